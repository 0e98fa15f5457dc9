//! What the sandbox stops, tried from inside: a process of its own closes itself and then does
//! what a guest's process may not.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use vmm::control::ExitRecord;
use vmm::process::sandbox::Sandbox;

/// Runs `forbidden` in a closed child; returns the exit record that is left.
fn closed(forbidden: fn()) -> ExitRecord {
    let record = tempfile::tempfile().unwrap();
    // SAFETY: the child only prepares, closes itself and makes one call, then it ends; each test
    // has a process of its own, so no other thread holds a lock that the child needs.
    let child = unsafe { libc::fork() };
    assert!(child >= 0);
    if child == 0 {
        let closed = Sandbox::prepare()
            .and_then(|sandbox| sandbox.close(&Default::default(), Some(record.as_raw_fd()), "n"));
        if closed.is_ok() {
            forbidden();
        }
        // SAFETY: ends this process only.
        unsafe { libc::_exit(1) };
    }
    let mut status = 0;
    // SAFETY: waits for our own child.
    unsafe { libc::waitpid(child, &raw mut status, 0) };
    assert!(libc::WIFEXITED(status), "status {status:#x}");
    let mut json = vec![0; 4096];
    let len = record.read_at(&mut json, 0).unwrap();
    serde_json::from_slice(&json[..len])
        .unwrap_or_else(|error| panic!("{error}; exit {}", libc::WEXITSTATUS(status)))
}

#[test]
fn opening_a_path_ends_the_process_and_the_record_names_the_call() {
    let record = closed(|| drop(File::open("/etc/passwd")));
    assert_eq!((record.reason.as_str(), record.nonce.as_str()), ("error", "n"));
    assert!(
        record.message.contains(&format!("system call {:05} ", libc::SYS_openat)),
        "{}",
        record.message
    );
}

#[test]
fn making_a_socket_ends_the_process() {
    let record = closed(|| drop(std::net::TcpListener::bind("127.0.0.1:0")));
    assert!(
        record.message.contains(&format!("system call {:05} ", libc::SYS_socket)),
        "{}",
        record.message
    );
}

#[test]
fn starting_a_program_ends_the_process() {
    let record = closed(|| {
        // SAFETY: the strings are terminated.
        unsafe {
            libc::execl(c"/bin/true".as_ptr(), c"true".as_ptr(), std::ptr::null::<libc::c_char>())
        };
    });
    assert!(
        record.message.contains(&format!("system call {:05} ", libc::SYS_execve)),
        "{}",
        record.message
    );
}

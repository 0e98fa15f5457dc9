//! What the sandbox stops, tried from inside: a process of its own closes itself as a guest's does
//! and then does what a guest's process may not. What the system call filter would stop is also
//! tried without it, as root and as an ordinary user: the other walls hold alone.

use std::fs::File;
use std::io::Write;
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use vmm::control::ExitRecord;
use vmm::devices::DeviceKind;
use vmm::process::sandbox::{self, Sandbox};
use vmm::process::seccomp::Role;

/// An ordinary user of this host.
const NOBODY: u32 = 65_534;

/// Runs `body` in a process of its own, which then ends; `output` is what it may write to. Returns
/// its exit code.
fn apart(output: &File, body: impl FnOnce(&File) -> i32) -> i32 {
    // SAFETY: the child prepares and closes itself, makes some calls and ends; nothing that it
    // needs is held by another thread of this process for long: the C library's fork sees to
    // the allocator.
    let child = unsafe { libc::fork() };
    assert!(child >= 0);
    if child == 0 {
        let code = body(output);
        // SAFETY: ends this process only.
        unsafe { libc::_exit(code) };
    }
    let mut status = 0;
    // SAFETY: waits for our own child.
    unsafe { libc::waitpid(child, &raw mut status, 0) };
    assert!(libc::WIFEXITED(status), "status {status:#x}");
    libc::WEXITSTATUS(status)
}

fn text(file: &File) -> String {
    let mut bytes = vec![0; 8192];
    let len = file.read_at(&mut bytes, 0).unwrap();
    String::from_utf8_lossy(&bytes[..len]).into_owned()
}

/// Runs `forbidden` in a closed thread of kind `role`; returns the exit record that is left.
fn closed(role: Role, forbidden: fn()) -> ExitRecord {
    let record = tempfile::tempfile().unwrap();
    let code = apart(&record, |record| {
        let prepared = Sandbox::prepare()
            .and_then(|sandbox| sandbox.close(&Default::default(), Some(record.as_raw_fd()), "n"));
        let act = move || {
            if prepared.and_then(|()| sandbox::narrow(role)).is_ok() {
                forbidden();
            }
        };
        match role {
            Role::Vcpu => act(),
            _ => drop(std::thread::spawn(act).join()),
        }
        1
    });
    serde_json::from_str(&text(&record)).unwrap_or_else(|error| panic!("{error}; exit {code}"))
}

#[test]
fn a_forbidden_call_ends_the_process_and_the_record_names_call_and_thread() {
    let attempts: [(libc::c_long, fn()); 3] = [
        (libc::SYS_openat, || drop(File::open("/etc/passwd"))),
        (libc::SYS_socket, || drop(std::net::TcpListener::bind("127.0.0.1:0"))),
        (libc::SYS_execve, || {
            // SAFETY: the strings are terminated.
            unsafe { libc::execl(c"/bin/true".as_ptr(), c"true".as_ptr(), std::ptr::null::<u8>()) };
        }),
    ];
    for role in Role::ALL {
        for (call, attempt) in attempts {
            let record = closed(role, attempt);
            assert_eq!((record.reason.as_str(), record.nonce.as_str()), ("error", "n"));
            let expected = format!(
                "system call {call:05} is not allowed in the sandbox to its {} thread",
                role.thread_name()
            );
            assert_eq!(record.message, expected);
        }
    }
}

#[test]
fn a_thread_may_not_do_what_only_another_kind_does() {
    // The control thread plugs what it is sent; a disk's thread takes no connections and asks KVM
    // for nothing but interrupts.
    for role in [Role::Device(DeviceKind::Disk), Role::Device(DeviceKind::Net)] {
        let record = closed(role, || {
            // SAFETY: the call is refused before its arguments are looked at.
            unsafe { libc::accept4(0, std::ptr::null_mut(), std::ptr::null_mut(), 0) };
        });
        let expected = format!("system call {:05} ", libc::SYS_accept4);
        assert!(record.message.starts_with(&expected), "{record:?}");
        let record = closed(role, || {
            // SAFETY: as above.
            unsafe { libc::ioctl(0, 0xAE80, 0) };
        });
        let expected = format!("system call {:05} ", libc::SYS_ioctl);
        assert!(record.message.starts_with(&expected), "{record:?}");
    }
}

/// What lies outside, within reach if nothing stopped it.
struct Outside {
    directory: tempfile::TempDir,
    tcp: std::net::TcpListener,
    by_name: SocketAddr,
    _by_path: UnixListener,
    _abstract: UnixListener,
}

impl Outside {
    fn new() -> Outside {
        let directory = tempfile::tempdir().unwrap();
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o777);
        std::fs::set_permissions(directory.path(), open).unwrap();
        let by_path = UnixListener::bind(directory.path().join("socket")).unwrap();
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o777);
        std::fs::set_permissions(directory.path().join("socket"), open).unwrap();
        std::fs::write(directory.path().join("file"), b"x").unwrap();
        let by_name = SocketAddr::from_abstract_name(directory.path().as_os_str().as_bytes());
        let by_name = by_name.unwrap();
        Outside {
            tcp: std::net::TcpListener::bind("127.0.0.1:0").unwrap(),
            _abstract: UnixListener::bind_addr(&by_name).unwrap(),
            by_name,
            _by_path: by_path,
            directory,
        }
    }

    /// Tries everything; each name that comes back succeeded.
    fn escapes(&self, open: &File) -> Vec<&'static str> {
        let here = self.directory.path();
        let reopened = format!("/proc/self/fd/{}", open.as_raw_fd());
        let attempts = [
            ("read a file", File::open(here.join("file")).is_ok()),
            ("list the root", std::fs::read_dir("/").is_ok_and(|mut all| all.next().is_some())),
            ("make a file", File::create(here.join("made")).is_ok()),
            ("make a file in the root", File::create("/made").is_ok()),
            ("make a directory", std::fs::create_dir("/tmp/made").is_ok()),
            ("open a descriptor again", File::open(reopened).is_ok()),
            ("connect by TCP", TcpStream::connect(self.tcp.local_addr().unwrap()).is_ok()),
            ("connect to a path", UnixStream::connect(here.join("socket")).is_ok()),
            ("connect to an abstract name", UnixStream::connect_addr(&self.by_name).is_ok()),
            // SAFETY: plain calls on integers.
            ("mount", unsafe { libc::setuid(0) == 0 && libc::unshare(libc::CLONE_NEWNS) == 0 }),
        ];
        attempts.into_iter().filter(|(_, worked)| *worked).map(|(name, _)| name).collect()
    }
}

/// Closes a process but for the system call filter, as `uid` where one is given, and tries
/// everything; returns its tier and what succeeded, `None` where `uid` can't be taken.
fn without_filter(uid: Option<u32>) -> Option<(String, Vec<String>)> {
    let (outside, output) = (Outside::new(), tempfile::tempfile().unwrap());
    let code = apart(&output, |mut output| {
        if let Some(uid) = uid {
            // SAFETY: plain calls on integers.
            let taken = unsafe {
                libc::setgroups(0, std::ptr::null()) == 0
                    && libc::setgid(uid) == 0
                    && libc::setuid(uid) == 0
                    // As after a program's start: /proc/self belongs to the user.
                    && libc::prctl(libc::PR_SET_DUMPABLE, 1) == 0
            };
            if !taken {
                return 2;
            }
        }
        assert!(outside.escapes(output).len() >= 5, "the attempts work where nothing is closed");
        std::fs::remove_file(outside.directory.path().join("made")).unwrap();
        let _ = std::fs::remove_dir("/tmp/made");
        let _ = std::fs::remove_file("/made");
        let Ok(sandbox) = Sandbox::prepare() else { return 3 };
        let tier = sandbox.tier();
        if sandbox.close(&Default::default(), None, "n").is_err() {
            return 4;
        }
        let escapes = outside.escapes(output).join("\n");
        i32::from(write!(output, "{tier}\n{escapes}").is_err())
    });
    if code == 2 {
        return None;
    }
    assert_eq!(code, 0);
    let output = text(&output);
    let mut lines = output.lines().map(String::from);
    Some((lines.next().unwrap(), lines.collect()))
}

#[test]
fn nothing_is_opened_made_or_connected_even_without_the_filter() {
    let (tier, escapes) = without_filter(None).unwrap();
    check_walls(&tier, &escapes);
}

#[test]
fn an_ordinary_users_process_is_closed_as_well() {
    let Some((tier, escapes)) = without_filter(Some(NOBODY)) else {
        eprintln!("SKIPPED: only root may become another user");
        return;
    };
    assert!(tier.starts_with("user: "), "{tier}");
    check_walls(&tier, &escapes);
}

/// Which walls a host has, its tier says; each that stands lets nothing through.
fn check_walls(tier: &str, escapes: &[String]) {
    let no_namespaces = tier.contains("no namespaces");
    let no_landlock = tier.contains("no Landlock");
    let expected = |name: &str| {
        let by_connection = name.starts_with("connect");
        no_namespaces && (no_landlock || by_connection)
    };
    for escape in escapes {
        assert!(expected(escape), "{tier}: {escape}");
        eprintln!("SKIPPED: {tier}: on this host only the filter stops: {escape}");
    }
}

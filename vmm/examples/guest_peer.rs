//! The guest's end of a vsock, for `cargo xtask guest-linux`: `guest_peer serve PORT` echoes one
//! connection; `guest_peer ask PORT` has the host echo a pattern.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

const ECHO_BYTES: usize = 1 << 20;

fn main() -> io::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let [what, port] = arguments.as_slice() else {
        return Err(io::Error::other("guest_peer serve|ask PORT"));
    };
    let port = port.parse().map_err(io::Error::other)?;
    match *what {
        "serve" => serve(port),
        _ => ask(port),
    }
}

fn socket() -> io::Result<OwnedFd> {
    // SAFETY: a plain system call on integers; the new descriptor is ours.
    unsafe {
        match libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) {
            ..0 => Err(io::Error::last_os_error()),
            fd => Ok(OwnedFd::from_raw_fd(fd)),
        }
    }
}

fn address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: a zeroed sockaddr_vm is valid.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    (address.svm_cid, address.svm_port) = (cid, port);
    address
}

const ADDRESS_BYTES: libc::socklen_t = size_of::<libc::sockaddr_vm>() as libc::socklen_t;

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn serve(port: u32) -> io::Result<()> {
    let listener = socket()?;
    let any = address(libc::VMADDR_CID_ANY, port);
    // SAFETY: the address lives through the call and its length is given.
    check(unsafe { libc::bind(listener.as_raw_fd(), (&raw const any).cast(), ADDRESS_BYTES) })?;
    // SAFETY: a plain system call on integers.
    check(unsafe { libc::listen(listener.as_raw_fd(), 4) })?;
    println!("guest: listening as {}", own_cid()?);
    // SAFETY: no address is asked for; the new descriptor is ours.
    let mut stream = unsafe {
        let accepted =
            libc::accept(listener.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut());
        File::from_raw_fd(check(accepted)?)
    };
    let copied = io::copy(&mut stream.try_clone()?, &mut stream)?;
    println!("guest: echoed {copied}");
    Ok(())
}

fn own_cid() -> io::Result<u32> {
    const GET_LOCAL_CID: libc::c_ulong = 0x7B9;
    let device = File::open("/dev/vsock")?;
    let mut cid = 0u32;
    // SAFETY: the request writes one u32, which is ours.
    check(unsafe { libc::ioctl(device.as_raw_fd(), GET_LOCAL_CID, &raw mut cid) })?;
    Ok(cid)
}

fn ask(port: u32) -> io::Result<()> {
    let socket = socket()?;
    let host = address(libc::VMADDR_CID_HOST, port);
    // SAFETY: the address lives through the call and its length is given.
    let connected =
        unsafe { libc::connect(socket.as_raw_fd(), (&raw const host).cast(), ADDRESS_BYTES) };
    if connected < 0 {
        println!("guest: nobody at {port}");
        return Ok(());
    }
    let mut stream = File::from(socket);
    let pattern: Vec<u8> = (0..ECHO_BYTES).map(|at| (at / 11 + at / 999) as u8).collect();
    let mut back = Vec::new();
    std::thread::scope(|scope| {
        let mut to = stream.try_clone()?;
        let pattern = &pattern;
        let sender = scope.spawn(move || {
            to.write_all(pattern)?;
            // SAFETY: a plain system call on integers.
            check(unsafe { libc::shutdown(to.as_raw_fd(), libc::SHUT_WR) })
        });
        stream.read_to_end(&mut back)?;
        sender.join().map_err(|_| io::Error::other("the sender failed"))??;
        Ok::<_, io::Error>(())
    })?;
    if back != pattern {
        return Err(io::Error::other(format!("{} wrong bytes came back", back.len())));
    }
    println!("guest: asked {}", back.len());
    Ok(())
}

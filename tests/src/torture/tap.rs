//! A TAP device in another network namespace.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use anyhow::{Context, Result};
use rustix::fs::OFlags;
use rustix::ioctl::{Setter, ioctl};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// `struct ifreq` with its flags (linux/if.h).
#[repr(C)]
struct InterfaceRequest {
    name: [u8; 16],
    flags: i16,
    rest: [u8; 22],
}

/// `IFF_TAP | IFF_NO_PI`: whole Ethernet frames and nothing before them.
const TAP_WITHOUT_HEADER: i16 = 0x0002 | 0x1000;
/// `TUNSETIFF` (linux/if_tun.h).
const SET_INTERFACE: u32 = 0x4004_54ca;

/// Makes the device `name` in the network namespace of a process. It goes with the file; reads and writes
/// of the file are frames, and don't block.
pub(super) fn make(process: i32, name: &str) -> Result<File> {
    let namespace = PathBuf::from(format!("/proc/{process}/ns/net"));
    let namespace = File::open(&namespace)
        .with_context(|| format!("cannot open the namespace {}", namespace.display()))?;
    let name = name.to_owned();
    // A thread of its own: it ends in the other namespace.
    let made = std::thread::spawn(move || -> io::Result<File> {
        move_into_link_name_space(
            std::os::fd::AsFd::as_fd(&namespace),
            Some(LinkNameSpaceType::Network),
        )?;
        let device = File::options()
            .read(true)
            .write(true)
            .custom_flags((OFlags::NONBLOCK | OFlags::CLOEXEC).bits() as i32)
            .open("/dev/net/tun")?;
        let mut request =
            InterfaceRequest { name: [0; 16], flags: TAP_WITHOUT_HEADER, rest: [0; 22] };
        let length = name.len().min(15);
        request.name[..length].copy_from_slice(&name.as_bytes()[..length]);
        // SAFETY: TUNSETIFF reads one `struct ifreq`, 40 bytes, which `InterfaceRequest` is; it may
        // write the name back into the kernel's copy only.
        unsafe { ioctl(&device, Setter::<SET_INTERFACE, InterfaceRequest>::new(request))? };
        Ok(device)
    });
    let made = made.join().map_err(|_| anyhow::anyhow!("the thread that makes a TAP panicked"))?;
    made.context("cannot make a TAP device (/dev/net/tun)")
}

//! What control requests see of a disk, and say to it, while its thread owns it.

use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// A remote disk's connection, seen from outside of its thread.
#[derive(Debug)]
pub struct DiskLink {
    lost: AtomicBool,
    replacement: Mutex<Option<(UnixStream, u64)>>,
    wake: EventFd,
}

impl DiskLink {
    /// Of a disk that is connected.
    pub fn new() -> std::io::Result<DiskLink> {
        Ok(DiskLink {
            lost: AtomicBool::new(false),
            replacement: Mutex::new(None),
            wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        })
    }

    /// Hands the disk another connection to the same bytes, and its server's epoch. What it has not
    /// been answered is sent again there; of several that it has not taken yet, the last one counts.
    pub fn replace(&self, socket: UnixStream, epoch: u64) -> std::io::Result<()> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        let mut replacement = self.replacement.lock().unwrap_or_else(PoisonError::into_inner);
        *replacement = Some((socket, epoch));
        // Under the lock, so that the loss of this very connection is not missed.
        self.lost.store(false, Ordering::Release);
        drop(replacement);
        self.wake.write(1)
    }

    /// Whether the disk waits for another connection.
    pub fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    /// The disk's thread: takes what [`DiskLink::replace`] left.
    pub fn take(&self) -> Option<(UnixStream, u64)> {
        let _ = self.wake.read();
        self.replacement.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// The disk's thread: its connection is lost, unless another one is here already.
    pub fn lose(&self) {
        let replacement = self.replacement.lock().unwrap_or_else(PoisonError::into_inner);
        if replacement.is_none() {
            self.lost.store(true, Ordering::Release);
        }
    }

    /// Readable when there is something to take.
    pub fn wake(&self) -> &EventFd {
        &self.wake
    }
}

//! Carrying requests out on a file by io_uring: many at once, with one system call a wake.
//!
//! The ring is made before the sandbox closes, because nothing inside may make one. It is born
//! disabled, takes its file and its restrictions, and is then enabled: from there on it does to this
//! one file what a disk needs, whatever is written into it. Its descriptor is readable while
//! completions wait, so that the device's thread sleeps in its one poll.

use super::execute::{Act, Job, advance, io_vectors, mark_dirty};
use crate::devices::chain::total;
use crate::machine::memory::Ram;
use io_uring::register::Restriction;
use io_uring::squeue::{Entry, Flags};
use io_uring::types::{Fixed, FsyncFlags};
use io_uring::{IoUring, opcode};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Most requests in a ring, a power of 2.
pub const ENTRIES: u16 = 256;
/// Most bytes that changes in flight may have together: what passed just before the lease ended is
/// done well within the margin that the leader waits beyond it.
pub const CHANGE_BYTES_MAX: usize = 32 << 20;

/// The ring's only file.
const FILE: Fixed = Fixed(0);
/// What a disk needs. Each must name the registered file.
const OPERATIONS: [u8; 6] = [
    opcode::Read::CODE,
    opcode::Write::CODE,
    opcode::Readv::CODE,
    opcode::Writev::CODE,
    opcode::Fsync::CODE,
    opcode::Fallocate::CODE,
];

/// A request that the kernel has.
struct Flight {
    job: Job,
    /// Kept until the completion; they point into guest memory.
    vectors: Vec<libc::iovec>,
}

// SAFETY: the pointers are addresses of guest memory for the kernel; nothing here follows them.
unsafe impl Send for Flight {}

/// A ring on one file.
pub struct Ring {
    ring: IoUring,
    flights: Vec<Option<Flight>>,
    free: Vec<u16>,
    change_bytes: usize,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").field("in_flight", &self.len()).finish_non_exhaustive()
    }
}

impl Ring {
    /// A ring that does nothing but a disk's work on `file`.
    ///
    /// # Errors
    /// The kernel has no io_uring, none that can be restricted, or its administrator closed it.
    pub fn new(file: &File) -> io::Result<Ring> {
        let ring = IoUring::builder()
            .setup_r_disabled()
            .setup_coop_taskrun()
            .setup_submit_all()
            .build(u32::from(ENTRIES))?;
        let submitter = ring.submitter();
        submitter.register_files(&[file.as_raw_fd()])?;
        let mut rules: Vec<Restriction> = OPERATIONS.into_iter().map(Restriction::sqe_op).collect();
        let fixed = Flags::FIXED_FILE.bits();
        rules.push(Restriction::sqe_flags_allowed(fixed));
        rules.push(Restriction::sqe_flags_required(fixed));
        submitter.register_restrictions(&mut rules)?;
        submitter.register_enable_rings()?;
        Ok(Ring { ring, flights: Vec::new(), free: Vec::new(), change_bytes: 0 })
    }

    /// Requests that the kernel has.
    pub fn len(&self) -> usize {
        self.flights.len() - self.free.len()
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether `job` may be pushed now.
    pub fn has_room_for(&self, job: &Job) -> bool {
        let changes = change_bytes(job);
        let few = self.change_bytes == 0 || self.change_bytes + changes <= CHANGE_BYTES_MAX;
        self.len() < usize::from(ENTRIES) && (changes == 0 || few)
    }

    /// Readable while completions wait.
    pub fn wake(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open as long as the ring it is borrowed from.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }

    /// Puts a request into the ring, from where it was left; [`Ring::enter`] hands it to the kernel.
    /// What it can't take comes back, with the reason.
    pub fn push(&mut self, job: Job, ram: &Ram) -> Option<(Job, io::Error)> {
        let mut vectors = match io_vectors(job.data(), ram) {
            Ok(vectors) => vectors,
            Err(error) => return Some((job, error)),
        };
        let used = advance(&mut vectors, job.done);
        vectors.drain(..used);
        let Some(index) = self.place() else {
            return Some((job, io::ErrorKind::QuotaExceeded.into()));
        };
        let entry = entry(&job, &vectors).user_data(u64::from(index));
        // SAFETY: the vectors lie in mapped guest memory (checked by `io_vectors`). They and their
        // list stay until the completion: the flight keeps the list, and a device's thread gives
        // `ram` back only when nothing is in flight. Nothing holds references into guest memory.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        if pushed.is_err() {
            self.free.push(index);
            return Some((job, io::ErrorKind::QuotaExceeded.into()));
        }
        self.change_bytes += change_bytes(&job);
        self.flights[usize::from(index)] = Some(Flight { job, vectors });
        None
    }

    fn place(&mut self) -> Option<u16> {
        if let Some(index) = self.free.pop() {
            return Some(index);
        }
        let index = u16::try_from(self.flights.len()).ok().filter(|index| *index < ENTRIES)?;
        self.flights.push(None);
        Some(index)
    }

    /// Hands what was pushed to the kernel and waits until at least `wanted` are done; `false`: it
    /// took not all, try again soon.
    pub fn enter(&mut self, wanted: usize) -> io::Result<bool> {
        let waiting = self.ring.submission().len();
        if waiting == 0 && wanted == 0 {
            return Ok(true);
        }
        match self.ring.submit_and_wait(wanted) {
            Ok(taken) => Ok(taken >= waiting),
            Err(error) => match error.raw_os_error() {
                Some(libc::EINTR | libc::EAGAIN | libc::EBUSY) => Ok(false),
                _ => Err(error),
            },
        }
    }

    /// Takes a request that the kernel is done with: how many bytes it moved, or why not.
    pub fn reap(&mut self, ram: &Ram) -> Option<(Job, io::Result<usize>)> {
        loop {
            let entry = self.ring.completion().next()?;
            let index = entry.user_data() as u16;
            let flight = self.flights.get_mut(usize::from(index)).and_then(Option::take);
            let Some(Flight { job, vectors }) = flight else { continue };
            self.free.push(index);
            drop(vectors);
            self.change_bytes -= change_bytes(&job);
            let moved = entry.result();
            if moved < 0 {
                return Some((job, Err(io::Error::from_raw_os_error(-moved))));
            }
            if let Act::Read(_) = job.act {
                mark_dirty(&job.request.to_guest, ram);
            }
            return Some((job, Ok(moved as usize)));
        }
    }
}

impl Drop for Ring {
    /// What the kernel still has may write into guest memory: nothing goes on before it is done.
    fn drop(&mut self) {
        while !self.is_empty() && self.enter(1).is_ok() {
            while let Some(entry) = self.ring.completion().next() {
                let index = entry.user_data() as u16;
                if let Some(flight) = self.flights.get_mut(usize::from(index))
                    && flight.take().is_some()
                {
                    self.free.push(index);
                }
            }
        }
    }
}

fn change_bytes(job: &Job) -> usize {
    if let Act::Write(_) = job.act { total(job.data()) - job.done } else { 0 }
}

/// The submission of a request whose remaining data is in `vectors`.
fn entry(job: &Job, vectors: &[libc::iovec]) -> Entry {
    let done = job.done as u64;
    let list = vectors.as_ptr();
    let count = vectors.len() as u32;
    let clear =
        |offset, len, mode| opcode::Fallocate::new(FILE, len).offset(offset).mode(mode).build();
    const KEEP: i32 = libc::FALLOC_FL_KEEP_SIZE;
    match (job.act, vectors) {
        (Act::Read(at), [one]) => {
            let len = one.iov_len as u32;
            opcode::Read::new(FILE, one.iov_base.cast(), len).offset(at + done).build()
        }
        (Act::Read(at), _) => opcode::Readv::new(FILE, list, count).offset(at + done).build(),
        (Act::Write(at), [one]) => {
            let len = one.iov_len as u32;
            opcode::Write::new(FILE, one.iov_base.cast(), len).offset(at + done).build()
        }
        (Act::Write(at), _) => opcode::Writev::new(FILE, list, count).offset(at + done).build(),
        (Act::Discard { offset, len } | Act::Zero { offset, len, unmap: true }, _) => {
            clear(offset, len, libc::FALLOC_FL_PUNCH_HOLE | KEEP)
        }
        (Act::Zero { offset, len, unmap: false }, _) => {
            clear(offset, len, libc::FALLOC_FL_ZERO_RANGE | KEEP)
        }
        (Act::Flush | Act::GetId | Act::Refuse(_), _) => {
            opcode::Fsync::new(FILE).flags(FsyncFlags::DATASYNC).build()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use io_uring::types::Fd;

    fn outcome(ring: &mut Ring, entry: Entry) -> i32 {
        // SAFETY: the entries of these tests name no memory.
        unsafe { ring.ring.submission().push(&entry).unwrap() };
        ring.ring.submit_and_wait(1).unwrap();
        ring.ring.completion().next().unwrap().result()
    }

    #[test]
    fn a_ring_does_a_disks_work_on_its_file_and_nothing_else() {
        let file = tempfile::tempfile().unwrap();
        let mut ring = match Ring::new(&file) {
            Ok(ring) => ring,
            Err(error) => return eprintln!("SKIPPED: io_uring: {error}"),
        };
        assert_eq!(outcome(&mut ring, opcode::Fsync::new(FILE).build()), 0);
        assert_eq!(outcome(&mut ring, opcode::Fallocate::new(FILE, 4096).build()), 0);
        assert_eq!(file.metadata().unwrap().len(), 4096);
        let unregistered = opcode::Fsync::new(Fd(file.as_raw_fd())).build();
        let other_file = opcode::Fsync::new(Fixed(1)).build();
        let close = opcode::Close::new(FILE).build();
        let linked = opcode::Fsync::new(FILE).build().flags(Flags::IO_LINK);
        assert_eq!(outcome(&mut ring, opcode::Nop::new().build()), -libc::EACCES);
        assert_eq!(outcome(&mut ring, unregistered), -libc::EACCES);
        assert_eq!(outcome(&mut ring, other_file), -libc::EBADF);
        assert_eq!(outcome(&mut ring, close), -libc::EACCES);
        assert_eq!(outcome(&mut ring, linked), -libc::EACCES);
        assert!(ring.ring.submitter().register_files(&[file.as_raw_fd()]).is_err());
    }
}

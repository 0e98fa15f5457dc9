//! NBD client in the transmission phase (the NBD protocol document, "Transmission phase"): one
//! request at a time, simple replies. Whoever made the connection negotiated no more than that.

use super::execute::{advance, io_vectors, mark_dirty};
use crate::devices::chain::{Segment, total};
use crate::devices::{Work, borrow};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
const REQUEST_BYTES: usize = 28;
const REPLY_BYTES: usize = 16;
const COMMAND_READ: u16 = 0;
const COMMAND_WRITE: u16 = 1;
const COMMAND_FLUSH: u16 = 3;
/// Most data of one request; servers refuse more.
const DATA_BYTES_MAX: usize = 32 << 20;

/// How long a request in flight may go on when the device shall stop, seconds.
const STOP_GRACE_S: i64 = 2;

/// A connection to an NBD server.
#[derive(Debug)]
pub struct NbdClient {
    socket: UnixStream,
    cookie: u64,
    /// After an error in the stream nothing on it can be trusted: every request fails.
    broken: bool,
}

impl NbdClient {
    /// Takes a connected socket.
    pub fn new(socket: UnixStream) -> io::Result<NbdClient> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        Ok(NbdClient { socket, cookie: 0, broken: false })
    }

    /// Reads into guest memory.
    pub fn read(&mut self, offset: u64, to: &[Segment], work: &Work) -> io::Result<()> {
        let mut vectors = io_vectors(to, &work.ram)?;
        self.request(COMMAND_READ, offset, total(to), &mut [], &mut vectors, work)?;
        mark_dirty(to, &work.ram);
        Ok(())
    }

    /// Writes from guest memory.
    pub fn write(&mut self, offset: u64, from: &[Segment], work: &Work) -> io::Result<()> {
        let mut vectors = io_vectors(from, &work.ram)?;
        self.request(COMMAND_WRITE, offset, total(from), &mut vectors, &mut [], work)
    }

    /// Makes everything that was acknowledged durable.
    pub fn flush(&mut self, work: &Work) -> io::Result<()> {
        self.request(COMMAND_FLUSH, 0, 0, &mut [], &mut [], work)
    }

    fn request(
        &mut self,
        command: u16,
        offset: u64,
        len: usize,
        send: &mut [libc::iovec],
        receive: &mut [libc::iovec],
        work: &Work,
    ) -> io::Result<()> {
        if self.broken {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        if len > DATA_BYTES_MAX {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.cookie += 1;
        let mut head = [0; REQUEST_BYTES];
        head[0..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        head[6..8].copy_from_slice(&command.to_be_bytes());
        head[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        head[16..24].copy_from_slice(&offset.to_be_bytes());
        head[24..28].copy_from_slice(&(len as u32).to_be_bytes());
        let exchanged = self.exchange(&mut head, send, receive, work);
        // Only an error the server replied leaves the stream usable.
        self.broken = exchanged.is_err();
        match exchanged? {
            0 => Ok(()),
            error => Err(io::Error::from_raw_os_error(error as i32)),
        }
    }

    /// Sends a request and receives its reply; returns the server's error number.
    fn exchange(
        &self,
        head: &mut [u8; REQUEST_BYTES],
        send: &mut [libc::iovec],
        receive: &mut [libc::iovec],
        work: &Work,
    ) -> io::Result<u32> {
        let mut out = vec![vector(head)];
        out.extend_from_slice(send);
        self.move_all(&mut out, PollFlags::OUT, work)?;
        let mut reply = [0; REPLY_BYTES];
        self.move_all(&mut [vector(&mut reply)], PollFlags::IN, work)?;
        let word = |at: usize| {
            u32::from_be_bytes([reply[at], reply[at + 1], reply[at + 2], reply[at + 3]])
        };
        if word(0) != REPLY_MAGIC || reply[8..16] != self.cookie.to_be_bytes() {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let error = word(4);
        if error == 0 {
            self.move_all(receive, PollFlags::IN, work)?;
        }
        Ok(error)
    }

    fn move_all(
        &self,
        vectors: &mut [libc::iovec],
        direction: PollFlags,
        work: &Work,
    ) -> io::Result<()> {
        const VECTORS_MAX: usize = 1024;
        let mut first = 0;
        while first < vectors.len() {
            let rest = &mut vectors[first..];
            // SAFETY: a zeroed message header is valid; its vectors are ours or checked guest
            // memory, and live through the call.
            let moved = unsafe {
                let mut message: libc::msghdr = std::mem::zeroed();
                message.msg_iov = rest.as_mut_ptr();
                message.msg_iovlen = rest.len().min(VECTORS_MAX);
                if direction == PollFlags::OUT {
                    libc::sendmsg(self.socket.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL)
                } else {
                    libc::recvmsg(self.socket.as_raw_fd(), &raw mut message, 0)
                }
            };
            match moved {
                0 if rest.iter().any(|vector| vector.iov_len > 0) => {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                ..0 => {
                    let error = io::Error::last_os_error();
                    match error.kind() {
                        io::ErrorKind::WouldBlock => self.wait(direction, work)?,
                        io::ErrorKind::Interrupted => {}
                        _ => return Err(error),
                    }
                }
                _ => first += advance(rest, moved as usize),
            }
        }
        Ok(())
    }

    /// Waits for the socket. A device that shall stop gives the request in flight some time, so that
    /// a driver's reset does not break the connection.
    fn wait(&self, direction: PollFlags, work: &Work) -> io::Result<()> {
        let stop = borrow(&work.stop);
        let mut set = [PollFd::new(&stop, PollFlags::IN), PollFd::new(&self.socket, direction)];
        poll(&mut set, None)?;
        if !set[1].revents().is_empty() {
            return Ok(());
        }
        let grace = Timespec { tv_sec: STOP_GRACE_S, tv_nsec: 0 };
        match poll(&mut [PollFd::new(&self.socket, direction)], Some(&grace))? {
            0 => Err(io::ErrorKind::TimedOut.into()),
            _ => Ok(()),
        }
    }
}

fn vector(bytes: &mut [u8]) -> libc::iovec {
    libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }
}

//! NBD client in the transmission phase (the NBD protocol document, "Transmission phase"): simple
//! replies, several requests at once, answered in any order. Whoever made the connection negotiated
//! no more than that.
//!
//! ```text
//!   unsent ──send──▶ sent ──reply──▶ done
//!      ▲               │
//!      └─ connection ──┘   lost: everything unanswered waits for another connection
//! ```
//!
//! A lost connection is not the guest's matter: it sees a pause. What was not answered is sent
//! again, which is right because reads and writes are at fixed offsets, and because the volume's
//! home serves a new connection only after it has ended the old one with all it had in flight: an
//! old write can't follow a newer one. What was answered and not flushed is in the page cache of
//! the home's kernel, which a flush by another storage process of that host covers as well.
//!
//! Where that kernel itself ended, which the server's *epoch* tells, those writes may be lost. Then
//! every flush that was to cover some of them fails, once, as on a disk that lost its cache.

use super::execute::{Act, Job, advance, io_vectors, mark_dirty};
use crate::devices::Work;
use crate::devices::chain::{Segment, total};
use std::collections::{BTreeMap, VecDeque};
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
/// Most requests that the server has at one time.
pub const IN_FLIGHT_MAX: usize = 64;
const VECTORS_MAX: usize = 1024;
/// The server's disk is full.
const ERROR_NO_SPACE: u32 = 28;
/// The server is about to close the connection.
const ERROR_SHUTDOWN: u32 = 108;

/// What the server said to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It is done.
    Done,
    /// There is no room for it: try later.
    NoSpace,
    /// It can't be done.
    Failed,
}

/// A connection to an NBD server, and what is asked on it.
#[derive(Debug)]
pub struct NbdClient {
    socket: Option<UnixStream>,
    epoch: u64,
    cookie: u64,
    unsent: VecDeque<Asked>,
    sending: Option<Sending>,
    sent: BTreeMap<u64, Asked>,
    /// Flushes that fail, because writes that they were to cover may be lost.
    doomed: Vec<Job>,
    /// Writes that were answered.
    written: u64,
    /// So many of them are covered by a flush, one that failed or one that was answered.
    flushed: u64,
    /// The next flush fails.
    owes_failure: bool,
    reply: [u8; REPLY_BYTES],
    reply_bytes: usize,
    receiving: Option<Receiving>,
}

/// A request.
#[derive(Debug)]
struct Asked {
    job: Job,
    /// [`NbdClient::written`] when it was asked: a flush covers that many.
    covers: u64,
}

/// A request of which the first `done` bytes, header included, are sent.
#[derive(Debug)]
struct Sending {
    cookie: u64,
    asked: Asked,
    done: usize,
}

/// A read of which the first `done` bytes have come.
#[derive(Debug)]
struct Receiving {
    cookie: u64,
    done: usize,
}

impl NbdClient {
    /// Takes a connected socket, and its server's epoch.
    pub fn new(socket: UnixStream, epoch: u64) -> io::Result<NbdClient> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        Ok(NbdClient {
            socket: Some(socket),
            epoch,
            cookie: 0,
            unsent: VecDeque::new(),
            sending: None,
            sent: BTreeMap::new(),
            doomed: Vec::new(),
            written: 0,
            flushed: 0,
            owes_failure: false,
            reply: [0; REPLY_BYTES],
            reply_bytes: 0,
            receiving: None,
        })
    }

    /// The connection, while there is one.
    pub fn socket(&self) -> Option<&UnixStream> {
        self.socket.as_ref()
    }

    /// Requests that are not answered.
    pub fn len(&self) -> usize {
        self.unsent.len() + self.doomed.len() + self.in_flight()
    }

    /// Whether every request is answered.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Requests that the server has, or is about to.
    pub fn in_flight(&self) -> usize {
        self.sent.len() + usize::from(self.sending.is_some())
    }

    /// Whether there is something to send that needs only room in the socket.
    pub fn wants_to_send(&self) -> bool {
        self.sending.is_some()
    }

    /// Whether a change waits to be sent.
    pub fn holds_changes(&self) -> bool {
        self.unsent.iter().any(|asked| asked.job.act.changes())
    }

    /// Takes a request on.
    pub fn submit(&mut self, job: Job) {
        if self.owes_failure && job.act == Act::Flush {
            self.owes_failure = false;
            self.doomed.push(job);
        } else {
            self.unsent.push_back(Asked { job, covers: self.written });
        }
    }

    /// Another connection takes the place of this one; everything unanswered is asked again there.
    /// In another epoch, what was answered and not flushed may be lost.
    pub fn replace(&mut self, socket: UnixStream, epoch: u64) {
        self.lose();
        self.socket = Some(socket);
        if std::mem::replace(&mut self.epoch, epoch) != epoch && self.written > self.flushed {
            self.doom_flushes();
        }
    }

    /// Fails every flush that was to cover writes which may be lost; or the next one, where some of
    /// these writes are covered by none yet.
    fn doom_flushes(&mut self) {
        let mut covered = self.flushed;
        for asked in std::mem::take(&mut self.unsent) {
            if asked.job.act == Act::Flush && asked.covers > self.flushed {
                covered = covered.max(asked.covers);
                self.doomed.push(asked.job);
            } else {
                self.unsent.push_back(asked);
            }
        }
        self.owes_failure |= covered < self.written;
        self.flushed = self.written;
    }

    /// Closes the connection. What it was asked waits, in the order it came.
    pub fn lose(&mut self) {
        self.socket = None;
        self.reply_bytes = 0;
        self.receiving = None;
        let sending = self.sending.take().map(|sending| sending.asked);
        let unanswered: Vec<Asked> =
            std::mem::take(&mut self.sent).into_values().chain(sending).collect();
        for asked in unanswered.into_iter().rev() {
            self.unsent.push_front(asked);
        }
    }

    /// Forgets every request: the driver was reset. The caller has waited for those in flight, or
    /// has closed the connection.
    pub fn forget(&mut self) {
        self.unsent.clear();
        // A failure that the driver did not hear of is still to be told.
        self.owes_failure |= !self.doomed.is_empty();
        self.doomed.clear();
    }

    /// Sends and receives what goes without waiting; `allowed`: changes may be sent. Answered
    /// requests are handed to `answered`.
    ///
    /// # Errors
    /// The connection is of no use any more: [`NbdClient::lose`] it.
    pub fn exchange(
        &mut self,
        work: &Work,
        allowed: bool,
        answered: &mut Vec<(Job, Answer)>,
    ) -> io::Result<()> {
        answered.extend(self.doomed.drain(..).map(|job| (job, Answer::Failed)));
        if self.socket.is_none() {
            return Ok(());
        }
        while self.receive(work, answered)? {}
        while self.send(work, allowed, answered)? {}
        Ok(())
    }

    /// As [`NbdClient::exchange`], but nothing is sent of which the server has not a part already.
    ///
    /// # Errors
    /// As there.
    pub fn finish_sent(
        &mut self,
        work: &Work,
        answered: &mut Vec<(Job, Answer)>,
    ) -> io::Result<()> {
        if self.socket.is_none() {
            return Ok(());
        }
        while self.receive(work, answered)? {}
        while self.sending.is_some() && self.send(work, false, answered)? {}
        Ok(())
    }

    /// Sends on; `false`: nothing is left, or the socket is full.
    fn send(
        &mut self,
        work: &Work,
        allowed: bool,
        answered: &mut Vec<(Job, Answer)>,
    ) -> io::Result<bool> {
        let mut sending = match self.sending.take() {
            Some(sending) => sending,
            None => match self.next(allowed) {
                Some(sending) => sending,
                None => return Ok(false),
            },
        };
        let job = &sending.asked.job;
        if total(job.data()) > DATA_BYTES_MAX {
            answered.push((sending.asked.job, Answer::Failed));
            return Ok(true);
        }
        let mut head = sending.header();
        let mut vectors = vec![vector(&mut head)];
        if let Act::Write(_) = job.act {
            vectors.extend(io_vectors(&job.request.from_guest, &work.ram)?);
        }
        let all: usize = vectors.iter().map(|vector| vector.iov_len).sum();
        let first = advance(&mut vectors, sending.done);
        let moved = self.move_some(&mut vectors[first..], Direction::Send);
        let moved = match moved {
            Ok(moved) => moved,
            Err(error) => {
                self.sending = Some(sending);
                return Err(error);
            }
        };
        sending.done += moved.unwrap_or(0);
        if sending.done == all {
            self.sent.insert(sending.cookie, sending.asked);
        } else {
            self.sending = Some(sending);
        }
        Ok(moved.is_some())
    }

    /// The next request that may be sent.
    fn next(&mut self, allowed: bool) -> Option<Sending> {
        if self.sent.len() >= IN_FLIGHT_MAX {
            return None;
        }
        let index = self.unsent.iter().position(|asked| allowed || !asked.job.act.changes())?;
        let asked = self.unsent.remove(index)?;
        self.cookie += 1;
        Some(Sending { cookie: self.cookie, asked, done: 0 })
    }

    /// Receives on; `false`: nothing more is here.
    fn receive(&mut self, work: &Work, answered: &mut Vec<(Job, Answer)>) -> io::Result<bool> {
        if let Some(receiving) = self.receiving.take() {
            return self.receive_data(receiving, work, answered);
        }
        let mut reply = self.reply;
        let moved =
            self.move_some(&mut [vector(&mut reply[self.reply_bytes..])], Direction::Receive)?;
        self.reply = reply;
        let Some(moved) = moved else { return Ok(false) };
        self.reply_bytes += moved;
        if self.reply_bytes < REPLY_BYTES {
            return Ok(true);
        }
        self.reply_bytes = 0;
        let word = |at: usize| {
            u32::from_be_bytes([reply[at], reply[at + 1], reply[at + 2], reply[at + 3]])
        };
        let cookie = u64::from(word(8)) << 32 | u64::from(word(12));
        if word(0) != REPLY_MAGIC || word(4) == ERROR_SHUTDOWN {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let Some(Asked { job, .. }) = self.sent.get(&cookie) else {
            return Err(io::ErrorKind::InvalidData.into());
        };
        let answer = match word(4) {
            0 => Answer::Done,
            ERROR_NO_SPACE => Answer::NoSpace,
            _ => Answer::Failed,
        };
        let has_data = matches!(job.act, Act::Read(_)) && total(&job.request.to_guest) > 0;
        if answer == Answer::Done && has_data {
            self.receiving = Some(Receiving { cookie, done: 0 });
        } else if let Some(asked) = self.sent.remove(&cookie) {
            self.note(&asked, answer);
            answered.push((asked.job, answer));
        }
        Ok(true)
    }

    /// Notes what an answer says about what is durable.
    fn note(&mut self, asked: &Asked, answer: Answer) {
        match asked.job.act {
            // One that failed may have changed some of its bytes.
            Act::Write(_) => self.written += 1,
            Act::Flush if answer == Answer::Done => self.flushed = self.flushed.max(asked.covers),
            _ => {}
        }
    }

    fn receive_data(
        &mut self,
        mut receiving: Receiving,
        work: &Work,
        answered: &mut Vec<(Job, Answer)>,
    ) -> io::Result<bool> {
        let Some(Asked { job, .. }) = self.sent.get(&receiving.cookie) else {
            return Err(io::ErrorKind::InvalidData.into());
        };
        let to: &[Segment] = &job.request.to_guest;
        let mut vectors = io_vectors(to, &work.ram)?;
        let first = advance(&mut vectors, receiving.done);
        let Some(moved) = self.move_some(&mut vectors[first..], Direction::Receive)? else {
            self.receiving = Some(receiving);
            return Ok(false);
        };
        receiving.done += moved;
        if receiving.done < total(to) {
            self.receiving = Some(receiving);
            return Ok(true);
        }
        mark_dirty(to, &work.ram);
        if let Some(asked) = self.sent.remove(&receiving.cookie) {
            answered.push((asked.job, Answer::Done));
        }
        Ok(true)
    }

    /// Moves what the socket takes or has; `None`: it would have to wait.
    fn move_some(
        &self,
        vectors: &mut [libc::iovec],
        direction: Direction,
    ) -> io::Result<Option<usize>> {
        let Some(socket) = &self.socket else { return Err(io::ErrorKind::NotConnected.into()) };
        loop {
            // SAFETY: a zeroed message header is valid; its vectors are ours or checked guest
            // memory, and live through the call.
            let moved = unsafe {
                let mut message: libc::msghdr = std::mem::zeroed();
                message.msg_iov = vectors.as_mut_ptr();
                message.msg_iovlen = vectors.len().min(VECTORS_MAX);
                match direction {
                    Direction::Send => {
                        libc::sendmsg(socket.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL)
                    }
                    Direction::Receive => libc::recvmsg(socket.as_raw_fd(), &raw mut message, 0),
                }
            };
            match moved {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                1.. => return Ok(Some(moved as usize)),
                _ => {
                    let error = io::Error::last_os_error();
                    match error.kind() {
                        io::ErrorKind::WouldBlock => return Ok(None),
                        io::ErrorKind::Interrupted => {}
                        _ => return Err(error),
                    }
                }
            }
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Send,
    Receive,
}

impl Sending {
    fn header(&self) -> [u8; REQUEST_BYTES] {
        let (command, offset) = match self.asked.job.act {
            Act::Read(offset) => (COMMAND_READ, offset),
            Act::Write(offset) => (COMMAND_WRITE, offset),
            _ => (COMMAND_FLUSH, 0),
        };
        let mut head = [0; REQUEST_BYTES];
        head[0..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        head[6..8].copy_from_slice(&command.to_be_bytes());
        head[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        head[16..24].copy_from_slice(&offset.to_be_bytes());
        let len = if command == COMMAND_FLUSH { 0 } else { total(self.asked.job.data()) as u32 };
        head[24..28].copy_from_slice(&len.to_be_bytes());
        head
    }
}

fn vector(bytes: &mut [u8]) -> libc::iovec {
    libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }
}

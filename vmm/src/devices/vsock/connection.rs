//! One connection: the host's socket, what waits for it, and each side's credit.
//!
//! ```text
//!   Offered ──the guest responds──▶ Open ◀──connected outside── Awaited
//!   (the host's program asked)                        (the guest asked)
//! ```
//! A side that sends may have at most the other's buffer under way (virtio 1.2, section 5.10.6.3).
//! So what waits here is bounded, and a program on the host that does not read stops its peer in
//! the guest and nobody else.

use super::packet::{Header, Operation, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use rustix::event::PollFlags;
use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

/// Bytes of a guest's that wait for the host's program, at most.
pub const BUFFER_BYTES: u32 = 64 << 10;

/// How far a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The guest was asked.
    Offered,
    /// The guest asked, and outside it is being connected; the token of the question.
    Awaited(u32),
    /// Both sides talk.
    Open,
}

/// What came of reading the host's socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Came {
    /// So many bytes.
    Bytes(usize),
    /// Nothing now.
    Nothing,
    /// Nothing any more.
    End,
}

/// A connection.
#[derive(Debug)]
pub struct Connection {
    phase: Phase,
    stream: Option<UnixStream>,
    /// The guest's bytes that the host's socket had no room for yet.
    waiting: VecDeque<u8>,
    /// Counters modulo 2^32: bytes from the guest, those of them that went on, and how many of
    /// these the guest was told of.
    received: u32,
    forwarded: u32,
    told: u32,
    /// Bytes to the guest; its buffer, and what it took out of it.
    sent: u32,
    peer_buffer: u32,
    peer_forwarded: u32,
    /// The socket has something, as far as is known.
    readable: bool,
    /// The host's program has closed it.
    hung_up: bool,
    /// All that the host's program sent was read.
    ended: bool,
    guest_sends: bool,
    guest_receives: bool,
    /// What the guest was told: that nothing more comes, that nobody is there.
    told_end: bool,
    told_hang_up: bool,
    asked_credit: bool,
    owes_update: bool,
}

impl Connection {
    fn new(phase: Phase, stream: Option<UnixStream>) -> Connection {
        Connection {
            phase,
            stream,
            waiting: VecDeque::new(),
            received: 0,
            forwarded: 0,
            told: 0,
            sent: 0,
            peer_buffer: 0,
            peer_forwarded: 0,
            readable: false,
            hung_up: false,
            ended: false,
            guest_sends: true,
            guest_receives: true,
            told_end: false,
            told_hang_up: false,
            asked_credit: false,
            owes_update: false,
        }
    }

    /// A program on the host asks the guest.
    pub fn offered(stream: UnixStream) -> Connection {
        Connection::new(Phase::Offered, Some(stream))
    }

    /// The guest asks, by `request`; `token` is the question to the outside.
    pub fn awaited(token: u32, request: &Header) -> Connection {
        let mut connection = Connection::new(Phase::Awaited(token), None);
        connection.note_credit(request);
        connection
    }

    /// How far it is.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// The outside has connected it.
    pub fn connected(&mut self, stream: UnixStream) {
        self.stream = Some(stream);
        self.phase = Phase::Open;
    }

    /// Nobody is on the host's side any more, and the guest knows: its entry may be taken away.
    pub fn is_left(&self) -> bool {
        self.told_hang_up
    }

    /// The guest's packet; `false`: it broke the rules.
    pub fn apply(&mut self, header: &Header, host_port: u32, payload: &[u8]) -> bool {
        match (self.phase, header.operation) {
            (Phase::Offered, Some(Operation::Response)) => self.respond(host_port),
            (Phase::Open, Some(Operation::Data)) if self.guest_sends => {
                if !self.take(payload) {
                    return false;
                }
            }
            (Phase::Open, Some(Operation::Shutdown)) => {
                self.guest_receives &= header.flags & SHUTDOWN_RECEIVE == 0;
                self.guest_sends &= header.flags & SHUTDOWN_SEND == 0;
            }
            (Phase::Open, Some(Operation::CreditUpdate)) => {}
            (Phase::Open, Some(Operation::CreditRequest)) => self.owes_update = true,
            _ => return false,
        }
        self.note_credit(header);
        true
    }

    fn respond(&mut self, host_port: u32) {
        self.phase = Phase::Open;
        let line = format!("OK {host_port}\n");
        // Nothing was written before, so there is room, unless nobody is there.
        let said = self.stream.as_mut().map(|stream| stream.write_all(line.as_bytes()));
        if !matches!(said, Some(Ok(()))) {
            self.lose();
        }
    }

    /// The host's program has closed its end; what it sent before is still read.
    fn lose(&mut self) {
        (self.hung_up, self.readable) = (true, true);
    }

    fn note_credit(&mut self, header: &Header) {
        (self.peer_buffer, self.peer_forwarded) = (header.buffer_bytes, header.forwarded);
        self.asked_credit &= self.credit() == 0;
    }

    /// Bytes that the guest has room for.
    fn credit(&self) -> u32 {
        self.peer_buffer.saturating_sub(self.sent.wrapping_sub(self.peer_forwarded))
    }

    /// The guest's bytes; `false`: more than it was given room for.
    fn take(&mut self, payload: &[u8]) -> bool {
        let room = BUFFER_BYTES - self.received.wrapping_sub(self.forwarded);
        if payload.len() > room as usize {
            return false;
        }
        self.received = self.received.wrapping_add(payload.len() as u32);
        self.waiting.extend(payload);
        true
    }

    /// Writes what waits, as much as the host's socket takes; ends its sending side behind the
    /// guest's last byte.
    pub fn flush(&mut self) {
        while !self.waiting.is_empty() {
            let (front, _) = self.waiting.as_slices();
            let written = match (&mut self.stream, self.hung_up) {
                (Some(stream), false) => stream.write(front),
                _ => Err(io::ErrorKind::BrokenPipe.into()),
            };
            let gone = match written {
                Ok(len) => len,
                Err(error) if is_not_yet(&error) => break,
                // Nobody will read it.
                Err(_) => {
                    self.lose();
                    self.waiting.len()
                }
            };
            self.waiting.drain(..gone);
            self.forwarded = self.forwarded.wrapping_add(gone as u32);
        }
        if let (Some(stream), true) = (&self.stream, self.waiting.is_empty()) {
            if !self.guest_sends {
                let _ = stream.shutdown(Shutdown::Write);
            }
            if !self.guest_receives {
                let _ = stream.shutdown(Shutdown::Read);
            }
        }
    }

    /// Whether there may be something to read for the guest, and it has room.
    pub fn may_send(&self) -> bool {
        self.wants_bytes() && self.readable && self.credit() > 0
    }

    fn wants_bytes(&self) -> bool {
        self.phase == Phase::Open && self.guest_receives && !self.ended
    }

    /// Reads for the guest, as much as it has room for.
    pub fn read(&mut self, target: &mut [u8]) -> Came {
        let most = target.len().min(self.credit() as usize);
        let Some(stream) = &mut self.stream else { return Came::Nothing };
        match stream.read(&mut target[..most]) {
            Ok(0) => {
                self.ended = true;
                Came::End
            }
            Ok(len) => {
                self.sent = self.sent.wrapping_add(len as u32);
                Came::Bytes(len)
            }
            Err(error) if is_not_yet(&error) => {
                self.readable = false;
                Came::Nothing
            }
            Err(_) => {
                (self.ended, self.hung_up) = (true, true);
                Came::End
            }
        }
    }

    /// What the socket shall be watched for; `None`: it need not be.
    pub fn interest(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        let stream = self.stream.as_ref().filter(|_| !self.hung_up)?;
        let mut flags = PollFlags::empty();
        if self.wants_bytes() && !self.readable && self.credit() > 0 {
            flags |= PollFlags::IN;
        }
        if !self.waiting.is_empty() {
            flags |= PollFlags::OUT;
        }
        Some((stream.as_fd(), flags))
    }

    /// What the socket was found to have.
    pub fn ready(&mut self, has: PollFlags) {
        self.readable |= has.contains(PollFlags::IN);
        if has.intersects(PollFlags::HUP | PollFlags::ERR) {
            self.lose();
        }
    }

    /// Whether the host's program has gone before the guest answered.
    pub fn is_withdrawn(&self) -> bool {
        self.phase == Phase::Offered && self.hung_up
    }

    /// Whether the guest is done and nothing of its waits.
    pub fn is_over(&self) -> bool {
        !self.guest_sends && !self.guest_receives && self.waiting.is_empty()
    }

    /// What the guest must be told now, with the flags of it.
    pub fn news(&mut self) -> Option<(Operation, u32)> {
        if self.phase != Phase::Open {
            return None;
        }
        let nobody = self.hung_up && (self.ended || !self.guest_receives);
        if nobody && !self.told_hang_up {
            (self.told_hang_up, self.told_end) = (true, true);
            self.stream = None;
            return Some((Operation::Shutdown, SHUTDOWN_RECEIVE | SHUTDOWN_SEND));
        }
        if self.ended && !self.told_end {
            self.told_end = true;
            return Some((Operation::Shutdown, SHUTDOWN_SEND));
        }
        // Told before the guest runs out of room, and not at every byte.
        let known_room = BUFFER_BYTES - self.received.wrapping_sub(self.told);
        let more = self.forwarded != self.told;
        if std::mem::take(&mut self.owes_update) || (more && known_room <= BUFFER_BYTES / 2) {
            self.told = self.forwarded;
            return Some((Operation::CreditUpdate, 0));
        }
        if self.wants_bytes() && self.readable && self.credit() == 0 && !self.asked_credit {
            self.asked_credit = true;
            return Some((Operation::CreditRequest, 0));
        }
        None
    }

    /// The number of bytes that went on, which every packet tells the guest.
    pub fn tell_forwarded(&mut self) -> u32 {
        self.told = self.forwarded;
        self.forwarded
    }
}

fn is_not_yet(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

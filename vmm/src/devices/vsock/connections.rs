//! All connections of a guest: what its packets and the host's sockets do to them.

use super::connection::{BUFFER_BYTES, Came, Connection, Phase};
use super::connector::{Answer, Connector};
use super::packet::{HOST_CID, Header, Operation, STREAM};
use rustix::event::PollFlags;
use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;

/// Most connections of a guest; more are refused.
pub const CONNECTIONS_MAX: usize = 256;
/// With so many packets waiting for receive buffers, the guest's own wait until it offers some.
pub const PENDING_MAX: usize = 256;
/// Ports of the host's programs: from here up to twice this.
const HOST_PORTS_START: u32 = 1 << 30;

/// The two ports of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    /// On the host.
    pub host_port: u32,
    /// In the guest.
    pub guest_port: u32,
}

/// A packet to the guest that has no payload.
#[derive(Clone, Copy, Debug)]
struct Pending {
    key: Key,
    operation: Operation,
    flags: u32,
}

/// The connections.
#[derive(Debug)]
pub struct Connections {
    guest_cid: u64,
    all: BTreeMap<Key, Connection>,
    pending: VecDeque<Pending>,
    connector: Option<Connector>,
    next_host_port: u32,
    next_token: u32,
    /// The connection whose bytes went to the guest last: the others come first now.
    last: Option<Key>,
}

impl Connections {
    /// No connections yet; without a connector the guest can't open any itself.
    pub fn new(guest_cid: u64, connector: Option<Connector>) -> Connections {
        Connections {
            guest_cid,
            all: BTreeMap::new(),
            pending: VecDeque::new(),
            connector,
            next_host_port: HOST_PORTS_START,
            next_token: 0,
            last: None,
        }
    }

    /// The driver has gone: so have all connections.
    pub fn forget(&mut self) {
        self.all.clear();
        self.pending.clear();
    }

    /// Whether the guest must take packets before it may send any.
    pub fn is_clogged(&self) -> bool {
        self.pending.len() >= PENDING_MAX
    }

    fn push(&mut self, key: Key, operation: Operation, flags: u32) {
        self.pending.push_back(Pending { key, operation, flags });
    }

    fn reset(&mut self, key: Key) {
        self.all.remove(&key);
        self.push(key, Operation::Reset, 0);
    }

    /// Room for one more connection; one that is left over gives way.
    fn has_room(&mut self) -> bool {
        if self.all.len() < CONNECTIONS_MAX {
            return true;
        }
        let left = self.all.iter().find(|(_, it)| it.is_left()).map(|(key, _)| *key);
        left.map(|key| self.reset(key)).is_some()
    }

    /// A packet of the guest's; without `payload` it lacks the bytes that its header promises.
    pub fn handle(&mut self, header: &Header, payload: Option<&[u8]>) {
        let key = Key { host_port: header.to_port, guest_port: header.from_port };
        if header.operation == Some(Operation::Reset) {
            self.all.remove(&key);
            return;
        }
        let ours =
            (header.from_cid, header.to_cid, header.kind) == (self.guest_cid, HOST_CID, STREAM);
        let accepted = match payload.filter(|_| ours) {
            None => false,
            Some(_) if header.operation == Some(Operation::Request) => self.open(key, header),
            Some(payload) => self
                .all
                .get_mut(&key)
                .is_some_and(|connection| connection.apply(header, key.host_port, payload)),
        };
        if accepted {
            self.settle(key);
        } else {
            self.reset(key);
        }
    }

    /// The guest asks for a connection.
    fn open(&mut self, key: Key, request: &Header) -> bool {
        if self.all.contains_key(&key) || !self.has_room() {
            return false;
        }
        let token = self.next_token;
        let Some(connector) = &self.connector else { return false };
        if !connector.ask(token, key.host_port) {
            return false;
        }
        self.next_token = token.wrapping_add(1);
        self.all.insert(key, Connection::awaited(token, request));
        true
    }

    /// Takes what came from outside.
    pub fn take_answers(&mut self) {
        while let Some(connector) = &self.connector {
            match connector.answer() {
                Answer::Nothing => return,
                Answer::Connection(token, stream) => self.answered(token, stream),
                Answer::Gone => {
                    self.connector = None;
                    for key in self.keys(|phase| matches!(phase, Phase::Awaited(_))) {
                        self.reset(key);
                    }
                }
            }
        }
    }

    fn keys(&self, wanted: impl Fn(Phase) -> bool) -> Vec<Key> {
        self.all.iter().filter(|(_, it)| wanted(it.phase())).map(|(key, _)| *key).collect()
    }

    fn answered(&mut self, token: u32, stream: Option<UnixStream>) {
        // One that the guest has given up meanwhile is closed here.
        let Some(key) = self.keys(|phase| phase == Phase::Awaited(token)).pop() else { return };
        match (self.all.get_mut(&key), stream) {
            (Some(connection), Some(stream)) => {
                connection.connected(stream);
                self.push(key, Operation::Response, 0);
            }
            _ => self.reset(key),
        }
    }

    /// A program on the host asks for `guest_port`; without room it is refused.
    pub fn offer(&mut self, stream: UnixStream, guest_port: u32) {
        if !self.has_room() {
            return;
        }
        let key = loop {
            let host_port = self.next_host_port;
            self.next_host_port = HOST_PORTS_START | (host_port.wrapping_add(1) % HOST_PORTS_START);
            let key = Key { host_port, guest_port };
            if !self.all.contains_key(&key) {
                break key;
            }
        };
        self.all.insert(key, Connection::offered(stream));
        self.push(key, Operation::Request, 0);
    }

    /// Does what follows from a change of a connection.
    fn settle(&mut self, key: Key) {
        let Some(connection) = self.all.get_mut(&key) else { return };
        connection.flush();
        if connection.is_over() || connection.is_withdrawn() {
            self.reset(key);
            return;
        }
        while let Some((operation, flags)) = self.all.get_mut(&key).and_then(Connection::news) {
            self.push(key, operation, flags);
        }
    }

    /// What a connection's socket was found to have.
    pub fn ready(&mut self, key: Key, has: PollFlags) {
        if has.is_empty() {
            return;
        }
        if let Some(connection) = self.all.get_mut(&key) {
            connection.ready(has);
            self.settle(key);
        }
    }

    /// Sockets to watch.
    pub fn interests(&self) -> impl Iterator<Item = (Key, BorrowedFd<'_>, PollFlags)> {
        self.all.iter().filter_map(|(key, connection)| {
            connection.interest().map(|(socket, flags)| (*key, socket, flags))
        })
    }

    /// The socket of the outside, where answers come.
    pub fn answers(&self) -> Option<BorrowedFd<'_>> {
        self.connector.as_ref().map(Connector::socket)
    }

    /// Whether there is, as far as is known, something for the guest.
    pub fn has_packet(&self) -> bool {
        !self.pending.is_empty() || self.all.values().any(Connection::may_send)
    }

    /// The next packet for the guest; its payload is read into `payload`.
    pub fn next_packet(&mut self, payload: &mut [u8]) -> Option<(Header, usize)> {
        loop {
            if let Some(Pending { key, operation, flags }) = self.pending.pop_front() {
                return Some((self.header(key, operation, flags, 0), 0));
            }
            let key = self.next_speaker()?;
            self.last = Some(key);
            let came = self.all.get_mut(&key)?.read(payload);
            self.settle(key);
            if let Came::Bytes(len) = came {
                return Some((self.header(key, Operation::Data, 0, len as u32), len));
            }
        }
    }

    /// Whose bytes are next: each connection has its turn.
    fn next_speaker(&self) -> Option<Key> {
        let start = self.last.map_or(Bound::Unbounded, Bound::Excluded);
        let behind = self.all.range((start, Bound::Unbounded));
        let mut turns = behind.chain(self.all.iter());
        turns.find(|(_, connection)| connection.may_send()).map(|(key, _)| *key)
    }

    fn header(&mut self, key: Key, operation: Operation, flags: u32, len: u32) -> Header {
        let forwarded = self.all.get_mut(&key).map_or(0, Connection::tell_forwarded);
        Header {
            from_cid: HOST_CID,
            to_cid: self.guest_cid,
            from_port: key.host_port,
            to_port: key.guest_port,
            len,
            kind: STREAM,
            operation: Some(operation),
            flags,
            buffer_bytes: BUFFER_BYTES,
            forwarded,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_takes_no_packets_may_send_only_so_many() {
        let mut connections = Connections::new(3, None);
        let stranger = Header {
            from_cid: 3,
            to_cid: HOST_CID,
            from_port: 1,
            to_port: 2,
            len: 0,
            kind: STREAM,
            operation: Some(Operation::Data),
            flags: 0,
            buffer_bytes: 0,
            forwarded: 0,
        };
        for count in 0..PENDING_MAX {
            assert!(!connections.is_clogged(), "after {count} packets");
            connections.handle(&stranger, Some(&[]));
        }
        assert!(connections.is_clogged());
        let (reset, len) = connections.next_packet(&mut []).unwrap();
        assert_eq!((reset.operation, reset.from_port, len), (Some(Operation::Reset), 2, 0));
        assert!(!connections.is_clogged());
    }
}

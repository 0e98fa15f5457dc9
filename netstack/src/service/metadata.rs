//! The metadata service of one port: 169.254.169.254:80, read-only, from the program.

use super::http::{self, REQUEST_BYTES_MAX, Step};
use super::{discard, tcp_socket};
use crate::compile::METADATA_ADDRESS;
use crate::pipeline::METADATA_PORT;
use smoltcp::iface::{SocketHandle, SocketSet};
use smoltcp::socket::tcp;
use smoltcp::wire::IpAddress;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Connections of one guest at a time.
const CONNECTIONS_MAX: usize = 16;
/// Sockets kept listening, so that a burst of connections is not refused.
const LISTENING: usize = 4;
/// A connection that moves no byte is closed after this.
const IDLE_MS: u64 = 15_000;
const RECEIVE_BYTES: usize = 4096;
const SEND_BYTES: usize = 16_384;

pub(super) struct MetadataServer {
    files: Arc<BTreeMap<String, String>>,
    connections: Vec<Connection>,
}

struct Connection {
    handle: SocketHandle,
    request: Vec<u8>,
    response: Vec<u8>,
    sent: usize,
    closing: bool,
    /// When a byte last moved; `None` while listening.
    active_ms: Option<u64>,
}

impl MetadataServer {
    pub(super) fn new(files: Arc<BTreeMap<String, String>>) -> MetadataServer {
        MetadataServer { files, connections: Vec::new() }
    }

    pub(super) fn replace(&mut self, files: Arc<BTreeMap<String, String>>) {
        self.files = files;
    }

    pub(super) fn is_idle(&self) -> bool {
        self.connections.iter().all(|connection| connection.active_ms.is_none())
    }

    /// Moves every connection on; whether any byte moved.
    pub(super) fn serve(&mut self, sockets: &mut SocketSet<'static>, now_ms: u64) -> bool {
        let mut moved = false;
        self.connections.retain_mut(|connection| {
            let socket = sockets.get_mut::<tcp::Socket>(connection.handle);
            moved |= connection.serve(socket, &self.files, now_ms);
            let alive = socket.is_open();
            if !alive {
                discard(sockets, connection.handle);
            }
            alive
        });
        self.listen(sockets) || moved
    }

    /// Keeps some sockets listening; whether one was added.
    fn listen(&mut self, sockets: &mut SocketSet<'static>) -> bool {
        let waiting = |connection: &&Connection| connection.active_ms.is_none();
        let listening = self.connections.iter().filter(waiting).count();
        let wanted = LISTENING.saturating_sub(listening);
        let room = CONNECTIONS_MAX.saturating_sub(self.connections.len());
        for _ in 0..wanted.min(room) {
            let mut socket = tcp_socket(RECEIVE_BYTES, SEND_BYTES);
            if socket.listen((IpAddress::Ipv4(METADATA_ADDRESS), METADATA_PORT)).is_err() {
                return false;
            }
            self.connections.push(Connection {
                handle: sockets.add(socket),
                request: Vec::new(),
                response: Vec::new(),
                sent: 0,
                closing: false,
                active_ms: None,
            });
        }
        wanted.min(room) > 0
    }
}

impl Connection {
    fn serve(
        &mut self,
        socket: &mut tcp::Socket<'static>,
        files: &BTreeMap<String, String>,
        now_ms: u64,
    ) -> bool {
        if socket.is_listening() {
            // Also after a handshake that the guest broke off.
            self.active_ms = None;
            return false;
        }
        let active_ms = *self.active_ms.get_or_insert(now_ms);
        let mut moved = self.receive(socket);
        moved |= self.answer(files);
        moved |= self.send(socket);
        if moved {
            self.active_ms = Some(now_ms);
        } else if now_ms >= active_ms + IDLE_MS {
            socket.abort();
        }
        let all_sent = self.sent == self.response.len();
        // The guest has said all it will: what is left of its request never becomes whole.
        let no_more = !socket.may_recv() && socket.state() == tcp::State::CloseWait;
        if all_sent && (self.closing || no_more) {
            socket.close();
        }
        moved
    }

    fn receive(&mut self, socket: &mut tcp::Socket<'static>) -> bool {
        let room = REQUEST_BYTES_MAX.saturating_sub(self.request.len());
        if room == 0 || !socket.can_recv() {
            return false;
        }
        let request = &mut self.request;
        let taken = socket.recv(|bytes| {
            let taken = bytes.len().min(room);
            request.extend_from_slice(&bytes[..taken]);
            (taken, taken)
        });
        taken.is_ok_and(|taken| taken > 0)
    }

    /// Answers the next request once the previous answer is out.
    fn answer(&mut self, files: &BTreeMap<String, String>) -> bool {
        if self.closing || self.sent < self.response.len() {
            return false;
        }
        match http::step(&self.request, files) {
            Step::More => false,
            Step::Answer { response, consumed, close } => {
                self.request.drain(..consumed);
                (self.response, self.sent, self.closing) = (response, 0, close);
                true
            }
        }
    }

    fn send(&mut self, socket: &mut tcp::Socket<'static>) -> bool {
        if self.sent == self.response.len() || !socket.can_send() {
            return false;
        }
        let sent = socket.send_slice(&self.response[self.sent..]).unwrap_or(0);
        self.sent += sent;
        sent > 0
    }
}

//! One port that answers GET with a text, for several connections at once.

use alloc::string::String;
use alloc::vec::Vec;
use inputs::http::{self, HEAD_BYTES_MAX, Request};
use runtime::clock::Instant;
use smoltcp::iface::{SocketHandle, SocketSet};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};

/// Connections served at once on one port.
const CONNECTIONS: usize = 16;
/// Most ports served.
pub(crate) const SERVERS_MAX: usize = 16;
const RECEIVE_BYTES: usize = 2 << 10;
const TRANSMIT_BYTES: usize = 4 << 10;
/// A connection that takes longer is cut.
const CONNECTION_MICROS_MAX: u64 = 10_000_000;

/// A served port.
pub(crate) struct HttpServer {
    port: u16,
    text: String,
    connections: Vec<Connection>,
}

struct Connection {
    socket: SocketHandle,
    request: Vec<u8>,
    answer: Vec<u8>,
    sent: usize,
    deadline: Option<Instant>,
}

impl HttpServer {
    pub(crate) fn listen(sockets: &mut SocketSet<'static>, port: u16, text: String) -> HttpServer {
        let connections = (0..CONNECTIONS).map(|_| Connection::listen(sockets, port)).collect();
        HttpServer { port, text, connections }
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Goes on with every connection; `true` where one changed.
    pub(crate) fn serve(&mut self, sockets: &mut SocketSet<'static>, now: Instant) -> bool {
        let mut active = false;
        for connection in &mut self.connections {
            active |= connection.serve(sockets, self.port, &self.text, now);
        }
        active
    }

    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        self.connections.iter().filter_map(|connection| connection.deadline).min()
    }
}

impl Connection {
    fn listen(sockets: &mut SocketSet<'static>, port: u16) -> Connection {
        let mut socket = Socket::new(
            SocketBuffer::new(alloc::vec![0; RECEIVE_BYTES]),
            SocketBuffer::new(alloc::vec![0; TRANSMIT_BYTES]),
        );
        socket.set_nagle_enabled(false);
        // A fresh socket takes any port but 0, which no step names.
        let _ = socket.listen(port);
        let socket = sockets.add(socket);
        Connection { socket, request: Vec::new(), answer: Vec::new(), sent: 0, deadline: None }
    }

    fn serve(
        &mut self,
        sockets: &mut SocketSet<'static>,
        port: u16,
        text: &str,
        now: Instant,
    ) -> bool {
        let socket = sockets.get_mut::<Socket>(self.socket);
        match socket.state() {
            State::Listen | State::SynReceived => false,
            // TIME-WAIT is cut short: it would keep one of few sockets for seconds.
            State::Closed | State::TimeWait => {
                socket.abort();
                let _ = socket.listen(port);
                *self = Connection {
                    socket: self.socket,
                    request: Vec::new(),
                    answer: Vec::new(),
                    sent: 0,
                    deadline: None,
                };
                true
            }
            _ if self.deadline.is_some_and(|deadline| now >= deadline) => {
                socket.abort();
                self.deadline = None;
                true
            }
            _ => {
                self.deadline.get_or_insert(now.after_micros(CONNECTION_MICROS_MAX));
                self.go_on(sockets, text)
            }
        }
    }

    fn go_on(&mut self, sockets: &mut SocketSet<'static>, text: &str) -> bool {
        let socket = sockets.get_mut::<Socket>(self.socket);
        if self.answer.is_empty() {
            return self.receive(socket, text);
        }
        let rest = &self.answer[self.sent..];
        if rest.is_empty() || !socket.may_send() {
            return false;
        }
        let sent = socket.send_slice(rest).unwrap_or(0);
        self.sent += sent;
        if self.sent == self.answer.len() {
            socket.close();
        }
        sent > 0
    }

    fn receive(&mut self, socket: &mut Socket<'static>, text: &str) -> bool {
        let before = self.request.len();
        while socket.can_recv() && self.request.len() <= HEAD_BYTES_MAX {
            let taken = socket.recv(|bytes| {
                self.request.extend_from_slice(bytes);
                (bytes.len(), ())
            });
            if taken.is_err() {
                break;
            }
        }
        let request = http::read_request(&self.request);
        self.answer = http::answer(request, text);
        if request == Request::Partial && !socket.may_recv() {
            socket.abort();
            return true;
        }
        !self.answer.is_empty() || self.request.len() > before
    }
}

//! A forwarded connection: a client's TCP connection on this host and the switch's own TCP connection
//! to the guest, joined both ways through bounded buffers. Each side's end of data is passed on by
//! itself (half-close); a reset of one side resets the other.

use super::{discard, tcp_socket};
use smoltcp::iface::{SocketHandle, SocketSet};
use smoltcp::socket::tcp::{self, State};
use smoltcp::time::Duration;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};

const BUFFER_BYTES: usize = 65_535;
/// A guest that answers nothing for this long is gone.
const TIMEOUT: Duration = Duration::from_secs(30);
const KEEP_ALIVE: Duration = Duration::from_secs(10);
/// A connection that moves no byte is closed after this.
const IDLE_MS: u64 = 3600 * 1000;

pub(super) struct Splice {
    /// The listener that accepted it.
    pub(super) listener: u32,
    pub(super) local_port: u16,
    stream: TcpStream,
    handle: SocketHandle,
    readable: bool,
    writable: bool,
    /// The client will send no more, and the guest was told.
    client_done: bool,
    /// The guest will send no more, and the client was told.
    guest_done: bool,
    connected: bool,
    /// Over; one more poll may have a reset to send.
    ending: bool,
    active_ms: u64,
}

/// What a round did.
pub(super) struct Pumped {
    pub(super) moved: bool,
    pub(super) alive: bool,
}

/// The guest's side of a splice, not connected yet.
pub(super) fn socket() -> tcp::Socket<'static> {
    let mut socket = tcp_socket(BUFFER_BYTES, BUFFER_BYTES);
    socket.set_timeout(Some(TIMEOUT));
    socket.set_keep_alive(Some(KEEP_ALIVE));
    socket
}

impl Splice {
    /// `stream` does not block.
    pub(super) fn new(
        listener: u32,
        stream: TcpStream,
        handle: SocketHandle,
        local_port: u16,
        now_ms: u64,
    ) -> Splice {
        Splice {
            listener,
            local_port,
            stream,
            handle,
            readable: true,
            writable: true,
            client_done: false,
            guest_done: false,
            connected: false,
            ending: false,
            active_ms: now_ms,
        }
    }

    pub(super) fn ready(&mut self, readable: bool, writable: bool) {
        self.readable |= readable;
        self.writable |= writable;
    }

    /// Resets both sides; the next rounds carry it out.
    pub(super) fn abort(&mut self, sockets: &mut SocketSet<'static>) {
        if !self.ending {
            sockets.get_mut::<tcp::Socket>(self.handle).abort();
            self.reset_client();
            self.ending = true;
        }
    }

    /// Moves what can be moved. A splice that is no longer alive has removed its socket.
    pub(super) fn pump(&mut self, sockets: &mut SocketSet<'static>, now_ms: u64) -> Pumped {
        if self.ending {
            // The poll since has sent the reset, if there was one to send.
            discard(sockets, self.handle);
            return Pumped { moved: true, alive: false };
        }
        let socket = sockets.get_mut::<tcp::Socket>(self.handle);
        self.connected |= !matches!(socket.state(), State::SynSent | State::Closed);
        let outcome =
            self.client_to_guest(socket).and_then(|some| Ok(some | self.guest_to_client(socket)?));
        let Ok(mut moved) = outcome else {
            self.abort(sockets);
            return Pumped { moved: true, alive: true };
        };
        if moved {
            self.active_ms = now_ms;
        } else if now_ms >= self.active_ms + IDLE_MS {
            self.abort(sockets);
            return Pumped { moved: true, alive: true };
        }
        let both_done = self.client_done && self.guest_done;
        match sockets.get::<tcp::Socket>(self.handle).state() {
            State::TimeWait if both_done => self.ending = true,
            State::Closed => {
                if !both_done {
                    self.reset_client();
                }
                self.ending = true;
            }
            _ => {}
        }
        moved |= self.ending;
        Pumped { moved, alive: true }
    }

    /// `Err`: the client is gone.
    fn client_to_guest(&mut self, socket: &mut tcp::Socket<'static>) -> std::io::Result<bool> {
        let mut moved = false;
        while self.readable && !self.client_done && socket.can_send() {
            let stream = &mut self.stream;
            let read = socket.send(|room| match stream.read(room) {
                Ok(count) => (count, Ok(count)),
                Err(error) => (0, Err(error)),
            });
            match read {
                Ok(Ok(0)) => {
                    self.client_done = true;
                    socket.close();
                    moved = true;
                }
                Ok(Ok(_)) => moved = true,
                Ok(Err(error)) if error.kind() == ErrorKind::WouldBlock => self.readable = false,
                Ok(Err(error)) if error.kind() == ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Err(error),
                Err(_) => break,
            }
        }
        Ok(moved)
    }

    /// `Err`: the client is gone.
    fn guest_to_client(&mut self, socket: &mut tcp::Socket<'static>) -> std::io::Result<bool> {
        let mut moved = false;
        while self.writable && socket.can_recv() {
            let stream = &mut self.stream;
            let written = socket.recv(|bytes| match stream.write(bytes) {
                Ok(count) => (count, Ok(count)),
                Err(error) => (0, Err(error)),
            });
            match written {
                Ok(Ok(_)) => moved = true,
                Ok(Err(error)) if error.kind() == ErrorKind::WouldBlock => self.writable = false,
                Ok(Err(error)) if error.kind() == ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Err(error),
                Err(_) => break,
            }
        }
        let ended = matches!(
            socket.state(),
            State::CloseWait | State::LastAck | State::Closing | State::TimeWait
        );
        if self.connected && ended && !socket.can_recv() && !self.guest_done {
            self.guest_done = true;
            self.stream.shutdown(Shutdown::Write)?;
            moved = true;
        }
        Ok(moved)
    }

    /// The client is to see a reset, not an orderly end, once the stream is dropped.
    fn reset_client(&self) {
        // Without it the client sees an orderly end instead; nothing else depends on it.
        let _ =
            rustix::net::sockopt::set_socket_linger(&self.stream, Some(std::time::Duration::ZERO));
    }
}

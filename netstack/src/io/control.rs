//! The control socket and its one thread: reads requests, compiles programs (so that the data plane
//! only swaps them in), and hands commands to the data plane, whose answers it returns.

use super::plane::{Command, CommandSender};
use crate::compile::Tables;
use crate::control::{Envelope, ErrorKind, Reply, Request, VERSION};
use abi::packet_ring::Region;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fd::OwnedFd;
use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Control connections open at a time; the oldest gives way.
const CONNECTIONS_MAX: usize = 16;
/// A peer that stops in the middle of a frame is cut off after this, so that others get their turn.
const FRAME_TIMEOUT: Duration = Duration::from_secs(5);

pub(super) struct ControlSocket {
    listener: UnixListener,
    commands: CommandSender,
}

impl ControlSocket {
    /// Binds `path`, mode 0600; a socket that a dead switch left behind is replaced.
    pub(super) fn bind(path: &Path, commands: CommandSender) -> io::Result<ControlSocket> {
        if path.exists() {
            if UnixStream::connect(path).is_ok() {
                return Err(io::Error::new(
                    io::ErrorKind::AddrInUse,
                    "another switch answers on it",
                ));
            }
            std::fs::remove_file(path)?;
        }
        let flags = SocketFlags::CLOEXEC;
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
        // Nobody can connect before `listen`, so nobody gets in before the mode is set.
        rustix::fs::chmod(path, Mode::RUSR | Mode::WUSR)?;
        rustix::net::listen(&socket, CONNECTIONS_MAX as i32)?;
        let listener = UnixListener::from(socket);
        listener.set_nonblocking(true)?;
        Ok(ControlSocket { listener, commands })
    }

    /// Answers requests until the data plane is gone.
    pub(super) fn serve(self) {
        let mut connections: Vec<UnixStream> = Vec::new();
        loop {
            let ready = match wait(&self.listener, &connections) {
                Ok(ready) => ready,
                Err(error) => {
                    tracing::error!(%error, "the control socket cannot be polled; the switch takes no more requests");
                    return;
                }
            };
            let mut at = 0;
            connections.retain(|connection| {
                at += 1;
                !ready[at] || self.answer_one(connection)
            });
            if ready[0] {
                self.accept(&mut connections);
            }
        }
    }

    fn accept(&self, connections: &mut Vec<UnixStream>) {
        while let Ok((connection, _)) = self.listener.accept() {
            let prepared = connection
                .set_nonblocking(false)
                .and_then(|()| connection.set_read_timeout(Some(FRAME_TIMEOUT)))
                .and_then(|()| connection.set_write_timeout(Some(FRAME_TIMEOUT)));
            if prepared.is_err() {
                continue;
            }
            if connections.len() == CONNECTIONS_MAX {
                connections.remove(0);
            }
            connections.push(connection);
        }
    }

    /// Whether the connection stays.
    fn answer_one(&self, connection: &UnixStream) -> bool {
        let Ok(Some((message, descriptors))) = abi::control::receive(connection) else {
            return false;
        };
        let reply = match serde_json::from_slice::<Envelope>(&message) {
            Ok(envelope) if envelope.version != VERSION => {
                let version = envelope.version;
                invalid(format!("control version {version}; this switch speaks {VERSION}"))
            }
            Ok(envelope) => self.perform(envelope.request, descriptors),
            Err(error) => invalid(format!("control request: {error}")),
        };
        match serde_json::to_vec(&reply) {
            Ok(reply) => abi::control::send(connection, &reply, &[]).is_ok(),
            Err(_) => false,
        }
    }

    fn perform(&self, request: Request, descriptors: Vec<OwnedFd>) -> Reply {
        let command = match request {
            Request::Status => Command::Status,
            Request::Counters => Command::Counters,
            Request::Detach { port_id, generation } => Command::Detach { port_id, generation },
            Request::Program(program) => match Tables::compile(*program) {
                Ok(tables) => Command::Program(Arc::new(tables)),
                Err(error) => return invalid(error.to_string()),
            },
            Request::Attach { port_id, generation } => match map(descriptors) {
                Ok(region) => Command::Attach { port_id, generation, region },
                Err(error) => return invalid(format!("attach of port {port_id}: {error}")),
            },
        };
        self.commands.perform(command)
    }
}

/// Waits for the listener (first) or a connection; which of them are ready.
fn wait(listener: &UnixListener, connections: &[UnixStream]) -> rustix::io::Result<Vec<bool>> {
    let mut waiting = vec![PollFd::new(listener, PollFlags::IN)];
    waiting.extend(connections.iter().map(|connection| PollFd::new(connection, PollFlags::IN)));
    match poll(&mut waiting, None) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(error) => return Err(error),
    }
    Ok(waiting.iter().map(|waiting| !waiting.revents().is_empty()).collect())
}

fn map(descriptors: Vec<OwnedFd>) -> io::Result<Region> {
    let count = descriptors.len();
    let [memory, from_guest, to_guest] = <[OwnedFd; 3]>::try_from(descriptors).map_err(|_| {
        let message = format!("{count} descriptors came; memory and two eventfds are taken");
        io::Error::new(io::ErrorKind::InvalidInput, message)
    })?;
    Region::map(memory, from_guest, to_guest)
}

fn invalid(message: String) -> Reply {
    Reply::Error { kind: ErrorKind::Invalid, message }
}

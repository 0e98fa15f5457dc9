//! The node's end of the control socket: one blocking request after the other.

use crate::control::{
    Counters, Envelope, ErrorKind, ForwardFailure, Reply, Request, Status, VERSION,
};
use crate::program::Program;
use abi::packet_ring::Region;
use rustix::fd::{AsFd, BorrowedFd};
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A switch that does not answer within this time is treated as gone.
pub const REPLY_TIMEOUT: Duration = Duration::from_secs(30);

/// A failed request.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No connection.
    #[error("cannot connect to the switch at {path}")]
    Connect {
        /// The control socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The connection broke; the switch may or may not have acted. Connect again and ask.
    #[error("the switch's control connection broke")]
    Broken(#[source] io::Error),
    /// The switch answered something that is not an answer to the request.
    #[error("the switch answered out of protocol: {0}")]
    Protocol(String),
    /// The switch refused; nothing was changed.
    #[error("the switch refused: {message}")]
    Refused {
        /// What kind of refusal.
        kind: ErrorKind,
        /// The thing, the value and the rule.
        message: String,
    },
}

impl Error {
    /// Whether a newer generation of the port is known to the switch.
    pub fn is_stale(&self) -> bool {
        matches!(self, Error::Refused { kind: ErrorKind::Stale, .. })
    }
}

/// A connection to a switch.
pub struct Client {
    socket: UnixStream,
}

impl Client {
    /// Connects to the control socket at `path`.
    pub fn connect(path: &Path) -> Result<Client, Error> {
        let connected = UnixStream::connect(path).and_then(|socket| {
            socket.set_read_timeout(Some(REPLY_TIMEOUT))?;
            socket.set_write_timeout(Some(REPLY_TIMEOUT))?;
            Ok(socket)
        });
        let socket =
            connected.map_err(|source| Error::Connect { path: path.to_owned(), source })?;
        Ok(Client { socket })
    }

    /// Replaces the switch's program. Returns the forwards that do not listen; all else is in force.
    pub fn program(&mut self, program: &Program) -> Result<Vec<ForwardFailure>, Error> {
        match self.ask(Request::Program(Box::new(program.clone())), &[])? {
            Reply::Programmed { forwards_failed } => Ok(forwards_failed),
            other => Err(unexpected(&other)),
        }
    }

    /// Connects a guest's rings; the region may be dropped afterwards by whoever doesn't use it.
    pub fn attach(&mut self, port_id: &str, generation: u64, region: &Region) -> Result<(), Error> {
        let [memory, from_guest, to_guest] = region.descriptors().map_err(Error::Broken)?;
        self.attach_descriptors(
            port_id,
            generation,
            [memory.as_fd(), from_guest.as_fd(), to_guest.as_fd()],
        )
    }

    /// Connects a guest's rings by descriptors in the order of [`Region::descriptors`].
    pub fn attach_descriptors(
        &mut self,
        port_id: &str,
        generation: u64,
        descriptors: [BorrowedFd<'_>; 3],
    ) -> Result<(), Error> {
        done(self.ask(Request::Attach { port_id: port_id.to_owned(), generation }, &descriptors)?)
    }

    /// Lets go of a guest's rings.
    pub fn detach(&mut self, port_id: &str, generation: u64) -> Result<(), Error> {
        done(self.ask(Request::Detach { port_id: port_id.to_owned(), generation }, &[])?)
    }

    /// Who the switch is and what it holds.
    pub fn status(&mut self) -> Result<Status, Error> {
        match self.ask(Request::Status, &[])? {
            Reply::Status(status) => Ok(status),
            other => Err(unexpected(&other)),
        }
    }

    /// Frames and drops so far.
    pub fn counters(&mut self) -> Result<Counters, Error> {
        match self.ask(Request::Counters, &[])? {
            Reply::Counters(counters) => Ok(counters),
            other => Err(unexpected(&other)),
        }
    }

    fn ask(&mut self, request: Request, descriptors: &[BorrowedFd<'_>]) -> Result<Reply, Error> {
        let envelope = Envelope { version: VERSION, request };
        let message =
            serde_json::to_vec(&envelope).map_err(|error| Error::Protocol(error.to_string()))?;
        abi::control::send(&self.socket, &message, descriptors).map_err(Error::Broken)?;
        let received = abi::control::receive(&self.socket).map_err(Error::Broken)?;
        let (reply, _) =
            received.ok_or_else(|| Error::Broken(io::ErrorKind::UnexpectedEof.into()))?;
        serde_json::from_slice(&reply).map_err(|error| Error::Protocol(error.to_string()))
    }
}

fn done(reply: Reply) -> Result<(), Error> {
    match reply {
        Reply::Done => Ok(()),
        other => Err(unexpected(&other)),
    }
}

fn unexpected(reply: &Reply) -> Error {
    match reply {
        Reply::Error { kind, message } => Error::Refused { kind: *kind, message: message.clone() },
        other => Error::Protocol(format!("{other:?}")),
    }
}

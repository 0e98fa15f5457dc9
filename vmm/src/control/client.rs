//! The asking side of a control socket: blocking, one request at a time.

use super::{BalloonStatus, CONTROL_VERSION, Envelope, Metrics, Reply, Request, Status};
use crate::config::{DiskConfig, NetConfig, RateLimits};
use rustix::net::sockopt::{self, Timeout};
use rustix::net::{self, AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// Longest wait for a reply: a removal waits 10 s for the guest.
const REPLY_TIMEOUT: Duration = Duration::from_secs(20);
/// Longest wait for what is answered at once: connecting, and the status.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The VMM can't be reached, or broke off. The connection is of no use any more.
    #[error("control socket: {0}")]
    Io(#[from] io::Error),
    /// It answered something else.
    #[error("control socket: {0}")]
    Protocol(String),
    /// It refused; nothing changed.
    #[error("{message}")]
    Refused {
        /// `invalid`, `not_found`, `exists`, `guest_refused`, `io`.
        kind: String,
        /// What, which value, which rule.
        message: String,
    },
}

/// A connection to a running guest's VMM.
#[derive(Debug)]
pub struct Client {
    socket: UnixStream,
}

impl Client {
    /// Connects to a control socket. A VMM that hangs is not waited for.
    pub fn connect(path: &Path) -> Result<Client, ControlError> {
        let io = io::Error::from;
        let (family, flags) = (AddressFamily::UNIX, SocketFlags::CLOEXEC);
        let socket = net::socket_with(family, SocketType::STREAM, flags, None).map_err(io)?;
        // It bounds the wait for a place among the connections that wait to be accepted, too.
        sockopt::set_socket_timeout(&socket, Timeout::Send, Some(ANSWER_TIMEOUT)).map_err(io)?;
        net::connect(&socket, &SocketAddrUnix::new(path).map_err(io)?).map_err(io)?;
        let socket = UnixStream::from(socket);
        socket.set_read_timeout(Some(REPLY_TIMEOUT))?;
        Ok(Client { socket })
    }

    /// One request and its answer, whatever it is.
    pub fn request(
        &self,
        request: Request,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(Reply, Vec<OwnedFd>), ControlError> {
        let envelope = Envelope { version: CONTROL_VERSION, request };
        let message = serde_json::to_vec(&envelope).map_err(io::Error::other)?;
        abi::control::send(&self.socket, &message, descriptors)?;
        let (reply, descriptors) = abi::control::receive(&self.socket)?
            .ok_or(io::Error::from(io::ErrorKind::UnexpectedEof))?;
        let reply = serde_json::from_slice(&reply)
            .map_err(|error| ControlError::Protocol(error.to_string()))?;
        match reply {
            Reply::Error { kind, message } => Err(ControlError::Refused { kind, message }),
            reply => Ok((reply, descriptors)),
        }
    }

    fn done(&self, request: Request, descriptors: &[BorrowedFd<'_>]) -> Result<(), ControlError> {
        match self.request(request, descriptors)? {
            (Reply::Done, _) => Ok(()),
            (other, _) => Err(ControlError::Protocol(format!("unexpected reply {other:?}"))),
        }
    }

    /// Who this is and how it is.
    pub fn status(&self) -> Result<Status, ControlError> {
        self.socket.set_read_timeout(Some(ANSWER_TIMEOUT))?;
        let status = self.ask_status();
        self.socket.set_read_timeout(Some(REPLY_TIMEOUT))?;
        status
    }

    fn ask_status(&self) -> Result<Status, ControlError> {
        match self.request(Request::Status, &[])? {
            (Reply::Status(status), _) => Ok(status),
            (other, _) => Err(ControlError::Protocol(format!("unexpected reply {other:?}"))),
        }
    }

    /// Hot-plugs a disk.
    pub fn add_disk(
        &self,
        disk: DiskConfig,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), ControlError> {
        self.done(Request::AddDisk(disk), descriptors)
    }

    /// Takes a disk away; returns when nothing writes to it any more.
    pub fn remove_disk(&self, id: &str) -> Result<(), ControlError> {
        self.done(Request::RemoveDisk { id: id.into() }, &[])
    }

    /// Gives a remote disk another connection; see [`Request::ReplaceDisk`].
    pub fn replace_disk(
        &self,
        id: &str,
        socket: BorrowedFd<'_>,
        epoch: u64,
    ) -> Result<(), ControlError> {
        self.done(Request::ReplaceDisk { id: id.into(), epoch }, &[socket])
    }

    /// Hot-plugs a network device.
    pub fn add_net(
        &self,
        net: NetConfig,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), ControlError> {
        self.done(Request::AddNet(net), descriptors)
    }

    /// Takes a network device away.
    pub fn remove_net(&self, id: &str) -> Result<(), ControlError> {
        self.done(Request::RemoveNet { id: id.into() }, &[])
    }

    /// Takes a disk or network device away without the guest; see [`Request::ForceRemove`].
    pub fn force_remove(&self, id: &str) -> Result<(), ControlError> {
        self.done(Request::ForceRemove { id: id.into() }, &[])
    }

    /// Numbers about the guest.
    pub fn metrics(&self) -> Result<Metrics, ControlError> {
        match self.request(Request::Metrics, &[])? {
            (Reply::Metrics(metrics), _) => Ok(metrics),
            (other, _) => Err(ControlError::Protocol(format!("unexpected reply {other:?}"))),
        }
    }

    /// The packet ring of a network device: memory, from-guest eventfd, to-guest eventfd.
    pub fn net_ring(&self, id: &str) -> Result<[OwnedFd; 3], ControlError> {
        let (_, descriptors) = self.request(Request::NetRing { id: id.into() }, &[])?;
        <[OwnedFd; 3]>::try_from(descriptors).map_err(|all| {
            ControlError::Protocol(format!("{} descriptors came with a packet ring", all.len()))
        })
    }

    /// Changes a disk's rate limits.
    pub fn set_disk_limits(&self, id: &str, limits: RateLimits) -> Result<(), ControlError> {
        self.done(Request::SetDiskLimits { id: id.into(), limits }, &[])
    }

    /// Changes a network device's rate limits.
    pub fn set_net_limits(
        &self,
        id: &str,
        from_guest: RateLimits,
        to_guest: RateLimits,
    ) -> Result<(), ControlError> {
        self.done(Request::SetNetLimits { id: id.into(), from_guest, to_guest }, &[])
    }

    /// Asks the guest to give memory back; see [`Request::SetBalloon`].
    pub fn set_balloon(&self, target_mib: u32) -> Result<(), ControlError> {
        self.done(Request::SetBalloon { target_mib }, &[])
    }

    /// How the balloon is.
    pub fn balloon(&self) -> Result<BalloonStatus, ControlError> {
        match self.request(Request::Balloon, &[])? {
            (Reply::Balloon(status), _) => Ok(status),
            (other, _) => Err(ControlError::Protocol(format!("unexpected reply {other:?}"))),
        }
    }

    /// Stops the vCPUs and the devices.
    pub fn pause(&self) -> Result<(), ControlError> {
        self.done(Request::Pause, &[])
    }

    /// Lets the vCPUs run.
    pub fn resume(&self) -> Result<(), ControlError> {
        self.done(Request::Resume, &[])
    }

    /// Ends the guest at once.
    pub fn kill(&self) -> Result<(), ControlError> {
        self.done(Request::Kill, &[])
    }
}

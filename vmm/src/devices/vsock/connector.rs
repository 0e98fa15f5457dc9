//! Connections that a guest asks for, made outside of the sandbox.
//!
//! Inside nothing can be connected. So the device asks over a socket pair, by a token and the
//! guest's port; outside, [`Outside::serve`] connects to the Unix socket `PATH_PORT` and sends the
//! connection back. Each question and each answer is one message of 8 bytes.

use crate::process::resources::ResourceError;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recvmsg,
    sendmsg, socket_with, socketpair,
};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

const MESSAGE_BYTES: usize = 8;

/// A socket pair for [`Connector`] and [`Outside`].
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

/// The end inside: asks, and never waits.
#[derive(Debug)]
pub struct Connector(OwnedFd);

/// What came from outside.
#[derive(Debug)]
pub enum Answer {
    /// Nothing yet.
    Nothing,
    /// To the question with this token: the connection, or nobody listens there.
    Connection(u32, Option<UnixStream>),
    /// Nobody answers any more.
    Gone,
}

impl Connector {
    /// Takes one end of a pair.
    pub fn new(socket: OwnedFd) -> Connector {
        Connector(socket)
    }

    /// Asks for a connection to `port`; `false`: there are too many questions already.
    pub fn ask(&self, token: u32, port: u32) -> bool {
        send(&self.0, token, port, None, SendFlags::DONTWAIT).is_ok()
    }

    /// The next answer.
    pub fn answer(&self) -> Answer {
        match receive(&self.0, RecvFlags::DONTWAIT) {
            Ok(Some((token, _, descriptor))) => {
                let stream = descriptor.map(UnixStream::from);
                Answer::Connection(token, stream.filter(|it| it.set_nonblocking(true).is_ok()))
            }
            Ok(None) => Answer::Gone,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Answer::Nothing,
            Err(_) => Answer::Gone,
        }
    }

    /// Readable when there is an answer.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The end outside.
#[derive(Debug)]
pub struct Outside {
    socket: OwnedFd,
    path: PathBuf,
}

impl Outside {
    /// Answers on `socket`; a guest's port `P` is the Unix socket `path_P`.
    pub fn new(socket: OwnedFd, path: &Path) -> Outside {
        Outside { socket, path: path.to_path_buf() }
    }

    /// Connects until the other end is closed.
    pub fn serve(self) {
        while let Ok(Some((token, port, _))) = receive(&self.socket, RecvFlags::empty()) {
            let connection = self.connect(port).ok();
            let connection = connection.as_ref().map(AsFd::as_fd);
            if send(&self.socket, token, port, connection, SendFlags::empty()).is_err() {
                return;
            }
        }
    }

    /// Never waits: where nobody accepts, the guest is refused.
    fn connect(&self, port: u32) -> io::Result<OwnedFd> {
        let mut path = self.path.clone().into_os_string();
        path.push(format!("_{port}"));
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        connect(&socket, &SocketAddrUnix::new(&path)?)?;
        Ok(socket)
    }
}

/// The two ends of a pair for a socket at `path`.
pub(crate) fn between(path: &Path) -> Result<(Connector, Outside), ResourceError> {
    let failed = |error: io::Error| ResourceError::Unusable {
        what: "vsock.socket".into(),
        reason: error.to_string(),
    };
    let (inside, outside) = pair().map_err(failed)?;
    Ok((Connector::new(inside), Outside::new(outside, path)))
}

fn send(
    socket: &OwnedFd,
    token: u32,
    port: u32,
    descriptor: Option<BorrowedFd<'_>>,
    flags: SendFlags,
) -> io::Result<()> {
    let mut message = [0; MESSAGE_BYTES];
    message[..4].copy_from_slice(&token.to_le_bytes());
    message[4..].copy_from_slice(&port.to_le_bytes());
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let descriptors: Vec<_> = descriptor.into_iter().collect();
    if !descriptors.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
    }
    let flags = flags | SendFlags::NOSIGNAL;
    sendmsg(socket, &[IoSlice::new(&message)], &mut ancillary, flags)?;
    Ok(())
}

type Received = (u32, u32, Option<OwnedFd>);

/// One message; `None`: the other end is closed, or does not keep to the protocol.
fn receive(socket: &OwnedFd, flags: RecvFlags) -> io::Result<Option<Received>> {
    let mut message = [0; MESSAGE_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = flags | RecvFlags::CMSG_CLOEXEC;
    let received = loop {
        let mut slices = [IoSliceMut::new(&mut message)];
        match recvmsg(socket, &mut slices, &mut ancillary, flags) {
            Err(rustix::io::Errno::INTR) => {}
            other => break other?,
        }
    };
    let mut descriptor = None;
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = message {
            descriptor = descriptors.last();
        }
    }
    if received.bytes != MESSAGE_BYTES {
        return Ok(None);
    }
    let word = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|index| message[at + index]));
    Ok(Some((word(0), word(4), descriptor)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;

    #[test]
    fn a_guests_port_is_a_socket_beside_the_path() {
        let place = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(place.path().join("vsock_52")).unwrap();
        let (inside, outside) = between(&place.path().join("vsock")).unwrap();
        let serving = std::thread::spawn(move || outside.serve());
        let next = || loop {
            match inside.answer() {
                Answer::Nothing => std::thread::yield_now(),
                answer => return answer,
            }
        };
        assert!(inside.ask(7, 52) && inside.ask(8, 53));
        let Answer::Connection(7, Some(mut stream)) = next() else { panic!("no connection") };
        assert!(matches!(next(), Answer::Connection(8, None)));
        let (mut accepted, _) = listener.accept().unwrap();
        accepted.write_all(b"hello").unwrap();
        let mut said = [0; 5];
        stream.set_nonblocking(false).unwrap();
        stream.read_exact(&mut said).unwrap();
        assert_eq!(&said, b"hello");
        drop(inside);
        serving.join().unwrap();
    }

    #[test]
    fn questions_that_nobody_takes_are_refused_in_the_end() {
        let place = tempfile::tempdir().unwrap();
        let (inside, outside) = between(&place.path().join("vsock")).unwrap();
        let asked = (0..1_000_000).take_while(|token| inside.ask(*token, 1)).count();
        assert!(asked < 1_000_000);
        drop(outside);
        assert!(!inside.ask(0, 1));
        assert!(matches!(inside.answer(), Answer::Gone));
    }
}

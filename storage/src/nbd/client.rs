//! A connection to another host's storage process, up to the end of the handshake.

use super::tls::{ClientStream, Identity};
use super::wire::{self, ExportInfo, InfoRequest, option, reply};
use crate::control::{Error, ErrorKind, Peer};
use rustix::net::sockopt;
use std::io;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// How long connecting and the whole handshake may take.
const HANDSHAKE_MAX: Duration = Duration::from_secs(10);
/// How long a peer may leave sent bytes unacknowledged.
const UNACKNOWLEDGED_MS_MAX: u32 = 30_000;
/// Most replies to one option.
const OPTION_REPLIES_MAX: usize = 64;

/// What another host says of an export.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Described {
    pub(crate) info: ExportInfo,
    /// That host's storage epoch; 0 where it tells none.
    pub(crate) epoch: u64,
}

/// Opens an export of another host: the stream is then in the transmission phase.
pub(crate) async fn connect(
    identity: &Identity,
    peer: &Peer,
    export: &str,
) -> Result<(ClientStream, Described), Error> {
    let failed = |message: String| {
        Error::unreachable(format!(
            "open {export} at {} ({}): {message}",
            peer.server_name, peer.address
        ))
    };
    match tokio::time::timeout(HANDSHAKE_MAX, handshake(identity, peer, export)).await {
        Ok(Ok(opened)) => Ok(opened),
        Ok(Err(Refusal::Io(error))) => Err(failed(error.to_string())),
        Ok(Err(Refusal::Export { kind, message })) => {
            Err(Error::new(kind, format!("{} refuses {export}: {message}", peer.server_name)))
        }
        Err(_) => Err(failed(format!("no answer within {} seconds", HANDSHAKE_MAX.as_secs()))),
    }
}

enum Refusal {
    Io(io::Error),
    Export { kind: ErrorKind, message: String },
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<wire::Malformed> for Refusal {
    fn from(error: wire::Malformed) -> Self {
        Self::Io(io::Error::new(io::ErrorKind::InvalidData, error))
    }
}

async fn handshake(
    identity: &Identity,
    peer: &Peer,
    export: &str,
) -> Result<(ClientStream, Described), Refusal> {
    let mut stream = TcpStream::connect(peer.address).await?;
    prepare(&stream)?;
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).await?;
    let flags = u16::from_be_bytes([greeting[16], greeting[17]]);
    if greeting[..16] != wire::GREETING || flags & wire::FIXED_NEWSTYLE == 0 {
        return Err(wire::Malformed::Magic { what: "the greeting" }.into());
    }
    let flags = u32::from(wire::FIXED_NEWSTYLE | (flags & wire::NO_ZEROES));
    stream.write_all(&flags.to_be_bytes()).await?;
    stream.write_all(&wire::option(option::STARTTLS, &[])).await?;
    let (kind, data) = option_reply(&mut stream, option::STARTTLS).await?;
    if kind != reply::ACK {
        return Err(refusal(kind, &data));
    }
    let mut stream = identity.connect(stream, &peer.server_name).await?;
    let described = go(&mut stream, export).await?;
    Ok((stream, described))
}

/// Small requests go out at once, and a peer that vanished is noticed.
pub(crate) fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    sockopt::set_tcp_user_timeout(stream, UNACKNOWLEDGED_MS_MAX)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, Duration::from_secs(10))?;
    sockopt::set_tcp_keepintvl(stream, Duration::from_secs(5))?;
    Ok(())
}

async fn go(stream: &mut ClientStream, export: &str) -> Result<Described, Refusal> {
    let request = InfoRequest { name: export.to_owned(), wanted: vec![] };
    stream.write_all(&wire::option(option::GO, &request.encode())).await?;
    stream.flush().await?;
    let (mut info, mut epoch) = (None, 0);
    for _ in 0..OPTION_REPLIES_MAX {
        match option_reply(stream, option::GO).await? {
            (reply::INFO, data) => {
                info = ExportInfo::parse(&data).or(info);
                epoch = wire::parse_epoch(&data).unwrap_or(epoch);
            }
            (reply::ACK, _) => {
                let what = "the export's description";
                let info = info.ok_or(wire::Malformed::Truncated { what })?;
                return Ok(Described { info, epoch });
            }
            (kind, data) => return Err(refusal(kind, &data)),
        }
    }
    Err(wire::Malformed::Truncated { what: "the export's description" }.into())
}

async fn option_reply(
    stream: &mut (impl super::Stream + ?Sized),
    asked: u32,
) -> Result<(u32, Vec<u8>), Refusal> {
    let mut header = [0; wire::OPTION_REPLY_HEADER_BYTES];
    stream.read_exact(&mut header).await?;
    let (option, kind, length) = wire::parse_option_reply(&header)?;
    if option != asked {
        return Err(wire::Malformed::Magic { what: "a reply to another option" }.into());
    }
    let mut data = vec![0; length as usize];
    stream.read_exact(&mut data).await?;
    Ok((kind, data))
}

fn refusal(kind: u32, data: &[u8]) -> Refusal {
    let text = String::from_utf8_lossy(data);
    let (kind, message) = match (wire::parse_refusal(&text), kind) {
        (Some((kind, message)), _) => (kind, message.to_owned()),
        (None, reply::ERR_UNKNOWN) => (ErrorKind::NotFound, text.into_owned()),
        (None, _) => (ErrorKind::Unreachable, format!("reply {kind:#x} {text}")),
    };
    Refusal::Export { kind, message }
}

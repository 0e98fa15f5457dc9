//! The images and volumes of this host for the others: accepts connections and negotiates what is
//! opened. Nothing is told or opened before TLS.

use super::export::{Export, Exports};
use super::tls::{Identity, ServerStream};
use super::wire::{self, ExportInfo, InfoRequest, info, option, reply};
use super::{Stream, client, transmission};
use crate::control::{Error, ErrorKind};
use crate::volumes::SessionGuard;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

/// Most connections from other hosts at one time.
const CONNECTIONS_MAX: usize = 256;
/// Most options that one handshake may negotiate.
const OPTIONS_MAX: usize = 64;
/// How long a handshake may take.
const HANDSHAKE_MAX: Duration = Duration::from_secs(10);
/// How long to wait after the system refused to accept, for instance without free descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What the handshake ended with.
type Opened = (Export, Option<SessionGuard>);

/// Accepts and serves connections until it is dropped.
pub(crate) async fn listen(listener: TcpListener, identity: Identity, exports: Exports) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        // The semaphore is never closed.
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let (stream, address) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "accept a connection from another host");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let (identity, exports) = (identity.clone(), exports.clone());
        tokio::spawn(async move {
            if let Err(error) = connection(stream, &identity, exports).await {
                tracing::warn!(%address, %error, "connection from another host ended");
            }
            drop(place);
        });
    }
}

async fn connection(stream: TcpStream, identity: &Identity, exports: Exports) -> io::Result<()> {
    client::prepare(&stream)?;
    let handshake = async {
        let Some((stream, no_zeroes)) = before_tls(stream).await? else {
            return Ok(None);
        };
        let (mut stream, host) = identity.accept(stream).await?;
        let opened = negotiate(&mut stream, &host, &exports, no_zeroes).await?;
        Ok::<_, io::Error>(opened.map(|opened| (stream, opened)))
    };
    let negotiated = tokio::time::timeout(HANDSHAKE_MAX, handshake)
        .await
        .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "the handshake took too long"))??;
    match negotiated {
        Some((stream, (export, guard))) => transmission::serve(stream, export, guard).await,
        None => Ok(()),
    }
}

struct ClientOption {
    number: u32,
    data: Vec<u8>,
}

/// Up to `STARTTLS`, the only thing that is done in the clear; whether the client knows
/// `NO_ZEROES`. `None`: the client left.
async fn before_tls(mut stream: TcpStream) -> io::Result<Option<(TcpStream, bool)>> {
    let flags = wire::FIXED_NEWSTYLE | wire::NO_ZEROES;
    stream.write_all(&[&wire::GREETING[..], &flags.to_be_bytes()].concat()).await?;
    let client_flags = stream.read_u32().await?;
    if client_flags & !u32::from(flags) != 0 || client_flags & u32::from(wire::FIXED_NEWSTYLE) == 0
    {
        return Err(invalid("the client's flags are not those of fixed newstyle"));
    }
    let no_zeroes = client_flags & u32::from(wire::NO_ZEROES) != 0;
    for _ in 0..OPTIONS_MAX {
        let asked = next_option(&mut stream).await?;
        match asked.number {
            option::STARTTLS if asked.data.is_empty() => {
                send(&mut stream, asked.number, reply::ACK, &[]).await?;
                return Ok(Some((stream, no_zeroes)));
            }
            option::STARTTLS => {
                send(&mut stream, asked.number, reply::ERR_INVALID, b"STARTTLS has no data")
                    .await?;
            }
            option::ABORT => {
                send(&mut stream, asked.number, reply::ACK, &[]).await?;
                return Ok(None);
            }
            option::EXPORT_NAME => return Err(invalid("an export was asked for without TLS")),
            number => {
                send(&mut stream, number, reply::ERR_TLS_REQD, b"TLS first").await?;
            }
        }
    }
    Err(invalid("too many options before TLS"))
}

/// Inside TLS, up to an open export. `None`: the client left.
async fn negotiate(
    stream: &mut ServerStream,
    host: &str,
    exports: &Exports,
    no_zeroes: bool,
) -> io::Result<Option<Opened>> {
    for _ in 0..OPTIONS_MAX {
        let asked = next_option(stream).await?;
        match asked.number {
            option::EXPORT_NAME => {
                let name = wire::parse_name(&asked.data)
                    .ok_or_else(|| invalid("the export's name is not one"))?;
                // This option has no way to say an error but to hang up.
                let (export, guard) =
                    open(exports, host, name).await.map_err(|error| invalid(&error.message))?;
                let mut answer = export.info().encode().to_vec();
                answer.resize(if no_zeroes { 10 } else { 134 }, 0);
                stream.write_all(&answer).await?;
                stream.flush().await?;
                return Ok(Some((export, guard)));
            }
            option::ABORT => {
                send(stream, asked.number, reply::ACK, &[]).await?;
                return Ok(None);
            }
            option::LIST => list(stream, &asked, exports).await?,
            option::INFO | option::GO => {
                if let Some(opened) = describe(stream, &asked, host, exports).await? {
                    return Ok(Some(opened));
                }
            }
            option::STARTTLS => {
                send(stream, asked.number, reply::ERR_INVALID, b"TLS is on already").await?;
            }
            number => send(stream, number, reply::ERR_UNSUP, &[]).await?,
        }
    }
    Err(invalid("too many options"))
}

async fn list(
    stream: &mut ServerStream,
    asked: &ClientOption,
    exports: &Exports,
) -> io::Result<()> {
    if !asked.data.is_empty() {
        return send(stream, option::LIST, reply::ERR_INVALID, b"LIST has no data").await;
    }
    for name in exports.names() {
        let answer = wire::option_reply(option::LIST, reply::SERVER, &wire::server_reply(&name));
        stream.write_all(&answer).await?;
    }
    send(stream, option::LIST, reply::ACK, &[]).await
}

/// Answers `INFO` and `GO`; the latter opens.
async fn describe(
    stream: &mut ServerStream,
    asked: &ClientOption,
    host: &str,
    exports: &Exports,
) -> io::Result<Option<Opened>> {
    let request = match InfoRequest::parse(&asked.data) {
        Ok(request) => request,
        Err(error) => {
            let message = error.to_string();
            send(stream, asked.number, reply::ERR_INVALID, message.as_bytes()).await?;
            return Ok(None);
        }
    };
    let found = if asked.number == option::GO {
        open(exports, host, request.name).await.map(|opened| (opened.0.info(), Some(opened)))
    } else {
        look_up(exports, request.name).await.map(|info| (info, None))
    };
    match found {
        Ok((export, opened)) => {
            let mut answer =
                wire::option_reply(asked.number, reply::INFO, &wire::export_info(&export));
            if asked.number == option::GO || request.wanted.contains(&info::BLOCK_SIZE) {
                let limits = wire::block_size_info();
                answer.extend(wire::option_reply(asked.number, reply::INFO, &limits));
            }
            if asked.number == option::GO || request.wanted.contains(&info::DESCRIPTION) {
                let description = wire::description_info(exports.epoch);
                answer.extend(wire::option_reply(asked.number, reply::INFO, &description));
            }
            answer.extend(wire::option_reply(asked.number, reply::ACK, &[]));
            stream.write_all(&answer).await?;
            stream.flush().await?;
            Ok(opened)
        }
        Err(error) => {
            let kind = match error.kind {
                ErrorKind::Stale | ErrorKind::InUse => reply::ERR_POLICY,
                _ => reply::ERR_UNKNOWN,
            };
            let message = wire::refusal(error.kind, &error.message);
            send(stream, asked.number, kind, message.as_bytes()).await?;
            Ok(None)
        }
    }
}

async fn open(exports: &Exports, host: &str, name: String) -> Result<Opened, Error> {
    let exports = exports.clone();
    let asking = host.to_owned();
    let (result, name) = blocking(move || (exports.open(&name, &asking), name)).await?;
    match &result {
        Ok(_) => tracing::info!(host, export = name, "opened for another host"),
        Err(error) => tracing::warn!(host, export = name, %error, "refused to another host"),
    }
    result
}

async fn look_up(exports: &Exports, name: String) -> Result<ExportInfo, Error> {
    let exports = exports.clone();
    blocking(move || exports.look_up(&name)).await?
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Error> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| Error::new(ErrorKind::Io, format!("open an export: {error}")))
}

async fn next_option(stream: &mut impl Stream) -> io::Result<ClientOption> {
    let mut header = [0; wire::OPTION_HEADER_BYTES];
    stream.read_exact(&mut header).await?;
    let (number, length) = match wire::parse_option(&header) {
        Ok(parsed) => parsed,
        Err(error) => {
            // The data of such an option is not waited for: say why, then hang up.
            let _ = send(stream, 0, reply::ERR_TOO_BIG, error.to_string().as_bytes()).await;
            return Err(io::Error::new(io::ErrorKind::InvalidData, error));
        }
    };
    let mut data = vec![0; length as usize];
    stream.read_exact(&mut data).await?;
    Ok(ClientOption { number, data })
}

async fn send(stream: &mut impl Stream, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
    stream.write_all(&wire::option_reply(option, kind, data)).await?;
    stream.flush().await
}

fn invalid(message: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message)
}

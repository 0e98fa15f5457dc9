//! The transmission phase of one connection: requests are read in order, executed at the same
//! time, and answered as they end.
//!
//! ```text
//!  reader ──request──> blocking pool ──reply──> writer
//!    │ takes room in memory                        │ gives it back
//! ```

use super::Stream;
use super::export::Export;
use super::wire::{self, Command, Request};
use crate::volumes::SessionGuard;
use std::io;
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

/// Memory of one connection for payloads on their way, in units of [`ROOM_UNIT_BYTES`].
const ROOM_UNITS: u32 = 1024;
const ROOM_UNIT_BYTES: u32 = 64 << 10;
/// Most requests of one connection that are executed at the same time.
const REQUESTS_MAX: u32 = 32;

const _: () = assert!(wire::PAYLOAD_BYTES_MAX / ROOM_UNIT_BYTES < ROOM_UNITS);

struct Reply {
    bytes: Vec<u8>,
    _room: OwnedSemaphorePermit,
}

/// Serves an open export until the peer leaves or the gate cuts it off; nothing touches the
/// export any more when this returns.
pub(crate) async fn serve(
    stream: impl Stream,
    export: Export,
    mut guard: Option<SessionGuard>,
) -> io::Result<()> {
    let executing = Arc::new(Semaphore::new(REQUESTS_MAX as usize));
    let result = converse(stream, export, guard.as_mut(), &executing).await;
    // Every request that was being executed gives its permit back when it no longer touches the
    // export; those that were only being read were dropped with the conversation.
    let _ = executing.acquire_many(REQUESTS_MAX).await;
    result
}

async fn converse(
    stream: impl Stream,
    export: Export,
    guard: Option<&mut SessionGuard>,
    executing: &Arc<Semaphore>,
) -> io::Result<()> {
    let (reader, writer) = tokio::io::split(stream);
    let (replies, queue) = mpsc::unbounded_channel();
    let reading = read(reader, Arc::new(export), executing.clone(), replies);
    let mut writing = Box::pin(write(writer, queue));
    let cut_off = async {
        match guard {
            Some(guard) => guard.stopped().await,
            None => std::future::pending().await,
        }
    };
    let both = async {
        tokio::select! {
            // The peer said that it leaves: it still gets the replies it waits for.
            result = reading => match result {
                Ok(()) => writing.await,
                Err(error) => Err(error),
            },
            result = &mut writing => result,
        }
    };
    tokio::select! {
        result = both => result,
        () = cut_off => Ok(()),
    }
}

async fn read(
    mut reader: impl AsyncRead + Unpin,
    export: Arc<Export>,
    executing: Arc<Semaphore>,
    replies: mpsc::UnboundedSender<Reply>,
) -> io::Result<()> {
    let room = Arc::new(Semaphore::new(ROOM_UNITS as usize));
    loop {
        let mut header = [0; wire::REQUEST_BYTES];
        match reader.read_exact(&mut header).await {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            result => result?,
        };
        let request = Request::parse(&header)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        if request.command == Some(Command::Disconnect) {
            return Ok(());
        }
        let units = 1 + request.length.min(wire::PAYLOAD_BYTES_MAX) / ROOM_UNIT_BYTES;
        let room = acquire(&room, units).await?;
        let slot = acquire(&executing, 1).await?;
        let mut payload = vec![0; request.payload_bytes()];
        reader.read_exact(&mut payload).await?;
        let (export, replies) = (export.clone(), replies.clone());
        tokio::task::spawn_blocking(move || {
            let bytes = answer(&export, &request, &payload);
            drop((export, slot));
            // Without a writer the connection is over, and nobody waits for this.
            let _ = replies.send(Reply { bytes, _room: room });
        });
    }
}

async fn acquire(semaphore: &Arc<Semaphore>, units: u32) -> io::Result<OwnedSemaphorePermit> {
    semaphore.clone().acquire_many_owned(units).await.map_err(io::Error::other)
}

fn answer(export: &Export, request: &Request, payload: &[u8]) -> Vec<u8> {
    match export.execute(request, payload, wire::SIMPLE_REPLY_BYTES) {
        Ok(mut bytes) => {
            let header = wire::simple_reply(request.cookie, None);
            bytes[..wire::SIMPLE_REPLY_BYTES].copy_from_slice(&header);
            bytes
        }
        Err(error) => wire::simple_reply(request.cookie, Some(error)).to_vec(),
    }
}

async fn write(
    mut writer: impl AsyncWrite + Unpin,
    mut replies: mpsc::UnboundedReceiver<Reply>,
) -> io::Result<()> {
    while let Some(mut reply) = replies.recv().await {
        loop {
            writer.write_all(&reply.bytes).await?;
            match replies.try_recv() {
                Ok(next) => reply = next,
                Err(_) => break,
            }
        }
        writer.flush().await?;
    }
    writer.shutdown().await
}

//! Brings images from other hosts: read over NBD, hashed as they arrive, kept only if they are
//! what was asked for. Requests for the same image share one transfer.

use crate::control::{Error, ErrorKind, PEERS_MAX, Peer, check_sha512};
use crate::image::check_hash;
use crate::images::Images;
use crate::nbd::client;
use crate::nbd::tls::{ClientStream, Identity};
use crate::nbd::wire::{self, Command, Request};
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::runtime::Handle;
use tokio::sync::mpsc;

/// Bytes that one request reads.
const BLOCK_BYTES: u32 = 1 << 20;
/// Requests under way at one time; with blocks that wait for an earlier one.
const WINDOW_BLOCKS: u64 = 8;
/// Blocks that have arrived and wait to be hashed.
const QUEUE_BLOCKS: usize = 4;
/// How long the peer may take for the next reply.
const REPLY_MAX: Duration = Duration::from_secs(30);

/// Fetches images, one transfer for each.
pub(crate) struct Fetcher {
    images: Arc<Images>,
    identity: Identity,
    runtime: Handle,
    under_way: Mutex<HashMap<String, Arc<Transfer>>>,
}

#[derive(Default)]
struct Transfer {
    outcome: Mutex<Option<Result<(), Error>>>,
    ended: Condvar,
}

impl Fetcher {
    pub(crate) fn new(images: Arc<Images>, identity: Identity, runtime: Handle) -> Self {
        Self { images, identity, runtime, under_way: Mutex::new(HashMap::new()) }
    }

    /// Has the image here when it returns well; blocks until then. `stop` ends it early.
    pub(crate) fn fetch(
        &self,
        sha512: &str,
        size_bytes: u64,
        from: &[Peer],
        stop: &AtomicBool,
    ) -> Result<(), Error> {
        check_sha512(sha512)?;
        if from.len() > PEERS_MAX {
            return Err(Error::invalid(format!("{} peers: at most {PEERS_MAX}", from.len())));
        }
        let (transfer, mine) = {
            let mut under_way = lock(&self.under_way);
            if self.images.get(sha512).is_some() {
                return Ok(());
            }
            match under_way.get(sha512) {
                Some(transfer) => (transfer.clone(), false),
                None => {
                    let transfer = Arc::new(Transfer::default());
                    under_way.insert(sha512.to_owned(), transfer.clone());
                    (transfer, true)
                }
            }
        };
        if mine {
            let outcome = self.try_each(sha512, size_bytes, from, stop);
            lock(&self.under_way).remove(sha512);
            *lock(&transfer.outcome) = Some(outcome.clone());
            transfer.ended.notify_all();
            return outcome;
        }
        let mut outcome = lock(&transfer.outcome);
        loop {
            if let Some(outcome) = &*outcome {
                return outcome.clone();
            }
            outcome = transfer.ended.wait(outcome).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn try_each(
        &self,
        sha512: &str,
        size_bytes: u64,
        from: &[Peer],
        stop: &AtomicBool,
    ) -> Result<(), Error> {
        let mut failures: Vec<Error> = Vec::new();
        for peer in from {
            match self.fetch_from(sha512, size_bytes, peer, stop) {
                Ok(()) => return Ok(()),
                Err(error) => {
                    tracing::warn!(sha512, host = peer.server_name, %error, "fetch an image");
                    failures.push(error);
                }
            }
        }
        // A wrong content is worse news than a host that is away, and a full disk here than both.
        let rank = |error: &Error| match error.kind {
            ErrorKind::NoSpace | ErrorKind::Io => 0,
            ErrorKind::HashMismatch => 1,
            ErrorKind::Unreachable => 2,
            _ => 3,
        };
        let kind = failures.iter().min_by_key(|error| rank(error)).map(|error| error.kind);
        let reasons: Vec<String> = failures.into_iter().map(|error| error.message).collect();
        Err(Error::new(
            kind.unwrap_or(ErrorKind::NotFound),
            match reasons.as_slice() {
                [] => format!("image {sha512}: no host is known to hold it"),
                _ => format!("image {sha512} came from no host: {}", reasons.join("; ")),
            },
        ))
    }

    fn fetch_from(
        &self,
        sha512: &str,
        size_bytes: u64,
        peer: &Peer,
        stop: &AtomicBool,
    ) -> Result<(), Error> {
        let mut intake = self.images.intake(size_bytes)?;
        let (blocks, mut arrived) = mpsc::channel::<Vec<u8>>(QUEUE_BLOCKS);
        let identity = self.identity.clone();
        let (peer, name) = (peer.clone(), format!("image/{sha512}"));
        let transfer = self.runtime.spawn(async move {
            let (stream, described) = client::connect(&identity, &peer, &name).await?;
            let info = described.info;
            if info.size_bytes != size_bytes {
                return Err(Error::new(
                    ErrorKind::HashMismatch,
                    format!(
                        "{} has {name} with {} bytes, asked for {size_bytes}",
                        peer.server_name, info.size_bytes
                    ),
                ));
            }
            read_all(stream, size_bytes, blocks).await.map_err(|error| {
                Error::unreachable(format!("read {name} from {}: {error}", peer.server_name))
            })
        });
        while let Some(block) = arrived.blocking_recv() {
            if stop.load(Ordering::Relaxed) {
                return Err(Error::unreachable("the storage process is stopping"));
            }
            intake.write(&block)?;
        }
        self.runtime
            .block_on(transfer)
            .map_err(|error| Error::new(ErrorKind::Io, format!("fetch an image: {error}")))??;
        let arrived = intake.finish()?;
        check_hash(&arrived.info, sha512, size_bytes)?;
        self.images.keep(arrived)?;
        Ok(())
    }
}

/// Reads an export from its start to its end, several blocks at a time, and passes it on in order.
async fn read_all(
    stream: ClientStream,
    size_bytes: u64,
    blocks: mpsc::Sender<Vec<u8>>,
) -> io::Result<()> {
    let (mut reader, mut writer) = tokio::io::split(stream);
    let total = size_bytes.div_ceil(u64::from(BLOCK_BYTES));
    let length =
        |block: u64| (size_bytes - block * u64::from(BLOCK_BYTES)).min(u64::from(BLOCK_BYTES));
    let mut asked = 0;
    let mut waiting = BTreeMap::new();
    for next in 0..total {
        while asked < total && asked < next + WINDOW_BLOCKS {
            ask(&mut writer, asked, length(asked) as u32).await?;
            asked += 1;
        }
        let block = loop {
            if let Some(block) = waiting.remove(&next) {
                break block;
            }
            let reply = receive(&mut reader, |block| {
                (block >= next && block < asked).then(|| length(block) as usize)
            });
            let (block, bytes) = tokio::time::timeout(REPLY_MAX, reply).await??;
            if waiting.insert(block, bytes).is_some() {
                return Err(invalid("a request was answered twice"));
            }
        };
        if blocks.send(block).await.is_err() {
            // Whoever takes the blocks has failed, and says why.
            return Ok(());
        }
    }
    let leave = Request { flags: 0, command: None, cookie: 0, offset: 0, length: 0 };
    writer.write_all(&leave.encode(Command::Disconnect)).await?;
    writer.shutdown().await
}

async fn ask(writer: &mut WriteHalf<ClientStream>, block: u64, length: u32) -> io::Result<()> {
    let offset = block * u64::from(BLOCK_BYTES);
    let request = Request { flags: 0, command: None, cookie: block, offset, length };
    writer.write_all(&request.encode(Command::Read)).await?;
    writer.flush().await
}

async fn receive(
    reader: &mut ReadHalf<ClientStream>,
    length: impl Fn(u64) -> Option<usize>,
) -> io::Result<(u64, Vec<u8>)> {
    let mut header = [0; wire::SIMPLE_REPLY_BYTES];
    reader.read_exact(&mut header).await?;
    let (error, block) = wire::parse_simple_reply(&header)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    if error != 0 {
        return Err(io::Error::other(format!("the peer's error {error}")));
    }
    let length = length(block).ok_or_else(|| invalid("a reply to nothing that was asked"))?;
    let mut bytes = vec![0; length];
    reader.read_exact(&mut bytes).await?;
    Ok((block, bytes))
}

fn invalid(message: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

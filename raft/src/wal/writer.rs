//! The one thread that writes: it takes all that waits, writes it as one frame, flushes once, and
//! calls every callback.

use std::{
    collections::VecDeque,
    io,
    path::PathBuf,
    sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError},
    thread,
    time::Instant,
};

use tokio::sync::watch;

use super::{
    frame::{FRAME_HEADER_BYTES, encode_frame},
    segment::{self, Identity, SEGMENT_HEADER_BYTES, Segment},
};

/// A frame takes what waits up to about this size.
const FRAME_BYTES_TARGET: usize = 1 << 20;
/// How many flushes the published median looks at.
const FSYNC_SAMPLES: usize = 256;

/// Called once, when what it came with is durable or never will be.
pub(crate) type Done = Box<dyn FnOnce(io::Result<()>) + Send>;

/// Encoded records that must lie in one frame.
pub(super) struct Item {
    pub(super) bytes: Vec<u8>,
    /// The greatest entry index among them.
    pub(super) last_index: Option<u64>,
    pub(super) latest: Latest,
    pub(super) done: Option<Done>,
}

/// The newest records that a new segment repeats, so that older segments can go.
#[derive(Default, Clone)]
pub(super) struct Latest {
    pub(super) vote: Option<Vec<u8>>,
    pub(super) committed: Option<Vec<u8>>,
    pub(super) purge: Option<(u64, Vec<u8>)>,
}

impl Latest {
    pub(super) fn replace_with(&mut self, newer: Latest) {
        self.vote = newer.vote.or(self.vote.take());
        self.committed = newer.committed.or(self.committed.take());
        self.purge = newer.purge.or(self.purge.take());
    }

    fn checkpoint(&self) -> Vec<u8> {
        let purge = self.purge.as_ref().map(|(_, bytes)| bytes);
        let parts = [self.vote.as_ref(), self.committed.as_ref(), purge];
        parts.into_iter().flatten().flatten().copied().collect()
    }
}

#[derive(Default)]
struct Queue {
    items: VecDeque<Item>,
    /// The newest committed record: written with the next frame, never alone, because losing it
    /// costs nothing but a later apply.
    committed: Option<Vec<u8>>,
    stopping: bool,
}

/// What submitters and the thread share.
pub(super) struct Shared {
    queue: Mutex<Queue>,
    wake: Condvar,
    failure: OnceLock<String>,
    failure_sender: watch::Sender<Option<String>>,
    fsync_us: Mutex<VecDeque<u32>>,
}

impl Shared {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            queue: Mutex::default(),
            wake: Condvar::new(),
            failure: OnceLock::new(),
            failure_sender: watch::Sender::new(None),
            fsync_us: Mutex::default(),
        })
    }

    pub(super) fn submit(&self, items: impl IntoIterator<Item = Item>) {
        let mut queue = lock(&self.queue);
        if queue.stopping || self.failure.get().is_some() {
            drop(queue);
            let error = self.error();
            items.into_iter().for_each(|item| finish(item, Err(copy(&error))));
            return;
        }
        queue.items.extend(items);
        drop(queue);
        self.wake.notify_one();
    }

    pub(super) fn note_committed(&self, record: Vec<u8>) {
        lock(&self.queue).committed = Some(record);
    }

    pub(super) fn stop(&self) {
        lock(&self.queue).stopping = true;
        self.wake.notify_one();
    }

    pub(super) fn failure(&self) -> watch::Receiver<Option<String>> {
        self.failure_sender.subscribe()
    }

    pub(super) fn error(&self) -> io::Error {
        match self.failure.get() {
            Some(reason) => io::Error::other(reason.clone()),
            None => io::Error::other("the log is closed"),
        }
    }

    pub(super) fn fsync_us_p50(&self) -> Option<u32> {
        let mut samples: Vec<u32> = lock(&self.fsync_us).iter().copied().collect();
        samples.sort_unstable();
        samples.get(samples.len() / 2).copied()
    }

    fn note_fsync(&self, started: Instant) {
        let mut samples = lock(&self.fsync_us);
        if samples.len() == FSYNC_SAMPLES {
            samples.pop_front();
        }
        samples.push_back(u32::try_from(started.elapsed().as_micros()).unwrap_or(u32::MAX));
    }

    /// Waits for work. `None` when asked to stop and nothing is left.
    fn next_batch(&self) -> Option<(Vec<Item>, Option<Vec<u8>>)> {
        let mut queue = lock(&self.queue);
        while queue.items.is_empty() && !queue.stopping {
            queue = self.wake.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
        let mut batch = Vec::new();
        let mut size_bytes = 0;
        while size_bytes < FRAME_BYTES_TARGET
            && let Some(item) = queue.items.pop_front()
        {
            size_bytes += item.bytes.len();
            batch.push(item);
        }
        let committed = queue.committed.take();
        (!batch.is_empty() || committed.is_some()).then_some((batch, committed))
    }
}

/// What the thread owns.
pub(super) struct Writer {
    pub(super) shared: Arc<Shared>,
    pub(super) directory: PathBuf,
    pub(super) identity: Identity,
    pub(super) segment_bytes: u64,
    pub(super) active: Segment,
    /// Sequence of the next frame.
    pub(super) sequence: u64,
    pub(super) latest: Latest,
    /// Older segments with the greatest entry index each ever held.
    pub(super) older: VecDeque<(PathBuf, Option<u64>)>,
    pub(super) active_last_index: Option<u64>,
    pub(super) prepared: Option<thread::JoinHandle<io::Result<Segment>>>,
}

impl Writer {
    /// Runs until stopped, or until the disk fails: then it stays to refuse what still comes.
    pub(super) fn run(mut self) {
        while let Some((batch, committed)) = self.shared.next_batch() {
            let result = self.write(&batch, committed);
            if let Err(error) = result {
                self.fail(batch, &error);
                return;
            }
            batch.into_iter().for_each(|item| finish(item, Ok(())));
            self.remove_purged();
        }
    }

    fn fail(&self, batch: Vec<Item>, error: &io::Error) {
        let reason = format!("can't write the log in {}: {error}", self.directory.display());
        tracing::error!(%reason, "the node stops: its log can't be trusted any more");
        let _ = self.shared.failure.set(reason.clone());
        self.shared.failure_sender.send_replace(Some(reason));
        let rest = std::mem::take(&mut lock(&self.shared.queue).items);
        for item in batch.into_iter().chain(rest) {
            finish(item, Err(self.shared.error()));
        }
    }

    fn write(&mut self, batch: &[Item], committed: Option<Vec<u8>>) -> io::Result<()> {
        let mut payload = Vec::new();
        if let Some(record) = committed {
            payload.extend_from_slice(&record);
            self.latest.committed = Some(record);
        }
        for item in batch {
            payload.extend_from_slice(&item.bytes);
        }
        if payload.is_empty() {
            return Ok(());
        }
        let checkpoint_bytes = self.latest.checkpoint().len();
        if !self.active.fits(FRAME_HEADER_BYTES + payload.len()) {
            self.rotate(FRAME_HEADER_BYTES + checkpoint_bytes + payload.len())?;
            let mut with_checkpoint = self.latest.checkpoint();
            with_checkpoint.extend_from_slice(&payload);
            payload = with_checkpoint;
        }
        let frame = encode_frame(self.sequence, &payload);
        let started = Instant::now();
        self.active.append(&frame)?;
        self.shared.note_fsync(started);
        self.sequence += 1;
        for item in batch {
            self.latest.replace_with(item.latest.clone());
            self.active_last_index = self.active_last_index.max(item.last_index);
        }
        self.prepare_ahead();
        Ok(())
    }

    /// Goes on in the next segment, which has room for a frame of `frame_bytes`.
    fn rotate(&mut self, frame_bytes: usize) -> io::Result<()> {
        let number = self.active.number + 1;
        let needed = (SEGMENT_HEADER_BYTES + frame_bytes) as u64;
        let prepared = match self.prepared.take().map(thread::JoinHandle::join) {
            Some(Ok(prepared)) => Some(prepared?),
            Some(Err(_)) | None => None,
        };
        let next = match prepared {
            Some(segment) if segment.capacity >= needed => segment,
            _ => {
                let capacity = self.segment_bytes.max(needed);
                segment::prepare(&self.directory, self.identity, number, capacity)?
            }
        };
        let next = segment::activate(&self.directory, next)?;
        let previous = std::mem::replace(&mut self.active, next);
        self.older.push_back((previous.path, self.active_last_index.take()));
        Ok(())
    }

    /// Zeroes the next segment beside us once this one is half full.
    fn prepare_ahead(&mut self) {
        if self.prepared.is_some() || self.active.offset < self.active.capacity / 2 {
            return;
        }
        let (directory, identity) = (self.directory.clone(), self.identity);
        let (number, capacity) = (self.active.number + 1, self.segment_bytes);
        let thread = thread::Builder::new().name("raft-wal-zero".to_owned());
        self.prepared =
            thread.spawn(move || segment::prepare(&directory, identity, number, capacity)).ok();
    }

    /// Removes the oldest segments as long as every entry in them is purged.
    fn remove_purged(&mut self) {
        let Some((purged, _)) = self.latest.purge else {
            return;
        };
        while let Some((path, last_index)) = self.older.front()
            && last_index.is_none_or(|last| last <= purged)
        {
            if let Err(error) = std::fs::remove_file(path) {
                tracing::warn!(path = %path.display(), %error, "can't remove a purged log segment");
                return;
            }
            self.older.pop_front();
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if let Some(prepared) = self.prepared.take()
            && let Ok(Ok(segment)) = prepared.join()
        {
            let _ = std::fs::remove_file(&segment.path);
        }
    }
}

fn finish(item: Item, result: io::Result<()>) {
    if let Some(done) = item.done {
        done(result);
    }
}

fn copy(error: &io::Error) -> io::Error {
    io::Error::other(error.to_string())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

//! The one writer: it takes all that waits, writes it as one frame, flushes once, and calls every
//! callback. On disks that block it is a thread, in the simulator a task.
//!
//! Without space the log waits instead of failing: nothing is acknowledged that isn't durable, the
//! next segment is tried again and again, and a reserve at each segment's end still takes votes, so
//! that a full disk on one node never costs the cluster its leader.

use std::{
    collections::VecDeque,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError},
    task::Waker,
    thread,
    time::{Duration, Instant},
};

use super::{
    frame::{FRAME_OVERHEAD_BYTES, encode_frame},
    segment::{self, Owner, SEGMENT_HEADER_BYTES, Segment},
    state_file::StateFile,
};
use crate::{
    disk::{Disk, DiskFile},
    watch,
};

/// A frame takes what waits up to about this size.
const FRAME_BYTES_TARGET: usize = 1 << 20;
/// How many flushes the published median looks at.
const FSYNC_SAMPLES: usize = 256;
/// Kept free at a segment's end for votes …
const RESERVE_BYTES_MAX: u64 = 64 << 10;
/// … or this part of a small segment.
const RESERVE_PART: u64 = 8;
/// What a frame with one urgent record takes at most.
const URGENT_BYTES: usize = 128;
/// Pause before space is looked for again.
pub(crate) const SPACE_PAUSE: Duration = Duration::from_millis(250);

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
    /// As a record, and as the state file's slot.
    pub(super) vote: Option<(Vec<u8>, Vec<u8>)>,
    pub(super) committed: Option<Vec<u8>>,
    pub(super) purge: Option<(u64, Vec<u8>)>,
}

impl Latest {
    pub(super) fn replace_with(&mut self, newer: Latest) {
        self.vote = newer.vote.or(self.vote.take());
        self.committed = newer.committed.or(self.committed.take());
        self.purge = newer.purge.or(self.purge.take());
    }

    pub(super) fn checkpoint(&self) -> Vec<u8> {
        let vote = self.vote.as_ref().map(|(record, _)| record);
        let purge = self.purge.as_ref().map(|(_, bytes)| bytes);
        let parts = [vote, self.committed.as_ref(), purge];
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
    waker: Option<Waker>,
}

/// What is written as one frame.
struct Batch {
    items: Vec<Item>,
    committed: Option<Vec<u8>>,
}

/// A writer whose next frame finds no room.
#[derive(Clone, Copy)]
struct Stalled {
    /// The active segment has room for a small frame.
    reserve_left: bool,
}

/// What the writer found to do.
enum Work {
    Write(Batch),
    /// Nothing came while space is missing: look for it again.
    LookForSpace,
    Stop,
}

/// What submitters and the writer share.
pub(super) struct Shared {
    queue: Mutex<Queue>,
    wake: Condvar,
    failure: OnceLock<String>,
    failure_sender: watch::Sender<Option<String>>,
    no_space: watch::Sender<Option<String>>,
    fsync_us: Mutex<VecDeque<u32>>,
}

impl Shared {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            queue: Mutex::default(),
            wake: Condvar::new(),
            failure: OnceLock::new(),
            failure_sender: watch::Sender::new(None),
            no_space: watch::Sender::new(None),
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
        self.notify(queue);
    }

    pub(super) fn note_committed(&self, record: Vec<u8>) {
        lock(&self.queue).committed = Some(record);
    }

    pub(super) fn stop(&self) {
        let mut queue = lock(&self.queue);
        queue.stopping = true;
        self.notify(queue);
    }

    fn notify(&self, mut queue: MutexGuard<'_, Queue>) {
        let waker = queue.waker.take();
        drop(queue);
        self.wake.notify_one();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    pub(super) fn failure(&self) -> watch::Receiver<Option<String>> {
        self.failure_sender.subscribe()
    }

    pub(super) fn no_space(&self) -> watch::Receiver<Option<String>> {
        self.no_space.subscribe()
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

    fn lacks_space(&self) -> bool {
        self.no_space.borrow().is_some()
    }

    /// Waits for work, on the writer's thread.
    fn next_work(&self, stalled: Option<Stalled>) -> Work {
        let mut queue = lock(&self.queue);
        loop {
            if let Some(work) = queue.take(stalled) {
                return work;
            }
            if stalled.is_none() && !self.lacks_space() {
                queue = self.wake.wait(queue).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let (again, waited) =
                self.wake.wait_timeout(queue, SPACE_PAUSE).unwrap_or_else(PoisonError::into_inner);
            queue = again;
            if waited.timed_out() {
                return queue.take(stalled).unwrap_or(Work::LookForSpace);
            }
        }
    }
}

impl Queue {
    /// What can be written now.
    fn take(&mut self, stalled: Option<Stalled>) -> Option<Work> {
        if let Some(stalled) = stalled {
            return self.take_urgent(stalled);
        }
        if self.items.is_empty() && !self.stopping {
            return None;
        }
        let mut items = Vec::new();
        let mut size_bytes = 0;
        while size_bytes < FRAME_BYTES_TARGET
            && let Some(item) = self.items.pop_front()
        {
            size_bytes += item.bytes.len();
            items.push(item);
        }
        let committed = self.committed.take();
        if items.is_empty() && committed.is_none() {
            return Some(Work::Stop);
        }
        Some(Work::Write(Batch { items, committed }))
    }

    /// What may pass entries that wait for space: votes, which are independent of them, and purges,
    /// which make space. (An entry behind its purge in the log counts as purged.)
    fn take_urgent(&mut self, stalled: Stalled) -> Option<Work> {
        if self.stopping {
            return Some(Work::Stop);
        }
        let is_urgent = |item: &Item| {
            item.latest.vote.is_some() || (stalled.reserve_left && item.latest.purge.is_some())
        };
        let at = self.items.iter().position(is_urgent)?;
        let items = self.items.remove(at).into_iter().collect();
        Some(Work::Write(Batch { items, committed: None }))
    }

    /// Gives back what found no room, in its order.
    fn give_back(&mut self, batch: Batch) {
        for item in batch.items.into_iter().rev() {
            self.items.push_front(item);
        }
        self.committed = self.committed.take().or(batch.committed);
    }
}

/// What the writer owns.
pub(crate) struct Writer<D: Disk> {
    pub(super) shared: Arc<Shared>,
    pub(super) disk: D,
    pub(super) directory: PathBuf,
    pub(super) owner: Owner,
    pub(super) segment_bytes: u64,
    pub(super) active: Segment<D::File>,
    pub(super) state: StateFile<D::File>,
    /// Sequence of the next frame.
    pub(super) sequence: u64,
    pub(super) latest: Latest,
    /// Older segments with the greatest entry index each ever held.
    pub(super) older: VecDeque<(PathBuf, Option<u64>)>,
    pub(super) active_last_index: Option<u64>,
    pub(super) prepared: Option<Ahead<D>>,
    /// Given back when the writer ends.
    pub(super) _lock: D::Lock,
}

/// The next segment, made ahead of need.
pub(super) enum Ahead<D: Disk> {
    Ready(Segment<D::File>),
    Beside(thread::JoinHandle<io::Result<Segment<D::File>>>),
}

/// A frame that is written and not yet flushed.
struct Written {
    frame_bytes: u64,
    vote: Option<Vec<u8>>,
}

impl<D: Disk> Writer<D> {
    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Runs until stopped, or until the disk fails: then it stays to refuse what still comes.
    pub(crate) fn run(mut self) {
        let mut stalled = None;
        loop {
            let batch = match self.shared.next_work(stalled) {
                Work::Stop => return self.refuse_rest(),
                Work::LookForSpace => {
                    stalled = None;
                    self.look_for_space();
                    continue;
                }
                Work::Write(batch) => batch,
            };
            let started = Instant::now();
            let written = match self.write(&batch, stalled.is_some()) {
                Ok(written) => written,
                Err(error) if is_no_space(&error) => {
                    stalled = Some(self.give_back(batch, &error));
                    continue;
                }
                Err(error) => return self.fail(batch, &error),
            };
            if let Err(error) = self.flush(written) {
                return self.fail(batch, &error);
            }
            self.shared.note_fsync(started);
            self.acknowledge(batch);
        }
    }

    /// As [`Writer::run`], as a task on a disk that doesn't block. `pause` passes between a write and
    /// its flush, and before space is looked for again.
    #[cfg(any(test, feature = "sim"))]
    pub(crate) async fn run_as_task<P: Future<Output = ()>>(
        mut self,
        mut pause: impl FnMut(Duration) -> P,
    ) {
        let mut stalled = None;
        loop {
            let work = if stalled.is_some() || self.shared.lacks_space() {
                pause(SPACE_PAUSE).await;
                lock(&self.shared.queue).take(stalled).unwrap_or(Work::LookForSpace)
            } else {
                self.next_work_as_task().await
            };
            let batch = match work {
                Work::Stop => return self.refuse_rest(),
                Work::LookForSpace => {
                    stalled = None;
                    self.look_for_space();
                    continue;
                }
                Work::Write(batch) => batch,
            };
            let written = match self.write(&batch, stalled.is_some()) {
                Ok(written) => written,
                Err(error) if is_no_space(&error) => {
                    stalled = Some(self.give_back(batch, &error));
                    continue;
                }
                Err(error) => return self.fail(batch, &error),
            };
            pause(Duration::ZERO).await;
            if let Err(error) = self.flush(written) {
                return self.fail(batch, &error);
            }
            self.acknowledge(batch);
        }
    }

    #[cfg(any(test, feature = "sim"))]
    async fn next_work_as_task(&self) -> Work {
        use std::task::Poll;
        std::future::poll_fn(|context| {
            let mut queue = lock(&self.shared.queue);
            match queue.take(None) {
                Some(work) => Poll::Ready(work),
                None => {
                    queue.waker = Some(context.waker().clone());
                    Poll::Pending
                }
            }
        })
        .await
    }

    fn fail(&self, batch: Batch, error: &io::Error) {
        let reason = format!("can't write the log in {}: {error}", self.directory.display());
        tracing::error!(%reason, "the node stops: its log can't be trusted any more");
        let _ = self.shared.failure.set(reason.clone());
        self.shared.failure_sender.send_replace(Some(reason));
        let rest = std::mem::take(&mut lock(&self.shared.queue).items);
        for item in batch.items.into_iter().chain(rest) {
            finish(item, Err(self.shared.error()));
        }
    }

    /// Whatever still waits when the writer ends, because it found no space, was never written.
    fn refuse_rest(&self) {
        let rest = std::mem::take(&mut lock(&self.shared.queue).items);
        rest.into_iter().for_each(|item| finish(item, Err(self.shared.error())));
    }

    /// Keeps what found no room until there is some.
    fn give_back(&self, batch: Batch, error: &io::Error) -> Stalled {
        lock(&self.shared.queue).give_back(batch);
        self.note_no_space(error);
        Stalled { reserve_left: self.active.fits(URGENT_BYTES) }
    }

    fn note_no_space(&self, error: &io::Error) {
        let directory = self.directory.display();
        let reason = format!("no space for the log in {directory}: {error}");
        self.shared.no_space.send_if_modified(|known| {
            let is_news = known.is_none();
            if is_news {
                tracing::error!(%reason, "the log waits for space; free some on its file system");
                *known = Some(reason);
            }
            is_news
        });
    }

    /// Tries to make the next segment again.
    fn look_for_space(&mut self) {
        if self.prepared.is_none() {
            let (number, capacity) = (self.active.number + 1, self.segment_bytes);
            let made = segment::prepare(&self.disk, &self.directory, self.owner, number, capacity);
            match made {
                Ok(segment) => self.prepared = Some(Ahead::Ready(segment)),
                Err(error) => return self.note_no_space(&error),
            }
        }
        if self.shared.no_space.send_replace(None).is_some() {
            tracing::info!("the log has space again");
        }
    }

    /// Writes a batch as one frame, not yet durable.
    fn write(&mut self, batch: &Batch, stalled: bool) -> io::Result<Option<Written>> {
        let mut payload = batch.committed.clone().unwrap_or_default();
        for item in &batch.items {
            payload.extend_from_slice(&item.bytes);
        }
        if payload.is_empty() {
            return Ok(None);
        }
        let vote = batch.items.iter().rev().find_map(|item| item.latest.vote.clone());
        let reserve = if stalled { 0 } else { self.reserve_bytes() };
        if !self.active.fits(FRAME_OVERHEAD_BYTES + payload.len() + reserve) {
            if let Some((_, slot)) = vote.filter(|_| stalled) {
                // Not even the reserve is left: the slots alone must do.
                self.state.save_vote_alone(&slot)?;
                return Ok(None);
            }
            let mut with_checkpoint = self.latest_with(batch).checkpoint();
            with_checkpoint.extend_from_slice(&payload);
            payload = with_checkpoint;
            self.rotate(FRAME_OVERHEAD_BYTES + payload.len())?;
        }
        let frame = encode_frame(self.sequence, &payload);
        self.write_frame(&frame)?;
        let vote = batch.items.iter().rev().find_map(|item| item.latest.vote.clone());
        Ok(Some(Written { frame_bytes: frame.len() as u64, vote: vote.map(|(_, slot)| slot) }))
    }

    fn write_frame(&self, frame: &[u8]) -> io::Result<()> {
        let offset = self.active.offset;
        self.active.file.write_all_at(frame, offset).inspect_err(|error| {
            if is_no_space(error) {
                // What was begun must not look like a damaged frame behind a shorter one.
                let _ = self.active.file.write_all_at(&vec![0; frame.len()], offset);
            }
        })
    }

    /// What a checkpoint before this batch says. Its own commit counts already, because it comes
    /// first in the frame.
    fn latest_with(&self, batch: &Batch) -> Latest {
        let mut latest = self.latest.clone();
        latest.committed = batch.committed.clone().or(latest.committed);
        latest
    }

    fn reserve_bytes(&self) -> usize {
        let room = self.active.capacity.saturating_sub(SEGMENT_HEADER_BYTES as u64);
        RESERVE_BYTES_MAX.min(room / RESERVE_PART) as usize
    }

    /// Makes what was written durable.
    fn flush(&mut self, written: Option<Written>) -> io::Result<()> {
        let Some(written) = written else {
            return Ok(());
        };
        self.active.file.sync_data()?;
        self.active.offset += written.frame_bytes;
        self.sequence += 1;
        if let Some(slot) = written.vote {
            self.state.save_vote(&slot)?;
        }
        self.state.note_acknowledged(self.sequence)
    }

    /// Tells everybody whose records are durable.
    fn acknowledge(&mut self, batch: Batch) {
        if let Some(record) = batch.committed {
            self.latest.committed = Some(record);
        }
        for item in batch.items {
            self.latest.replace_with(item.latest.clone());
            self.active_last_index = self.active_last_index.max(item.last_index);
            finish(item, Ok(()));
        }
        self.remove_purged();
        self.prepare_ahead();
    }

    /// Goes on in the next segment, which has room for a frame of `frame_bytes`.
    fn rotate(&mut self, frame_bytes: usize) -> io::Result<()> {
        let number = self.active.number + 1;
        let needed = (SEGMENT_HEADER_BYTES + frame_bytes) as u64;
        let prepared = match self.prepared.take() {
            Some(Ahead::Ready(segment)) => Some(segment),
            // A failed attempt is made again below, where its error counts.
            Some(Ahead::Beside(thread)) => thread.join().ok().and_then(Result::ok),
            None => None,
        };
        let next = match prepared {
            Some(segment) if segment.capacity >= needed => segment,
            _ => {
                // An oversized frame gets a segment of its own size, with a reserve behind it.
                let oversized = needed + needed / (RESERVE_PART - 1) + 1;
                let capacity = if needed + self.segment_bytes / RESERVE_PART > self.segment_bytes {
                    oversized.max(self.segment_bytes)
                } else {
                    self.segment_bytes
                };
                segment::prepare(&self.disk, &self.directory, self.owner, number, capacity)?
            }
        };
        let next = segment::activate(&self.disk, &self.directory, next)?;
        self.shared.no_space.send_if_modified(|reason| reason.take().is_some());
        let previous = std::mem::replace(&mut self.active, next);
        self.older.push_back((previous.path, self.active_last_index.take()));
        Ok(())
    }

    /// Zeroes the next segment beside us once this one is half full.
    fn prepare_ahead(&mut self) {
        if let Some(Ahead::Beside(thread)) = &self.prepared
            && thread.is_finished()
            && let Some(Ahead::Beside(thread)) = self.prepared.take()
        {
            match thread.join() {
                Ok(Ok(segment)) => self.prepared = Some(Ahead::Ready(segment)),
                Ok(Err(error)) if is_no_space(&error) => self.note_no_space(&error),
                // What else is wrong shows when the segment is needed.
                Ok(Err(_)) | Err(_) => {}
            }
        }
        let half_empty = self.active.offset < self.active.capacity / 2;
        if self.prepared.is_some() || half_empty || self.shared.lacks_space() {
            return;
        }
        let (disk, directory, owner) = (self.disk.clone(), self.directory.clone(), self.owner);
        let (number, capacity) = (self.active.number + 1, self.segment_bytes);
        let work = move || segment::prepare(&disk, &directory, owner, number, capacity);
        if D::BLOCKING {
            let thread = thread::Builder::new().name("raft-wal-zero".to_owned());
            self.prepared = thread.spawn(work).ok().map(Ahead::Beside);
            return;
        }
        match work() {
            Ok(segment) => self.prepared = Some(Ahead::Ready(segment)),
            Err(error) if is_no_space(&error) => self.note_no_space(&error),
            Err(_) => {}
        }
    }

    /// Removes the oldest segments as long as every entry in them is purged.
    fn remove_purged(&mut self) {
        let Some((purged, _)) = self.latest.purge else {
            return;
        };
        while let Some((path, last_index)) = self.older.front()
            && last_index.is_none_or(|last| last <= purged)
        {
            if let Err(error) = self.disk.remove(path) {
                tracing::warn!(path = %path.display(), %error, "can't remove a purged log segment");
                return;
            }
            self.older.pop_front();
        }
    }
}

impl<D: Disk> Drop for Writer<D> {
    fn drop(&mut self) {
        // In order: the mark becomes durable, what was prepared goes, the lock is given back.
        if let Err(error) = self.state.flush() {
            let path = self.state.path().display();
            tracing::warn!(%path, %error, "can't flush the state file");
        }
        let segment = match self.prepared.take() {
            Some(Ahead::Ready(segment)) => Some(segment),
            Some(Ahead::Beside(thread)) => thread.join().ok().and_then(Result::ok),
            None => None,
        };
        if let Some(segment) = segment {
            let _ = self.disk.remove(&segment.path);
        }
    }
}

/// Whether an error means that space is missing, which may come back.
pub(crate) fn is_no_space(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
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

//! The write-ahead log: votes, entries, commits, truncations and purges as one ordered chain of
//! records in preallocated segment files.
//!
//! What is acknowledged is on disk. At most the last frame can be torn by a crash, and is cut off
//! at the next start; damage anywhere else is an error that names file and offset.

mod frame;
mod segment;
#[cfg(test)]
mod tests;
mod writer;

use std::{
    collections::{BTreeMap, VecDeque},
    fs::{self, File, OpenOptions, TryLockError},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    thread,
};

pub(crate) use frame::Record;
pub(crate) use segment::Identity;
use tokio::sync::watch;
pub(crate) use writer::Done;
use writer::{Item, Latest, Shared, Writer};

use self::{
    frame::{decode_frame, decode_records, later_frame_exists},
    segment::{SEGMENT_HEADER_BYTES, Segment},
};
use crate::types::{LogEntry, LogId, Vote};

/// Size of an ordinary segment.
pub(crate) const SEGMENT_BYTES: u64 = 8 << 20;
/// The largest segment file that is read back.
const SEGMENT_BYTES_MAX: u64 = 256 << 20;
const LOCK_FILE: &str = "lock";

/// Why a log can't be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WalError {
    /// Another process has it.
    #[error("the raft directory {path} is in use by another process")]
    Locked {
        /// The directory.
        path: PathBuf,
    },
    /// The file system refused.
    #[error("can't {act} {path}")]
    Io {
        /// What was tried.
        act: &'static str,
        /// On what.
        path: PathBuf,
        /// What it answered.
        #[source]
        source: io::Error,
    },
    /// It was written by a newer version.
    #[error("{path} has log format version {version}, this program reads version 1")]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        version: u32,
    },
    /// It is another cluster's or another node's.
    #[error(
        "{path} belongs to node {found_node} of another cluster or to another node than {expected_node}"
    )]
    WrongIdentity {
        /// The file.
        path: PathBuf,
        /// Who wrote it.
        found_node: u64,
        /// Who reads it.
        expected_node: u64,
    },
    /// Acknowledged data is damaged. The node must be wiped and join again under a new id.
    #[error("{path} is damaged at byte {offset}: {reason}")]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// Where the damage begins.
        offset: u64,
        /// What is wrong there.
        reason: &'static str,
    },
}

/// Where and whose.
pub(crate) struct WalOptions {
    pub(crate) directory: PathBuf,
    pub(crate) identity: Identity,
    pub(crate) segment_bytes: u64,
}

/// What a log held when it was opened.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Recovered {
    pub(crate) vote: Option<Vote>,
    pub(crate) committed: Option<LogId>,
    pub(crate) purged: Option<LogId>,
    pub(crate) entries: BTreeMap<u64, LogEntry>,
}

impl Recovered {
    fn apply(&mut self, record: Record) {
        match record {
            Record::Vote(vote) => self.vote = Some(vote),
            Record::Entry(entry) => {
                self.entries.insert(entry.log_id.index, entry);
            }
            Record::Committed(log_id) => self.committed = Some(log_id),
            Record::Truncate(None) => self.entries.clear(),
            Record::Truncate(Some(log_id)) => {
                self.entries.split_off(&log_id.index.saturating_add(1));
            }
            Record::Purge(log_id) => {
                self.entries = self.entries.split_off(&log_id.index.saturating_add(1));
                self.purged = self.purged.max(Some(log_id));
            }
        }
    }

    /// Drops what a purge covered although an older segment still held it, and looks for holes.
    fn check(&mut self, directory: &Path) -> Result<(), WalError> {
        let mut expected = self.purged.map_or(0, |id| id.index.saturating_add(1));
        self.entries = self.entries.split_off(&expected);
        for index in self.entries.keys() {
            if *index != expected {
                return Err(WalError::Corrupt {
                    path: directory.to_owned(),
                    offset: 0,
                    reason: "an entry is missing between others",
                });
            }
            expected = expected.saturating_add(1);
        }
        Ok(())
    }
}

/// An open log.
pub(crate) struct Wal {
    shared: Arc<Shared>,
    thread: Mutex<Option<thread::JoinHandle<()>>>,
}

impl Wal {
    /// Takes the directory's lock, reads what is there and starts the writer.
    pub(crate) fn open(options: WalOptions) -> Result<(Self, Recovered), WalError> {
        let directory = options.directory.clone();
        fs::create_dir_all(&directory).map_err(io_error("create", &directory))?;
        let lock = take_lock(&directory)?;
        let mut recovery = Recovery::default();
        segment::remove_unfinished(&directory).map_err(io_error("clean", &directory))?;
        let listed = segment::list(&directory).map_err(io_error("list", &directory))?;
        let mut active = None;
        for (position, (number, path)) in listed.iter().enumerate() {
            let is_last = position + 1 == listed.len();
            if let Some((previous, _)) = position.checked_sub(1).and_then(|at| listed.get(at))
                && previous + 1 != *number
            {
                return Err(WalError::Corrupt {
                    path: path.clone(),
                    offset: 0,
                    reason: "the segment before it is missing",
                });
            }
            active = recovery.read(path, *number, options.identity, is_last)?;
        }
        let mut recovered = recovery.recovered;
        recovered.check(&directory)?;
        let active = match active {
            Some(active) => active,
            None => first_segment(&options)?,
        };
        recovery.segments.pop_back();
        let writer = Writer {
            shared: Shared::new(),
            directory,
            identity: options.identity,
            segment_bytes: options.segment_bytes,
            active,
            sequence: recovery.next_sequence,
            latest: latest_of(&recovered),
            older: recovery.segments,
            active_last_index: recovery.last_index,
            prepared: None,
        };
        Ok((Self::start(writer, lock)?, recovered))
    }

    fn start(writer: Writer, lock: File) -> Result<Self, WalError> {
        let shared = writer.shared.clone();
        let directory = writer.directory.clone();
        let thread = thread::Builder::new()
            .name("raft-wal".to_owned())
            .spawn(move || {
                writer.run();
                drop(lock);
            })
            .map_err(io_error("start the writer of", &directory))?;
        Ok(Self { shared, thread: Mutex::new(Some(thread)) })
    }

    /// Queues records in order; `done` is called when all of them are durable.
    pub(crate) fn submit(&self, records: &[Record], done: Option<Done>) {
        let mut done = done;
        let last = records.len().saturating_sub(1);
        if records.is_empty() {
            self.shared.submit([Item {
                bytes: Vec::new(),
                last_index: None,
                latest: Latest::default(),
                done,
            }]);
            return;
        }
        let items: Vec<Item> = records
            .iter()
            .enumerate()
            .map(|(at, record)| {
                let done = if at == last { done.take() } else { None };
                item(record, done)
            })
            .collect();
        self.shared.submit(items);
    }

    /// Remembers how far is committed, with the next frame.
    pub(crate) fn note_committed(&self, log_id: LogId) {
        self.shared.note_committed(Record::Committed(log_id).encode());
    }

    /// Changes once, to why the log stopped for good.
    pub(crate) fn failure(&self) -> watch::Receiver<Option<String>> {
        self.shared.failure()
    }

    /// Median of recent flushes.
    pub(crate) fn fsync_us_p50(&self) -> Option<u32> {
        self.shared.fsync_us_p50()
    }

    /// Writes what is queued, stops the thread and gives the directory's lock back.
    pub(crate) fn close(&self) {
        self.shared.stop();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread
            && thread.join().is_err()
        {
            tracing::error!("the log's writer panicked");
        }
    }
}

impl Drop for Wal {
    fn drop(&mut self) {
        self.close();
    }
}

fn item(record: &Record, done: Option<Done>) -> Item {
    let bytes = record.encode();
    let mut latest = Latest::default();
    let mut last_index = None;
    match record {
        Record::Vote(_) => latest.vote = Some(bytes.clone()),
        Record::Committed(_) => latest.committed = Some(bytes.clone()),
        Record::Purge(log_id) => latest.purge = Some((log_id.index, bytes.clone())),
        Record::Entry(entry) => last_index = Some(entry.log_id.index),
        Record::Truncate(_) => {}
    }
    Item { bytes, last_index, latest, done }
}

fn latest_of(recovered: &Recovered) -> Latest {
    Latest {
        vote: recovered.vote.map(|vote| Record::Vote(vote).encode()),
        committed: recovered.committed.map(|id| Record::Committed(id).encode()),
        purge: recovered.purged.map(|id| (id.index, Record::Purge(id).encode())),
    }
}

fn first_segment(options: &WalOptions) -> Result<Segment, WalError> {
    let directory = &options.directory;
    segment::prepare(directory, options.identity, 1, options.segment_bytes)
        .and_then(|segment| segment::activate(directory, segment))
        .map_err(io_error("create a log segment in", directory))
}

fn take_lock(directory: &Path) -> Result<File, WalError> {
    let path = directory.join(LOCK_FILE);
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .map_err(io_error("open", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(WalError::Locked { path: directory.to_owned() }),
        Err(TryLockError::Error(source)) => Err(io_error("lock", &path)(source)),
    }
}

fn io_error(act: &'static str, path: &Path) -> impl FnOnce(io::Error) -> WalError {
    let path = path.to_owned();
    move |source| WalError::Io { act, path, source }
}

/// Reading segments one after the other.
#[derive(Default)]
struct Recovery {
    recovered: Recovered,
    next_sequence: u64,
    segments: VecDeque<(PathBuf, Option<u64>)>,
    last_index: Option<u64>,
    /// Where the segment read last stopped being readable.
    stopped_at: Option<(PathBuf, u64)>,
    started: bool,
}

impl Recovery {
    fn read(
        &mut self,
        path: &Path,
        number: u64,
        identity: Identity,
        is_last: bool,
    ) -> Result<Option<Segment>, WalError> {
        let bytes = read_bounded(path)?;
        segment::check_header(path, &bytes, identity, number)?;
        self.last_index = None;
        let mut offset = SEGMENT_HEADER_BYTES;
        while let Some(frame) = decode_frame(&bytes[offset..]) {
            self.check_sequence(path, offset, frame.sequence)?;
            let records = decode_records(frame.payload).map_err(|_| WalError::Corrupt {
                path: path.to_owned(),
                offset: offset as u64,
                reason: "a record can't be read although its checksum is right",
            })?;
            for record in records {
                if let Record::Entry(entry) = &record {
                    self.last_index = self.last_index.max(Some(entry.log_id.index));
                }
                self.recovered.apply(record);
            }
            offset += frame.size_bytes;
        }
        self.stopped_at = Some((path.to_owned(), offset as u64));
        self.segments.push_back((path.to_owned(), self.last_index));
        if is_last {
            return self.open_last(path, number, &bytes, offset).map(Some);
        }
        Ok(None)
    }

    fn check_sequence(&mut self, path: &Path, at: usize, found: u64) -> Result<(), WalError> {
        if self.started && found != self.next_sequence {
            let (path, offset) = match self.stopped_at.take() {
                Some(stopped) if at == SEGMENT_HEADER_BYTES => stopped,
                _ => (path.to_owned(), at as u64),
            };
            return Err(WalError::Corrupt {
                path,
                offset,
                reason: "valid frames follow unreadable ones",
            });
        }
        self.started = true;
        self.next_sequence = found + 1;
        Ok(())
    }

    /// Cuts a torn frame off the end and opens the segment for writing.
    fn open_last(
        &self,
        path: &Path,
        number: u64,
        bytes: &[u8],
        offset: usize,
    ) -> Result<Segment, WalError> {
        let file =
            OpenOptions::new().read(true).write(true).open(path).map_err(io_error("open", path))?;
        let tail = &bytes[offset..];
        let torn_bytes = tail.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        if torn_bytes > 0 {
            if later_frame_exists(tail, self.next_sequence) {
                return Err(WalError::Corrupt {
                    path: path.to_owned(),
                    offset: offset as u64,
                    reason: "valid frames follow unreadable ones",
                });
            }
            tracing::warn!(path = %path.display(), offset, torn_bytes, "cutting off a torn write");
            file.write_all_at(&vec![0; torn_bytes], offset as u64)
                .and_then(|()| file.sync_all())
                .map_err(io_error("cut a torn write off", path))?;
        }
        Ok(Segment {
            number,
            file,
            path: path.to_owned(),
            capacity: bytes.len() as u64,
            offset: offset as u64,
        })
    }
}

fn read_bounded(path: &Path) -> Result<Vec<u8>, WalError> {
    let length = fs::metadata(path).map_err(io_error("read", path))?.len();
    if length > SEGMENT_BYTES_MAX {
        return Err(WalError::Corrupt {
            path: path.to_owned(),
            offset: SEGMENT_BYTES_MAX,
            reason: "the file is larger than any segment",
        });
    }
    fs::read(path).map_err(io_error("read", path))
}

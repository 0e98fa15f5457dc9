//! The write-ahead log: votes, entries, commits, truncations and purges as one ordered chain of
//! records in preallocated segment files.
//!
//! What is acknowledged is on disk. At most the last frame can be torn by a crash, and is cut off
//! at the next start. Damage anywhere else is found ([`recovery`]), named, and cut off with all
//! that follows it; the node that opened such a log must not vote before its peers have given it
//! back what it lost ([`crate::healing`]).

mod frame;
#[cfg(test)]
mod power_tests;
pub(crate) mod recovery;
mod segment;
pub(crate) mod state_file;
#[cfg(test)]
mod tests;
mod writer;

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    thread,
};

pub(crate) use frame::Record;
pub(crate) use recovery::{Opened, Opening, WalOptions};
pub(crate) use segment::Identity;
pub(crate) use writer::{Done, SPACE_PAUSE, Writer, is_no_space};
use writer::{Item, Latest, Shared};

use crate::{
    disk::Disk,
    types::{LogEntry, LogId, Membership, Payload, Vote},
    watch,
};

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
    /// It was written by another version.
    #[error("{path} has format version {version}, this program reads version {expected}")]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        version: u32,
        /// Ours.
        expected: u32,
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
    /// It is damaged in a way that peers can't heal. The node must be replaced under a new id.
    #[error(
        "{path} is damaged at byte {offset}: {reason}; replace this node with `trine cluster replace`"
    )]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// Where the damage begins.
        offset: u64,
        /// What is wrong there.
        reason: String,
    },
}

/// What a log held when it was opened.
#[derive(Debug, Default, Clone, PartialEq)]
pub(crate) struct Recovered {
    pub(crate) vote: Option<Vote>,
    pub(crate) committed: Option<LogId>,
    pub(crate) purged: Option<LogId>,
    pub(crate) entries: BTreeMap<u64, LogEntry>,
}

impl Recovered {
    /// The last entry it holds or has dropped.
    pub(crate) fn last(&self) -> Option<LogId> {
        self.entries.values().next_back().map(|entry| entry.log_id).or(self.purged)
    }

    /// The newest membership among its entries.
    pub(crate) fn membership(&self) -> Option<Membership> {
        self.entries.values().rev().find_map(|entry| match &entry.payload {
            Payload::Membership(membership) => Some(membership.clone()),
            _ => None,
        })
    }
}

/// An open log.
pub(crate) struct Wal {
    shared: Arc<Shared>,
    thread: Mutex<Option<thread::JoinHandle<()>>>,
}

impl Wal {
    /// Runs the writer on a thread of its own, as disks that block need it.
    pub(crate) fn start_thread<D: Disk>(&self, writer: Writer<D>) -> Result<(), WalError> {
        let directory = writer.directory().to_owned();
        let thread = thread::Builder::new()
            .name("raft-wal".to_owned())
            .spawn(move || writer.run())
            .map_err(io_error("start the writer of", &directory))?;
        *self.thread.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread);
        Ok(())
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

    /// Why the log can't grow now, while there is no space.
    pub(crate) fn no_space(&self) -> watch::Receiver<Option<String>> {
        self.shared.no_space()
    }

    /// Median of recent flushes.
    pub(crate) fn fsync_us_p50(&self) -> Option<u32> {
        self.shared.fsync_us_p50()
    }

    /// Writes what is queued, stops the writer and gives the directory's lock back.
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
        Record::Vote(vote) => {
            latest.vote = Some((bytes.clone(), state_file::encode_vote(Some(vote))));
        }
        Record::Committed(_) => latest.committed = Some(bytes.clone()),
        Record::Purge(log_id) => latest.purge = Some((log_id.index, bytes.clone())),
        Record::Entry(entry) => last_index = Some(entry.log_id.index),
        Record::Truncate(_) => {}
    }
    Item { bytes, last_index, latest, done }
}

fn latest_of(recovered: &Recovered) -> Latest {
    let vote = |vote: &Vote| (Record::Vote(*vote).encode(), state_file::encode_vote(Some(vote)));
    Latest {
        vote: recovered.vote.as_ref().map(vote),
        committed: recovered.committed.map(|id| Record::Committed(id).encode()),
        purge: recovered.purged.map(|id| (id.index, Record::Purge(id).encode())),
    }
}

fn io_error(act: &'static str, path: &Path) -> impl FnOnce(io::Error) -> WalError {
    let path = path.to_owned();
    move |source| WalError::Io { act, path, source }
}

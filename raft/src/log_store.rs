//! openraft's log, kept in memory for reading and in the write-ahead log for keeping.
//!
//! The entries after the last purge are few (`snapshot_every` + `keep_entries`), so readers never
//! touch the disk.

use std::{
    collections::BTreeMap,
    fmt::Debug,
    io,
    ops::{Bound, RangeBounds},
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
};

use openraft::{
    EntryPayload, LogState, OptionalSend, RaftLogReader,
    storage::{IOFlushed, RaftLogStorage},
};
use tokio::sync::oneshot;

use crate::{
    types::{LogEntry, LogId, Types, Vote},
    wal::{Record, Recovered, Wal},
};

/// Entries of one append request to a follower hold about this much at most.
const REPLICATION_BYTES_TARGET: usize = 4 << 20;

/// Entries in memory beyond this size ask for a snapshot before `snapshot_every` does.
pub(crate) const LOG_BYTES_TARGET: usize = 256 << 20;

/// The log of one node.
#[derive(Clone)]
pub(crate) struct LogStore {
    memory: Arc<RwLock<Memory>>,
    wal: Arc<Wal>,
}

#[derive(Default)]
struct Memory {
    vote: Option<Vote>,
    committed: Option<LogId>,
    purged: Option<LogId>,
    entries: BTreeMap<u64, LogEntry>,
    size_bytes: usize,
}

impl LogStore {
    pub(crate) fn new(wal: Arc<Wal>, recovered: Recovered) -> Self {
        let memory = Memory {
            vote: recovered.vote,
            committed: recovered.committed,
            purged: recovered.purged,
            size_bytes: recovered.entries.values().map(size_of_entry).sum(),
            entries: recovered.entries,
        };
        Self { memory: Arc::new(RwLock::new(memory)), wal }
    }

    /// How much memory the entries take.
    pub(crate) fn size_bytes(&self) -> usize {
        self.read().size_bytes
    }

    /// The last entry it holds or has dropped.
    pub(crate) fn last(&self) -> Option<LogId> {
        let memory = self.read();
        memory.entries.values().next_back().map(|entry| entry.log_id).or(memory.purged)
    }

    /// Whether it holds this very entry, or a snapshot took its place.
    pub(crate) fn holds(&self, log_id: LogId) -> bool {
        let memory = self.read();
        let held = memory.entries.get(&log_id.index).is_some_and(|entry| entry.log_id == log_id);
        held || memory.purged.is_some_and(|purged| purged.index >= log_id.index)
    }

    /// Returns once everything it holds now is durable.
    pub(crate) async fn flushed(&self) -> io::Result<()> {
        self.durable(&[]).await
    }

    fn read(&self) -> RwLockReadGuard<'_, Memory> {
        self.memory.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Memory> {
        self.memory.write().unwrap_or_else(PoisonError::into_inner)
    }

    async fn durable(&self, records: &[Record]) -> io::Result<()> {
        let (sender, receiver) = oneshot::channel();
        self.wal.submit(
            records,
            Some(Box::new(move |result| {
                let _ = sender.send(result);
            })),
        );
        receiver.await.unwrap_or_else(|_| Err(io::Error::other("the log's writer is gone")))
    }
}

impl Memory {
    fn forget(&mut self, removed: &BTreeMap<u64, LogEntry>) {
        let removed_bytes = removed.values().map(size_of_entry).sum();
        self.size_bytes = self.size_bytes.saturating_sub(removed_bytes);
    }
}

impl RaftLogReader<Types> for LogStore {
    async fn try_get_log_entries<R: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: R,
    ) -> Result<Vec<LogEntry>, io::Error> {
        if is_empty(&range) {
            return Ok(Vec::new());
        }
        Ok(self.read().entries.range(range).map(|(_, entry)| entry.clone()).collect())
    }

    async fn limited_get_log_entries(
        &mut self,
        start: u64,
        end: u64,
    ) -> Result<Vec<LogEntry>, io::Error> {
        let mut entries = Vec::new();
        let mut size_bytes = 0;
        if start >= end {
            return Ok(entries);
        }
        for entry in self.read().entries.range(start..end).map(|(_, entry)| entry) {
            size_bytes += size_of_entry(entry);
            if size_bytes > REPLICATION_BYTES_TARGET && !entries.is_empty() {
                break;
            }
            entries.push(entry.clone());
        }
        Ok(entries)
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        Ok(self.read().vote)
    }
}

impl RaftLogStorage<Types> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<Types>, io::Error> {
        let memory = self.read();
        let last = memory.entries.values().next_back().map(|entry| entry.log_id);
        Ok(LogState { last_purged_log_id: memory.purged, last_log_id: last.or(memory.purged) })
    }

    async fn get_log_reader(&mut self) -> Self::LogReader {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        self.durable(&[Record::Vote(*vote)]).await?;
        self.write().vote = Some(*vote);
        Ok(())
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), io::Error> {
        self.write().committed = committed;
        if let Some(log_id) = committed {
            self.wal.note_committed(log_id);
        }
        Ok(())
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, io::Error> {
        Ok(self.read().committed)
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<Types>) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = LogEntry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let entries: Vec<LogEntry> = entries.into_iter().collect();
        {
            let mut memory = self.write();
            for entry in &entries {
                memory.size_bytes += size_of_entry(entry);
                memory.entries.insert(entry.log_id.index, entry.clone());
            }
        }
        let records: Vec<Record> = entries.into_iter().map(Record::Entry).collect();
        self.wal.submit(&records, Some(Box::new(move |result| callback.io_completed(result))));
        Ok(())
    }

    async fn truncate_after(&mut self, last_log_id: Option<LogId>) -> Result<(), io::Error> {
        // Ordered before every later append, so nobody has to wait for it.
        self.wal.submit(&[Record::Truncate(last_log_id)], None);
        let keep_below = last_log_id.map_or(0, |id| id.index.saturating_add(1));
        let mut memory = self.write();
        let removed = memory.entries.split_off(&keep_below);
        memory.forget(&removed);
        Ok(())
    }

    async fn purge(&mut self, log_id: LogId) -> Result<(), io::Error> {
        self.wal.submit(&[Record::Purge(log_id)], None);
        let mut memory = self.write();
        let kept = memory.entries.split_off(&log_id.index.saturating_add(1));
        let removed = std::mem::replace(&mut memory.entries, kept);
        memory.forget(&removed);
        memory.purged = memory.purged.max(Some(log_id));
        Ok(())
    }
}

fn size_of_entry(entry: &LogEntry) -> usize {
    match &entry.payload {
        EntryPayload::Normal(command) => command.data.len() + 64,
        EntryPayload::Blank | EntryPayload::Membership(_) => 64,
    }
}

/// `BTreeMap::range` panics on a reversed range.
fn is_empty(range: &impl RangeBounds<u64>) -> bool {
    let start = match range.start_bound() {
        Bound::Included(start) => *start,
        Bound::Excluded(start) => start.saturating_add(1),
        Bound::Unbounded => 0,
    };
    match range.end_bound() {
        Bound::Included(end) => start > *end,
        Bound::Excluded(end) => start >= *end,
        Bound::Unbounded => false,
    }
}

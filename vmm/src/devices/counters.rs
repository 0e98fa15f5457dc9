//! What a device did, counted by its thread and read by control requests.

use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicU64, Ordering};

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds to it.
    pub fn add(&self, more: u64) {
        self.0.fetch_add(more, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Counters of a device, from when it was plugged.
#[derive(Debug, Default)]
pub struct Counters {
    /// See [`Counts::reads`].
    pub reads: Counter,
    /// See [`Counts::read_bytes`].
    pub read_bytes: Counter,
    /// See [`Counts::writes`].
    pub writes: Counter,
    /// See [`Counts::written_bytes`].
    pub written_bytes: Counter,
    /// See [`Counts::flushes`].
    pub flushes: Counter,
    /// See [`Counts::failures`].
    pub failures: Counter,
}

impl Counters {
    /// What they say now.
    pub fn counts(&self) -> Counts {
        Counts {
            reads: self.reads.get(),
            read_bytes: self.read_bytes.get(),
            writes: self.writes.get(),
            written_bytes: self.written_bytes.get(),
            flushes: self.flushes.get(),
            failures: self.failures.get(),
        }
    }
}

/// What a device did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Counts {
    /// A disk's reads; frames that a network device gave to the guest.
    pub reads: u64,
    /// Their bytes.
    pub read_bytes: u64,
    /// A disk's writes, discards and write-zeroes; frames that a network device took from the guest.
    pub writes: u64,
    /// Bytes of the writes and of the frames.
    pub written_bytes: u64,
    /// A disk's flushes.
    pub flushes: u64,
    /// Requests that failed or were malformed; frames that were lost.
    pub failures: u64,
}

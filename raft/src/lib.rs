//! Consensus: a replicated log of opaque commands, applied in the same order on every node.
//!
//! What it is: [openraft](https://docs.rs/openraft) joined to a write-ahead log of our own with
//! group commit, checksummed snapshot files, and a transport in which every peer is authenticated
//! by a certificate of the cluster's authority. It is generic over the [`StateMachine`].
//!
//! What it must never do: know a cloud resource, let an openraft type reach another crate, the disk
//! or the wire (the encodings are ours, in `codec`), answer a guarded read by a lease, or go on
//! after a failed `fdatasync`.
//!
//! Where to start reading: [`Raft`] in `node.rs` is what a user holds. A proposal goes
//! `node.rs` → openraft → `log_store.rs` → `wal/writer.rs` (one write, one `fdatasync`, all
//! callbacks) and, in parallel, `transport/network.rs` → a peer's `transport/server.rs` →
//! `requests.rs`; what is committed reaches `state_machine.rs`.
#![forbid(unsafe_code)]

mod backup;
mod clocks;
mod codec;
mod config;
pub mod disk;
mod healing;
mod leadership;
mod log_store;
mod membership;
mod node;
mod offline;
mod proposals;
mod reads;
mod requests;
mod runtime;
#[cfg(feature = "sim")]
pub mod sim;
#[cfg(any(test, feature = "sim"))]
pub mod sim_disk;
mod snapshot;
mod space;
mod state_machine;
mod status;
mod storage;
#[cfg(test)]
mod storage_suite;
mod transport;
mod types;
mod wal;
pub mod watch;

use std::net::SocketAddr;

use futures::future::BoxFuture;

pub use backup::{BackupInfo, read_backup};
pub use clocks::CLOCK_OFF_MAX;
pub use config::{Config, Tls};
pub use leadership::TransferError;
pub use membership::RemoveVoterError;
pub use node::{AddVoterError, BootstrapError, Raft, StartError};
pub use offline::{
    Inspection, OfflineError, RecoverAlone, RecoveredAlone, Restore, Restored, inspect,
    recover_alone, restore,
};
pub use proposals::{ProposeError, Proposed};
pub use reads::Unavailable;
pub use snapshot::SnapshotError;
pub use status::{MemberStatus, Status};
pub use transport::CallError;
pub use transport::client::Client;
pub use transport::tls::{TlsError, peer_name};
pub use wal::WalError;

/// Identifies a node for ever: never reused after a wipe or a removal.
pub type NodeId = u64;

/// The largest command the log takes.
pub const COMMAND_BYTES_MAX: usize = 1 << 20;

/// The largest request or answer of [`Raft::call`].
pub const CALL_BYTES_MAX: usize = 60 << 20;

/// What the log replicates. Pure; called in log order; never does I/O.
pub trait StateMachine: Send + Sync + 'static {
    /// Cheap copy of the whole state (persistent collections): what readers and snapshots see.
    type View: Clone + Send + Sync + 'static;

    /// Applies one command and returns the outcome's bytes. `entry.time_ms` is stamped by the
    /// leader and never goes back.
    fn apply(&mut self, entry: &Entry) -> Vec<u8>;

    /// The state as it is now.
    fn view(&self) -> Self::View;

    /// Writes a view as bytes, off the apply path.
    fn snapshot(view: &Self::View) -> Vec<u8>;

    /// Reads what [`StateMachine::snapshot`] wrote, perhaps by an older version.
    ///
    /// # Errors
    /// A sentence saying what can't be read.
    fn restore(bytes: &[u8]) -> Result<Self, String>
    where
        Self: Sized;
}

/// One command of the log, as the state machine sees it.
#[derive(Clone, PartialEq, Eq)]
pub struct Entry {
    /// Position in the log.
    pub index: u64,
    /// The leader's clock in milliseconds since the Unix epoch, made monotonic.
    pub time_ms: u64,
    /// Minted by the node that received the request; a retry carries the same.
    pub command_id: [u8; 16],
    /// The command after [`Prepare`].
    pub command: Vec<u8>,
}

impl std::fmt::Debug for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Entry")
            .field("index", &self.index)
            .field("time_ms", &self.time_ms)
            .field("command_bytes", &self.command.len())
            .finish_non_exhaustive()
    }
}

/// Runs on the leader before a command enters the log (placement is decided here).
pub trait Prepare: Send + Sync + 'static {
    /// Returns the command to replicate. It may run more than once for one command id.
    fn prepare(&self, command: Vec<u8>) -> Prepared;
}

/// A command as it enters the log.
pub struct Prepared {
    /// Its bytes.
    pub command: Vec<u8>,
    /// Dropped once the command has its outcome here, or nobody waits for one any more.
    pub held: Option<Box<dyn std::any::Any + Send>>,
}

impl Prepared {
    /// A command that nothing is held for.
    pub fn bare(command: Vec<u8>) -> Self {
        Self { command, held: None }
    }
}

impl std::fmt::Debug for Prepared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Prepared")
            .field("command_bytes", &self.command.len())
            .finish_non_exhaustive()
    }
}

/// A [`Prepare`] that leaves every command as it is.
#[derive(Debug, Clone, Copy, Default)]
pub struct Unprepared;

impl Prepare for Unprepared {
    fn prepare(&self, command: Vec<u8>) -> Prepared {
        Prepared::bare(command)
    }
}

/// Answers [`Raft::call`] from peers.
pub trait Calls: Send + Sync + 'static {
    /// Answers one request. `peer` is authenticated by its certificate, and need not be a member
    /// yet.
    fn call(&self, peer: NodeId, request: Vec<u8>) -> BoxFuture<'static, Vec<u8>>;
}

/// Where a member listens and what people call it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// The address of its raft transport.
    pub address: SocketAddr,
    /// Its host name; only for display.
    pub name: String,
}

//! What a node needs to know to take part in its cluster.

use std::{
    fmt,
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use crate::NodeId;

/// The settings of one node.
#[derive(Debug, Clone)]
pub struct Config {
    /// Stamped on every file and connection; another cluster's are refused.
    pub cluster_id: [u8; 16],
    /// This node.
    pub node_id: NodeId,
    /// Log and snapshots live here, under an exclusive lock.
    pub directory: PathBuf,
    /// Where peers connect. Never a wildcard address. Port 0 takes a free one.
    pub listen: SocketAddr,
    /// The cluster's authority and this node's certificate.
    pub tls: Tls,
    /// How often a leader reminds its followers.
    pub heartbeat_ms: u64,
    /// A follower that heard nothing for a random time from here …
    pub election_ms_min: u64,
    /// … to here asks for votes.
    pub election_ms_max: u64,
    /// Entries between two snapshots.
    pub snapshot_every: u64,
    /// Entries kept after a snapshot covers them, so that a follower that was away for a moment
    /// needs no snapshot.
    pub keep_entries: u64,
    /// How long [`crate::Raft::propose`] and [`crate::Raft::add_voter`] look for a leader.
    pub propose_deadline: Duration,
    /// How long [`crate::Raft::read`] looks for a leader.
    pub read_deadline: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            cluster_id: [0; 16],
            node_id: 0,
            directory: PathBuf::new(),
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            tls: Tls::default(),
            heartbeat_ms: 60,
            election_ms_min: 220,
            election_ms_max: 430,
            snapshot_every: 5_000,
            keep_entries: 1_000,
            propose_deadline: Duration::from_secs(10),
            read_deadline: Duration::from_secs(5),
        }
    }
}

/// PEM texts: who we trust and who we are.
#[derive(Clone, Default)]
pub struct Tls {
    /// The cluster's authority.
    pub ca: String,
    /// This node's certificate, with its chain. It names [`crate::peer_name`].
    pub cert: String,
    /// The certificate's private key.
    pub key: String,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").finish_non_exhaustive()
    }
}

//! What a node knows about itself and its cluster.

use serde::Serialize;

use crate::NodeId;

/// A moment's picture of one node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Status {
    /// This node.
    pub id: NodeId,
    /// Whom it follows; itself when it leads.
    pub leader: Option<NodeId>,
    /// Its term.
    pub term: u64,
    /// Index of the last entry in its log.
    pub last_log: Option<u64>,
    /// Index up to which it knows entries to be committed.
    pub committed: Option<u64>,
    /// Index up to which it has applied them.
    pub applied: Option<u64>,
    /// Last entry of its newest snapshot.
    pub snapshot: Option<u64>,
    /// Last entry it has dropped from its log.
    pub purged: Option<u64>,
    /// Who belongs to the cluster, by id.
    pub members: Vec<MemberStatus>,
    /// Milliseconds since a quorum last answered; only on the leader.
    pub quorum_ms: Option<u64>,
    /// Median of the recent `fdatasync` calls, in microseconds.
    pub fsync_us_p50: Option<u32>,
    /// What its log lost: until its peers have given it back, this node doesn't vote.
    pub healing: Option<String>,
    /// Why its log can't grow now; it goes on when there is space.
    pub no_space: Option<String>,
    /// Why it stopped for good.
    pub failure: Option<String>,
}

/// One member in a [`Status`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MemberStatus {
    /// The member.
    pub id: NodeId,
    /// Where its transport listens.
    pub address: String,
    /// What people call it.
    pub name: String,
    /// Whether it votes or only learns.
    pub voter: bool,
    /// Last entry it is known to hold; only on the leader.
    pub matched: Option<u64>,
}

//! openraft's generic types with our parameters filled in: nothing below this crate's surface
//! names an openraft generic anywhere else.

use std::{collections::BTreeSet, fmt, sync::Arc};

use openraft::vote::leader_id_adv;
use serde::{Deserialize, Serialize};

use crate::{Member, NodeId};

openraft::declare_raft_types!(
    /// The parameters of our openraft.
    pub(crate) Types:
        D = Command,
        R = Vec<u8>,
        Node = MemberNode,
        AsyncRuntime = crate::runtime::Runtime,
);

pub(crate) type LeaderId = leader_id_adv::LeaderId<u64, NodeId>;
pub(crate) type LogId = openraft::LogId<LeaderId>;
pub(crate) type Vote = openraft::Vote<LeaderId>;
pub(crate) type Payload = openraft::EntryPayload<Command, NodeId, MemberNode>;
pub(crate) type LogEntry = openraft::Entry<LeaderId, Payload>;
pub(crate) type Membership = openraft::Membership<NodeId, MemberNode>;
pub(crate) type StoredMembership = openraft::StoredMembership<LeaderId, NodeId, MemberNode>;
pub(crate) type SnapshotMeta = openraft::SnapshotMeta<LeaderId, NodeId, MemberNode>;
pub(crate) type Snapshot = openraft::Snapshot<LeaderId, NodeId, MemberNode, SnapshotData>;
pub(crate) type AppendRequest = openraft::raft::AppendEntriesRequest<Types>;
pub(crate) type AppendResult = openraft::raft::StreamAppendResult<Types>;
pub(crate) type VoteRequest = openraft::raft::VoteRequest<Types>;
pub(crate) type VoteResponse = openraft::raft::VoteResponse<Types>;

/// One proposed command with its stamp.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Command {
    pub(crate) time_ms: u64,
    pub(crate) id: [u8; 16],
    pub(crate) data: Arc<[u8]>,
}

// A command may carry secrets, so neither form shows its bytes.
impl fmt::Debug for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "command of {} bytes", self.data.len())
    }
}

/// What the replicated membership says about a node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MemberNode {
    pub(crate) address: String,
    pub(crate) name: String,
    /// Names the directory that the member was added with: a wiped node has another.
    pub(crate) incarnation: Incarnation,
}

/// Random bytes made with a node's directory.
pub(crate) type Incarnation = [u8; 16];

impl MemberNode {
    pub(crate) fn new(member: &Member, incarnation: Incarnation) -> Self {
        Self { address: member.address.to_string(), name: member.name.clone(), incarnation }
    }
}

/// A whole state as bytes: the time of its last command, the ids that were ever removed, then what
/// the state machine wrote.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct SnapshotData {
    pub(crate) time_ms: u64,
    pub(crate) removed: BTreeSet<NodeId>,
    pub(crate) state: Arc<Vec<u8>>,
}

impl fmt::Debug for SnapshotData {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "snapshot of {} bytes", self.state.len())
    }
}

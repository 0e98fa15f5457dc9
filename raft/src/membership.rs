//! Who votes: adding, moving and removing members, on the leader.
//!
//! An id is used once. A member is bound to the directory it was added with (its incarnation), and
//! an id that was removed is remembered in the replicated state and never added again.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use openraft::{ChangeMembers, async_runtime::watch::WatchReceiver};

use crate::{
    NodeId, Raft, StateMachine,
    codec::Encoder,
    node::Core,
    proposals::{Attempt, LeaderError, write_failed},
    runtime::now,
    transport::{Kind, TransportError, client::Lane, server::stopped},
    types::{Incarnation, MemberNode},
};

/// How long a node may take to say which directory it runs on.
const DESCRIBE_TIMEOUT: Duration = Duration::from_secs(3);

/// Why a node is still a member.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RemoveVoterError {
    /// No leader finished it in time. It may still happen: ask again.
    #[error("node {id} was not removed within {waited:?}: {reason}")]
    NotYet {
        /// The node.
        id: NodeId,
        /// How long it was tried.
        waited: Duration,
        /// What was seen last.
        reason: String,
    },
    /// The leader refused.
    #[error("node {id} can't be removed: {reason}")]
    Rejected {
        /// The node.
        id: NodeId,
        /// Why.
        reason: String,
    },
    /// This node is shut down or its disk failed.
    #[error("this node has stopped: {0}")]
    Stopped(String),
}

/// What a node says of itself.
pub(crate) struct Description {
    pub(crate) incarnation: Incarnation,
    /// Whether it could lead: its log is whole and has space.
    pub(crate) fit: bool,
}

impl<S: StateMachine> Raft<S> {
    /// Takes a node out of the cluster for ever: its id is never added again. Works on any node; a
    /// leader that removes itself stops leading. Asked again it does nothing.
    ///
    /// # Errors
    /// See [`RemoveVoterError`].
    pub async fn remove_voter(&self, id: NodeId) -> Result<(), RemoveVoterError> {
        let core = &self.core;
        let waited = core.config.propose_deadline;
        let deadline = now() + waited;
        let result = core
            .on_leader(deadline, |leader| async move {
                if leader == core.config.node_id {
                    return core.remove_voter_here(id).await;
                }
                let mut body = Encoder::default();
                body.u64(id);
                match core.ask(leader, Lane::Forward, Kind::RemoveVoter, body.0, deadline).await {
                    Err(error) => Attempt::from_transport(&error),
                    Ok(bytes) => Attempt::decode(&bytes, |body| body.u64())
                        .unwrap_or_else(|error| Attempt::Retry(error.to_string())),
                }
            })
            .await;
        let index = result.map_err(|error| match error {
            LeaderError::Deadline(reason) => RemoveVoterError::NotYet { id, waited, reason },
            LeaderError::Rejected(reason) | LeaderError::NoSpace(reason) => {
                RemoveVoterError::Rejected { id, reason }
            }
            LeaderError::Stopped(reason) => RemoveVoterError::Stopped(reason),
        })?;
        core.wait_applied(index, deadline).await;
        Ok(())
    }

    /// The random bytes that name this node's directory.
    pub fn incarnation(&self) -> [u8; 16] {
        self.core.incarnations.own
    }
}

impl<S: StateMachine> Core<S> {
    /// Adds a voter as the leader: it learns first, and votes once it has caught up. Returns the
    /// index of the membership.
    pub(crate) async fn add_voter_here(&self, id: NodeId, mut node: MemberNode) -> Attempt<u64> {
        if self.leader() != Some(self.config.node_id) {
            return Attempt::NotLeader(self.leader());
        }
        if self.published.picture().removed.contains(&id) {
            return Attempt::Rejected(format!(
                "node id {id} was removed from this cluster before, and ids are never used again"
            ));
        }
        let (is_voter, known, index) = {
            let metrics = self.raft.metrics();
            let metrics = metrics.borrow_watched();
            let membership = &metrics.membership_config;
            let is_voter = membership.voter_ids().any(|voter| voter == id);
            let known = membership.get_node(&id).cloned();
            (is_voter, known, membership.log_id().map_or(0, |id| id.index))
        };
        node.incarnation = match self.incarnation_of(id, &node).await {
            Ok(incarnation) => incarnation,
            Err(TransportError::Identity { reason, .. }) if known.is_some() => {
                return Attempt::Rejected(reason);
            }
            Err(error) => return Attempt::from_transport(&error),
        };
        if known.as_ref().is_some_and(|known| known.incarnation != node.incarnation) {
            return Attempt::Rejected(format!(
                "node {id} is a member and runs on another directory now: it was wiped"
            ));
        }
        if is_voter && known.as_ref() == Some(&node) {
            return Attempt::Done(index);
        }
        let learned = if known.is_some_and(|known| known != node) {
            let moved = ChangeMembers::SetNodes(BTreeMap::from([(id, node)]));
            self.raft.change_membership(moved, true).await
        } else {
            self.raft.add_learner(id, node, false).await
        };
        match learned {
            Ok(response) => self.learner_holds(id, response.log_id.index).await,
            Err(error) => return write_failed(error),
        }
        let voters = ChangeMembers::AddVoterIds(BTreeSet::from([id]));
        match self.raft.change_membership(voters, true).await {
            Ok(response) => Attempt::Done(response.log_id.index),
            Err(error) => write_failed(error),
        }
    }

    /// Removes a member as the leader: first its vote, then itself. Returns the index of the
    /// membership.
    pub(crate) async fn remove_voter_here(&self, id: NodeId) -> Attempt<u64> {
        if self.leader() != Some(self.config.node_id) {
            return Attempt::NotLeader(self.leader());
        }
        let (known, voters, index) = {
            let metrics = self.raft.metrics();
            let metrics = metrics.borrow_watched();
            let membership = &metrics.membership_config;
            let voters: BTreeSet<NodeId> = membership.voter_ids().collect();
            let index = membership.log_id().map_or(0, |id| id.index);
            (membership.get_node(&id).is_some(), voters, index)
        };
        if !known {
            return Attempt::Done(index);
        }
        if voters.len() == 1 && voters.contains(&id) {
            return Attempt::Rejected("it is the only voter".to_owned());
        }
        let change = if voters.contains(&id) {
            ChangeMembers::RemoveVoters(BTreeSet::from([id]))
        } else {
            ChangeMembers::RemoveNodes(BTreeSet::from([id]))
        };
        match self.raft.change_membership(change, false).await {
            Ok(response) => Attempt::Done(response.log_id.index),
            Err(error) => write_failed(error),
        }
    }

    async fn incarnation_of(
        &self,
        id: NodeId,
        node: &MemberNode,
    ) -> Result<Incarnation, TransportError> {
        if id == self.config.node_id {
            return Ok(self.incarnations.own);
        }
        let address = node
            .address
            .parse()
            .map_err(|_| TransportError::Refused(format!("{:?} is no address", node.address)))?;
        let link = self.peers.link(id, address, Lane::Forward);
        let answer = link.request(Kind::Describe, Vec::new(), DESCRIBE_TIMEOUT).await?;
        decode_description(&answer).map(|description| description.incarnation)
    }

    /// What a member says of itself.
    pub(crate) async fn describe(&self, member: NodeId) -> Result<Description, TransportError> {
        let deadline = now() + DESCRIBE_TIMEOUT;
        let answer = self.ask(member, Lane::Forward, Kind::Describe, Vec::new(), deadline).await?;
        decode_description(&answer)
    }

    pub(crate) fn handle_describe(&self) -> Vec<u8> {
        let fit = self.healing.borrow().is_none() && self.wal.no_space().borrow().is_none();
        let mut answer = Encoder::default();
        answer.raw(&self.incarnations.own);
        answer.u8(u8::from(fit));
        answer.0
    }

    /// Waits until a learner is known to hold an entry. A node that can't be reached must not
    /// become a voter: it would only weaken the quorum. The caller's deadline ends the wait, and
    /// so does the loss of leadership.
    async fn learner_holds(&self, id: NodeId, index: u64) {
        let mut metrics = self.raft.metrics();
        loop {
            let holds = match &metrics.borrow_watched().replication {
                None => true,
                Some(all) => {
                    let matched = all.get(&id).copied().flatten();
                    matched.is_some_and(|matched| matched.index >= index)
                }
            };
            if holds || metrics.changed().await.is_err() {
                return;
            }
        }
    }
}

fn decode_description(bytes: &[u8]) -> Result<Description, TransportError> {
    let mut decoder = crate::codec::Decoder(bytes);
    let read = decoder.id().and_then(|incarnation| {
        let fit = decoder.bool()?;
        decoder.end()?;
        Ok(Description { incarnation, fit })
    });
    read.map_err(|error| TransportError::Refused(error.to_string()))
}

/// Keeps what connections are checked against at what the membership says.
pub(crate) async fn watch_members<S: StateMachine>(core: Arc<Core<S>>) {
    let mut metrics = core.raft.metrics();
    let mut stop = core.stop.subscribe();
    let mut seen = None;
    loop {
        {
            let metrics = metrics.borrow_watched();
            let membership = &metrics.membership_config;
            if seen != Some(*membership.log_id()) {
                seen = Some(*membership.log_id());
                let members: HashMap<NodeId, Incarnation> =
                    membership.nodes().map(|(id, node)| (*id, node.incarnation)).collect();
                core.incarnations.replace(members);
            }
        }
        tokio::select! {
            biased;
            changed = metrics.changed() => if changed.is_err() { return },
            () = stopped(&mut stop) => return,
        }
    }
}

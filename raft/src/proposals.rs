//! Getting a command into the log from any node: find the leader, ask it, and ask the next one with
//! the same command id when the first is gone.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use openraft::{
    async_runtime::watch::WatchReceiver,
    errors::{ClientWriteError, RaftError},
};

use crate::{
    COMMAND_BYTES_MAX, NodeId, StateMachine,
    codec::{DecodeError, Decoder, Encoder},
    node::Core,
    runtime::{Instant, now, sleep, sleep_until, timeout_at, unix_ms},
    transport::{Kind, TransportError, chain, client::Lane, server::stopped},
    types::Command,
};

/// Proposals of one node that wait for their outcome.
pub(crate) const PROPOSALS_MAX: usize = 4_096;
/// Pause before the leader is looked for again.
const RETRY_PAUSE: Duration = Duration::from_millis(10);

/// A command that is committed and applied on this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proposed {
    /// Its position in the log.
    pub index: u64,
    /// What [`StateMachine::apply`] returned.
    pub outcome: Vec<u8>,
}

/// Why a proposal has no outcome.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProposeError {
    /// The command is larger than [`COMMAND_BYTES_MAX`]; it was not proposed.
    #[error("a command of {0} bytes is over the limit of {COMMAND_BYTES_MAX}")]
    TooLarge(usize),
    /// Too many proposals wait; it was not proposed.
    #[error("{PROPOSALS_MAX} proposals already wait on this node")]
    Overloaded,
    /// No leader with a quorum took it in time. It may still be applied: retry with the same id.
    #[error("no leader committed the command within {waited:?}: {reason}")]
    NoLeader {
        /// How long it was tried.
        waited: Duration,
        /// What was seen last.
        reason: String,
    },
    /// The cluster's disks are full; it was not proposed. Reads go on.
    #[error("the cluster takes no writes: {0}")]
    NoSpace(String),
    /// This node is shut down or its disk failed.
    #[error("this node has stopped: {0}")]
    Stopped(String),
}

/// What one try with one leader brought.
#[derive(Debug, Clone)]
pub(crate) enum Attempt<T> {
    Done(T),
    /// It does not lead, and perhaps knows who does.
    NotLeader(Option<NodeId>),
    /// Something passing.
    Retry(String),
    /// It will never work.
    Rejected(String),
    /// The leader's disk is full, and nobody else's is free.
    NoSpace(String),
}

const ATTEMPT_DONE: u8 = 0;
const ATTEMPT_NOT_LEADER: u8 = 1;
const ATTEMPT_RETRY: u8 = 2;
const ATTEMPT_REJECTED: u8 = 3;
const ATTEMPT_NO_SPACE: u8 = 4;

impl<T> Attempt<T> {
    pub(crate) fn encode(self, put: impl FnOnce(&mut Encoder, T)) -> Vec<u8> {
        let mut body = Encoder::default();
        match self {
            Self::Done(value) => {
                body.u8(ATTEMPT_DONE);
                put(&mut body, value);
            }
            Self::NotLeader(leader) => {
                body.u8(ATTEMPT_NOT_LEADER);
                body.option(leader, Encoder::u64);
            }
            Self::Retry(reason) => {
                body.u8(ATTEMPT_RETRY);
                body.bytes(reason.as_bytes());
            }
            Self::Rejected(reason) => {
                body.u8(ATTEMPT_REJECTED);
                body.bytes(reason.as_bytes());
            }
            Self::NoSpace(reason) => {
                body.u8(ATTEMPT_NO_SPACE);
                body.bytes(reason.as_bytes());
            }
        }
        body.0
    }

    pub(crate) fn decode(
        bytes: &[u8],
        get: impl FnOnce(&mut Decoder<'_>) -> Result<T, DecodeError>,
    ) -> Result<Self, DecodeError> {
        let mut body = Decoder(bytes);
        match body.u8()? {
            ATTEMPT_DONE => get(&mut body).map(Self::Done),
            ATTEMPT_NOT_LEADER => body.option(Decoder::u64).map(Self::NotLeader),
            ATTEMPT_RETRY => body.text().map(Self::Retry),
            ATTEMPT_REJECTED => body.text().map(Self::Rejected),
            ATTEMPT_NO_SPACE => body.text().map(Self::NoSpace),
            _ => Err(DecodeError("an answer of an unknown kind")),
        }
    }

    /// A request to a leader that failed on the way: somebody else may lead by now.
    pub(crate) fn from_transport(error: &TransportError) -> Self {
        Self::Retry(chain(error))
    }
}

/// Why no leader answered.
#[derive(Debug)]
pub(crate) enum LeaderError {
    Deadline(String),
    Rejected(String),
    NoSpace(String),
    Stopped(String),
}

impl<S: StateMachine> Core<S> {
    /// Tries one leader after the other until one answers or the deadline passes. An attempt is
    /// dropped when its node stops leading, so it must be safe to repeat.
    pub(crate) async fn on_leader<T, F, A>(
        &self,
        deadline: Instant,
        mut attempt: F,
    ) -> Result<T, LeaderError>
    where
        F: FnMut(NodeId) -> A,
        A: Future<Output = Attempt<T>>,
    {
        let mut reason = "no leader is known".to_owned();
        let mut hint = None;
        loop {
            if let Some(stopped) = self.stopped() {
                return Err(LeaderError::Stopped(stopped));
            }
            if now() >= deadline {
                return Err(LeaderError::Deadline(reason));
            }
            let Some(leader) = hint.take().or_else(|| self.leader()) else {
                self.leader_appears(deadline).await;
                continue;
            };
            let result = tokio::select! {
                biased;
                result = attempt(leader) => result,
                () = self.leader_goes(leader) => Attempt::Retry(format!("node {leader} stopped leading")),
                () = sleep_until(deadline) => Attempt::Retry(format!("node {leader} did not answer")),
            };
            match result {
                Attempt::Done(value) => return Ok(value),
                Attempt::Rejected(reason) => return Err(LeaderError::Rejected(reason)),
                Attempt::NoSpace(reason) => return Err(LeaderError::NoSpace(reason)),
                Attempt::NotLeader(Some(other)) if other != leader => {
                    reason = format!("node {leader} says node {other} leads");
                    hint = Some(other);
                }
                Attempt::NotLeader(_) => reason = format!("node {leader} does not lead"),
                Attempt::Retry(passing) => reason = passing,
            }
            sleep(RETRY_PAUSE).await;
        }
    }

    /// Whom this node believes to lead.
    pub(crate) fn leader(&self) -> Option<NodeId> {
        self.raft.metrics().borrow_watched().current_leader
    }

    async fn leader_appears(&self, deadline: Instant) {
        let mut metrics = self.raft.metrics();
        let mut stop = self.stop.subscribe();
        let appears = async {
            while metrics.borrow_watched().current_leader.is_none() {
                tokio::select! {
                    biased;
                    changed = metrics.changed() => if changed.is_err() { return },
                    () = stopped(&mut stop) => return,
                }
            }
        };
        let _ = timeout_at(deadline, appears).await;
        if self.leader().is_none() {
            sleep(RETRY_PAUSE).await;
        }
    }

    /// Returns once this node, having followed `leader`, no longer does.
    async fn leader_goes(&self, leader: NodeId) {
        let mut metrics = self.raft.metrics();
        let mut followed = false;
        loop {
            let current = metrics.borrow_watched().current_leader;
            followed |= current == Some(leader);
            if followed && current != Some(leader) {
                return;
            }
            if metrics.changed().await.is_err() {
                return;
            }
        }
    }

    pub(crate) async fn propose(
        self: &Arc<Self>,
        command_id: [u8; 16],
        command: Vec<u8>,
    ) -> Result<Proposed, ProposeError> {
        if command.len() > COMMAND_BYTES_MAX {
            return Err(ProposeError::TooLarge(command.len()));
        }
        let _permit = self.proposals.try_acquire().map_err(|_| ProposeError::Overloaded)?;
        let waited = self.config.propose_deadline;
        let deadline = now() + waited;
        let proposed = self
            .on_leader(deadline, |leader| {
                self.propose_to(leader, command_id, command.clone(), deadline)
            })
            .await;
        let proposed = proposed.map_err(|error| match error {
            LeaderError::Deadline(reason) => ProposeError::NoLeader { waited, reason },
            LeaderError::Rejected(_) => ProposeError::TooLarge(COMMAND_BYTES_MAX + 1),
            LeaderError::NoSpace(reason) => ProposeError::NoSpace(reason),
            LeaderError::Stopped(reason) => ProposeError::Stopped(reason),
        })?;
        if self.wait_applied(proposed.index, deadline).await {
            return Ok(proposed);
        }
        Err(ProposeError::NoLeader {
            waited,
            reason: format!("this node has not applied entry {} yet", proposed.index),
        })
    }

    async fn propose_to(
        &self,
        leader: NodeId,
        command_id: [u8; 16],
        command: Vec<u8>,
        deadline: Instant,
    ) -> Attempt<Proposed> {
        if leader == self.config.node_id {
            return self.propose_here(command_id, command).await;
        }
        let mut body = Encoder::default();
        body.raw(&command_id);
        body.raw(&command);
        let answer = self.ask(leader, Lane::Forward, Kind::Propose, body.0, deadline).await;
        match answer {
            Err(error) => Attempt::from_transport(&error),
            Ok(bytes) => Attempt::decode(&bytes, |body| {
                Ok(Proposed { index: body.u64()?, outcome: body.rest().to_vec() })
            })
            .unwrap_or_else(|error| Attempt::Retry(error.to_string())),
        }
    }

    /// Proposes as the leader: prepare, stamp, write.
    pub(crate) async fn propose_here(
        &self,
        command_id: [u8; 16],
        command: Vec<u8>,
    ) -> Attempt<Proposed> {
        if self.leader() != Some(self.config.node_id) {
            return Attempt::NotLeader(self.leader());
        }
        if let Some(reason) = self.wal.no_space().borrow().clone() {
            // Internal entries keep the room that is left.
            return if self.refusing.load(Ordering::Relaxed) {
                Attempt::NoSpace(format!("node {}: {reason}", self.config.node_id))
            } else {
                Attempt::Retry(format!(
                    "node {} hands its leadership over: {reason}",
                    self.config.node_id
                ))
            };
        }
        let prepared = self.prepare.prepare(command);
        if prepared.command.len() > COMMAND_BYTES_MAX {
            return Attempt::Rejected("the prepared command is too large".to_owned());
        }
        let data = Arc::from(prepared.command);
        let command = Command { time_ms: self.stamp(), id: command_id, data };
        let _held = prepared.held;
        match self.raft.client_write(command).await {
            Ok(response) => {
                Attempt::Done(Proposed { index: response.log_id.index, outcome: response.data })
            }
            Err(error) => write_failed(error),
        }
    }

    /// The clock in milliseconds, never behind an earlier stamp of this node.
    fn stamp(&self) -> u64 {
        let now_ms = unix_ms();
        self.clock_ms.fetch_max(now_ms, Ordering::Relaxed).max(now_ms)
    }
}

/// What a failed write to openraft means for the caller's next step.
pub(crate) fn write_failed<T>(
    error: RaftError<crate::types::Types, ClientWriteError<crate::types::Types>>,
) -> Attempt<T> {
    use openraft::errors::ChangeMembershipError as Change;
    match error {
        RaftError::APIError(
            ClientWriteError::ForwardToLeader(forward)
            | ClientWriteError::LogEntryDiscarded(forward),
        ) => Attempt::NotLeader(forward.leader_id),
        RaftError::APIError(ClientWriteError::ChangeMembershipError(
            error @ (Change::InProgress(_)
            | Change::LearnerNotFound(_)
            | Change::UncommittedLeaderLog(_)),
        )) => Attempt::Retry(error.to_string()),
        RaftError::APIError(error) => Attempt::Rejected(error.to_string()),
        RaftError::Fatal(fatal) => Attempt::Retry(fatal.to_string()),
    }
}

//! Linearizable reads on any node, by ReadIndex: the leader proves that it still leads by one round
//! of heartbeats, which all readers that wait share; then the reader waits until its own state has
//! got as far.

use std::{sync::Arc, time::Duration};

use openraft::{
    ReadPolicy,
    async_runtime::watch::WatchReceiver,
    errors::{LinearizableReadError, RaftError},
};
use tokio::sync::{mpsc, oneshot};

use crate::{
    NodeId, StateMachine,
    node::{Core, OpenRaft},
    proposals::{Attempt, LeaderError},
    runtime::{Instant, now, spawn, timeout, timeout_at},
    transport::{
        Kind,
        client::{Lane, Peers},
    },
};

/// Readers of one node that wait for a round.
const READERS_MAX: usize = 16_384;
/// How long one round may take before its readers look for the leader again.
const ROUND_TIMEOUT: Duration = Duration::from_secs(2);

/// Why a guarded read is impossible now: no quorum can be reached from this node.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no linearizable read within {waited:?}: {reason}")]
pub struct Unavailable {
    /// How long it was tried.
    pub waited: Duration,
    /// What was seen last.
    pub reason: String,
}

/// Rounds that many callers share: who comes while one runs joins the next.
pub(crate) struct Rounds {
    waiting: mpsc::Sender<oneshot::Sender<Attempt<u64>>>,
}

impl Rounds {
    pub(crate) fn start<F, A>(run: F) -> Self
    where
        F: Fn() -> A + Send + 'static,
        A: Future<Output = Attempt<u64>> + Send,
    {
        let (waiting, mut callers) = mpsc::channel::<oneshot::Sender<_>>(READERS_MAX);
        drop(spawn(async move {
            while let Some(first) = callers.recv().await {
                let mut sharing = vec![first];
                while let Ok(next) = callers.try_recv() {
                    sharing.push(next);
                }
                let result = timeout(ROUND_TIMEOUT, run())
                    .await
                    .unwrap_or_else(|_| Attempt::Retry("the round took too long".to_owned()));
                for caller in sharing {
                    let _ = caller.send(result.clone());
                }
            }
        }));
        Self { waiting }
    }

    /// The index that the state must have reached to be current.
    pub(crate) async fn join(&self) -> Attempt<u64> {
        let (sender, receiver) = oneshot::channel();
        if self.waiting.send(sender).await.is_err() {
            return Attempt::Retry("the node is shutting down".to_owned());
        }
        receiver.await.unwrap_or_else(|_| Attempt::Retry("the node is shutting down".to_owned()))
    }
}

/// A round on the leader itself.
pub(crate) fn local_rounds<S: StateMachine>(raft: &OpenRaft<S>) -> Rounds {
    let raft = raft.clone();
    Rounds::start(move || {
        let raft = raft.clone();
        async move {
            match raft.get_read_linearizer(ReadPolicy::ReadIndex).await {
                Ok(linearizer) => Attempt::Done(linearizer.read_log_id().index()),
                Err(RaftError::APIError(LinearizableReadError::ForwardToLeader(forward))) => {
                    Attempt::NotLeader(forward.leader_id)
                }
                Err(error) => Attempt::Retry(error.to_string()),
            }
        }
    })
}

/// A round that a follower asks its leader for.
pub(crate) fn remote_rounds<S: StateMachine>(
    me: NodeId,
    raft: &OpenRaft<S>,
    peers: &Arc<Peers>,
) -> Rounds {
    let (raft, peers) = (raft.clone(), peers.clone());
    Rounds::start(move || {
        let (raft, peers) = (raft.clone(), peers.clone());
        async move { ask_leader(me, &raft, &peers).await }
    })
}

async fn ask_leader<S: StateMachine>(
    me: NodeId,
    raft: &OpenRaft<S>,
    peers: &Peers,
) -> Attempt<u64> {
    let (leader, address) = {
        let metrics = raft.metrics();
        let metrics = metrics.borrow_watched();
        let leader = metrics.current_leader;
        let node = leader.and_then(|id| metrics.membership_config.get_node(&id).cloned());
        (leader, node.and_then(|node| node.address.parse().ok()))
    };
    let (Some(leader), Some(address)) = (leader, address) else {
        return Attempt::NotLeader(None);
    };
    if leader == me {
        return Attempt::Retry("this node has just become the leader".to_owned());
    }
    let link = peers.link(leader, address, Lane::Forward);
    match link.request(Kind::ReadIndex, Vec::new(), ROUND_TIMEOUT).await {
        Ok(bytes) => Attempt::decode(&bytes, |body| body.u64())
            .unwrap_or_else(|error| Attempt::Retry(error.to_string())),
        Err(error) => Attempt::from_transport(&error),
    }
}

impl<S: StateMachine> Core<S> {
    pub(crate) async fn read(self: &Arc<Self>) -> Result<S::View, Unavailable> {
        let waited = self.config.read_deadline;
        let deadline = now() + waited;
        let index = self
            .on_leader(deadline, |leader| {
                let rounds = if leader == self.config.node_id {
                    &self.local_reads
                } else {
                    &self.remote_reads
                };
                rounds.join()
            })
            .await;
        let index = index.map_err(|error| match error {
            LeaderError::Deadline(reason)
            | LeaderError::Rejected(reason)
            | LeaderError::NoSpace(reason)
            | LeaderError::Stopped(reason) => Unavailable { waited, reason },
        })?;
        if self.wait_applied(index, deadline).await {
            return Ok(self.published.view());
        }
        Err(Unavailable { waited, reason: format!("this node has not applied entry {index} yet") })
    }

    /// Waits until this node has applied an entry; `false` when the deadline passes first.
    pub(crate) async fn wait_applied(&self, index: u64, deadline: Instant) -> bool {
        let mut applied = self.published.applied();
        timeout_at(deadline, applied.wait_for(|applied| *applied >= index))
            .await
            .is_ok_and(|reached| reached.is_ok())
    }
}

//! Handing leadership over on purpose, so that nobody waits for an election to be called.

use std::time::Duration;

use crate::runtime::{sleep, timeout};
use openraft::async_runtime::watch::WatchReceiver;

use crate::{NodeId, Raft, StateMachine};

/// How long the chosen node may take to be elected.
const TRANSFER_WITHIN: Duration = Duration::from_secs(5);
/// It is asked again after this long: it may have been behind.
const ASK_AGAIN_AFTER: Duration = Duration::from_millis(500);

/// Why another node does not lead.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TransferError {
    /// Only the leader can hand over.
    #[error("node {me} does not lead, so it can't hand over")]
    NotLeader {
        /// The node that was asked.
        me: NodeId,
    },
    /// The chosen node has no vote.
    #[error("node {to} is no voter of the cluster, so it can't lead")]
    NotVoter {
        /// The chosen node.
        to: NodeId,
    },
    /// It was not elected in time.
    #[error("node {to} was not elected within {within:?}")]
    NotYet {
        /// The chosen node.
        to: NodeId,
        /// How long it was tried.
        within: Duration,
    },
    /// This node is shut down or its disk failed.
    #[error("this node has stopped: {0}")]
    Stopped(String),
}

impl<S: StateMachine> Raft<S> {
    /// On the leader: lets another voter lead, and returns once somebody else does.
    ///
    /// # Errors
    /// See [`TransferError`].
    pub async fn transfer_leader(&self, to: NodeId) -> Result<(), TransferError> {
        let me = self.node_id();
        if !self.is_leader() {
            return Err(TransferError::NotLeader { me });
        }
        if !self.status().members.iter().any(|member| member.id == to && member.voter) {
            return Err(TransferError::NotVoter { to });
        }
        if to == me {
            return Ok(());
        }
        let asking = async {
            loop {
                let asked = self.core.raft.trigger().transfer_leader(to).await;
                asked.map_err(|fatal| TransferError::Stopped(fatal.to_string()))?;
                if timeout(ASK_AGAIN_AFTER, self.another_leads()).await.is_ok() {
                    return Ok(());
                }
            }
        };
        let within = TRANSFER_WITHIN;
        timeout(within, asking).await.unwrap_or(Err(TransferError::NotYet { to, within }))
    }

    /// Before a planned stop: a leader lets the voter lead that has most of the log. Best effort
    /// within a bound; what fails here, an election repairs.
    pub async fn hand_over(&self, within: Duration) {
        let me = self.node_id();
        let status = self.status();
        let followers = status.members.iter().filter(|member| member.voter && member.id != me);
        let best = followers.max_by_key(|member| (member.matched, std::cmp::Reverse(member.id)));
        let Some(to) = best.map(|member| member.id).filter(|_| self.is_leader()) else {
            return;
        };
        match timeout(within, self.transfer_leader(to)).await {
            Ok(Ok(())) => tracing::info!(to, "leadership was handed over"),
            Ok(Err(error)) => tracing::info!(%error, "leadership was not handed over"),
            Err(_) => tracing::info!(to, "leadership was not handed over in time"),
        }
    }

    async fn another_leads(&self) {
        let me = self.node_id();
        let mut metrics = self.core.raft.metrics();
        loop {
            let leader = metrics.borrow_watched().current_leader;
            if leader.is_some_and(|leader| leader != me) {
                return;
            }
            if metrics.changed().await.is_err() {
                // It is shut down; nobody else's leading will be seen here.
                sleep(TRANSFER_WITHIN).await;
            }
        }
    }
}

//! A leader whose log has no space hands its leadership to a voter that has some; when nobody has,
//! it goes on leading (reads need a leader) and refuses writes.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use openraft::async_runtime::watch::WatchReceiver;

use crate::{
    NodeId, StateMachine,
    node::Core,
    runtime::{sleep, timeout},
    transport::server::stopped,
};

/// Pause between two looks for a successor.
const PAUSE: Duration = Duration::from_secs(1);
/// How long all voters may take to say how they are.
const LOOK_TIMEOUT: Duration = Duration::from_secs(5);

/// Watches the log's space until the node stops.
pub(crate) async fn watch_space<S: StateMachine>(core: Arc<Core<S>>) {
    let mut no_space = core.wal.no_space();
    let mut stop = core.stop.subscribe();
    loop {
        let missing = no_space.borrow_and_update().is_some();
        if missing && core.leader() == Some(core.config.node_id) {
            let successor = timeout(LOOK_TIMEOUT, core.successor()).await.ok().flatten();
            core.refusing.store(successor.is_none(), Ordering::Relaxed);
            if let Some(successor) = successor {
                tracing::warn!(successor, "no space for the log: handing leadership over");
                let _ = core.raft.trigger().transfer_leader(successor).await;
            }
        } else if !missing {
            core.refusing.store(false, Ordering::Relaxed);
        }
        tokio::select! {
            biased;
            changed = no_space.changed() => if changed.is_err() { return },
            () = sleep(PAUSE), if missing => {}
            () = stopped(&mut stop) => return,
        }
    }
}

impl<S: StateMachine> Core<S> {
    /// The voter that lags least among those that could lead.
    async fn successor(&self) -> Option<NodeId> {
        let mut voters: Vec<(Option<u64>, NodeId)> = {
            let metrics = self.raft.metrics();
            let metrics = metrics.borrow_watched();
            let matched = |id: &NodeId| {
                let all = metrics.replication.as_ref()?;
                all.get(id).copied().flatten().map(|log_id| log_id.index)
            };
            let voters = metrics.membership_config.voter_ids();
            voters.filter(|id| *id != self.config.node_id).map(|id| (matched(&id), id)).collect()
        };
        voters.sort_unstable();
        while let Some((_, voter)) = voters.pop() {
            if self.describe(voter).await.is_ok_and(|description| description.fit) {
                return Some(voter);
            }
        }
        None
    }
}

//! The node's pulse: tells the leader that this host lives.

use super::Node;
use super::calls::{PeerAnswer, PeerCall};
use super::liveness::HEARTBEAT_EVERY;
use controller::ids::HostId;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::time::MissedTickBehavior;

/// How soon a change of the leader is noticed: a new one must know of every host before it places.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Beats until the node ends.
pub(super) async fn run(node: Arc<Node>) {
    let mut ticks = tokio::time::interval(LOOK_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut last = (None, Instant::now());
    loop {
        ticks.tick().await;
        let Ok(leader) = node.raft().map(|raft| raft.status().leader) else { continue };
        let (told, at) = last;
        if leader != told || at.elapsed() >= HEARTBEAT_EVERY {
            beat(&node, leader).await;
            last = (leader, Instant::now());
        }
    }
}

/// One beat, now.
pub(super) async fn beat_once(node: &Node) {
    if let Ok(raft) = node.raft() {
        beat(node, raft.status().leader).await;
    }
}

async fn beat(node: &Node, leader: Option<u64>) {
    let now = Instant::now();
    let leading = leader == Some(node.config.node_id);
    node.heartbeats.set_leading(leading, now);
    match leader {
        Some(_) if leading => node.heartbeats.hear(node.host(), now),
        Some(leader) => tell(node, HostId(leader)).await,
        None => {}
    }
}

async fn tell(node: &Node, leader: HostId) {
    match node.call(leader, &PeerCall::Heartbeat, HEARTBEAT_EVERY).await {
        Ok(PeerAnswer::Up(up)) => node.heartbeats.told(up),
        Ok(other) => tracing::debug!(?other, "the leader answered a heartbeat with nonsense"),
        Err(error) => tracing::debug!("no answer to a heartbeat: {error:#}"),
    }
}

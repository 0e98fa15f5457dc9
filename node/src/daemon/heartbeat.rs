//! The node's pulse: tells the leader that this host lives.

use super::calls::{PeerAnswer, PeerCall};
use super::liveness::HEARTBEAT_EVERY;
use super::Node;
use controller::ids::HostId;
use std::sync::Arc;
use std::time::Instant;
use tokio::time::MissedTickBehavior;

/// Beats until the node ends.
pub(super) async fn beat(node: Arc<Node>) {
    let mut ticks = tokio::time::interval(HEARTBEAT_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let Ok(status) = node.raft().map(|raft| raft.status()) else { continue };
        let leading = status.leader == Some(node.config.node_id);
        node.heartbeats.set_leading(leading, Instant::now());
        match status.leader {
            Some(_) if leading => node.heartbeats.hear(node.host(), Instant::now()),
            Some(leader) => tell(&node, HostId(leader)).await,
            None => {}
        }
    }
}

async fn tell(node: &Node, leader: HostId) {
    match node.call(leader, &PeerCall::Heartbeat, HEARTBEAT_EVERY).await {
        Ok(PeerAnswer::Up(up)) => node.heartbeats.told(up),
        Ok(other) => tracing::debug!(?other, "the leader answered a heartbeat with nonsense"),
        Err(error) => tracing::debug!("no answer to a heartbeat: {error:#}"),
    }
}

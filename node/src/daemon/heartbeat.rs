//! The node's pulse: tells the leader that this host lives, and renews the host's lease on changing
//! disks with what the leader answers.

use super::Node;
use super::calls::{PeerAnswer, PeerCall};
use abi::lease;
use controller::ids::HostId;
use controller::plan::leases::HEARTBEAT_EVERY;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::MissedTickBehavior;

/// How soon a change of the leader is noticed: a new one must know of every host before it places.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How long the leader may take to answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);

/// Beats until the node ends.
pub(super) async fn run(node: Arc<Node>) {
    let mut ticks = tokio::time::interval(LOOK_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut last = (None, lease::now());
    loop {
        ticks.tick().await;
        node.note_leadership();
        let Some(leader) = leader(&node) else { continue };
        let (told, at) = last;
        if Some(leader) != told || lease::now().saturating_sub(at) >= HEARTBEAT_EVERY {
            last = (Some(leader), lease::now());
            tokio::select! {
                () = tell(&node, leader) => {}
                () = goes(&node, leader) => {}
            }
        }
        renew(&node);
    }
}

/// One beat, now.
pub(super) async fn beat_once(node: &Node) {
    node.note_leadership();
    if let Some(leader) = leader(node) {
        tell(node, leader).await;
        renew(node);
    }
}

fn leader(node: &Node) -> Option<HostId> {
    node.raft().ok()?.status().leader.map(HostId)
}

/// Returns once somebody else leads.
async fn goes(node: &Node, leading: HostId) {
    while leader(node) == Some(leading) {
        tokio::time::sleep(LOOK_EVERY).await;
        renew(node);
    }
}

fn renew(node: &Node) {
    // Before the node has all its parts there is nothing to renew.
    if node.agent().is_ok()
        && let Err(error) = node.heartbeats.renew_page(node)
    {
        tracing::warn!("guests' writes will stop: {error:#}");
    }
}

async fn tell(node: &Node, leader: HostId) {
    let asked = lease::now();
    match node.call(leader, &PeerCall::Heartbeat, ANSWER_WITHIN).await {
        Ok(PeerAnswer::Heard { up, lease }) => {
            node.heartbeats.told(up);
            if let Some(lease) = lease {
                node.heartbeats.granted(asked, lease.index, lease.ms);
            }
        }
        Ok(other) => tracing::debug!(?other, "the leader answered a heartbeat with nonsense"),
        Err(error) => tracing::debug!("no answer to a heartbeat: {error:#}"),
    }
}

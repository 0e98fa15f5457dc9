//! Whether this node still belongs to its cluster. One that was removed gets no word of it by the
//! log, so a node that hears of no quorum asks whoever it knows, and ends when it learns that.

use super::Node;
use super::calls::{PeerAnswer, PeerCall};
use super::start::raft_tls;
use crate::joining::{PEERS_FILE_NAME, Peer};
use anyhow::{Result, bail};
use controller::ids::HostId;
use std::sync::Arc;
use std::time::Duration;

/// How often a node looks whether it hears of a quorum.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// How long a peer may take to answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// What a node is told that does not belong to the cluster (any more).
pub(super) fn refusal(id: u64) -> String {
    format!(
        "node {id} is no host of this cluster: it was removed, or replaced by another. Its id is \
         never given again; to take this machine back into the cluster, make a new data directory \
         with `trine join`"
    )
}

/// Looks until the node ends.
pub(super) async fn watch(node: Arc<Node>) {
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let Ok(raft) = node.raft() else { continue };
        if node.quorum.look(raft).await {
            continue;
        }
        for peer in known_peers(&node) {
            match ask(&node, &peer).await {
                Ok(false) => {
                    node.end(refusal(node.config.node_id));
                    return;
                }
                Ok(true) => break,
                Err(error) => tracing::debug!(peer = peer.id, "no word on our standing: {error:#}"),
            }
        }
    }
}

/// Members as the log knows them, else as `trine join` was told them.
pub(super) fn known_peers(node: &Node) -> Vec<Peer> {
    let members = node.raft().map(|raft| raft.status().members).unwrap_or_default();
    let others = members.into_iter().filter(|member| member.id != node.config.node_id);
    let peers: Vec<Peer> =
        others.filter_map(|m| Some(Peer { id: m.id, address: m.address.parse().ok()? })).collect();
    if !peers.is_empty() {
        return peers;
    }
    let text = std::fs::read(node.directory.join(PEERS_FILE_NAME)).unwrap_or_default();
    serde_json::from_slice(&text).unwrap_or_default()
}

async fn ask(node: &Node, peer: &Peer) -> Result<bool> {
    let answer = raft::Client::call(
        peer.address,
        &raft_tls(node),
        node.config.cluster_bytes(),
        node.config.node_id,
        PeerCall::Standing.encode(),
        ANSWER_WITHIN,
    )
    .await?;
    match PeerAnswer::decode(&answer)? {
        PeerAnswer::Standing { host } => Ok(host),
        other => bail!("node {} answered {other:?}", peer.id),
    }
}

/// Whether a peer is a host of the cluster, by a state that is not stale.
pub(super) async fn of(node: &Node, peer: raft::NodeId) -> Result<PeerAnswer> {
    let state = node.raft()?.read().await?;
    Ok(PeerAnswer::Standing { host: state.cluster.hosts.contains_key(&HostId(peer)) })
}

//! Replacing, removing and leading: the acts on the cluster's membership.

use super::super::calls::PeerCall;
use super::super::{Node, join_service};
use super::{Held, find, propose};
use anyhow::{Context, Result, bail};
use controller::ids::HostId;
use controller::state::cluster::ClusterCommand;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long the leader may take to hand over, and the others to follow.
const TRANSFER_WITHIN: Duration = Duration::from_secs(10);
/// Pause between two looks at who leads.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// A token with which a new machine takes a dead host's place.
pub(super) async fn replace(
    node: &Arc<Node>,
    host: &str,
    ttl_seconds: u64,
    force: bool,
) -> Result<Value> {
    let state = node.raft()?.read().await?;
    let host = find(&state, host)?;
    if host.id == node.host() {
        bail!("host {} is this one; ask a host that stays", host.name);
    }
    if node.liveness()?.up.contains(&host.id) && !force {
        bail!(
            "host {} ({}) is alive; stop it first (trine stop --guests), or say --force: it will be \
             treated as dead, and its servers are made anew elsewhere",
            host.name,
            host.id
        );
    }
    let mut issued = join_service::issue_token(node, ttl_seconds, Some(host.id)).await?;
    issued["replaces"] = json!({"id": host.id, "name": host.name});
    issued["held"] = Held::by(&state, host.id).json();
    Ok(issued)
}

/// Takes a host out: of consensus first, then of the state.
pub(super) async fn remove(node: &Arc<Node>, host: &str, force: bool) -> Result<Value> {
    let raft = node.raft()?;
    let state = raft.read().await?;
    let host = find(&state, host)?;
    let held = Held::by(&state, host.id);
    if !held.is_empty() && !force {
        bail!(
            "host {} ({}) still holds {held}. Evacuate or delete these first; --force removes the \
             host with them: they are lost",
            host.name,
            host.id
        );
    }
    let members = raft.status().members;
    let voters = members.iter().filter(|member| member.voter);
    if voters.clone().count() == 1 && voters.clone().all(|voter| voter.id == host.id.0) {
        bail!("host {} ({}) is the cluster's last member; it can't be removed", host.name, host.id);
    }
    raft.remove_voter(host.id.0).await?;
    propose(node, ClusterCommand::RemoveHost { id: host.id, force }).await?;
    tracing::warn!(host = %host.id, name = host.name, "an operator removed a host");
    Ok(json!({"id": host.id, "name": host.name, "lost": held.json()}))
}

/// Lets another node lead.
pub(super) async fn transfer(node: &Arc<Node>, to: Option<&str>) -> Result<Value> {
    let state = node.raft()?.read().await?;
    let leader = leader(node)?;
    let to = match to {
        Some(host) => find(&state, host)?.id,
        None => best_follower(node, leader).await?,
    };
    if to != leader {
        node.call(leader, &PeerCall::TransferLeader { to: to.0 }, TRANSFER_WITHIN).await?;
    }
    let started = Instant::now();
    while node.raft()?.status().leader != Some(to.0) {
        if started.elapsed() > TRANSFER_WITHIN {
            bail!("host {to} does not lead after {} s", TRANSFER_WITHIN.as_secs());
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
    Ok(json!({"leader": to, "before": leader}))
}

fn leader(node: &Node) -> Result<HostId> {
    let leader = node.raft()?.status().leader;
    leader.map(HostId).context("the cluster has no leader at the moment")
}

/// The voter that has most of the log, as the leader knows.
async fn best_follower(node: &Arc<Node>, leader: HostId) -> Result<HostId> {
    let status = super::status::of(node, leader).await?;
    let members = status["members"].as_array().cloned().unwrap_or_default();
    let followers = members
        .iter()
        .filter(|member| member["voter"] == true && member["id"] != json!(leader))
        .filter_map(|member| Some((member["matched"].as_u64(), member["id"].as_u64()?)));
    let best = followers.max_by_key(|(matched, id)| (*matched, std::cmp::Reverse(*id)));
    let (_, id) = best.context("the cluster has no other voter")?;
    Ok(HostId(id))
}

//! How the cluster is, asked of every member.

use super::super::Node;
use super::super::calls::{PeerAnswer, PeerCall};
use super::Held;
use anyhow::{Result, bail};
use controller::ids::HostId;
use controller::state::State;
use controller::state::cluster::Host;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;

/// How long a member may take to say how it is.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);

/// Everything about members and hosts. It needs no quorum, and says where there is none.
pub(super) async fn cluster(node: &Arc<Node>) -> Result<Value> {
    let raft = node.raft()?;
    let quorum = tokio::time::timeout(ANSWER_WITHIN, raft.read()).await;
    let quorum = matches!(quorum, Ok(Ok(_)));
    let (mine, state) = (raft.status(), raft.view());
    let asked = mine
        .members
        .iter()
        .map(|member| async move { (member, of(node, HostId(member.id)).await) });
    let answers = futures::future::join_all(asked).await;
    let newest = answers.iter().filter_map(|(_, answer)| answer.as_ref().ok());
    let newest = newest.filter_map(|status| status["committed"].as_u64()).max().unwrap_or(0);
    let members: Vec<Value> = answers
        .iter()
        .map(|(member, answer)| member_json(member, answer, mine.leader, newest))
        .collect();
    let up = node.liveness()?.up;
    let hosts: Vec<Value> = state
        .cluster
        .hosts
        .values()
        .map(|host| host_json(&state, host, up.contains(&host.id), &mine.members))
        .collect();
    Ok(json!({
        "cluster_id": node.config.cluster_id,
        "asked": node.config.node_id,
        "quorum": quorum,
        "leader": mine.leader,
        "term": mine.term,
        "feature_level": state.cluster.feature_level,
        "members": members,
        "hosts": hosts,
    }))
}

/// A member's own word on its consensus.
pub(super) async fn of(node: &Node, member: HostId) -> Result<Value> {
    match node.call(member, &PeerCall::Consensus, ANSWER_WITHIN).await? {
        PeerAnswer::Consensus(status) => Ok(status),
        other => bail!("host {member} answered {other:?}"),
    }
}

/// This node's own word.
pub(in super::super) fn consensus(node: &Node) -> Result<Value> {
    Ok(serde_json::to_value(node.raft()?.status())?)
}

fn member_json(
    member: &raft::MemberStatus,
    answer: &Result<Value>,
    leader: Option<u64>,
    newest: u64,
) -> Value {
    let role = match (member.voter, leader == Some(member.id)) {
        (true, true) => "leader",
        (true, false) => "voter",
        (false, _) => "learner",
    };
    let mut shown = json!({
        "id": member.id,
        "name": member.name,
        "address": member.address,
        "role": role,
        "reachable": answer.is_ok(),
    });
    match answer {
        Ok(status) => {
            for key in ["term", "last_log", "committed", "applied", "snapshot", "fsync_us_p50"] {
                shown[key] = status[key].clone();
            }
            for key in ["failure", "healing", "no_space"] {
                shown[key] = status[key].clone();
            }
            let applied = status["applied"].as_u64().unwrap_or(0);
            shown["lag"] = newest.saturating_sub(applied).into();
        }
        Err(error) => shown["error"] = format!("{error:#}").into(),
    }
    shown
}

fn host_json(state: &State, host: &Host, up: bool, members: &[raft::MemberStatus]) -> Value {
    let held = Held::by(state, host.id);
    json!({
        "id": host.id,
        "name": host.name,
        "address": host.addresses.api.to_string(),
        "up": up && !host.is_out(),
        "member": members.iter().any(|member| member.id == host.id.0),
        // Its first start tells it: before that the host has only joined.
        "started": !host.addresses.server_name.is_empty(),
        "fenced": host.fenced.is_some(),
        "evacuate": host.evacuate,
        "disabled": host.disabled,
        "forced_down": host.forced_down,
        "replaced_by": host.replaced_by,
        "servers": held.servers.len(),
        "volumes": held.volumes.len(),
        "images_only_here": held.images.len(),
    })
}

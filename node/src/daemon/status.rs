//! How a node is, as JSON for `trine status` and for operators of the API.

use super::Node;
use serde_json::{Value, json};

/// Everything a person asks first.
pub(super) fn status(node: &Node) -> Value {
    let mut status = cluster_status(node);
    let processes = node.supervised.iter().map(|process| {
        let state = if process.pid().is_some() { "running" } else { "down" };
        json!({"name": process.name, "pid": process.pid(), "state": state})
    });
    status["processes"] = processes.collect();
    if let Ok(agent) = node.agent() {
        status["guests"] = serde_json::to_value(agent.guests()).unwrap_or_default();
        status["sandbox"] = agent.sandbox().into();
        status["reconcilers"] = serde_json::to_value(agent.reconcilers()).unwrap_or_default();
    } else {
        status["guests"] = json!([]);
    }
    let left = node.heartbeats.page().writes_until().saturating_sub(abi::lease::now());
    status["lease_ms"] = u64::try_from(left.as_millis()).unwrap_or(u64::MAX).into();
    status
}

/// What this node knows of the cluster.
fn cluster_status(node: &Node) -> Value {
    let Ok(raft) = node.raft() else {
        return json!({"node_id": node.config.node_id, "leader": null, "starting": true});
    };
    let consensus = raft.status();
    let state = raft.view();
    let up = node.liveness().unwrap_or_default().up;
    let hosts = state.cluster.hosts.values().map(|host| {
        let voter = consensus.members.iter().any(|m| m.id == host.id.0 && m.voter);
        json!({
            "id": host.id,
            "name": host.name,
            "address": host.addresses.api.to_string(),
            "up": up.contains(&host.id),
            "voter": voter,
            "disabled": host.disabled,
            "vcpus": host.capacity.vcpus,
            "ram_mib": host.capacity.ram_mib,
            "disk_gib": host.capacity.disk_gib,
        })
    });
    let hosts: Vec<Value> = hosts.collect();
    json!({
        "node_id": node.config.node_id,
        "cluster_id": node.config.cluster_id,
        "leader": consensus.leader,
        "applied": consensus.applied,
        "members": consensus.members,
        "hosts": hosts,
        "consensus": consensus,
    })
}

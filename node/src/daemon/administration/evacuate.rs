//! The operator's mark on a host: its servers are made anew elsewhere when it fails.

use super::super::Node;
use super::{find, propose};
use anyhow::Result;
use controller::state::cluster::ClusterCommand;
use serde_json::{Value, json};

/// Sets or clears the mark.
pub(super) async fn mark(node: &Node, host: &str, on: bool) -> Result<Value> {
    let state = node.raft()?.read().await?;
    let host = find(&state, host)?;
    let set = ClusterCommand::SetHostService {
        id: host.id,
        disabled: None,
        disabled_reason: None,
        forced_down: None,
        evacuate: Some(on),
    };
    propose(node, set).await?;
    Ok(json!({"id": host.id, "name": host.name, "evacuate": on}))
}

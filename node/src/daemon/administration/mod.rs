//! What an operator asks a running node to do with the cluster: `trine cluster …`, over the node's
//! local socket.

mod backup;
mod evacuate;
mod keys;
mod membership;
mod status;

use super::Node;
use anyhow::{Context, Result, bail};
use controller::ids::HostId;
use controller::state::cluster::{ClusterCommand, Host};
use controller::state::{Command, Outcome, State, decode_result};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::os::fd::OwnedFd;
use std::sync::Arc;

pub(super) use status::consensus as consensus_status;

/// What can be asked.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum ClusterRequest {
    /// Members, hosts and what is wrong with them.
    Status,
    /// A token with which a new machine takes a dead host's place.
    Replace {
        /// The dead host: name or id.
        host: String,
        /// How long the token may be used.
        ttl_seconds: u64,
        /// Even though the host answers.
        force: bool,
    },
    /// Takes a host out of the cluster.
    Remove {
        /// The host: name or id.
        host: String,
        /// Even though what it holds is lost.
        force: bool,
    },
    /// Another node shall lead.
    Transfer {
        /// Which; the one that has most of the log where none is said.
        to: Option<String>,
    },
    /// Whether a host's servers are made anew elsewhere when it fails.
    EvacuateOnFailure {
        /// The host: name or id.
        host: String,
        /// Whether.
        on: bool,
    },
    /// A new key for the cluster's secrets, and new keys for tokens.
    RotateKeys {
        /// Hosts that need not answer: names or ids.
        without: Vec<String>,
    },
    /// The whole state, into the file that comes with the request.
    Backup,
}

/// Answers a request; `file` came with it.
pub(super) async fn answer(
    node: &Arc<Node>,
    request: ClusterRequest,
    file: Option<OwnedFd>,
) -> Result<Value> {
    match request {
        ClusterRequest::Status => status::cluster(node).await,
        ClusterRequest::Replace { host, ttl_seconds, force } => {
            membership::replace(node, &host, ttl_seconds, force).await
        }
        ClusterRequest::Remove { host, force } => membership::remove(node, &host, force).await,
        ClusterRequest::Transfer { to } => membership::transfer(node, to.as_deref()).await,
        ClusterRequest::EvacuateOnFailure { host, on } => evacuate::mark(node, &host, on).await,
        ClusterRequest::RotateKeys { without } => keys::rotate(node, &without).await,
        ClusterRequest::Backup => {
            backup::write(node, file.context("a backup needs a file to go to")?).await
        }
    }
}

/// A host by its id or name.
fn find<'a>(state: &'a State, host: &str) -> Result<&'a Host> {
    let hosts = &state.cluster.hosts;
    let by_id = host.parse().ok().and_then(|id| hosts.get(&HostId(id)));
    if let Some(found) = by_id.or_else(|| hosts.values().find(|known| known.name == host)) {
        return Ok(found);
    }
    let known: Vec<String> =
        hosts.values().map(|host| format!("{} ({})", host.name, host.id)).collect();
    bail!("the cluster has no host {host:?}; its hosts are {}", known.join(", "))
}

/// Proposes a command of the operator's; a rejection is an error.
async fn propose(node: &Node, command: ClusterCommand) -> Result<Outcome> {
    let command = Command::Cluster(command);
    let id = *uuid::Uuid::new_v4().as_bytes();
    let proposed = node.raft()?.propose(id, command.encode()).await?;
    match decode_result(&proposed.outcome).context("an outcome can't be read")? {
        Ok(outcome) => Ok(outcome),
        Err(rejection) => bail!("the cluster refused: {rejection}"),
    }
}

/// What goes with a host.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Held {
    servers: Vec<String>,
    volumes: Vec<String>,
    /// Images whose content no other host has.
    images: Vec<String>,
}

impl Held {
    /// What `host` has.
    pub(super) fn by(state: &State, host: HostId) -> Held {
        let servers = state.compute.servers.values().filter(|server| server.host == Some(host));
        let volumes = state.volume.volumes.values().filter(|volume| volume.home == Some(host));
        let alone =
            |hosts: &std::collections::BTreeSet<HostId>| hosts.len() == 1 && hosts.contains(&host);
        let images = state.image.images.values().filter(|image| alone(&image.hosts));
        Held {
            servers: servers.map(|server| format!("{} ({})", server.name, server.id)).collect(),
            volumes: volumes.map(|volume| format!("{} ({})", volume.name, volume.id)).collect(),
            images: images
                .map(|image| format!("{} ({})", image.name.as_deref().unwrap_or("-"), image.id))
                .collect(),
        }
    }

    /// Whether nothing does.
    pub(super) fn is_empty(&self) -> bool {
        *self == Held::default()
    }

    fn json(&self) -> Value {
        serde_json::json!({
            "servers": self.servers, "volumes": self.volumes, "images": self.images,
        })
    }
}

impl std::fmt::Display for Held {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        /// Names shown of each kind.
        const SHOWN: usize = 3;
        let kinds = [
            ("server", &self.servers),
            ("volume", &self.volumes),
            ("image that no other host has", &self.images),
        ];
        let mut first = true;
        for (kind, names) in kinds.into_iter().filter(|(_, names)| !names.is_empty()) {
            let more = if names.len() > SHOWN { ", …" } else { "" };
            let shown = names[..names.len().min(SHOWN)].join(", ");
            let plural = if names.len() == 1 { "" } else { "s" };
            let (kind, rest) = kind.split_once(' ').map_or((kind, ""), |(kind, rest)| (kind, rest));
            let gap = if rest.is_empty() { "" } else { " " };
            let comma = if first { "" } else { "; " };
            write!(f, "{comma}{} {kind}{plural}{gap}{rest}: {shown}{more}", names.len())?;
            first = false;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::Held;

    #[test]
    fn what_goes_with_a_host_is_counted_and_the_first_are_named() {
        let names = |count: usize| (1..=count).map(|n| format!("n{n}")).collect();
        let held = Held { servers: names(4), volumes: vec![], images: names(1) };
        assert_eq!(
            held.to_string(),
            "4 servers: n1, n2, n3, …; 1 image that no other host has: n1"
        );
    }
}

//! What nodes ask of each other over consensus' authenticated connections.

use super::Node;
use crate::agent::CONSOLE_BYTES_MAX;
use crate::cluster_keys::ClusterKey;
use anyhow::{Context, Result, bail};
use controller::ids::{HostId, ServerId};
use controller::plan::leases::LEASE;
use futures::future::{BoxFuture, FutureExt};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

/// A question to another node.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum PeerCall {
    /// To any member: make the asking node a voter.
    AddVoter {
        /// The asking node.
        id: u64,
        /// Where it takes consensus traffic.
        address: SocketAddr,
        /// Its name.
        name: String,
    },
    /// To any member: is the asking node a host of the cluster?
    Standing,
    /// To any member: how its consensus is.
    Consensus,
    /// To any member: the ids of the cluster's keys that it holds.
    KeyIds,
    /// To any member: hold a key that may be taken into use.
    HoldKey {
        /// The key.
        key: ClusterKey,
        /// The id of the key that it may follow.
        after: String,
    },
    /// To any member: the cluster's keys, which the asking node lacks.
    Keys,
    /// To the leader: let another node lead.
    TransferLeader {
        /// Which.
        to: u64,
    },
    /// To the leader: this host is alive.
    Heartbeat,
    /// To a guest's host: the end of its console.
    Console {
        /// The server.
        server: ServerId,
    },
    /// To a guest's host: how far its start has come.
    SubState {
        /// The server.
        server: ServerId,
    },
    /// Hold a copy of an image.
    FetchImage {
        /// The content.
        sha512: String,
        /// Its length.
        size_bytes: u64,
        /// Who has it.
        from: Vec<storage::control::Peer>,
    },
}

/// Its answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum PeerAnswer {
    /// It is done.
    Done,
    /// To a heartbeat.
    Heard {
        /// The hosts that are up.
        up: BTreeSet<HostId>,
        /// The asking host's lease, where the leader proved that it leads.
        lease: Option<Lease>,
    },
    /// Whether the asking node is a host of the cluster.
    Standing {
        /// Whether.
        host: bool,
    },
    /// How a member's consensus is.
    Consensus(serde_json::Value),
    /// The ids of the keys that a member holds.
    KeyIds(Vec<String>),
    /// The cluster's keys that are in use.
    Keys(Vec<ClusterKey>),
    /// The end of a console.
    Console(String),
    /// How far a start has come, in Nova's words; none where nothing is being started.
    SubState(Option<String>),
    /// It could not be done.
    Failed(String),
    /// It can never be done.
    Refused(String),
}

/// What asking again won't change.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Refused(String);

/// A lease: from when the host asked, once its state has reached `index`.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Lease {
    /// What the host's state must have reached.
    pub(super) index: u64,
    /// How long it lasts.
    pub(super) ms: u64,
}

impl PeerCall {
    /// Its bytes.
    pub(super) fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("plain fields encode")
    }
}

impl PeerAnswer {
    /// The answer in these bytes; a refusal is an error.
    pub(super) fn decode(bytes: &[u8]) -> Result<PeerAnswer> {
        match serde_json::from_slice(bytes).context("the node answered nonsense")? {
            PeerAnswer::Failed(message) => bail!("{message}"),
            PeerAnswer::Refused(message) => Err(Refused(message).into()),
            answer => Ok(answer),
        }
    }
}

impl Node {
    /// Asks another node (or this one).
    pub(super) async fn call(
        &self,
        to: HostId,
        call: &PeerCall,
        within: Duration,
    ) -> Result<PeerAnswer> {
        let answer = self.raft()?.call(to.0, call.encode(), within).await;
        PeerAnswer::decode(&answer.with_context(|| format!("host {to} does not answer"))?)
    }
}

/// Answers other nodes.
pub(super) struct NodeCalls {
    node: Arc<Node>,
}

impl NodeCalls {
    /// For a node.
    pub(super) fn new(node: Arc<Node>) -> NodeCalls {
        NodeCalls { node }
    }
}

impl raft::Calls for NodeCalls {
    fn call(&self, peer: raft::NodeId, request: Vec<u8>) -> BoxFuture<'static, Vec<u8>> {
        let node = Arc::clone(&self.node);
        async move {
            let answer = match serde_json::from_slice(&request) {
                Ok(call) => answer(&node, peer, call).await,
                Err(error) => Err(anyhow::anyhow!("this node does not know the request: {error}")),
            };
            let answer = answer.unwrap_or_else(|error| PeerAnswer::Failed(format!("{error:#}")));
            serde_json::to_vec(&answer).expect("plain fields encode")
        }
        .boxed()
    }
}

async fn answer(node: &Arc<Node>, peer: raft::NodeId, call: PeerCall) -> Result<PeerAnswer> {
    match call {
        PeerCall::AddVoter { id, address, name } => add_voter(node, peer, id, address, name).await,
        PeerCall::Standing => super::standing::of(node, peer).await,
        PeerCall::Consensus => {
            Ok(PeerAnswer::Consensus(super::administration::consensus_status(node)?))
        }
        PeerCall::KeyIds => Ok(PeerAnswer::KeyIds(node.keys.ids())),
        PeerCall::HoldKey { key, after } => super::keys::take(node, peer, key, after).await,
        PeerCall::Keys => super::keys::give(node, peer).await,
        PeerCall::TransferLeader { to } => {
            node.raft()?.transfer_leader(to).await?;
            Ok(PeerAnswer::Done)
        }
        PeerCall::Heartbeat => {
            let (liveness, index) = node.hear(HostId(peer)).await?;
            let ms = u64::try_from(LEASE.as_millis()).unwrap_or(u64::MAX);
            let lease = index.map(|index| Lease { index, ms });
            Ok(PeerAnswer::Heard { up: liveness.up, lease })
        }
        PeerCall::Console { server } => Ok(PeerAnswer::Console(node.console(server).await?)),
        PeerCall::SubState { server } => {
            let sub_state = node.agent()?.sub_state(&server);
            Ok(PeerAnswer::SubState(sub_state.map(|state| state.as_str().to_owned())))
        }
        PeerCall::FetchImage { sha512, size_bytes, from } => {
            let fetch =
                move |mut client: storage::Client| client.fetch_image(&sha512, size_bytes, from);
            node.storage(fetch).await?;
            Ok(PeerAnswer::Done)
        }
    }
}

async fn add_voter(
    node: &Node,
    peer: raft::NodeId,
    id: u64,
    address: SocketAddr,
    name: String,
) -> Result<PeerAnswer> {
    if peer != id {
        bail!("node {peer} can't ask for the membership of node {id}");
    }
    let raft = node.raft()?;
    let state = raft.read().await?;
    if !state.cluster.hosts.contains_key(&HostId(id)) {
        return Ok(PeerAnswer::Refused(super::standing::refusal(id)));
    }
    match raft.add_voter(id, raft::Member { address, name }).await {
        Ok(()) => Ok(PeerAnswer::Done),
        Err(error @ raft::AddVoterError::Rejected { .. }) => {
            Ok(PeerAnswer::Refused(error.to_string()))
        }
        Err(error) => Err(error.into()),
    }
}

impl Node {
    /// The hosts that are up, as far as this node knows.
    pub(super) fn liveness(&self) -> Result<controller::plan::Liveness> {
        let state = self.raft()?.view();
        Ok(self.heartbeats.liveness(state.cluster.hosts.keys().copied()))
    }

    /// The end of the console of a guest on this host.
    pub(super) async fn console(&self, server: ServerId) -> Result<String> {
        let agent = self.agent()?.clone();
        let bytes = tokio::task::spawn_blocking(move || agent.console(&server, CONSOLE_BYTES_MAX))
            .await??;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Runs requests to this host's storage process on a thread of their own.
    pub(super) async fn storage<T: Send + 'static>(
        &self,
        work: impl FnOnce(storage::Client) -> Result<T, storage::Error> + Send + 'static,
    ) -> Result<T, storage::Error> {
        let socket = self.storage_socket();
        let done = tokio::task::spawn_blocking(move || work(storage::Client::connect(&socket)?));
        done.await.unwrap_or_else(|error| {
            Err(storage::Error {
                kind: storage::ErrorKind::Io,
                message: format!("a request to storage was cut off: {error}"),
            })
        })
    }
}

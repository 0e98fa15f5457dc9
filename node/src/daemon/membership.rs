//! Taking part in the cluster: the first node makes it, later ones ask to be added as voters
//! until they are, and each start says where this host is reached and what it has.

use super::Node;
use super::bootstrap::{Adoption, FirstStart, addresses};
use super::calls::{PeerAnswer, PeerCall, Refused};
use super::capacity::Capacity;
use super::start::{first_command, raft_tls};
use crate::joining::PEERS_FILE_NAME;
use anyhow::{Context, Result, bail};
use controller::state::cluster::ClusterCommand;
use controller::state::{Command, Outcome, decode_result};
use std::time::Duration;

/// Pause between two tries to be added or to reach a quorum.
const RETRY: Duration = Duration::from_millis(100);
/// How long one node may take to add us.
const ADD_WITHIN: Duration = Duration::from_secs(10);
/// Tries before the log says what the node waits for.
const QUIET_TRIES: u32 = 20;

/// Returns once this node is a voter and its host is up to date in the state.
pub(super) async fn take_part(node: &Node) -> Result<()> {
    match (first_command(node).await?, Adoption::read(&node.directory)?) {
        (Some(command), _) => make_cluster(node, command).await?,
        (None, Some(adoption)) => adopt(node, &adoption).await?,
        (None, None) => become_voter(node).await?,
    }
    update_host(node).await?;
    end_uploads(node).await
}

/// Uploads that this node had begun when it last ended are over.
async fn end_uploads(node: &Node) -> Result<()> {
    let state = node.raft()?.read().await?;
    for command in controller::plan::interrupted_uploads(&state, node.host()) {
        let id = *uuid::Uuid::new_v4().as_bytes();
        if let Err(rejection) = propose_until_taken(node, id, &command).await? {
            tracing::warn!(%rejection, "an upload can't be ended");
        }
    }
    Ok(())
}

async fn make_cluster(node: &Node, command: Command) -> Result<()> {
    let raft = node.raft()?;
    if raft.status().members.is_empty() {
        raft.bootstrap(member(node)).await.context("cannot make the cluster")?;
    }
    // The same at each try, so that a crash before the file is removed changes nothing.
    let id = node.config.cluster_bytes();
    match propose_until_taken(node, id, &command).await? {
        Ok(_) => {}
        Err(rejection) if raft.read().await.is_ok_and(|state| !state.cluster.id.is_empty()) => {
            tracing::info!(%rejection, "the cluster was made before");
        }
        Err(rejection) => bail!("the cluster can't be made: {rejection}"),
    }
    FirstStart::remove(&node.directory)
}

/// A restored or recovered state goes on under this node's cluster id.
async fn adopt(node: &Node, adoption: &Adoption) -> Result<()> {
    let command = adoption.command(&node.config)?;
    // The same at each try, as for a new cluster.
    match propose_until_taken(node, node.config.cluster_bytes(), &command).await? {
        Ok(_) => {}
        Err(rejection) if rejection.kind == controller::state::RejectionKind::Conflict => {
            tracing::info!(%rejection, "the state was adopted before");
        }
        Err(rejection) => bail!("the state can't be adopted: {rejection}"),
    }
    Adoption::remove(&node.directory)
}

fn member(node: &Node) -> raft::Member {
    raft::Member { address: node.config.raft(), name: node.config.name.clone() }
}

async fn become_voter(node: &Node) -> Result<()> {
    let mut tries = 0;
    while !is_voter(node) {
        if let Err(error) = ask_to_be_added(node).await {
            if error.downcast_ref::<Refused>().is_some() {
                return Err(error);
            }
            tries += 1;
            if tries % QUIET_TRIES == 0 {
                tracing::warn!("not a member yet: {error:#}");
            }
        }
        tokio::time::sleep(RETRY).await;
    }
    Ok(())
}

fn is_voter(node: &Node) -> bool {
    let status = node.raft().map(|raft| raft.status());
    status.is_ok_and(|status| {
        status.members.iter().any(|member| member.id == node.config.node_id && member.voter)
    })
}

async fn ask_to_be_added(node: &Node) -> Result<()> {
    let peers = super::standing::known_peers(node);
    let request = PeerCall::AddVoter {
        id: node.config.node_id,
        address: node.config.raft(),
        name: node.config.name.clone(),
    };
    let tls = raft_tls(node);
    let mut last = None;
    for peer in peers {
        let asked = raft::Client::call(
            peer.address,
            &tls,
            node.config.cluster_bytes(),
            node.config.node_id,
            request.encode(),
            ADD_WITHIN,
        );
        let answer = asked.await.map_err(anyhow::Error::from);
        match answer.and_then(|answer| PeerAnswer::decode(&answer)) {
            Ok(PeerAnswer::Done) => return Ok(()),
            Err(error) if error.downcast_ref::<Refused>().is_some() => return Err(error),
            Ok(other) => last = Some(anyhow::anyhow!("node {} answered {other:?}", peer.id)),
            Err(error) => {
                last = Some(error.context(format!("node {} at {}", peer.id, peer.address)))
            }
        }
    }
    Err(last.unwrap_or_else(|| {
        let path = node.directory.join(PEERS_FILE_NAME);
        anyhow::anyhow!("no member of the cluster is known: {} names none", path.display())
    }))
}

async fn update_host(node: &Node) -> Result<()> {
    let capacity = Capacity::of_this_machine(&node.config, node.directory.root());
    let command = Command::Cluster(ClusterCommand::UpdateHost {
        id: node.host(),
        addresses: addresses(&node.config),
        capacity: capacity.into(),
        feature_level: controller::state::FEATURE_LEVEL,
    });
    let id = *uuid::Uuid::new_v4().as_bytes();
    match propose_until_taken(node, id, &command).await? {
        Ok(_) => Ok(()),
        Err(rejection) => bail!("the cluster does not accept this host: {rejection}"),
    }
}

/// Proposes until a quorum takes the command: a node that starts waits for the others.
async fn propose_until_taken(
    node: &Node,
    id: [u8; 16],
    command: &Command,
) -> Result<Result<Outcome, controller::state::Rejection>> {
    let raft = node.raft()?;
    loop {
        match raft.propose(id, command.encode()).await {
            Ok(proposed) => {
                return decode_result(&proposed.outcome).context("an outcome can't be read");
            }
            Err(error) => {
                if let Some(failure) = raft.status().failure {
                    bail!("consensus has stopped: {failure}");
                }
                tracing::warn!(%error, "waiting for a quorum of the cluster's nodes");
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}

//! The steps of a node's start, in order. What a step started goes on when a later one fails:
//! switch and storage serve guests that may be running.

use super::bootstrap::FirstStart;
use super::calls::NodeCalls;
use super::capacity::Capacity;
use super::cloud::NodeCloud;
use super::prepare::Placing;
use super::processes::Supervised;
use super::{
    Node, checks, heartbeat, https, join_service, keys, leader, local, membership, redundancy,
    replacement, standing,
};
use crate::agent::{self, Agent};
use crate::cli::storage::StorageFile;
use crate::cli::switch::SwitchFile;
use crate::config::NodeConfig;
use crate::data_directory::DataDirectory;
use crate::embedded::{self, Executables};
use crate::process::Held;
use crate::spawner::Spawner;
use crate::{pki, runtime_directory};
use anyhow::{Context, Result, anyhow, bail};
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// How long a leader that stops waits for a sign of a quorum.
const QUORUM_WITHIN: Duration = Duration::from_millis(300);
/// How long a node that stops may take to let another one lead.
const HAND_OVER_WITHIN: Duration = Duration::from_secs(2);

/// A node that serves.
pub(super) struct Running {
    node: Arc<Node>,
    api: JoinHandle<()>,
    failures: raft::watch::Receiver<Option<String>>,
}

impl Running {
    /// Waits for what the node can't survive.
    pub(super) async fn failure(&mut self) -> anyhow::Error {
        let mut ended = self.node.ended.subscribe();
        tokio::select! {
            failure = self.failures.wait_for(Option::is_some) => match failure {
                Ok(failure) => {
                    anyhow!("consensus has stopped: {}", failure.as_deref().unwrap_or(""))
                }
                Err(_) => anyhow!("consensus has ended"),
            },
            Ok(reason) = ended.wait_for(Option::is_some) => {
                anyhow!("{}", reason.as_deref().unwrap_or(""))
            }
        }
    }

    /// Lets another node lead, before this one stops.
    pub(super) async fn hand_over(&self) {
        let Ok(raft) = self.node.raft() else { return };
        if !raft.is_leader() {
            return;
        }
        // Where no quorum answers, nobody else can be elected.
        if let Ok(Ok(_)) = tokio::time::timeout(QUORUM_WITHIN, raft.read()).await {
            raft.hand_over(HAND_OVER_WITHIN).await;
        }
    }

    /// Ends what belongs to the node process, after `stopping` was set.
    pub(super) async fn finish(self) {
        let _ = self.api.await;
        if let Ok(raft) = self.node.raft() {
            raft.shutdown().await;
        }
    }
}

/// Starts the node; returns once it serves and takes part in its cluster.
pub(super) async fn start(
    config: NodeConfig,
    directory: DataDirectory,
    stopping: watch::Receiver<bool>,
) -> Result<Running> {
    checks::kvm()?;
    let listener = checks::bind_api(&config)?;
    checks::raft_port(&config)?;
    let runtime_directory = runtime_directory::make(directory.root())?;
    let bin = directory.join("bin");
    let executables = embedded::install(&bin)
        .with_context(|| format!("cannot put the VMM into {}", bin.display()))?;
    let node = Arc::new(node(config, directory, runtime_directory)?);

    let (switch, storage) =
        tokio::try_join!(node.supervised[0].ensure(), node.supervised[1].ensure())?;
    for (process, held) in node.supervised.iter().zip([switch, storage]) {
        keep(&node, process, held, &stopping);
    }
    start_raft(&node).await?;
    start_agent(&node, &executables).await?;
    local::serve(Arc::clone(&node))?;
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let api = tokio::spawn(https::serve(listener, tls(&node)?, router(&node)?, stopping.clone()));
    tokio::spawn(heartbeat::run(Arc::clone(&node)));
    tokio::spawn(replacement::run(Arc::clone(&node)));
    tokio::spawn(redundancy::run(Arc::clone(&node)));
    tokio::spawn(standing::watch(Arc::clone(&node)));
    tokio::spawn(keys::run(Arc::clone(&node)));
    tokio::spawn(leader::run(Arc::clone(&node)));
    let failures = node.raft()?.failure();

    let mut ended = node.ended.subscribe();
    tokio::select! {
        taken = membership::take_part(&node) => taken?,
        Ok(reason) = ended.wait_for(Option::is_some) => {
            bail!("{}", reason.as_deref().unwrap_or(""));
        }
    }
    // Who is told that we are ready may at once ask for a guest.
    heartbeat::beat_once(&node).await;
    println!("trine node ready: node {} at {}", node.config.node_id, node.config.base_url());
    tracing::info!(node_id = node.config.node_id, url = node.config.base_url(), "ready");
    Ok(Running { node, api, failures })
}

fn node(
    config: NodeConfig,
    directory: DataDirectory,
    runtime_directory: std::path::PathBuf,
) -> Result<Node> {
    let secrets = directory.secrets(&config.cluster_id)?;
    let keys = keys::HeldKeys::new(&directory, secrets.cluster_keys.clone());
    let supervised = vec![
        switch_process(&config, &directory, &runtime_directory)?,
        storage_process(&config, &directory, &runtime_directory)?,
    ];
    let heartbeats = super::liveness::Heartbeats::open(directory.root())?;
    Ok(Node {
        config,
        directory,
        runtime_directory,
        secrets,
        keys,
        rotation: Default::default(),
        heartbeats,
        raft: OnceLock::new(),
        agent: OnceLock::new(),
        supervised,
        quorum: Default::default(),
        ended: watch::Sender::new(None),
    })
}

fn switch_process(
    config: &NodeConfig,
    directory: &DataDirectory,
    runtime_directory: &Path,
) -> Result<Arc<Supervised>> {
    let control = super::switch_socket(runtime_directory);
    let file = SwitchFile { control: control.clone(), vtep: config.vtep() };
    let check = {
        let config = config.clone();
        Box::new(move || checks::vxlan_port(&config))
    };
    let ask = |path: &Path| Ok(netstack::Client::connect(path)?.status()?.pid);
    Ok(Supervised::new(directory, "switch", toml::to_string(&file)?, control, ask, check))
}

fn storage_process(
    config: &NodeConfig,
    directory: &DataDirectory,
    runtime_directory: &Path,
) -> Result<Arc<Supervised>> {
    let control = super::storage_socket(runtime_directory);
    let file = StorageFile {
        control: control.clone(),
        directory: directory.join("storage"),
        listen: config.storage(),
        cluster_id: config.cluster_id.clone(),
        ca: directory.join("ca.pem"),
        certificate: directory.join("node.pem"),
        key: directory.join("node-key.pem"),
    };
    let check = {
        let config = config.clone();
        Box::new(move || checks::storage_port(&config))
    };
    let ask = |path: &Path| Ok(storage::Client::connect(path)?.status()?.pid);
    Ok(Supervised::new(directory, "storage", toml::to_string(&file)?, control, ask, check))
}

fn keep(node: &Arc<Node>, process: &Arc<Supervised>, held: Held, stopping: &watch::Receiver<bool>) {
    let node = Arc::clone(node);
    let restarted = move || {
        if let Ok(agent) = node.agent() {
            agent.wake();
        }
    };
    tokio::spawn(Arc::clone(process).keep(held, restarted, stopping.clone()));
}

async fn start_raft(node: &Arc<Node>) -> Result<()> {
    let config = raft::Config {
        cluster_id: node.config.cluster_bytes(),
        node_id: node.config.node_id,
        directory: node.directory.join("raft"),
        listen: node.config.raft(),
        tls: raft_tls(node),
        ..raft::Config::default()
    };
    let prepare = Arc::new(Placing::new(Arc::clone(node)));
    let calls = Arc::new(NodeCalls::new(Arc::clone(node)));
    let raft = raft::Raft::start(config, super::Machine::default(), prepare, calls)
        .await
        .context("cannot start consensus")?;
    node.raft.set(raft).map_err(|_| anyhow!("consensus was started twice"))
}

/// Who this node is to its peers.
pub(super) fn raft_tls(node: &Node) -> raft::Tls {
    raft::Tls {
        ca: node.secrets.authority.certificate_pem.clone(),
        cert: node.secrets.certificate_pem.clone(),
        key: node.secrets.key_pem.clone(),
    }
}

async fn start_agent(node: &Arc<Node>, executables: &Executables) -> Result<()> {
    let vmm = executables.vmm.clone();
    let spawner = tokio::task::spawn_blocking(move || Spawner::start(vmm)).await??;
    tracing::info!(sandbox = spawner.sandbox(), "guests are closed in");
    let agent = Agent::start(agent::Context {
        host: node.host(),
        guests: node.directory.guests(),
        raft: node.raft()?.clone(),
        storage: node.storage_socket(),
        switch: super::switch_socket(&node.runtime_directory),
        spawner,
        sealer: node.keys.sealer().clone(),
        lease: node.heartbeats.page(),
    })?;
    node.agent.set(agent).map_err(|_| anyhow!("the agent was started twice"))
}

fn tls(node: &Node) -> Result<Arc<rustls::ServerConfig>> {
    let secrets = &node.secrets;
    let authority = &secrets.authority.certificate_pem;
    Ok(Arc::new(pki::server_tls(&secrets.certificate_pem, &secrets.key_pem, authority)?))
}

fn router(node: &Arc<Node>) -> Result<axum::Router> {
    let cloud = Arc::new(NodeCloud::new(Arc::clone(node)));
    let config = controller::api::ApiConfig {
        public_url: node.config.public_url.clone(),
        ..controller::api::ApiConfig::new(node.config.api())
    };
    Ok(controller::api::router(cloud, config).merge(join_service::router(Arc::clone(node))))
}

/// What the first start of a cluster proposes, if this is it.
pub(super) async fn first_command(node: &Node) -> Result<Option<controller::state::Command>> {
    let Some(first) = FirstStart::read(&node.directory)? else { return Ok(None) };
    let capacity = Capacity::of_this_machine(&node.config, node.directory.root());
    let config = node.config.clone();
    let command = tokio::task::spawn_blocking(move || first.command(&config, capacity)).await??;
    Ok(Some(command))
}

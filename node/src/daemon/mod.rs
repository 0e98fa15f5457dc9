//! A node's life, from its data directory to SIGTERM.
//!
//! Start reading at [`run`]. [`cloud`] is what the API asks of the node, [`calls`] what other nodes
//! ask of it, [`processes`] keeps switch and storage running, [`membership`] makes or joins the
//! replicated state, and [`crate::agent`] makes this host follow it.

pub(crate) mod administration;
pub(crate) mod bootstrap;
mod calls;
pub(crate) mod capacity;
mod checks;
mod cloud;
mod heartbeat;
mod https;
mod images;
mod join_service;
mod keys;
mod leader;
mod liveness;
pub(crate) mod local;
mod machine;
mod membership;
mod prepare;
mod processes;
mod quorum;
mod redundancy;
mod replacement;
mod standing;
mod start;
mod status;

pub(crate) use checks::lock;
pub(crate) use machine::Machine;

use crate::agent::Agent;
use crate::config::NodeConfig;
use crate::data_directory::{DataDirectory, RECOVERY, Secrets};
use crate::process::ProcessRecord;
use anyhow::{Context, Result, bail};
use controller::ids::HostId;
use keys::HeldKeys;
use liveness::Heartbeats;
use processes::Supervised;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use tokio::sync::watch;

/// What the parts of a running node share.
pub(crate) struct Node {
    /// `node.toml`.
    pub(crate) config: NodeConfig,
    /// The data directory.
    pub(crate) directory: DataDirectory,
    /// Where its sockets lie.
    pub(crate) runtime_directory: PathBuf,
    secrets: Secrets,
    keys: HeldKeys,
    /// Held by the rotation of keys that was asked of this node.
    rotation: tokio::sync::Mutex<()>,
    heartbeats: Heartbeats,
    raft: OnceLock<raft::Raft<Machine>>,
    agent: OnceLock<Agent>,
    supervised: Vec<Arc<Supervised>>,
    /// Whether a quorum answers.
    quorum: quorum::Quorum,
    /// Why the node process must end, once it must.
    ended: watch::Sender<Option<String>>,
}

impl Node {
    /// Ends the node process, with a sentence for its operator.
    fn end(&self, reason: String) {
        self.ended.send_replace(Some(reason));
    }

    /// This host.
    fn host(&self) -> HostId {
        HostId(self.config.node_id)
    }

    /// Consensus, once it was started.
    fn raft(&self) -> Result<&raft::Raft<Machine>> {
        self.raft.get().context("the node is still starting")
    }

    /// The agent, once it was started.
    fn agent(&self) -> Result<&Agent> {
        self.agent.get().context("the node is still starting")
    }

    fn storage_socket(&self) -> PathBuf {
        storage_socket(&self.runtime_directory)
    }
}

fn switch_socket(runtime_directory: &Path) -> PathBuf {
    runtime_directory.join("switch.sock")
}

fn storage_socket(runtime_directory: &Path) -> PathBuf {
    runtime_directory.join("storage.sock")
}

/// Runs the node of a data directory until SIGTERM, Ctrl-C or a failure that it can't survive.
pub(crate) async fn run(data_directory: &Path) -> Result<()> {
    let directory = DataDirectory::open(data_directory)?;
    let config = NodeConfig::read(directory.root())?;
    let _lock = checks::lock(&directory)?;
    if directory.join(RECOVERY).exists() {
        let root = directory.root().display();
        bail!(
            "a recovery was begun here; finish it: trine cluster recover --yes --data-dir {root}"
        );
    }
    let record = directory.process_record("node");
    ProcessRecord::of(std::process::id())
        .and_then(|me| me.write(&record))
        .with_context(|| format!("cannot write {}", record.display()))?;

    let (stop, stopping) = watch::channel(false);
    let ended = live(config, directory, &stop, stopping).await;
    let _ = std::fs::remove_file(&record);
    ended
}

async fn live(
    config: NodeConfig,
    directory: DataDirectory,
    stop: &watch::Sender<bool>,
    stopping: watch::Receiver<bool>,
) -> Result<()> {
    let mut running = tokio::select! {
        started = start::start(config, directory, stopping) => started?,
        signal = stop_signal() => return signal,
    };
    let ended = tokio::select! {
        signal = stop_signal() => {
            running.hand_over().await;
            signal
        }
        failure = running.failure() => Err(failure),
    };
    let _ = stop.send(true);
    running.finish().await;
    ended
}

async fn stop_signal() -> Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        interrupted = tokio::signal::ctrl_c() => interrupted?,
        _ = terminate.recv() => {}
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use controller::ids::HostId;
    use controller::state::cluster::{Capacity, Host, HostAddresses};

    /// A host of that id with nothing particular about it.
    pub(super) fn host(id: u64) -> Host {
        let at = std::net::SocketAddr::from(([127, 0, 0, 1], 1));
        Host {
            id: HostId(id),
            name: format!("node{id}"),
            addresses: HostAddresses {
                api: at,
                raft: at,
                storage: at,
                tunnel: at,
                server_name: String::new(),
            },
            capacity: Capacity::default(),
            availability_zone: "nova".into(),
            disabled: false,
            disabled_reason: None,
            forced_down: false,
            registered_ms: 0,
            replaced_by: None,
            fenced: None,
            fence_epoch: 0,
            evacuate: false,
            feature_level: 1,
        }
    }
}

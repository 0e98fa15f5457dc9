//! A node's consensus: the product's, with what a simulated host knows of itself. Whoever isn't the
//! node itself calls it through [`Node::within`], as a client calls a server: when the node dies,
//! the caller has no answer.

use std::sync::Arc;
use std::time::Duration;

use controller::ids::HostId;
use controller::state::State;
use raft::sim::Process;
use raft::{Calls, Config, Member, Prepare, ProposeError, Proposed, Raft, Unavailable};

use crate::machine::Machine;
use crate::runtime;
use crate::setup;

/// Stamped on everything that the nodes write.
const CLUSTER_ID: [u8; 16] = [0xcc; 16];
/// How long a node looks for a leader before it says that there is none.
const PROPOSE_WITHIN: Duration = Duration::from_secs(6);
/// The same for reads.
const READ_WITHIN: Duration = Duration::from_secs(4);

/// How a cluster's logs are kept.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Keeping {
    /// Entries between two snapshots.
    pub(crate) snapshot_every: u64,
    /// Entries that are kept after one.
    pub(crate) keep_entries: u64,
}

/// A node that runs. Clones are the same.
#[derive(Clone)]
pub(crate) struct Node {
    host: HostId,
    process: Process,
    raft: Raft<Machine>,
}

impl Node {
    /// Opens what is on the disk of the node that this runs in.
    pub(crate) async fn start(
        host: HostId,
        keeping: Keeping,
        prepare: Arc<dyn Prepare>,
        calls: Arc<dyn Calls>,
    ) -> Result<Node, String> {
        let config = Config {
            cluster_id: CLUSTER_ID,
            node_id: host.0,
            directory: "/raft".into(),
            listen: setup::new_host(host).addresses.raft,
            snapshot_every: keeping.snapshot_every,
            keep_entries: keeping.keep_entries,
            propose_deadline: PROPOSE_WITHIN,
            read_deadline: READ_WITHIN,
            ..Config::default()
        };
        let raft = Raft::start(config, Machine::new(host.0), prepare, calls).await;
        let process = runtime::sim().node(host.0).process();
        Ok(Node { host, process, raft: raft.map_err(|error| error.to_string())? })
    }

    /// Makes it the only member of the cluster.
    pub(crate) async fn bootstrap(&self) -> Result<(), String> {
        self.raft.bootstrap(member(self.host)).await.map_err(|error| error.to_string())
    }

    /// Makes another node a voter.
    pub(crate) async fn add(&self, host: HostId) -> Result<(), String> {
        self.raft.add_voter(host.0, member(host)).await.map_err(|error| error.to_string())
    }

    /// Takes another node out of the cluster for ever.
    pub(crate) async fn remove(&self, host: HostId) -> Result<(), String> {
        self.raft.remove_voter(host.0).await.map_err(|error| error.to_string())
    }

    /// Lets another node lead, if that goes.
    pub(crate) async fn transfer(&self, to: HostId) {
        let raft = self.raft.clone();
        self.within(async move { raft.transfer_leader(to.0).await.is_ok() }).await;
    }

    /// Runs `work` in this node's process; nothing comes of it when the process ends first.
    pub(crate) async fn within<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> Option<T> {
        let (answer, answered) = tokio::sync::oneshot::channel();
        drop(self.process.spawn(async move {
            let _ = answer.send(work.await);
        }));
        answered.await.ok()
    }

    /// Replicates a command, from within this node.
    pub(crate) async fn propose(
        &self,
        id: [u8; 16],
        command: Vec<u8>,
    ) -> Result<Proposed, ProposeError> {
        self.raft.propose(id, command).await
    }

    /// Replicates a command for a client.
    pub(crate) async fn propose_for(&self, id: [u8; 16], command: Vec<u8>) -> Option<Proposed> {
        let node = self.clone();
        self.within(async move { node.propose(id, command).await.ok() }).await?
    }

    /// The state now or later, from within this node.
    pub(crate) async fn read(&self) -> Result<State, Unavailable> {
        self.raft.read().await
    }

    /// The state now or later, for a client.
    pub(crate) async fn read_for(&self) -> Option<State> {
        let node = self.clone();
        self.within(async move { node.read().await.ok() }).await?
    }

    /// An index at which this node certainly led after it was asked.
    pub(crate) async fn lead_index(&self) -> Option<u64> {
        self.raft.lead_index().await
    }

    /// What this node has applied.
    pub(crate) fn view(&self) -> State {
        self.raft.view()
    }

    /// Up to where it has applied.
    pub(crate) fn applied(&self) -> u64 {
        *self.raft.applied().borrow()
    }

    /// Whom it believes to lead.
    pub(crate) fn leader(&self) -> Option<HostId> {
        self.raft.status().leader.map(HostId)
    }

    /// The term in which it believes to lead.
    pub(crate) fn leads(&self) -> Option<u64> {
        let status = self.raft.status();
        (status.leader == Some(self.host.0)).then_some(status.term)
    }

    /// Why it can't go on.
    pub(crate) fn failure(&self) -> Option<String> {
        self.raft.status().failure
    }

    /// Asks another node's agent.
    pub(crate) async fn call(
        &self,
        to: HostId,
        request: Vec<u8>,
        within: Duration,
    ) -> Option<Vec<u8>> {
        self.raft.call(to.0, request, within).await.ok()
    }
}

fn member(host: HostId) -> Member {
    let new = setup::new_host(host);
    Member { address: new.addresses.raft, name: new.name }
}

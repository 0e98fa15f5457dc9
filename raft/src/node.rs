//! [`Raft`]: one node of a cluster.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64},
    },
    time::Duration,
};

use openraft::{
    Instant as _, SnapshotPolicy,
    async_runtime::watch::WatchReceiver,
    errors::{InitializeError, RaftError},
};
use tokio::sync::Semaphore;

use crate::{
    CALL_BYTES_MAX, CallError, Calls, Config, Member, MemberStatus, NodeId, Prepare, ProposeError,
    Proposed, SnapshotError, StateMachine, Status, TlsError, Unavailable, WalError,
    clocks::watch_clocks,
    codec::Encoder,
    disk::{Disk, HostDisk},
    healing,
    log_store::{LOG_BYTES_TARGET, LogStore},
    membership, offline,
    proposals::{Attempt, LeaderError, PROPOSALS_MAX},
    reads::{self, Rounds},
    requests::Incoming,
    runtime::{JoinHandle, blocking, now, spawn, timeout},
    snapshot::Snapshots,
    space,
    state_machine::{Machine, Published},
    storage,
    transport::{
        Kind,
        channel::{Listener, Wire},
        client::{Lane, Peers},
        incarnations::{self, Incarnations},
        network::NetworkFactory,
        server,
        tls::TlsContext,
    },
    types::{Incarnation, MemberNode, Snapshot, Types},
    wal::{Identity, Recovered, Wal, Writer, recovery},
    watch,
};

/// Entries sent in one append.
const APPEND_ENTRIES_MAX: u64 = 512;
/// How long installing a snapshot on a peer may take.
const INSTALL_TIMEOUT_MS: u64 = 150_000;

/// Writes to the directory that its log is whole again.
pub(crate) type NoteHealed = dyn Fn() -> io::Result<()> + Send + Sync;

pub(crate) type OpenRaft<S> = openraft::Raft<Types, Machine<S>>;

/// Why a node can't start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The log can't be opened.
    #[error(transparent)]
    Log(#[from] WalError),
    /// The snapshots can't be opened.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The certificates can't be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The address is taken or not ours.
    #[error("can't listen on {address}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// A setting makes no sense.
    #[error("the raft settings can't work: {0}")]
    Config(String),
    /// What is on disk can't be brought back to a state.
    #[error("can't restore the replicated state: {0}")]
    Restore(String),
}

/// Why a cluster can't be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BootstrapError {
    /// This node is shut down or its disk failed.
    #[error("this node has stopped: {0}")]
    Stopped(String),
}

/// Why a node did not become a voter.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AddVoterError {
    /// No leader finished it in time, perhaps because the new node can't be reached. It may still
    /// happen: ask again.
    #[error("node {id} did not become a voter within {waited:?}: {reason}")]
    NotYet {
        /// The new node.
        id: NodeId,
        /// How long it was tried.
        waited: Duration,
        /// What was seen last.
        reason: String,
    },
    /// The leader refused.
    #[error("node {id} can't become a voter: {reason}")]
    Rejected {
        /// The new node.
        id: NodeId,
        /// Why.
        reason: String,
    },
    /// This node is shut down or its disk failed.
    #[error("this node has stopped: {0}")]
    Stopped(String),
}

/// What one node's parts share.
pub(crate) struct Core<S: StateMachine> {
    pub(crate) config: Config,
    pub(crate) raft: OpenRaft<S>,
    pub(crate) published: Arc<Published<S>>,
    pub(crate) peers: Arc<Peers>,
    pub(crate) prepare: Arc<dyn Prepare>,
    pub(crate) calls: Arc<dyn Calls>,
    pub(crate) clock_ms: AtomicU64,
    pub(crate) local_reads: Rounds,
    pub(crate) remote_reads: Rounds,
    pub(crate) proposals: Semaphore,
    pub(crate) stop: watch::Sender<bool>,
    pub(crate) incoming: Mutex<HashMap<NodeId, Incoming>>,
    failure: watch::Sender<Option<String>>,
    /// What the log lost, while this node abstains.
    pub(crate) healing: watch::Sender<Option<String>>,
    pub(crate) note_healed: Arc<NoteHealed>,
    /// No voter has space for its log.
    pub(crate) refusing: AtomicBool,
    pub(crate) incarnations: Arc<Incarnations>,
    pub(crate) log: LogStore,
    pub(crate) wal: Arc<Wal>,
    listen: SocketAddr,
    server: Mutex<Option<JoinHandle<()>>>,
}

/// A node of a cluster. Clones are the same node.
pub struct Raft<S: StateMachine> {
    pub(crate) core: Arc<Core<S>>,
}

impl<S: StateMachine> Clone for Raft<S> {
    fn clone(&self) -> Self {
        Self { core: self.core.clone() }
    }
}

impl<S: StateMachine> std::fmt::Debug for Raft<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Raft").field("node_id", &self.core.config.node_id).finish_non_exhaustive()
    }
}

impl<S: StateMachine> Raft<S> {
    /// Opens what is on disk, brings the state back, and starts to listen.
    ///
    /// `initial` is the state before the first command. A node with an empty directory waits until
    /// [`Raft::bootstrap`] is called on it or another node adds it.
    ///
    /// # Errors
    /// See [`StartError`].
    pub async fn start(
        config: Config,
        initial: S,
        prepare: Arc<dyn Prepare>,
        calls: Arc<dyn Calls>,
    ) -> Result<Self, StartError> {
        let mut settings = openraft_config(&config)?;
        let wire = Arc::new(wire(&config)?);
        let storage = open_storage(&config).await?;
        let Storage { wal, recovered, files, newest, note_healed, .. } = storage;
        let healing = watch::Sender::new(storage.healing);
        let incarnations = Arc::new(Incarnations::new(storage.incarnation));
        let (listener, listen) = bind(&wire, config.listen).await?;
        let peers = Peers::new(config.node_id, wire.clone(), incarnations.clone());
        let machine = Machine::open(initial, files, newest);
        let machine = machine.await.map_err(|error| StartError::Restore(error.to_string()))?;
        let published = machine.published();
        let network = NetworkFactory {
            me: config.node_id,
            peers: peers.clone(),
            streams: Arc::new(AtomicU64::new(1)),
            acknowledged: Arc::default(),
        };
        let log = LogStore::new(wal.clone(), recovered);
        settings.enable_elect = healing.borrow().is_none();
        let raft = OpenRaft::new(config.node_id, Arc::new(settings), network, log.clone(), machine)
            .await
            .map_err(|fatal| StartError::Restore(fatal.to_string()))?;
        let core = Arc::new(Core {
            local_reads: reads::local_rounds(&raft),
            remote_reads: reads::remote_rounds(config.node_id, &raft, &peers),
            config,
            raft,
            published,
            peers,
            prepare,
            calls,
            clock_ms: AtomicU64::new(0),
            proposals: Semaphore::new(PROPOSALS_MAX),
            stop: watch::Sender::new(false),
            incoming: Mutex::default(),
            failure: watch::Sender::new(None),
            healing,
            note_healed,
            refusing: AtomicBool::new(false),
            incarnations: incarnations.clone(),
            log: log.clone(),
            wal,
            listen,
            server: Mutex::default(),
        });
        let me = (core.config.node_id, incarnations);
        let serving = server::serve(listener, wire, me, core.clone(), core.stop.subscribe());
        *lock(&core.server) = Some(spawn(serving));
        drop(spawn(watch_failure(core.clone())));
        drop(spawn(watch_size(core.clone(), log)));
        drop(spawn(membership::watch_members(core.clone())));
        drop(spawn(space::watch_space(core.clone())));
        if core.healing.borrow().is_some() {
            drop(spawn(healing::heal(core.clone())));
        }
        drop(spawn(watch_clocks(core.clone())));
        Ok(Self { core })
    }

    /// Makes this node the only member of a new cluster. Does nothing on a node that already
    /// belongs to one.
    ///
    /// # Errors
    /// See [`BootstrapError`].
    pub async fn bootstrap(&self, me: Member) -> Result<(), BootstrapError> {
        let node = MemberNode::new(&me, self.core.incarnations.own);
        let members = BTreeMap::from([(self.core.config.node_id, node)]);
        match self.core.raft.initialize(members).await {
            Ok(()) | Err(RaftError::APIError(InitializeError::NotAllowed(_))) => Ok(()),
            Err(error) => Err(BootstrapError::Stopped(error.to_string())),
        }
    }

    /// Adds a running node: first as a learner, then as a voter once it has caught up. Asked again
    /// it does nothing; asked with another address it moves the member there. Works on any node.
    ///
    /// # Errors
    /// See [`AddVoterError`].
    pub async fn add_voter(&self, id: NodeId, member: Member) -> Result<(), AddVoterError> {
        let core = &self.core;
        // The leader asks the node itself which directory it runs on.
        let node = MemberNode::new(&member, incarnations::NONE);
        let waited = core.config.propose_deadline;
        let deadline = now() + waited;
        let result = core
            .on_leader(deadline, |leader| {
                let node = node.clone();
                async move {
                    if leader == core.config.node_id {
                        return core.add_voter_here(id, node).await;
                    }
                    let mut body = Encoder::default();
                    body.u64(id);
                    body.member_node(&node);
                    let kind = Kind::AddVoter;
                    match core.ask(leader, Lane::Forward, kind, body.0, deadline).await {
                        Err(error) => Attempt::from_transport(&error),
                        Ok(bytes) => Attempt::decode(&bytes, |body| body.u64())
                            .unwrap_or_else(|error| Attempt::Retry(error.to_string())),
                    }
                }
            })
            .await;
        let index = result.map_err(|error| match error {
            LeaderError::Deadline(reason) => AddVoterError::NotYet { id, waited, reason },
            LeaderError::Rejected(reason) | LeaderError::NoSpace(reason) => {
                AddVoterError::Rejected { id, reason }
            }
            LeaderError::Stopped(reason) => AddVoterError::Stopped(reason),
        })?;
        core.wait_applied(index, deadline).await;
        Ok(())
    }

    /// Replicates a command from any node, and returns its outcome once this node has applied it.
    ///
    /// It is tried again with the same id when leaders change, until `propose_deadline`; the state
    /// machine must therefore return the stored outcome for an id it has seen.
    ///
    /// # Errors
    /// See [`ProposeError`].
    pub async fn propose(
        &self,
        command_id: [u8; 16],
        command: Vec<u8>,
    ) -> Result<Proposed, ProposeError> {
        self.core.propose(command_id, command).await
    }

    /// The state as of now or later: linearizable on any node, by ReadIndex.
    ///
    /// # Errors
    /// [`Unavailable`] when no quorum answers before `read_deadline`.
    pub async fn read(&self) -> Result<S::View, Unavailable> {
        self.core.read().await
    }

    /// As the leader, proved by a round that began after this call: the index that holds all that
    /// was committed before. `None` on a node that can't prove that it leads; nobody else is asked.
    pub async fn lead_index(&self) -> Option<u64> {
        match self.core.local_reads.join().await {
            Attempt::Done(index) => Some(index),
            _ => None,
        }
    }

    /// The state this node has applied, possibly stale.
    pub fn view(&self) -> S::View {
        self.core.published.view()
    }

    /// Index of the last entry applied here; wakes after each apply.
    pub fn applied(&self) -> watch::Receiver<u64> {
        self.core.published.applied()
    }

    /// Wakes once, with the reason, when this node can't go on: its disk failed.
    pub fn failure(&self) -> watch::Receiver<Option<String>> {
        self.core.failure.subscribe()
    }

    /// Where this node listens, with the port it got.
    pub fn listen_address(&self) -> SocketAddr {
        self.core.listen
    }

    /// This node.
    pub fn node_id(&self) -> NodeId {
        self.core.config.node_id
    }

    /// Whether this node believes to lead. Only for choosing where work is done: what guards
    /// correctness uses [`Raft::read`] or [`Raft::propose`].
    pub fn is_leader(&self) -> bool {
        self.core.leader() == Some(self.core.config.node_id)
    }

    /// A moment's picture of this node.
    pub fn status(&self) -> Status {
        self.core.status()
    }

    /// Asks a member's [`Calls`] over the peers' connections; this node's own directly.
    ///
    /// # Errors
    /// See [`CallError`].
    pub async fn call(
        &self,
        to: NodeId,
        request: Vec<u8>,
        deadline: Duration,
    ) -> Result<Vec<u8>, CallError> {
        let core = &self.core;
        if request.len() > CALL_BYTES_MAX {
            return Err(CallError::TooLarge(request.len()));
        }
        if to == core.config.node_id {
            return timeout(deadline, core.calls.call(to, request)).await.map_err(|_| {
                CallError::NoAnswer {
                    peer: format!("node {to}"),
                    reason: format!("no answer within {deadline:?}"),
                }
            });
        }
        let address = core.address_of(to).ok_or(CallError::UnknownNode(to))?;
        core.peers
            .link(to, address, Lane::Bulk)
            .request(Kind::Call, request, deadline)
            .await
            .map_err(|error| CallError::from_transport(format!("node {to}"), &error))
    }

    /// Stops listening, leaves elections to others, writes what is queued and unlocks the
    /// directory.
    pub async fn shutdown(&self) {
        let core = &self.core;
        core.stop.send_replace(true);
        let server = lock(&core.server).take();
        if let Some(server) = server {
            let _ = server.await;
        }
        if let Err(error) = core.raft.shutdown().await {
            tracing::error!(%error, "raft did not stop cleanly");
        }
        core.peers.close();
        let wal = core.wal.clone();
        let closing = move || {
            wal.close();
            Ok(())
        };
        let _ = blocking(closing).await;
    }
}

impl<S: StateMachine> Core<S> {
    /// Why nothing works here any more.
    pub(crate) fn stopped(&self) -> Option<String> {
        if *self.stop.borrow() {
            return Some("it is shut down".to_owned());
        }
        self.failure.borrow().clone()
    }

    fn status(&self) -> Status {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        let membership = &metrics.membership_config;
        let members = membership.nodes().map(|(id, node)| MemberStatus {
            id: *id,
            address: node.address.clone(),
            name: node.name.clone(),
            voter: membership.voter_ids().any(|voter| voter == *id),
            matched: metrics
                .replication
                .as_ref()
                .and_then(|all| all.get(id).copied().flatten())
                .map(|log_id| log_id.index),
        });
        Status {
            id: self.config.node_id,
            leader: metrics.current_leader,
            term: metrics.current_term,
            last_log: metrics.last_log_index,
            committed: metrics.local_committed.map(|id| id.index),
            applied: metrics.last_applied.map(|id| id.index),
            snapshot: metrics.snapshot.map(|id| id.index),
            purged: metrics.purged.map(|id| id.index),
            members: members.collect(),
            quorum_ms: metrics
                .last_quorum_acked
                .map(|at| u64::try_from(at.elapsed().as_millis()).unwrap_or(u64::MAX)),
            fsync_us_p50: self.wal.fsync_us_p50(),
            healing: self.healing.borrow().clone(),
            no_space: self.wal.no_space().borrow().clone(),
            failure: self.failure.borrow().clone(),
        }
    }
}

/// Publishes why the node stopped, unless it was asked to.
async fn watch_failure<S: StateMachine>(core: Arc<Core<S>>) {
    let mut metrics = core.raft.metrics();
    let mut stop = core.stop.subscribe();
    loop {
        let state = metrics.borrow_watched().running_state.clone();
        if let Err(fatal) = state {
            let log_failure = core.wal.failure().borrow().clone();
            if !*core.stop.borrow() {
                core.failure.send_replace(Some(log_failure.unwrap_or_else(|| fatal.to_string())));
            }
            return;
        }
        tokio::select! {
            biased;
            changed = metrics.changed() => if changed.is_err() { return },
            () = server::stopped(&mut stop) => return,
        }
    }
}

/// Asks for a snapshot, and drops what it covers, when a few large entries fill the memory long
/// before many small ones would.
async fn watch_size<S: StateMachine>(core: Arc<Core<S>>, log: LogStore) {
    let mut applied = core.published.applied();
    let mut stop = core.stop.subscribe();
    let mut asked_at: Option<u64> = None;
    loop {
        tokio::select! {
            biased;
            changed = applied.changed() => if changed.is_err() { return },
            () = server::stopped(&mut stop) => return,
        }
        if log.size_bytes() < LOG_BYTES_TARGET {
            asked_at = None;
            continue;
        }
        let Some(asked) = asked_at else {
            asked_at = Some(*applied.borrow());
            let _ = core.raft.trigger().snapshot().await;
            continue;
        };
        let covered = core.raft.metrics().borrow_watched().snapshot.map(|id| id.index);
        if let Some(covered) = covered.filter(|covered| *covered >= asked) {
            asked_at = None;
            let _ = core.raft.trigger().purge_log(covered).await;
        }
    }
}

fn openraft_config(config: &Config) -> Result<openraft::Config, StartError> {
    if config.listen.ip().is_unspecified() {
        return Err(StartError::Config(format!(
            "listen is {}: name one address, not all of them",
            config.listen
        )));
    }
    let settings = openraft::Config {
        cluster_name: crate::peer_name(&config.cluster_id, config.node_id),
        heartbeat_interval: config.heartbeat_ms,
        election_timeout_min: config.election_ms_min,
        election_timeout_max: config.election_ms_max,
        install_snapshot_timeout: INSTALL_TIMEOUT_MS,
        max_payload_entries: APPEND_ENTRIES_MAX,
        replication_lag_threshold: config.snapshot_every.saturating_add(config.keep_entries),
        snapshot_policy: SnapshotPolicy::LogsSinceLast(config.snapshot_every.max(1)),
        max_in_snapshot_log_to_keep: config.keep_entries,
        // Entries leave for the followers while the leader's own flush runs.
        broadcast_submitted_on_append: Some(true),
        enable_pre_vote: Some(true),
        // A healing follower's log goes back; any other that does is cut off by the transport.
        allow_log_reversion: Some(true),
        // A restarted leader asks for votes like anyone else.
        enable_leader_restore: Some(false),
        backoff: "50ms".to_owned(),
        ..openraft::Config::default()
    };
    settings.validate().map_err(|error| StartError::Config(error.to_string()))
}

/// A node's directory, opened.
struct Storage {
    wal: Arc<Wal>,
    recovered: Recovered,
    healing: Option<String>,
    incarnation: Incarnation,
    files: Arc<dyn Snapshots>,
    newest: Option<Snapshot>,
    note_healed: Arc<NoteHealed>,
}

impl Storage {
    /// What was opened, once its writer runs.
    fn new<D: Disk>(
        config: &Config,
        disk: D,
        files: storage::Files<D>,
        start: impl FnOnce(&Wal, Writer<D>) -> Result<(), StartError>,
    ) -> Result<Self, StartError> {
        let opened = files.log;
        start(&opened.wal, opened.writer)?;
        let directory = config.directory.clone();
        Ok(Self {
            wal: Arc::new(opened.wal),
            recovered: opened.recovered,
            healing: opened.healing,
            incarnation: opened.incarnation,
            files: Arc::new(files.snapshots),
            newest: files.newest,
            note_healed: Arc::new(move || recovery::note_healed(&disk, &directory)),
        })
    }
}

async fn open_storage(config: &Config) -> Result<Storage, StartError> {
    let identity = Identity { cluster_id: config.cluster_id, node_id: config.node_id };
    let directory = config.directory.clone();
    #[cfg(feature = "sim")]
    if let (Some(disk), Some(fresh)) = (crate::sim::disk(), crate::sim::random_id()) {
        let opened = storage::open(disk.clone(), identity, directory, fresh)?;
        return Storage::new(config, disk, opened, |_, writer| {
            drop(spawn(writer.run_as_task(crate::sim::disk_pause)));
            Ok(())
        });
    }
    let opening = move || {
        Ok(offline::random_id()
            .map_err(|error| StartError::Config(error.to_string()))
            .and_then(|fresh| storage::open(HostDisk, identity, directory, fresh)))
    };
    let opened = blocking(opening).await;
    let opened = opened.map_err(|error| StartError::Restore(error.to_string()))??;
    Storage::new(config, HostDisk, opened, |wal, writer| Ok(wal.start_thread(writer)?))
}

fn wire(config: &Config) -> Result<Wire, StartError> {
    #[cfg(feature = "sim")]
    if crate::sim::is_running() {
        return Ok(Wire::Simulated { cluster_id: config.cluster_id });
    }
    let tls = TlsContext::new(config.cluster_id, &config.tls)?;
    tls.check_own_name(&config.tls, config.node_id)?;
    Ok(Wire::Tls(tls))
}

async fn bind(wire: &Wire, address: SocketAddr) -> Result<(Listener, SocketAddr), StartError> {
    let listen = |source| StartError::Listen { address, source };
    let listener = Listener::bind(wire, address).await.map_err(listen)?;
    let bound = listener.address().map_err(listen)?;
    Ok((listener, bound))
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

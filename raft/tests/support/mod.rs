//! A cluster in one process: real directories, real sockets, real certificates.
#![allow(dead_code)]

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use futures::future::BoxFuture;
use raft::{Calls, Config, Entry, Member, NodeId, Raft, StateMachine, Tls, Unprepared, peer_name};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use tempfile::TempDir;

/// How long a test waits for what must happen. Never asserted on.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
pub(crate) const CLUSTER: [u8; 16] = [0xc1; 16];

/// Keys and values, and what every command id answered.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Store {
    pub(crate) values: BTreeMap<String, String>,
    pub(crate) seen: BTreeMap<[u8; 16], Vec<u8>>,
    pub(crate) applied: u64,
    pub(crate) time_ms: u64,
}

impl StateMachine for Store {
    type View = Arc<Store>;

    fn apply(&mut self, entry: &Entry) -> Vec<u8> {
        assert!(entry.time_ms >= self.time_ms, "time went back");
        self.time_ms = entry.time_ms;
        if let Some(outcome) = self.seen.get(&entry.command_id) {
            return outcome.clone();
        }
        self.applied += 1;
        let text = String::from_utf8_lossy(&entry.command);
        let (key, value) = text.split_once('=').unwrap_or((&text, ""));
        self.values.insert(key.to_owned(), value.to_owned());
        let outcome = format!("{} values", self.values.len()).into_bytes();
        self.seen.insert(entry.command_id, outcome.clone());
        outcome
    }

    fn view(&self) -> Arc<Store> {
        Arc::new(self.clone())
    }

    fn snapshot(view: &Arc<Store>) -> Vec<u8> {
        let mut text = format!("{} {}\n", view.applied, view.time_ms);
        for (id, outcome) in &view.seen {
            let id = u128::from_be_bytes(*id);
            text.push_str(&format!("{id:032x} {}\n", String::from_utf8_lossy(outcome)));
        }
        text.push('\n');
        for (key, value) in &view.values {
            text.push_str(&format!("{key}={value}\n"));
        }
        text.into_bytes()
    }

    fn restore(bytes: &[u8]) -> Result<Self, String> {
        let text = std::str::from_utf8(bytes).map_err(|error| error.to_string())?;
        let (head, values) = text.split_once("\n\n").ok_or("no end of the head")?;
        let mut lines = head.lines();
        let mut numbers = lines.next().ok_or("no first line")?.split(' ');
        let mut number = || numbers.next().and_then(|text| text.parse().ok()).ok_or("no number");
        let (applied, time_ms) = (number()?, number()?);
        let mut store = Store { applied, time_ms, ..Store::default() };
        for line in lines {
            let (id, outcome) = line.split_once(' ').ok_or("no outcome")?;
            let id = u128::from_str_radix(id, 16).map_err(|error| error.to_string())?;
            store.seen.insert(id.to_be_bytes(), outcome.as_bytes().to_vec());
        }
        for line in values.lines() {
            let (key, value) = line.split_once('=').ok_or("no value")?;
            store.values.insert(key.to_owned(), value.to_owned());
        }
        Ok(store)
    }
}

/// Answers with who asked whom and what.
pub(crate) struct Echo(pub(crate) NodeId);

impl Calls for Echo {
    fn call(&self, peer: NodeId, request: Vec<u8>) -> BoxFuture<'static, Vec<u8>> {
        let mut answer = format!("{peer}>{} ", self.0).into_bytes();
        answer.extend_from_slice(&request);
        Box::pin(async move { answer })
    }
}

/// A certificate authority.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Authority {
    pub(crate) fn new() -> Self {
        let key = KeyPair::generate().expect("key");
        let mut params = CertificateParams::new(Vec::new()).expect("parameters");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key).expect("certificate").pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    pub(crate) fn node(&self, cluster_id: &[u8; 16], id: NodeId) -> Tls {
        let key = KeyPair::generate().expect("key");
        let params = CertificateParams::new(vec![peer_name(cluster_id, id)]).expect("parameters");
        let certificate = params.signed_by(&key, &self.issuer).expect("certificate");
        Tls { ca: self.pem.clone(), cert: certificate.pem(), key: key.serialize_pem() }
    }
}

pub(crate) struct Cluster {
    pub(crate) authority: Authority,
    pub(crate) nodes: BTreeMap<NodeId, Raft<Store>>,
    pub(crate) configs: BTreeMap<NodeId, Config>,
    pub(crate) directory: TempDir,
}

impl Cluster {
    /// Three voters, the first of which made the cluster.
    pub(crate) async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    pub(crate) async fn start_with(adjust: impl Fn(&mut Config)) -> Self {
        let mut cluster = Self {
            authority: Authority::new(),
            nodes: BTreeMap::new(),
            configs: BTreeMap::new(),
            directory: tempfile::tempdir().expect("temporary directory"),
        };
        for id in 1..=3 {
            let mut config = cluster.config(id);
            adjust(&mut config);
            cluster.launch(config).await;
        }
        let first = cluster.node(1);
        first.bootstrap(cluster.member(1)).await.expect("bootstrap");
        for id in 2..=3 {
            first.add_voter(id, cluster.member(id)).await.expect("add a voter");
        }
        cluster
    }

    pub(crate) fn config(&self, id: NodeId) -> Config {
        Config {
            cluster_id: CLUSTER,
            node_id: id,
            directory: self.directory.path().join(format!("node-{id}")),
            tls: self.authority.node(&CLUSTER, id),
            heartbeat_ms: 100,
            election_ms_min: 500,
            election_ms_max: 900,
            propose_deadline: PATIENCE,
            read_deadline: PATIENCE,
            ..Config::default()
        }
    }

    /// Starts a node; what it listens on stays the same from then on.
    pub(crate) async fn launch(&mut self, mut config: Config) {
        let id = config.node_id;
        let node =
            Raft::start(config.clone(), Store::default(), Arc::new(Unprepared), Arc::new(Echo(id)))
                .await
                .expect("start a node");
        config.listen = node.listen_address();
        self.configs.insert(id, config);
        self.nodes.insert(id, node);
    }

    pub(crate) async fn stop(&mut self, id: NodeId) {
        self.nodes.remove(&id).expect("running").shutdown().await;
    }

    pub(crate) async fn restart(&mut self, id: NodeId) {
        let config = self.configs[&id].clone();
        self.launch(config).await;
    }

    pub(crate) fn node(&self, id: NodeId) -> Raft<Store> {
        self.nodes[&id].clone()
    }

    pub(crate) fn member(&self, id: NodeId) -> Member {
        Member { address: self.configs[&id].listen, name: format!("host-{id}") }
    }

    pub(crate) fn address(&self, id: NodeId) -> SocketAddr {
        self.configs[&id].listen
    }

    /// Waits until all running nodes agree on a running leader.
    pub(crate) async fn leader(&self) -> NodeId {
        self.eventually("a leader", || {
            let leaders: Vec<_> = self.nodes.values().map(|node| node.status().leader).collect();
            let leader = leaders[0]?;
            let agreed = leaders.iter().all(|other| *other == Some(leader));
            (agreed && self.nodes.contains_key(&leader)).then_some(leader)
        })
        .await
    }

    pub(crate) async fn follower(&self) -> NodeId {
        let leader = self.leader().await;
        *self.nodes.keys().find(|id| **id != leader).expect("a follower")
    }

    /// Polls until `check` answers; gives up loudly after [`PATIENCE`].
    pub(crate) async fn eventually<T>(&self, what: &str, check: impl Fn() -> Option<T>) -> T {
        let started = Instant::now();
        loop {
            if let Some(found) = check() {
                return found;
            }
            let statuses: Vec<_> = self.nodes.values().map(Raft::status).collect();
            assert!(started.elapsed() < PATIENCE, "waited for {what}: {statuses:#?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Reads until it can.
    pub(crate) async fn eventually_reads(&self, node: &Raft<Store>) -> Arc<Store> {
        let started = Instant::now();
        loop {
            match node.read().await {
                Ok(view) => return view,
                Err(error) => assert!(started.elapsed() < PATIENCE, "{error}"),
            }
        }
    }

    pub(crate) async fn stop_all(mut self) {
        for (_, node) in std::mem::take(&mut self.nodes) {
            node.shutdown().await;
        }
    }
}

pub(crate) fn id(number: u64) -> [u8; 16] {
    u128::from(number).to_be_bytes()
}

pub(crate) async fn put(node: &Raft<Store>, number: u64, value: &str) -> u64 {
    let command = format!("key-{number}={value}").into_bytes();
    node.propose(id(number), command).await.expect("proposed").index
}

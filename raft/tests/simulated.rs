//! Clusters in a simulated world: the real log, recovery, encodings and consensus on virtual disks,
//! links and clocks. A failure names its seed; the seed alone repeats it.

mod support;

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures::future::{Either, select};
use raft::{
    Config, Member, NodeId, Raft, Unprepared,
    sim::{Link, Loss, World, run},
};
use support::{CLUSTER, Echo, Store, id};

/// How long something that must happen may take, in virtual time.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long the register's clients and faults go on.
const DISTURBED: Duration = Duration::from_secs(20);
/// Seeds that every build tries.
const SEEDS: u64 = 4;

fn address(id: NodeId) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, u8::try_from(id).expect("a small id")], 7))
}

fn member(id: NodeId) -> Member {
    Member { address: address(id), name: format!("host{id}") }
}

fn config(id: NodeId) -> Config {
    Config {
        cluster_id: CLUSTER,
        node_id: id,
        directory: PathBuf::from("/raft"),
        listen: address(id),
        snapshot_every: 200,
        keep_entries: 50,
        ..Config::default()
    }
}

/// What a future answers, unless it takes too long.
async fn within<T>(
    world: &World,
    limit: Duration,
    future: impl Future<Output = T> + Unpin,
) -> Option<T> {
    match select(future, std::pin::pin!(world.sleep(limit))).await {
        Either::Left((answer, _)) => Some(answer),
        Either::Right(_) => None,
    }
}

type Nodes = Arc<Mutex<BTreeMap<NodeId, Raft<Store>>>>;

/// Three nodes of a world.
#[derive(Clone)]
struct Cluster {
    world: World,
    adjust: fn(&mut Config),
    running: Nodes,
}

impl Cluster {
    async fn start(world: &World, adjust: fn(&mut Config)) -> Self {
        let cluster = Self { world: world.clone(), adjust, running: Nodes::default() };
        for id in 1..=3 {
            cluster.launch(id).await;
        }
        let first = cluster.node(1).expect("node 1 runs");
        let joining = world.node(1).spawn(async move {
            first.bootstrap(member(1)).await.expect("bootstrap");
            for id in 2..=3 {
                first.add_voter(id, member(id)).await.expect("a voter");
            }
        });
        within(world, PATIENCE, joining).await.expect("a cluster of three in time");
        cluster
    }

    /// Starts a node on what its disk holds.
    async fn launch(&self, id: NodeId) {
        let mut config = config(id);
        (self.adjust)(&mut config);
        let starting = self.world.node(id).spawn(async move {
            Raft::start(config, Store::default(), Arc::new(Unprepared), Arc::new(Echo(id))).await
        });
        let started = within(&self.world, PATIENCE, starting).await.expect("a start in time");
        let raft = started.unwrap_or_else(|error| panic!("node {id} can't start: {error:?}"));
        self.running.lock().expect("lock").insert(id, raft);
    }

    fn kill(&self, id: NodeId, loss: Loss) {
        self.running.lock().expect("lock").remove(&id);
        self.world.node(id).kill(loss);
    }

    fn node(&self, id: NodeId) -> Option<Raft<Store>> {
        self.running.lock().expect("lock").get(&id).cloned()
    }

    fn nodes(&self) -> Vec<Raft<Store>> {
        self.running.lock().expect("lock").values().cloned().collect()
    }

    /// Waits for a leader that everybody who runs follows.
    async fn leader(&self) -> NodeId {
        self.eventually("a leader", || {
            let leaders: Vec<_> = self.nodes().iter().map(|node| node.status().leader).collect();
            let leader = (*leaders.first()?)?;
            leaders.iter().all(|other| *other == Some(leader)).then_some(leader)
        })
        .await
    }

    async fn eventually<T>(&self, what: &str, check: impl Fn() -> Option<T>) -> T {
        let limit = self.world.now() + PATIENCE;
        loop {
            if let Some(found) = check() {
                return found;
            }
            let statuses: Vec<_> = self.nodes().iter().map(Raft::status).collect();
            assert!(
                self.world.now() < limit,
                "seed {}: waited for {what}: {statuses:#?}",
                self.world.seed()
            );
            self.world.sleep(Duration::from_millis(1)).await;
        }
    }

    /// Proposes on a node; `None` when it gave no answer.
    async fn put(&self, on: NodeId, number: u64, command: &str) -> Option<u64> {
        let (raft, command) = (self.node(on)?, command.as_bytes().to_vec());
        let proposing =
            self.world.node(on).spawn(async move { raft.propose(id(number), command).await.ok() });
        within(&self.world, Duration::from_secs(15), proposing).await??.index.into()
    }

    /// A linearizable read on a node.
    async fn read(&self, on: NodeId) -> Option<Arc<Store>> {
        let raft = self.node(on)?;
        let reading = self.world.node(on).spawn(async move { raft.read().await.ok() });
        within(&self.world, Duration::from_secs(15), reading).await?
    }

    async fn agree(&self) {
        self.world.heal_links();
        for id in 1..=3 {
            if self.node(id).is_none() {
                self.launch(id).await;
            }
        }
        let leader = self.leader().await;
        let mut number = 1 << 40;
        while self.put(leader, number, "end=end").await.is_none() {
            number += 1;
        }
        self.eventually("the same state everywhere", || {
            let views: Vec<_> = self.nodes().iter().map(Raft::view).collect();
            views
                .iter()
                .all(|view| *view == views[0] && view.values.contains_key("end"))
                .then_some(())
        })
        .await;
    }
}

/// What clients of one register saw: a single writer counts up, everybody reads.
#[derive(Default)]
struct Register {
    /// (asked, answered, value)
    writes: Vec<(Duration, Duration, u64)>,
    reads: Vec<(Duration, Duration, u64)>,
}

impl Register {
    /// With one writer whose values grow, a history is linearizable exactly when each read answers
    /// at least the last write that ended before it began and at most the last that began before
    /// it ended, and no read answers less than one that ended before it began.
    fn check(&self, seed: u64) {
        for (asked, answered, value) in &self.reads {
            let ended = self.writes.iter().filter(|(_, end, _)| end < asked);
            let begun = self.writes.iter().filter(|(begin, _, _)| begin < answered);
            let least = ended.map(|(.., value)| *value).max().unwrap_or(0);
            let most = begun.map(|(.., value)| *value).max().unwrap_or(0);
            assert!(
                (least..=most).contains(value),
                "seed {seed}: a read from {asked:?} to {answered:?} answered {value}, not {least} to {most}"
            );
            let earlier = self.reads.iter().filter(|(_, end, _)| end < asked);
            let seen = earlier.map(|(.., value)| *value).max().unwrap_or(0);
            assert!(
                *value >= seen,
                "seed {seed}: a read at {asked:?} answered {value} after {seen}"
            );
        }
    }
}

/// One register's writer: a value is written until some node says that it is.
async fn write(cluster: Cluster, register: Arc<Mutex<Register>>) {
    let world = cluster.world.clone();
    for value in 1.. {
        let begin = world.now();
        if begin > DISTURBED {
            return;
        }
        register.lock().expect("lock").writes.push((begin, Duration::MAX, value));
        while cluster.put(1 + world.below(3), value, &format!("register={value}")).await.is_none() {
            world.sleep(Duration::from_millis(20)).await;
        }
        if let Some(write) = register.lock().expect("lock").writes.last_mut() {
            write.1 = world.now();
        }
        world.sleep(Duration::from_millis(world.below(60))).await;
    }
}

async fn read(cluster: Cluster, register: Arc<Mutex<Register>>) {
    let world = cluster.world.clone();
    while world.now() < DISTURBED {
        let begin = world.now();
        if let Some(view) = cluster.read(1 + world.below(3)).await {
            let value = view.values.get("register").map_or(0, |text| text.parse().expect("number"));
            register.lock().expect("lock").reads.push((begin, world.now(), value));
        }
        world.sleep(Duration::from_millis(world.below(60))).await;
    }
}

/// Cuts, delays, loses, repeats, kills and restarts, as the seed says.
async fn disturb(cluster: Cluster) {
    let world = cluster.world.clone();
    while world.now() < DISTURBED {
        world.sleep(Duration::from_millis(100 + world.below(1_500))).await;
        let (one, other) = (1 + world.below(3), 1 + world.below(3));
        match world.below(8) {
            0 => world.set_link(one, other, Link { cut: true, ..Link::default() }),
            1 => {
                for peer in 1..=3 {
                    world.set_link(one, peer, Link { cut: true, ..Link::default() });
                    world.set_link(peer, one, Link { cut: true, ..Link::default() });
                }
            }
            2 => {
                let slow = Link {
                    delay_max: Duration::from_millis(200),
                    loss_per_mille: 50,
                    twice_per_mille: 50,
                    break_per_mille: 10,
                    ..Link::default()
                };
                world.set_link(one, other, slow);
            }
            3 | 4 => world.heal_links(),
            5 => {
                let skew_ms = i64::try_from(world.below(4_000)).expect("small") - 2_000;
                world.node(one).set_skew_ms(skew_ms);
            }
            _ => {
                let losses = [Loss::Nothing, Loss::All, Loss::Prefix, Loss::Random];
                let pick = usize::try_from(world.below(4)).expect("small");
                cluster.kill(one, losses[pick]);
                world.sleep(Duration::from_millis(world.below(2_000))).await;
                cluster.launch(one).await;
            }
        }
    }
    world.heal_links();
}

/// A register under all kinds of trouble; returns how many reads and writes were answered.
async fn troubled_register(world: World) -> (usize, usize) {
    let cluster = Cluster::start(&world, |_| {}).await;
    let register = Arc::new(Mutex::new(Register::default()));
    let mut clients = vec![
        world.spawn(write(cluster.clone(), register.clone())),
        world.spawn(disturb(cluster.clone())),
    ];
    for _ in 0..3 {
        clients.push(world.spawn(read(cluster.clone(), register.clone())));
    }
    for client in clients {
        within(&world, DISTURBED + PATIENCE, client).await.unwrap_or_else(|| {
            panic!("seed {}: a client or the faults got stuck", world.seed());
        });
    }
    cluster.agree().await;
    let register = register.lock().expect("lock");
    register.check(world.seed());
    (register.reads.len(), register.writes.len())
}

#[test]
fn a_register_stays_linearizable_under_cuts_and_crashes() {
    for seed in 1..=SEEDS {
        let ((reads, writes), _) = run(seed, troubled_register);
        assert!(reads > 20 && writes > 20, "seed {seed}: only {reads} reads and {writes} writes");
    }
}

#[test]
fn the_same_seed_gives_the_same_run() {
    let (counts, digest) = run(7, troubled_register);
    assert_eq!(run(7, troubled_register), (counts, digest));
    assert_ne!(run(8, troubled_register).1, digest);
}

#[test]
fn what_was_answered_outlives_a_power_cut_of_all_nodes() {
    for seed in 1..=SEEDS {
        run(seed, |world| async move {
            let cluster = Cluster::start(&world, |_| {}).await;
            let mut answered = Vec::new();
            for number in 0..60 {
                let on = 1 + world.below(3);
                if cluster.put(on, number, &format!("key-{number}=x")).await.is_some() {
                    answered.push(number);
                }
            }
            for id in 1..=3 {
                cluster.kill(id, Loss::Random);
            }
            for id in 1..=3 {
                cluster.launch(id).await;
            }
            let leader = cluster.leader().await;
            let view = cluster.read(leader).await.expect("a read");
            assert_eq!(answered.len(), 60, "seed {seed}");
            for number in answered {
                assert!(
                    view.values.contains_key(&format!("key-{number}")),
                    "seed {seed}: {number}"
                );
            }
        });
    }
}

#[test]
fn a_node_that_was_away_for_longer_than_the_log_gets_a_snapshot() {
    run(3, |world| async move {
        let shorten = |config: &mut Config| {
            config.snapshot_every = 20;
            config.keep_entries = 5;
        };
        let cluster = Cluster::start(&world, shorten).await;
        cluster.kill(3, Loss::All);
        let held = cluster.node(1).and_then(|node| node.status().last_log).expect("a log");
        for number in 0..120 {
            let command = format!("key-{number}=x");
            while cluster.put(1, number, &command).await.is_none() {}
        }
        cluster.launch(3).await;
        cluster
            .eventually("the whole state on node 3", || {
                cluster.node(3).filter(|node| node.view().values.len() == 120)
            })
            .await;
        let purged = cluster.node(1).and_then(|node| node.status().purged);
        assert!(purged > Some(held), "the others still had node 3's entries: {purged:?}");
        let installed = cluster.node(3).and_then(|node| node.status().snapshot);
        assert!(installed > Some(held), "node 3 got no snapshot: {installed:?}");
    });
}

#[test]
fn a_snapshot_whose_answer_is_lost_is_soon_sent_again() {
    run(5, |world| async move {
        let shorten = |config: &mut Config| {
            config.snapshot_every = 20;
            config.keep_entries = 5;
        };
        let cluster = Cluster::start(&world, shorten).await;
        cluster.kill(3, Loss::All);
        for number in 0..60 {
            let command = format!("key-{number}=x");
            while cluster.put(1, number, &command).await.is_none() {}
        }
        world.keep_trace();
        cluster.launch(3).await;
        while !world.take_trace().iter().any(|line| line.contains("snapshot chunk")) {
            world.sleep(Duration::from_micros(10)).await;
        }
        // Nobody closes a connection: the leader would wait for minutes.
        for other in [1, 2] {
            world.set_link(3, other, Link { cut: true, ..Link::default() });
        }
        world.sleep(Duration::from_secs(5)).await;
        world.heal_links();
        cluster.put(1, 60, "last=x").await.expect("a quorum takes it");
        let healed = world.now();
        cluster
            .eventually("the whole state on node 3", || {
                cluster.node(3).filter(|node| node.view().values.len() == 61)
            })
            .await;
        let took = world.now() - healed;
        assert!(took < Duration::from_secs(15), "{took:?}");
    });
}

#[test]
fn a_follower_learns_of_a_commit_without_waiting_for_a_heartbeat() {
    let heartbeat = Duration::from_secs(5);
    run(4, |world| async move {
        let rarely = |config: &mut Config| {
            config.heartbeat_ms = 5_000;
            config.election_ms_min = 20_000;
            config.election_ms_max = 40_000;
        };
        let cluster = Cluster::start(&world, rarely).await;
        let leader = cluster.leader().await;
        // Off the heartbeat's beat, whatever it is.
        for number in 0..10 {
            world.sleep(Duration::from_millis(world.below(700))).await;
            let index = cluster.put(leader, number, "key=x").await.expect("an answer");
            let answered = world.now();
            cluster
                .eventually("the entry on all nodes", || {
                    let applied = |node: &Raft<Store>| node.status().applied >= Some(index);
                    cluster.nodes().iter().all(applied).then_some(())
                })
                .await;
            let waited = world.now() - answered;
            assert!(waited < heartbeat / 50, "a follower waited {waited:?} for a commit");
        }
    });
}

#[test]
fn a_leader_whose_clock_is_wrong_hands_over_and_a_follower_with_a_wrong_clock_moves_nobody() {
    for (seed, skew_ms) in [(5, 60_000), (6, -60_000)] {
        run(seed, |world| async move {
            let cluster = Cluster::start(&world, |_| {}).await;
            let leader = cluster.leader().await;
            let follower = if leader == 1 { 2 } else { 1 };
            world.node(follower).set_skew_ms(skew_ms);
            world.sleep(Duration::from_secs(20)).await;
            assert_eq!(cluster.leader().await, leader, "a follower's clock is only its own");
            world.node(follower).set_skew_ms(0);

            let term = cluster.node(leader).map(|node| node.status().term).expect("it runs");
            world.node(leader).set_skew_ms(skew_ms);
            let next = cluster
                .eventually("another leader", || {
                    let status = cluster.node(follower)?.status();
                    status.leader.filter(|next| *next != leader && status.term > term)
                })
                .await;
            world.sleep(Duration::from_secs(20)).await;
            assert_eq!(cluster.leader().await, next, "the leadership stays where clocks are right");
        });
    }
}

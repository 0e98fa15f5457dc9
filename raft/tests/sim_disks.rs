//! Clusters on disks that fill, fail and lose what they held, in simulated time.

mod support;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use raft::{
    Config, Member, NodeId, ProposeError, Raft, Unprepared,
    sim::{Loss, World, run},
};
use support::{CLUSTER, Echo, Store, id};

const NODES: [NodeId; 3] = [1, 2, 3];
/// Simulated, so generous: it costs nothing.
const LIMIT: Duration = Duration::from_secs(120);

fn address(id: NodeId) -> std::net::SocketAddr {
    ([10, 0, 0, id as u8], 7_000).into()
}

fn config(id: NodeId) -> Config {
    Config {
        cluster_id: CLUSTER,
        node_id: id,
        directory: "raft".into(),
        listen: address(id),
        snapshot_every: 50,
        keep_entries: 10,
        propose_deadline: Duration::from_secs(20),
        read_deadline: Duration::from_secs(20),
        ..Config::default()
    }
}

async fn start(world: &World, id: NodeId) -> Raft<Store> {
    let starting = world.node(id).spawn(async move {
        Raft::start(config(id), Store::default(), Arc::new(Unprepared), Arc::new(Echo(id))).await
    });
    starting.await.expect("start")
}

async fn cluster(world: &World) -> BTreeMap<NodeId, Raft<Store>> {
    let mut nodes = BTreeMap::new();
    for id in NODES {
        nodes.insert(id, start(world, id).await);
    }
    let member = |id: NodeId| Member { address: address(id), name: format!("host-{id}") };
    let first = nodes[&1].clone();
    on(world, 1, async move {
        first.bootstrap(member(1)).await.expect("bootstrap");
        for id in [2, 3] {
            first.add_voter(id, member(id)).await.expect("add a voter");
        }
    })
    .await;
    nodes
}

/// Runs something as a task of a node.
async fn on<T: Send + 'static>(
    world: &World,
    id: NodeId,
    work: impl Future<Output = T> + Send + 'static,
) -> T {
    world.node(id).spawn(work).await
}

async fn put(world: &World, node: &Raft<Store>, number: u64) -> Result<u64, ProposeError> {
    let node = node.clone();
    let command = format!("key-{number}={}", "v".repeat(400)).into_bytes();
    on(world, node.node_id(), async move {
        node.propose(id(number), command).await.map(|proposed| proposed.index)
    })
    .await
}

async fn eventually<T>(world: &World, what: &str, check: impl Fn() -> Option<T>) -> T {
    let deadline = world.now() + LIMIT;
    loop {
        if let Some(found) = check() {
            return found;
        }
        assert!(world.now() < deadline, "seed {}: waited for {what}", world.seed());
        world.sleep(Duration::from_millis(20)).await;
    }
}

async fn read(world: &World, node: &Raft<Store>) -> Result<usize, raft::Unavailable> {
    let node = node.clone();
    on(world, node.node_id(), async move { node.read().await.map(|view| view.values.len()) }).await
}

fn leader(nodes: &BTreeMap<NodeId, Raft<Store>>) -> Option<NodeId> {
    nodes.values().find(|node| node.is_leader()).map(Raft::node_id)
}

#[test]
fn a_leader_whose_disk_is_full_hands_over_and_the_cluster_goes_on() {
    for seed in 0..3 {
        run(seed, |world| async move {
            let nodes = cluster(&world).await;
            let full = eventually(&world, "a leader", || leader(&nodes)).await;
            let disk = world.node(full).disk();
            disk.set_capacity(Some(disk.used_bytes()));
            for number in 0..200 {
                let other = nodes.values().find(|node| node.node_id() != full).expect("another");
                put(&world, other, number).await.expect("the others have space");
            }
            assert_ne!(leader(&nodes), Some(full), "seed {seed}");
            disk.set_capacity(None);
            let node = &nodes[&full];
            eventually(&world, "space", || node.status().no_space.is_none().then_some(())).await;
            assert_eq!(read(&world, node).await, Ok(200), "seed {seed}");
            assert_eq!(node.status().failure, None);
        });
    }
}

#[test]
fn a_cluster_of_full_disks_refuses_writes_and_goes_on_reading_until_there_is_space() {
    for seed in 0..3 {
        run(seed, |world| async move {
            let nodes = cluster(&world).await;
            put(&world, &nodes[&1], 0).await.expect("written");
            for id in NODES {
                let disk = world.node(id).disk();
                disk.set_capacity(Some(disk.used_bytes()));
            }
            let mut written = 1;
            let refused = loop {
                match put(&world, &nodes[&1], written).await {
                    Ok(_) => written += 1,
                    Err(error) => break error,
                }
                assert!(written < 1_000, "seed {seed}: the disks never were full");
            };
            assert!(
                matches!(&refused, ProposeError::NoSpace(reason) if reason.contains("no space")),
                "seed {seed}: {refused}"
            );
            for node in nodes.values() {
                let seen = read(&world, node).await.expect("reads go on");
                assert_eq!(seen as u64, written, "seed {seed}");
            }
            for id in NODES {
                world.node(id).disk().set_capacity(None);
            }
            let deadline = world.now() + LIMIT;
            while put(&world, &nodes[&2], 5_000).await.is_err() {
                world.sleep(Duration::from_millis(100)).await;
                assert!(world.now() < deadline, "seed {seed}: writes never went on");
            }
        });
    }
}

#[test]
fn a_failed_flush_stops_its_node_and_nobody_else() {
    for seed in 0..3 {
        run(seed, |world| async move {
            let nodes = cluster(&world).await;
            let broken = eventually(&world, "a leader", || leader(&nodes)).await;
            world.node(broken).disk().fail_syncs(1);
            let other = nodes.values().find(|node| node.node_id() != broken).expect("another");
            for number in 0..20 {
                put(&world, other, number).await.expect("the others go on");
            }
            let node = &nodes[&broken];
            let reason = eventually(&world, "its end", || node.status().failure).await;
            assert!(reason.contains("can't write the log"), "{reason}");
            assert!(read(&world, node).await.is_err());
        });
    }
}

/// Flips a bit somewhere in what a node's newest segments hold.
fn damage(world: &World, id: NodeId) {
    let disk = world.node(id).disk();
    let segments: Vec<_> = disk
        .paths()
        .into_iter()
        .map(|(path, _)| path)
        .filter(|path| path.extension().is_some_and(|extension| extension == "wal"))
        .collect();
    let path = &segments[world.below(segments.len() as u64) as usize];
    let at = world.random();
    disk.damage(path, |bytes| {
        let end = bytes.iter().rposition(|byte| *byte != 0).map_or(1, |last| last + 1);
        let bit = at % (end as u64 * 8);
        bytes[(bit / 8) as usize] ^= 1 << (bit % 8);
    });
}

#[test]
fn no_acknowledged_write_is_lost_to_power_cuts_and_one_damaged_log_at_a_time() {
    for seed in 0..8 {
        run(seed, |world| async move {
            let mut nodes = cluster(&world).await;
            let mut written = 0;
            for round in 0..12 {
                for _ in 0..world.below(40) {
                    let through = NODES[world.below(3) as usize];
                    put(&world, &nodes[&through], written).await.expect("written");
                    written += 1;
                }
                let victim = NODES[world.below(3) as usize];
                let losses = [Loss::Nothing, Loss::All, Loss::Prefix, Loss::Random];
                nodes.remove(&victim);
                world.node(victim).kill(losses[world.below(4) as usize]);
                if world.chance(500) {
                    damage(&world, victim);
                }
                nodes.insert(victim, start(&world, victim).await);
                // A second one may only fall once the first is whole again.
                let node = nodes[&victim].clone();
                let healed = || node.status().healing.is_none().then_some(());
                eventually(&world, "the log to heal", healed).await;
                let seen = read(&world, &node).await.unwrap_or_else(|error| {
                    let statuses: Vec<_> = nodes.values().map(Raft::status).collect();
                    panic!("seed {seed}, round {round}: node {victim}: {error}: {statuses:#?}")
                });
                assert_eq!(seen as u64, written, "seed {seed}, round {round}");
            }
        });
    }
}

#[test]
fn a_node_whose_first_entries_are_damaged_finds_its_peers_in_the_later_ones() {
    run(3, |world| async move {
        let mut nodes = cluster(&world).await;
        for number in 0..5 {
            put(&world, &nodes[&2], number).await.expect("written");
        }
        nodes.remove(&1);
        world.node(1).kill(Loss::Nothing);
        // What is left before the damage says that this node is alone.
        let path = std::path::Path::new("raft/0000000000000001.wal");
        assert!(world.node(1).disk().damage(path, |bytes| bytes[302] ^= 1));
        nodes.insert(1, start(&world, 1).await);
        let node = nodes[&1].clone();
        eventually(&world, "the log to heal", || node.status().healing.is_none().then_some(()))
            .await;
        assert_eq!(read(&world, &node).await, Ok(5));
    });
}

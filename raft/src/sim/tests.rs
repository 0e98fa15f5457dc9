//! Consensus alone in a simulated world.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use futures::{FutureExt, future::BoxFuture};

use super::{Loss, World, run};
use crate::{Calls, Config, Entry, Member, NodeId, Raft, StateMachine, Unprepared};

const NODES: [NodeId; 3] = [1, 2, 3];

/// A map from bytes to the last value, which remembers how many commands it took.
#[derive(Clone, Default)]
struct Map {
    values: BTreeMap<Vec<u8>, Vec<u8>>,
    applied: u64,
}

impl StateMachine for Map {
    type View = Map;

    fn apply(&mut self, entry: &Entry) -> Vec<u8> {
        self.applied += 1;
        self.values.insert(entry.command_id.to_vec(), entry.command.clone());
        entry.command.clone()
    }

    fn view(&self) -> Map {
        self.clone()
    }

    fn snapshot(view: &Map) -> Vec<u8> {
        let mut bytes = view.applied.to_le_bytes().to_vec();
        for (key, value) in &view.values {
            bytes.extend_from_slice(key);
            bytes.extend_from_slice(&(value.len() as u64).to_le_bytes());
            bytes.extend_from_slice(value);
        }
        bytes
    }

    fn restore(mut bytes: &[u8]) -> Result<Self, String> {
        let short = || "cut short".to_owned();
        let mut take = |length: usize| -> Result<Vec<u8>, String> {
            let (head, rest) = bytes.split_at_checked(length).ok_or_else(short)?;
            bytes = rest;
            Ok(head.to_vec())
        };
        let number = |bytes: Vec<u8>| bytes.try_into().map(u64::from_le_bytes).map_err(|_| short());
        let mut map = Map { applied: number(take(8)?)?, ..Map::default() };
        while let Ok(key) = take(16) {
            let length = number(take(8)?)? as usize;
            map.values.insert(key, take(length)?);
        }
        Ok(map)
    }
}

struct NoCalls;

impl Calls for NoCalls {
    fn call(&self, _peer: NodeId, request: Vec<u8>) -> BoxFuture<'static, Vec<u8>> {
        async move { request }.boxed()
    }
}

fn address(id: NodeId) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::new(10, 0, 0, id as u8), 7_000))
}

fn member(id: NodeId) -> Member {
    Member { address: address(id), name: format!("node{id}") }
}

async fn start(world: &World, id: NodeId) -> Raft<Map> {
    let config = Config {
        cluster_id: [7; 16],
        node_id: id,
        directory: "/raft".into(),
        listen: address(id),
        snapshot_every: 40,
        keep_entries: 10,
        ..Config::default()
    };
    let starting = Raft::start(config, Map::default(), Arc::new(Unprepared), Arc::new(NoCalls));
    world.node(id).spawn(starting).await.expect("start")
}

async fn cluster(world: &World) -> BTreeMap<NodeId, Raft<Map>> {
    let mut rafts = BTreeMap::new();
    for id in NODES {
        rafts.insert(id, start(world, id).await);
    }
    rafts[&1].bootstrap(member(1)).await.expect("bootstrap");
    for id in [2, 3] {
        let raft = rafts[&1].clone();
        let adding = async move { raft.add_voter(id, member(id)).await };
        world.node(1).spawn(adding).await.expect("add");
    }
    rafts
}

async fn propose(world: &World, id: NodeId, raft: &Raft<Map>, number: u64) -> bool {
    let raft = raft.clone();
    let mut command_id = [0; 16];
    command_id[..8].copy_from_slice(&number.to_le_bytes());
    let proposing = async move { raft.propose(command_id, number.to_le_bytes().to_vec()).await };
    world.node(id).spawn(proposing).await.is_ok()
}

fn holds(map: &Map, number: u64) -> bool {
    let mut command_id = [0; 16];
    command_id[..8].copy_from_slice(&number.to_le_bytes());
    map.values.contains_key(&command_id[..])
}

/// Writes through every node while one after the other dies and loses what it had not flushed.
async fn deaths(world: World) -> Vec<u64> {
    let mut rafts = cluster(&world).await;
    let mut acknowledged = Vec::new();
    for round in 0..12 {
        for step in 0..8 {
            let number = round * 8 + step;
            let through = NODES[world.below(3) as usize];
            if propose(&world, through, &rafts[&through], number).await {
                acknowledged.push(number);
            }
        }
        let victim = NODES[world.below(3) as usize];
        let loss = [Loss::Nothing, Loss::All, Loss::Prefix, Loss::Random][world.below(4) as usize];
        world.node(victim).kill(loss);
        world.sleep(Duration::from_millis(world.below(1_500))).await;
        rafts.insert(victim, start(&world, victim).await);
    }
    for id in NODES {
        let raft = rafts[&id].clone();
        let read = world.node(id).spawn(async move { raft.read().await }).await.expect("read");
        for number in &acknowledged {
            assert!(holds(&read, *number), "node {id} lost write {number}");
        }
    }
    acknowledged
}

#[test]
fn nothing_acknowledged_is_lost_when_nodes_die_and_lose_unflushed_writes() {
    for seed in 0..6 {
        let (acknowledged, _) = run(seed, deaths);
        assert!(
            acknowledged.len() > 60,
            "seed {seed}: only {} writes went through",
            acknowledged.len()
        );
    }
}

#[test]
fn the_same_seed_gives_the_same_run() {
    for seed in [1, 2] {
        let (first, first_digest) = run(seed, deaths);
        let (second, second_digest) = run(seed, deaths);
        assert_eq!((first, first_digest), (second, second_digest), "seed {seed}");
    }
    assert_ne!(run(1, deaths).1, run(2, deaths).1);
}

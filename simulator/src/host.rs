//! A host's node process: started, killed, powered off with its machine.

use std::sync::Arc;
use std::time::Duration;

use controller::ids::HostId;
use controller::plan::{self, SharedInFlight};
use controller::state::Command;
use raft::sim::Loss;

use crate::agent::Agent;
use crate::consensus::{Keeping, Node};
use crate::heartbeat::{self, Table};
use crate::leader;
use crate::runtime;
use crate::world::World;

/// How soon a node that stopped by itself is started again.
const RESTART_AFTER: Duration = Duration::from_millis(500);
/// How often somebody looks whether it has.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// A node's process that lives.
#[derive(Clone)]
pub(crate) struct NodeHandle {
    /// Its consensus.
    pub(crate) raft: Node,
}

/// Starts the node of a host that is on and has none; again, until it stays.
pub(crate) fn start_node(world: &World, id: HostId, keeping: Keeping) {
    let world = world.clone();
    if world.with(|shared| !shared.starting.insert(id)) {
        return;
    }
    world.note(format_args!("node {id} starts"));
    runtime::spawn_on(id, async move {
        loop {
            let why = match serve(&world, id, keeping).await {
                Ok(raft) => failed(&raft).await,
                Err(why) => why,
            };
            world.note(format_args!("node {id} stopped: {why}"));
            runtime::sleep(RESTART_AFTER).await;
            // The process ends, and a new one is started: its tasks must not outlive it.
            let again = world.clone();
            runtime::spawn(async move {
                kill_node(&again, id, Loss::Nothing);
                start_node(&again, id, keeping);
            });
            std::future::pending::<()>().await;
        }
    });
}

async fn failed(raft: &Node) -> String {
    loop {
        runtime::sleep(LOOK_EVERY).await;
        if let Some(why) = raft.failure() {
            return why;
        }
    }
}

/// What a node's process does.
async fn serve(world: &World, id: HostId, keeping: Keeping) -> Result<Node, String> {
    let table = Table::default();
    let placing = Arc::new(Placing::new(world, id, &table));
    let calls = Arc::new(heartbeat::Answers::new(world, id, &table));
    let raft = Node::start(id, keeping, placing, calls).await?;
    Agent::start(world, id, &raft);
    runtime::spawn_on(id, heartbeat::beat(world.clone(), id, raft.clone()));
    runtime::spawn_on(id, leader::lead(world.clone(), id, raft.clone(), table));
    let handle = NodeHandle { raft: raft.clone() };
    world.with(|shared| shared.nodes.insert(id, handle));
    world.note(format_args!("node {id} runs"));
    Ok(raft)
}

/// Kills the node of a host, as `kill -9` or a cut of power does.
pub(crate) fn kill_node(world: &World, id: HostId, loss: Loss) {
    let was = world.with(|shared| {
        shared.nodes.remove(&id);
        shared.starting.remove(&id)
    });
    if was {
        runtime::sim().node(id.0).kill(loss);
        world.note(format_args!("node {id} is killed"));
    }
}

/// Fills in on the leader what only it knows, as the node does.
struct Placing {
    world: World,
    host: HostId,
    table: Table,
    in_flight: SharedInFlight,
}

impl Placing {
    fn new(world: &World, host: HostId, table: &Table) -> Placing {
        Placing {
            world: world.clone(),
            host,
            table: table.clone(),
            in_flight: SharedInFlight::default(),
        }
    }
}

impl raft::Prepare for Placing {
    fn prepare(&self, bytes: Vec<u8>) -> raft::Prepared {
        let (Ok(mut command), Some(node)) = (Command::decode(&bytes), self.world.node(self.host))
        else {
            return raft::Prepared::bare(bytes);
        };
        let state = node.raft.view();
        let now = self.world.host(self.host, |hardware| hardware.clock(runtime::now()));
        let hosts = state.cluster.hosts.keys().copied();
        let leases = self.table.lock();
        let mut changed = leases.prepare_fence(&mut command);
        let liveness = leases.liveness(hosts, now.unwrap_or_default());
        let (placed, promise) =
            plan::prepare_held(&state, &liveness, &self.in_flight, &mut command);
        changed |= placed;
        let command = if changed { command.encode() } else { bytes };
        raft::Prepared { command, held: promise.map(|promise| Box::new(promise) as _) }
    }
}

//! One run: a seed decides everything.

use std::cell::RefCell;
use std::panic;
use std::time::Duration;

use controller::ids::HostId;
use tests::random::Random;

use crate::clients::Client;
use crate::cluster::Cluster;
use crate::consensus::Keeping;
use crate::world::World;
use crate::{faults, guests, machine, replacement, runtime};

/// Hosts of a run.
const HOSTS: u64 = 3;
/// Clients of a run.
const CLIENTS: usize = 4;

/// What came of a run.
#[derive(Clone, Debug)]
pub(crate) struct Report {
    /// Its seed.
    pub(crate) seed: u64,
    /// The hash of its trace.
    pub(crate) hash: u64,
    /// Events in the trace.
    pub(crate) events: u64,
    /// Commands that clients were told are done.
    pub(crate) acknowledged: usize,
    /// Operations whose order was checked.
    pub(crate) reads: usize,
    /// Writes of guests that landed.
    pub(crate) writes: u64,
    /// Guests that were started.
    pub(crate) starts: u64,
    /// How long it took on its own clock.
    pub(crate) lasted: Duration,
    /// What the checkers found.
    pub(crate) found: Vec<String>,
}

thread_local! {
    static PANICS: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

/// From now on a panic is a finding of the run on its thread: a task that panics just ends.
pub(crate) fn note_panics() {
    panic::set_hook(Box::new(|info| {
        PANICS.with_borrow_mut(|panics| panics.push(info.to_string().replace('\n', " ")));
    }));
}

/// Runs a seed.
pub(crate) fn run(seed: u64, print: bool) -> Report {
    let world = World::new(seed, print);
    machine::watch(Some(world.clone()));
    let (mut report, digest) = runtime::run(seed, || simulate(seed, world));
    report.hash ^= digest;
    machine::watch(None);
    let panics = PANICS.take();
    report.found.extend(panics.into_iter().map(|panic| format!("panic: {panic}")));
    report
}

async fn simulate(seed: u64, world: World) -> Report {
    let mut shape = Random::new(seed);
    // Some clusters forget their logs soon, so that who was away needs a snapshot.
    let keeping = match shape.below(3) {
        0 => Keeping { snapshot_every: 25, keep_entries: 5 },
        1 => Keeping { snapshot_every: 150, keep_entries: 30 },
        _ => Keeping { snapshot_every: 5_000, keep_entries: 1_000 },
    };
    let cluster = Cluster::new(&world, HOSTS, keeping);
    let mut result = cluster.form().await;
    if result.is_ok() {
        runtime::spawn(guests::write(world.clone()));
        for number in 0..CLIENTS {
            world.with(|shared| shared.clients += 1);
            let (client, world) = (Client::new(&world, number), world.clone());
            runtime::spawn(async move {
                client.run().await;
                world.with(|shared| shared.clients -= 1);
            });
        }
        let until = runtime::now() + Duration::from_secs(shape.between(5, 25));
        let replaced = shape.chance(20).then(|| HostId(shape.between(1, HOSTS)));
        if let Some(old) = replaced {
            let cluster = cluster.clone();
            runtime::spawn(async move {
                cluster.world().pause_ms(1_000, 15_000).await;
                replacement::replace(cluster.clone(), old).await;
                cluster.replaced();
            });
            world.with(|shared| shared.replacing = true);
        }
        faults::strike(cluster.clone(), until).await;
        // What would last longer ends now, and then nothing goes wrong any more.
        faults::mend_all(&cluster);
        world.note("all is mended");
        world.with(|shared| shared.busy = false);
        result = cluster.settle().await;
    }
    let states = cluster.states();
    world.with(|shared| {
        // They hold the world, and it them.
        shared.nodes.clear();
        shared.checks.check("settled", result);
        shared.checks.finish(&states);
        let (hash, events) = shared.trace.hash();
        Report {
            seed,
            hash,
            events,
            acknowledged: shared.checks.acknowledged.len(),
            reads: shared.checks.reads.len(),
            writes: shared.checks.one_guest.writes(),
            starts: shared.starts,
            lasted: runtime::now(),
            found: shared.checks.found.clone(),
        }
    })
}

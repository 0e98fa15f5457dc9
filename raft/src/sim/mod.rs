//! A simulated world for whole clusters: virtual time, seeded chance, disks that lose what was not
//! flushed, links that delay, lose, repeat and cut, and nodes that die at any await point.
//!
//! Everything in it runs on one thread in an order that the seed alone decides, so a run is
//! repeated exactly by its seed; [`World::digest`] proves it. Consensus in it is the product's own:
//! [`crate::Raft`] with its log, recovery, encodings and request handling, over openraft on
//! `openraft-rt-sim`. Only sockets, files and clocks are replaced.
//!
//! Start with [`run`], then [`World::node`] and [`Node::spawn`]: a [`crate::Raft`] started inside a
//! node's task uses that node's disk, clock and links, and dies with the node.

pub(crate) mod net;
mod node;
mod runtime;
#[cfg(test)]
mod tests;
mod world;

pub use net::Link;
pub use node::{Node, Process, Task};
pub use world::{World, run};

pub use crate::sim_disk::{Loss, SimDisk};
pub(crate) use runtime::Runtime;

/// How long a flush takes at least …
const FLUSH_MIN: std::time::Duration = std::time::Duration::from_micros(100);
/// … and at most.
const FLUSH_MAX: std::time::Duration = std::time::Duration::from_millis(2);

/// Whether the running code is part of a simulated world.
pub(crate) fn is_running() -> bool {
    world::current().is_some()
}

/// The wall clock of the node that the running code belongs to.
pub(crate) fn unix_ms() -> Option<u64> {
    let world = world::current()?;
    Some(world.unix_ms(node::current().map(|life| life.id)))
}

/// The disk of the node that the running code belongs to.
pub(crate) fn disk() -> Option<SimDisk> {
    Some(world::current()?.node(node::current()?.id).disk())
}

/// The time between a write and its flush, and between two looks for space.
pub(crate) async fn disk_pause(pause: std::time::Duration) {
    let Some(world) = world::current() else { return };
    let latency = world.between(FLUSH_MIN, FLUSH_MAX);
    world.sleep(pause.max(latency)).await;
}

/// Random bytes by the world's seed.
pub(crate) fn random_id() -> Option<[u8; 16]> {
    let world = world::current()?;
    let (high, low) = (world.random(), world.random());
    Some(((u128::from(high) << 64) | u128::from(low)).to_be_bytes())
}

//! Heartbeats and leases: what a host's node asks its leader every second, and what the leader
//! answers. The tables are the product's (`controller::plan::leases`); clocks are the hosts'.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use controller::ids::HostId;
use controller::plan::leases::{HEARTBEAT_EVERY, HostLease, LEASE, LeaderLeases, Until};
use futures::future::BoxFuture;

use crate::consensus::Node;
use crate::hardware::Hardware;
use crate::runtime;
use crate::world::World;

/// How long a host waits for an answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(1);
/// How often a host sees whether its lease counts by now.
const GLANCE: Duration = Duration::from_millis(50);

/// What a node knows as leader. Clones are the same.
#[derive(Clone, Default)]
pub(crate) struct Table {
    leases: Arc<Mutex<LeaderLeases>>,
}

impl Table {
    /// The leader's leases.
    pub(crate) fn lock(&self) -> MutexGuard<'_, LeaderLeases> {
        self.leases.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Answers heartbeats.
pub(crate) struct Answers {
    world: World,
    host: HostId,
    table: Table,
}

impl Answers {
    /// For a node that is about to start.
    pub(crate) fn new(world: &World, host: HostId, table: &Table) -> Answers {
        Answers { world: world.clone(), host, table: table.clone() }
    }
}

/// A host's clock since boot.
pub(crate) fn clock(world: &World, host: HostId) -> Duration {
    world.host(host, |hardware| hardware.clock(runtime::now())).unwrap_or_default()
}

impl raft::Calls for Answers {
    /// The answer is the index from which on a lease counts, or nothing where there is none.
    fn call(&self, peer: u64, _: Vec<u8>) -> BoxFuture<'static, Vec<u8>> {
        let (world, here, table) = (self.world.clone(), self.host, self.table.clone());
        // Not kept here, where consensus would hold itself for ever.
        let raft = self.world.node(self.host).map(|node| node.raft);
        Box::pin(async move {
            let Some(raft) = raft else { return Vec::new() };
            let peer = HostId(peer);
            let received = clock(&world, here);
            let forced = raft.view().cluster.hosts.get(&peer).is_none_or(|host| host.forced_down);
            let leasable = {
                let mut leases = table.lock();
                leases.lead(raft.leads(), received);
                leases.hear(peer, forced, received)
            };
            if !leasable {
                return Vec::new();
            }
            let Some(index) = raft.lead_index().await else { return Vec::new() };
            let mut leases = table.lock();
            leases.lead(raft.leads(), clock(&world, here));
            if !leases.may_grant(peer) {
                return Vec::new();
            }
            index.to_be_bytes().to_vec()
        })
    }
}

/// Asks for leases as long as the node lives, and lets guests write while one counts.
pub(crate) async fn beat(world: World, host: HostId, raft: Node) {
    let mut lease = HostLease::default();
    let mut next = Duration::ZERO;
    loop {
        if clock(&world, host) >= next {
            next = clock(&world, host) + HEARTBEAT_EVERY;
            if let Some(leader) = raft.leader() {
                let asked = clock(&world, host);
                let answer = raft.call(leader, Vec::new(), ANSWER_WITHIN).await;
                let index = answer.and_then(|bytes| bytes.try_into().ok()).map(u64::from_be_bytes);
                if let Some(index) = index {
                    lease.granted(asked, LEASE, index);
                }
            }
        }
        let applied = raft.applied();
        let running = |hardware: &mut Hardware| hardware.running();
        let guests = world.host(host, running).unwrap_or_default();
        let until = lease.writes_until(host, applied, &raft.view(), &guests);
        world.host(host, |hardware| match until {
            Until::Unknown => {}
            Until::At(until) => hardware.writes_until = until,
            Until::Never => hardware.writes_until = Duration::ZERO,
        });
        runtime::sleep(GLANCE).await;
    }
}

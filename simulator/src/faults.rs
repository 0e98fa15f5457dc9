//! What goes wrong, and when: drawn from the seed, for a while; then everything is mended.

use controller::ids::HostId;

use crate::cluster::Cluster;
use crate::runtime;
use crate::world::World;

/// A fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// A host hears nobody and nobody hears it.
    Isolated,
    /// A host is heard by nobody, and hears all; or the other way round.
    OneWay,
    /// Two hosts don't hear each other.
    Split,
    /// What goes between a host and the others comes late, twice or not at all.
    PoorLinks,
    /// A host's wall clock is off.
    ClockOff,
    /// A node's disk has no room.
    DiskFull,
    /// A node's disk fails to flush.
    FlushFails,
    /// A node is killed and starts again.
    NodeKilled,
    /// A host loses its power and gets it back.
    PowerCut,
    /// Storage ends and starts again.
    StorageKilled,
    /// The switch ends and starts again.
    SwitchKilled,
    /// A guest ends by itself.
    GuestEnds,
    /// Steps fail now and then.
    StepsFail,
    /// Steps hang.
    StepsHang,
    /// A node is killed, and a bit of its log flips while it is down.
    LogDamaged,
    /// The leader is asked to hand over to a node.
    LeaderMoves,
}

const FAULTS: [(Fault, u64); 16] = [
    (Fault::PoorLinks, 10),
    (Fault::ClockOff, 4),
    (Fault::DiskFull, 5),
    (Fault::FlushFails, 5),
    (Fault::Isolated, 12),
    (Fault::OneWay, 8),
    (Fault::Split, 8),
    (Fault::NodeKilled, 20),
    (Fault::PowerCut, 8),
    (Fault::StorageKilled, 8),
    (Fault::SwitchKilled, 8),
    (Fault::GuestEnds, 12),
    (Fault::StepsFail, 8),
    (Fault::StepsHang, 8),
    (Fault::LogDamaged, 5),
    (Fault::LeaderMoves, 8),
];

fn draw(world: &World) -> Fault {
    let total = FAULTS.iter().map(|(_, weight)| weight).sum::<u64>();
    let mut drawn = world.between(0, total - 1);
    for (fault, weight) in FAULTS {
        if drawn < weight {
            return fault;
        }
        drawn -= weight;
    }
    Fault::NodeKilled
}

/// Lets things go wrong until `until`, each for a while.
pub(crate) async fn strike(cluster: Cluster, until: std::time::Duration) {
    let world = cluster.world();
    loop {
        world.pause_ms(200, 4_000).await;
        if runtime::now() >= until {
            return;
        }
        let fault = draw(world);
        let host = HostId(world.between(1, cluster.hosts()));
        world.note(format_args!("fault {fault:?} on host {host}"));
        let lasts = if world.chance(25) { (8_000, 16_000) } else { (100, 3_000) };
        let cluster = cluster.clone();
        runtime::spawn(async move {
            begin(&cluster, fault, host);
            cluster.world().pause_ms(lasts.0, lasts.1).await;
            end(&cluster, fault, host);
        });
    }
}

fn begin(cluster: &Cluster, fault: Fault, host: HostId) {
    let world = cluster.world();
    let others = (1..=cluster.hosts()).map(HostId).filter(|other| *other != host);
    match fault {
        Fault::Isolated => others.for_each(|other| cluster.cut(host, other, true, true)),
        Fault::OneWay => {
            let outwards = world.chance(50);
            others.for_each(|other| cluster.cut(host, other, outwards, !outwards));
        }
        Fault::Split => others.take(1).for_each(|other| cluster.cut(host, other, true, true)),
        Fault::PoorLinks => cluster.make_links_poor(host),
        Fault::ClockOff => {
            let off = i64::try_from(world.between(0, 20_000)).unwrap_or(0) - 10_000;
            runtime::sim().node(host.0).set_skew_ms(off);
        }
        Fault::DiskFull => {
            let disk = runtime::sim().node(host.0).disk();
            disk.set_capacity(Some(disk.used_bytes()));
        }
        Fault::FlushFails => runtime::sim().node(host.0).disk().fail_syncs(1),
        Fault::NodeKilled => cluster.kill(host),
        Fault::PowerCut => cluster.power_off(host),
        Fault::StorageKilled => {
            world.host(host, |hardware| hardware.storage.stop());
        }
        Fault::SwitchKilled => {
            world.host(host, |hardware| hardware.switch.stop());
        }
        Fault::GuestEnds => guest_ends(world, host),
        Fault::StepsFail => {
            world.host(host, |hardware| hardware.failing = 30);
        }
        Fault::StepsHang => {
            world.host(host, |hardware| hardware.hanging = 30);
        }
        Fault::LogDamaged => cluster.damage_log(host),
        Fault::LeaderMoves => cluster.move_leader(host),
    }
}

fn guest_ends(world: &World, host: HostId) {
    world.with(|shared| {
        let Some(hardware) = shared.hosts.get_mut(&host) else { return };
        let all: Vec<_> = hardware.guests.keys().cloned().collect();
        if !all.is_empty() {
            let id = shared.random.pick(&all);
            let why = if shared.random.chance(50) { "crashed" } else { "powered off" };
            hardware.end_guest(id, why);
        }
    });
}

fn end(cluster: &Cluster, fault: Fault, host: HostId) {
    let world = cluster.world();
    match fault {
        Fault::Isolated | Fault::OneWay | Fault::Split | Fault::PoorLinks => cluster.mend(host),
        Fault::ClockOff => runtime::sim().node(host.0).set_skew_ms(0),
        Fault::DiskFull => runtime::sim().node(host.0).disk().set_capacity(None),
        Fault::FlushFails => runtime::sim().node(host.0).disk().fail_syncs(0),
        Fault::NodeKilled | Fault::LogDamaged => cluster.start(host),
        Fault::PowerCut => cluster.power_on(host),
        Fault::StorageKilled => {
            world.host(host, |hardware| {
                if hardware.powered {
                    hardware.storage.start();
                }
            });
        }
        Fault::SwitchKilled => {
            world.host(host, |hardware| {
                if hardware.powered && !hardware.switch.up {
                    let instance = hardware.switch.instance + 1;
                    hardware.switch = crate::hardware::switch::Switch::new(instance);
                }
            });
        }
        Fault::GuestEnds | Fault::LeaderMoves => {}
        Fault::StepsFail => {
            world.host(host, |hardware| hardware.failing = 0);
        }
        Fault::StepsHang => {
            world.host(host, |hardware| hardware.hanging = 0);
        }
    }
}

/// Mends everything.
pub(crate) fn mend_all(cluster: &Cluster) {
    for host in (1..=cluster.hosts()).map(HostId) {
        let lasting =
            [Fault::Isolated, Fault::StepsFail, Fault::StepsHang, Fault::ClockOff, Fault::DiskFull];
        for fault in lasting.into_iter().chain([Fault::FlushFails]) {
            end(cluster, fault, host);
        }
        cluster.power_on(host);
        for fault in [Fault::StorageKilled, Fault::SwitchKilled, Fault::NodeKilled] {
            end(cluster, fault, host);
        }
    }
}

//! What guests do: write to their disks, all the time, where lease and gate let them.

use std::time::Duration;

use controller::ids::{HostId, ServerId, VolumeId};

use crate::checks::Write;
use crate::hardware::guest::Disk;
use crate::hardware::storage::Claim;
use crate::runtime;
use crate::setup::server_name;
use crate::world::{Shared, World};

/// How often guests are looked at.
const EVERY: Duration = Duration::from_millis(60);
/// Longest that a write which passed the lease is in flight, within the fence's margin.
const IN_FLIGHT_MS_MAX: u64 = 900;

/// A write that passed the lease and has not landed.
struct InFlight {
    lands: Duration,
    host: HostId,
    server: ServerId,
    nonce: u64,
    /// A volume and how it is reached; none for the root disk.
    volume: Option<(VolumeId, Disk)>,
}

/// Lets all guests write until the run ends.
pub(crate) async fn write(world: World) {
    let mut in_flight: Vec<InFlight> = Vec::new();
    loop {
        runtime::sleep(EVERY).await;
        let now = runtime::now();
        world.with(|shared| {
            let (due, later) = in_flight.drain(..).partition(|write| write.lands <= now);
            in_flight = later;
            let due: Vec<InFlight> = due;
            for write in &due {
                land(shared, write);
            }
            reconnect(shared);
            issue(shared, now, &mut in_flight);
        });
    }
}

/// A connection that was lost is made again by the guest's host, as long as the home admits it.
fn reconnect(shared: &mut Shared) {
    let mut lost = Vec::new();
    for (host, hardware) in &shared.hosts {
        for (server, guest) in hardware.guests.iter().filter(|_| hardware.storage.up) {
            for (volume, disk) in guest.process.iter().flat_map(|process| &process.disks) {
                let Disk::Remote { generation, home, session, instance } = disk else { continue };
                if *instance != hardware.storage.instance {
                    // The agent has to give the guest another.
                    continue;
                }
                let there = shared.hosts.get(home);
                let there = there.filter(|_| shared.connected(*host, *home));
                if there.is_some_and(|there| !there.storage.is_connected(volume, *session)) {
                    let (volume, server, generation) =
                        (volume.clone(), server.clone(), *generation);
                    lost.push((*host, *home, Claim { volume, server, generation }));
                }
            }
        }
    }
    for (host, home, claim) in lost {
        let there = shared.hosts.get_mut(&home);
        let connected = there.map(|there| there.storage.connect(&claim, &server_name(host)));
        let Some(Ok(session)) = connected else { continue };
        let Some(here) = shared.hosts.get_mut(&host) else { continue };
        let instance = here.storage.instance;
        let guest = here.guests.get_mut(&claim.server);
        let Some(process) = guest.and_then(|guest| guest.process.as_mut()) else { continue };
        let generation = claim.generation;
        let disk = Disk::Remote { generation, home, session, instance };
        process.disks.insert(claim.volume, disk);
    }
}

/// Each guest writes to some of its disks.
fn issue(shared: &mut Shared, now: Duration, in_flight: &mut Vec<InFlight>) {
    let Shared { random, hosts, .. } = shared;
    for (host, hardware) in hosts.iter() {
        if !hardware.powered || !hardware.may_write(now) {
            continue;
        }
        for (server, guest) in &hardware.guests {
            let Some(process) = &guest.process else { continue };
            let volumes = process.disks.iter().map(|(id, disk)| Some((id.clone(), disk.clone())));
            for volume in std::iter::once(None).chain(volumes) {
                if !random.chance(25) {
                    continue;
                }
                // Most writes take no time worth speaking of.
                let ms = if random.chance(10) { random.below(IN_FLIGHT_MS_MAX) } else { 0 };
                let lands = now + Duration::from_millis(ms);
                let (host, server, nonce) = (*host, server.clone(), guest.nonce);
                in_flight.push(InFlight { lands, host, server, nonce, volume });
            }
        }
    }
}

/// A write reaches its disk, unless its guest has ended or its connection was cut off.
fn land(shared: &mut Shared, write: &InFlight) {
    let InFlight { host, server, nonce, .. } = write;
    let guest = shared.hosts.get(host).and_then(|hardware| hardware.guests.get(server));
    let Some(guest) = guest.filter(|guest| guest.nonce == *nonce) else { return };
    let Some(process) = &guest.process else { return };
    if let Some((volume, disk)) = &write.volume {
        let held = process.disks.get(volume) == Some(disk);
        let reaches = match disk {
            Disk::Local { .. } => true,
            Disk::Remote { home, session, instance, .. } => {
                let here = shared.hosts.get(host).map(|here| here.storage.instance);
                let there = shared.hosts.get(home);
                here == Some(*instance)
                    && shared.connected(*host, *home)
                    && there.is_some_and(|there| there.storage.is_connected(volume, *session))
            }
        };
        if !held || !reaches {
            return;
        }
        let state = shared.checks.newest();
        let write = Write {
            volume: volume.clone(),
            server: server.clone(),
            host: *host,
            generation: disk.generation(),
        };
        let result = shared.checks.one_writer.wrote(&write, &state);
        shared.checks.check("one writer", result);
    }
    let result = shared.checks.one_guest.wrote(server, *host, *nonce);
    shared.checks.check("one guest", result);
}

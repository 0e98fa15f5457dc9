//! No host is promised more than it has. Counted from servers and volumes, not from the sums that
//! `apply` keeps.

use std::collections::BTreeMap;

use controller::ids::HostId;
use controller::state::State;

/// vCPUs that may be promised for each of a host's own.
const VCPUS_FOR_EACH: u64 = 4;

type Promised = [u64; 3];

fn promised(state: &State) -> BTreeMap<HostId, Promised> {
    let mut all: BTreeMap<HostId, Promised> = BTreeMap::new();
    for server in state.compute.servers.values() {
        let Some(host) = server.host else { continue };
        let on = all.entry(host).or_default();
        on[0] += u64::from(server.flavor.vcpus);
        on[1] += server.flavor.ram_mib;
        on[2] += server.flavor.disk_gib();
    }
    for volume in state.volume.volumes.values() {
        let Some(home) = volume.home else { continue };
        all.entry(home).or_default()[2] += volume.size_gib;
    }
    all
}

/// Whether each host that was promised more than before still has it.
pub(super) fn within(before: &State, after: &State) -> Result<(), String> {
    let earlier = promised(before);
    for (id, now) in promised(after) {
        let Some(host) = after.cluster.hosts.get(&id) else {
            return Err(format!("host {id} is gone and promised to somebody"));
        };
        let capacity = host.capacity;
        let has = [u64::from(capacity.vcpus) * VCPUS_FOR_EACH, capacity.ram_mib, capacity.disk_gib];
        let was = earlier.get(&id).copied().unwrap_or_default();
        for (what, at) in ["vCPUs", "MiB of memory", "GiB of disk"].into_iter().zip(0..) {
            if now[at] > was[at] && now[at] > has[at] {
                return Err(format!("host {id} has {} {what}, {} are promised", has[at], now[at]));
            }
        }
    }
    Ok(())
}

//! No project uses more than its quota at the time it takes more. Counted from the objects.

use std::collections::BTreeMap;

use controller::ids::ProjectId;
use controller::state::{QuotaResource, State, UNLIMITED};

type Usage = BTreeMap<(ProjectId, QuotaResource), u64>;

fn usage(state: &State) -> Usage {
    let mut all = Usage::new();
    let mut add = |project: &ProjectId, resource, amount: u64| {
        *all.entry((project.clone(), resource)).or_default() += amount;
    };
    for server in state.compute.servers.values() {
        add(&server.project_id, QuotaResource::Instances, 1);
        add(&server.project_id, QuotaResource::Cores, server.flavor.vcpus.into());
        add(&server.project_id, QuotaResource::Ram, server.flavor.ram_mib);
    }
    for volume in state.volume.volumes.values() {
        add(&volume.project_id, QuotaResource::Volumes, 1);
        add(&volume.project_id, QuotaResource::Gigabytes, volume.size_gib);
    }
    for port in state.network.ports.values() {
        add(&port.project_id, QuotaResource::Ports, 1);
    }
    all
}

/// Whether what grew is within its limit.
pub(super) fn within(before: &State, after: &State) -> Result<(), String> {
    let earlier = usage(before);
    for ((project, resource), now) in usage(after) {
        let was = earlier.get(&(project.clone(), resource)).copied().unwrap_or(0);
        let limit = after.quota.limit(&project, resource);
        if now > was && limit != UNLIMITED && i64::try_from(now).is_ok_and(|now| now > limit) {
            let what = resource.as_str();
            return Err(format!("project {project} uses {now} of {limit} {what}"));
        }
    }
    Ok(())
}

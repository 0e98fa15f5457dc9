//! Nothing is left of what is gone: guests, root disks, volumes, exports and ports on a host all
//! belong to something that the state places there. Compared directly, not through the planner.

use std::collections::BTreeSet;

use controller::ids::{HostId, PortId};
use controller::state::State;
use controller::state::compute::Server;

use crate::hardware::Hardware;

/// The first thing on this host that belongs to nothing.
pub(crate) fn leaked(state: &State, host: HostId, hardware: &Hardware) -> Option<String> {
    let here = |server: &&std::sync::Arc<Server>| server.host == Some(host);
    let servers: Vec<_> = state.compute.servers.values().filter(here).collect();
    let placed = |id: &controller::ids::ServerId| servers.iter().any(|server| server.id == *id);
    if let Some(id) = hardware.guests.keys().find(|id| !placed(id)) {
        return Some(format!("host {host} has guest {id}, which isn't placed there"));
    }
    if let Some(id) = hardware.storage.roots.iter().find(|id| !placed(id)) {
        return Some(format!("host {host} has a root disk of {id}, which isn't placed there"));
    }
    for (id, volume) in hardware.storage.observed() {
        let Some(known) = state.volume.volumes.get(&id).filter(|v| v.home == Some(host)) else {
            return Some(format!("host {host} has volume {id}, whose home it isn't"));
        };
        if let Some((server, _)) = volume.holder
            && !known.attachments.iter().any(|attachment| attachment.server_id == server)
        {
            return Some(format!("volume {id} is held by {server}, which doesn't have it"));
        }
    }
    let ports: BTreeSet<&PortId> =
        servers.iter().flat_map(|server| server.ports.iter().map(|port| &port.port_id)).collect();
    let stray = hardware.switch.attached.keys().find(|port| !ports.contains(port));
    stray.map(|port| format!("host {host} has port {port} attached, which has no guest there"))
}

//! What is to be done for the servers of hosts that are fenced.

use super::leading::Chore;
use crate::ids::ServerId;
use crate::state::cluster::Host;
use crate::state::compute::{ComputeCommand, Desired, Server, VmState};
use crate::state::volume::{AttachmentState, VolumeCommand};
use crate::state::{Command, State};

/// The commands that free what waits for a fenced host, and, where the host is marked so, make its
/// servers anew elsewhere. The caller proposes a few at a time.
pub fn evacuation(state: &State) -> Vec<Chore> {
    let fenced = state.cluster.hosts.values().filter(|host| host.fenced.is_some());
    let mut chores = Vec::new();
    for host in fenced {
        let placed = state.compute.placed.get(&host.id);
        for id in placed.into_iter().flat_map(|placed| placed.servers.iter()) {
            let Some(server) = state.compute.servers.get(id) else { continue };
            chores.extend(server_chore(state, host, server));
            detachments(state, id, &mut chores);
        }
    }
    chores
}

fn server_chore(state: &State, host: &Host, server: &Server) -> Option<Chore> {
    let id = server.id.clone();
    let command = match (server.desired, server.vm_state) {
        (Desired::Deleted, _) => ComputeCommand::DeleteServer(id),
        (_, VmState::Error) => return None,
        // What never ran is made elsewhere whatever its host is marked with.
        (_, now) if now != VmState::Building && !host.evacuate => return None,
        _ => match state.evacuation_obstacle(server) {
            Some(obstacle) => {
                let known = server.fault.as_ref();
                if known.is_some_and(|fault| fault.message == obstacle.message) {
                    return None;
                }
                let generation = server.generation;
                ComputeCommand::ServerWaits { id, generation, message: obstacle.message }
            }
            None => ComputeCommand::EvacuateServer {
                id,
                requested_host: None,
                stop: false,
                placement: None,
            },
        },
    };
    let subject = format!("server {}", server.id);
    Some(Chore { subject, command: Command::Compute(command) })
}

/// Volumes that a guest on a fenced host was to give back: their home cuts it off.
fn detachments(state: &State, server: &ServerId, chores: &mut Vec<Chore>) {
    let volumes = state.volume.by_server.get(server).into_iter().flatten();
    for volume in volumes.filter_map(|id| state.volume.volumes.get(id)) {
        let home = volume.home.and_then(|home| state.cluster.hosts.get(&home));
        let leaving = volume
            .attachments
            .iter()
            .any(|a| a.server_id == *server && a.state == AttachmentState::Detaching);
        if leaving && home.is_some_and(|home| home.fenced.is_none()) {
            let (volume_id, server_id) = (volume.id.clone(), server.clone());
            let command = Command::Volume(VolumeCommand::Detach { volume_id, server_id });
            chores.push(Chore { subject: format!("volume {}", volume.id), command });
        }
    }
}

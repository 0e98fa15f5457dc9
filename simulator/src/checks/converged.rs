//! After the faults, what is wanted is what is: nothing is on its way any more, and each host does
//! exactly what the state says.

use controller::plan::{host_view, plan};
use controller::state::State;
use controller::state::compute::{Desired, VmState};
use controller::state::volume::VolumeStatus;

use crate::hardware::Hardware;
use controller::ids::HostId;

/// What isn't settled yet, in words; nothing when all is.
pub(crate) fn unsettled(state: &State, host: HostId, hardware: &Hardware) -> Option<String> {
    in_transition(state).or_else(|| differs(state, host, hardware))
}

/// An object in a state that it should only pass through.
fn in_transition(state: &State) -> Option<String> {
    let servers = state.compute.servers.values().find_map(|server| {
        let passing = server.vm_state == VmState::Building || server.task_state.is_some();
        (passing || server.desired == Desired::Deleted).then(|| {
            format!("server {} is {:?}/{:?}", server.id, server.vm_state, server.task_state)
        })
    });
    servers.or_else(|| {
        state.volume.volumes.values().find_map(|volume| {
            use VolumeStatus as S;
            let passing = matches!(
                volume.status,
                S::Creating | S::Reserved | S::Attaching | S::Detaching | S::Deleting
            );
            passing.then(|| format!("volume {} is {}", volume.id, volume.status.as_str()))
        })
    })
}

/// The first thing that the host still has to do.
fn differs(state: &State, host: HostId, hardware: &Hardware) -> Option<String> {
    let view = host_view(state, host);
    let programmed = hardware.switch.program.as_ref() == Some(&view.switch);
    let step = plan(&view, &hardware.observe(programmed)).into_iter().next();
    step.map(|step| format!("host {host} still has to do {step:?}"))
}

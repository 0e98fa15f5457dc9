//! What the leader adds to a command before it enters the log: placements.

use super::schedule::{InFlight, Liveness, place_again, place_server, place_volume};
use crate::state::compute::ComputeCommand;
use crate::state::volume::VolumeCommand;
use crate::state::{Command, State};

/// Fills in what only the leader knows; `false`: there was nothing to fill in. A command that was
/// refused as stale is prepared again and placed anew.
pub fn prepare(
    state: &State,
    liveness: &Liveness,
    in_flight: &mut InFlight,
    command: &mut Command,
) -> bool {
    // Deletions too: what is made and gone again between two placements would else stay promised.
    if matches!(command, Command::Compute(_) | Command::Volume(_)) {
        in_flight.settle(state);
    }
    match command {
        Command::Compute(ComputeCommand::CreateServer(new)) => {
            place_server(state, liveness, in_flight, new);
        }
        Command::Compute(ComputeCommand::EvacuateServer {
            id, requested_host, placement, ..
        }) => {
            let wanted = requested_host.as_deref();
            *placement = place_again(state, liveness, in_flight, id, wanted);
        }
        Command::Volume(VolumeCommand::Create(new)) => {
            place_volume(state, liveness, in_flight, new);
        }
        _ => return false,
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::fixture::{Sample, new_server};

    #[test]
    fn what_is_made_and_gone_again_leaves_no_promise() {
        let mut sample = Sample::new();
        let mut in_flight = InFlight::default();
        // Far more than the hosts have room for, one after the other.
        for number in 0..200 {
            let id = format!("s{number}");
            let create = ComputeCommand::CreateServer(Box::new(new_server(&id, None)));
            let delete = ComputeCommand::DeleteServer(id.as_str().into());
            for command in [create, delete] {
                let mut command = Command::Compute(command);
                let liveness = sample.liveness.clone();
                prepare(&sample.state, &liveness, &mut in_flight, &mut command);
                sample.apply_as_is(&command).expect("done");
            }
            assert!(sample.server(&id).host.is_some(), "there is room for {id}");
            let generation = sample.server(&id).generation;
            let gone = ComputeCommand::ServerGone { id: id.as_str().into(), generation };
            sample.apply_as_is(&Command::Compute(gone)).expect("gone");
        }
    }
}

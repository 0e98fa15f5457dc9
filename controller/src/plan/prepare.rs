//! What the leader adds to a command before it enters the log: placements.

use super::schedule::{InFlight, Liveness, place_again, place_server, place_volume};
use crate::state::compute::ComputeCommand;
use crate::state::volume::VolumeCommand;
use crate::state::{Command, State};

/// Fills in what only the leader knows. A command that was refused as stale is prepared
/// again and placed anew.
pub fn prepare(
    state: &State,
    liveness: &Liveness,
    in_flight: &mut InFlight,
    mut command: Command,
) -> Command {
    match &mut command {
        Command::Compute(ComputeCommand::CreateServer(new)) => {
            in_flight.settle(state);
            place_server(state, liveness, in_flight, new);
        }
        Command::Compute(ComputeCommand::EvacuateServer {
            id, requested_host, placement, ..
        }) => {
            in_flight.settle(state);
            let wanted = requested_host.as_deref();
            *placement = place_again(state, liveness, in_flight, id, wanted);
        }
        Command::Volume(VolumeCommand::Create(new)) => {
            in_flight.settle(state);
            place_volume(state, liveness, in_flight, new);
        }
        _ => {}
    }
    command
}

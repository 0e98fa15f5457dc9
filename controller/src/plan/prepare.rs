//! What the leader adds to a command before it enters the log: placements.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::schedule::{InFlight, Liveness, place_again, place_server, place_volume};
use crate::state::compute::ComputeCommand;
use crate::state::volume::VolumeCommand;
use crate::state::{Command, State};

/// What many proposals share.
pub type SharedInFlight = Arc<Mutex<InFlight>>;

/// A promise that lasts as long as its command is under way.
#[derive(Debug)]
pub struct Promise {
    in_flight: SharedInFlight,
    sequence: u64,
}

impl Drop for Promise {
    fn drop(&mut self) {
        lock(&self.in_flight).end(self.sequence);
    }
}

fn lock(in_flight: &SharedInFlight) -> MutexGuard<'_, InFlight> {
    in_flight.lock().unwrap_or_else(PoisonError::into_inner)
}

/// [`prepare`], with the promise that was made, where one was.
pub fn prepare_held(
    state: &State,
    liveness: &Liveness,
    in_flight: &SharedInFlight,
    command: &mut Command,
) -> (bool, Option<Promise>) {
    let mut all = lock(in_flight);
    let before = all.last();
    let changed = prepare(state, liveness, &mut all, command);
    let sequence = all.last();
    let promised = sequence > before;
    (changed, promised.then(|| Promise { in_flight: Arc::clone(in_flight), sequence }))
}

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
    use crate::state::compute::Placement;
    use crate::state::fixture::{Sample, new_server};

    #[test]
    fn what_was_refused_or_lost_leaves_no_promise() {
        let sample = Sample::new();
        let in_flight = SharedInFlight::default();
        let place = |number: usize| {
            let create = new_server(&format!("s{number}"), None);
            let mut command = Command::Compute(ComputeCommand::CreateServer(Box::new(create)));
            let (changed, held) =
                prepare_held(&sample.state, &sample.liveness, &in_flight, &mut command);
            assert!(changed);
            let Command::Compute(ComputeCommand::CreateServer(new)) = command else {
                panic!("the command became another");
            };
            (matches!(new.placement, Some(Placement::Host(_))), held)
        };
        // Far more than the hosts have room for; none gets into the state.
        for number in 0..200 {
            let (placed, held) = place(number);
            assert!(placed && held.is_some(), "there is room for s{number}");
        }
        let held: Vec<_> = (200..400).map(place).take_while(|(placed, _)| *placed).collect();
        assert!(!held.is_empty() && held.len() < 200, "what is under way holds its room");
    }

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

//! The controller's state as the state machine that the log drives.

use controller::state::State;
use std::collections::BTreeSet;

/// What the log replicates.
#[derive(Default)]
pub(crate) struct Machine {
    state: State,
}

impl Machine {
    /// The id that the next host gets, of a state as a snapshot or a backup holds it.
    pub(crate) fn next_host_id(state: &[u8]) -> Result<u64, String> {
        let state = State::restore(state).map_err(|error| error.to_string())?;
        Ok(state.cluster.next_host_id)
    }

    /// The ids of the cluster's keys without which that state is of no use.
    pub(crate) fn key_ids(state: &[u8]) -> Result<BTreeSet<String>, String> {
        let state = State::restore(state).map_err(|error| error.to_string())?;
        let keys = &state.cluster.keys;
        let used = keys.current.iter().chain(&keys.retiring).cloned();
        Ok(used.chain(state.sealed().map(|sealed| sealed.key_id().to_owned())).collect())
    }
}

impl raft::StateMachine for Machine {
    type View = State;

    fn apply(&mut self, entry: &raft::Entry) -> Vec<u8> {
        let raft::Entry { index, time_ms, command_id, ref command } = *entry;
        self.state.apply_encoded(index, time_ms, command_id, command)
    }

    fn view(&self) -> State {
        self.state.clone()
    }

    fn snapshot(view: &State) -> Vec<u8> {
        view.snapshot()
    }

    fn restore(bytes: &[u8]) -> Result<Machine, String> {
        State::restore(bytes).map(|state| Machine { state }).map_err(|error| error.to_string())
    }
}

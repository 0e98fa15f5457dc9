//! The controller's state as the state machine that the log drives.

use controller::state::{Command, Rejection, RejectionKind, State, encode_result};

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
}

impl raft::StateMachine for Machine {
    type View = State;

    fn apply(&mut self, entry: &raft::Entry) -> Vec<u8> {
        let result = match Command::decode(&entry.command) {
            Ok(command) => self.state.apply(entry.index, entry.time_ms, entry.command_id, &command),
            // The same on every node that runs this version; a newer node's command can't be here
            // before all nodes know it.
            Err(error) => Err(Rejection::new(
                RejectionKind::Invalid,
                "command",
                entry.index,
                error.to_string(),
            )),
        };
        encode_result(&result)
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

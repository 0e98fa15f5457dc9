//! The controller's state as the machine that the log drives, watched by the checkers.

use std::cell::RefCell;

use controller::state::State;

use crate::checks::Applied;
use crate::world::World;

thread_local! {
    /// The run on this thread: a machine that is made from a snapshot gets nothing but bytes.
    static WORLD: RefCell<Option<World>> = const { RefCell::new(None) };
}

/// Makes a world the one that machines on this thread report to.
pub(crate) fn watch(world: Option<World>) {
    WORLD.with_borrow_mut(|current| *current = world);
}

fn report(what: impl FnOnce(&World)) {
    WORLD.with_borrow(|current| {
        if let Some(world) = current {
            what(world);
        }
    });
}

/// A node's state machine.
#[derive(Default)]
pub(crate) struct Machine {
    state: State,
    node: u64,
}

impl Machine {
    /// An empty one for a node.
    pub(crate) fn new(node: u64) -> Machine {
        Machine { state: State::default(), node }
    }
}

impl raft::StateMachine for Machine {
    type View = State;

    fn apply(&mut self, entry: &raft::Entry) -> Vec<u8> {
        let raft::Entry { index, time_ms, command_id, ref command } = *entry;
        let outcome = self.state.apply_encoded(index, time_ms, command_id, command);
        let applied = Applied { index, command_id, outcome: &outcome, state: &self.state };
        report(|world| world.with(|shared| shared.checks.applied(self.node, &applied)));
        outcome
    }

    fn view(&self) -> State {
        self.state.clone()
    }

    fn snapshot(view: &State) -> Vec<u8> {
        view.snapshot()
    }

    fn restore(bytes: &[u8]) -> Result<Machine, String> {
        let state = State::restore(bytes).map_err(|error| error.to_string())?;
        report(|world| world.with(|shared| shared.checks.restored(&state)));
        Ok(Machine { state, node: 0 })
    }
}

//! Placement, on the leader, before a command enters the log.

use super::Node;
use controller::plan::{self, Liveness, SharedInFlight};
use controller::state::{Command, State};
use raft::Prepared;
use std::any::Any;
use std::sync::Arc;

/// Fills placements in.
pub(super) struct Placing {
    node: Arc<Node>,
    in_flight: SharedInFlight,
}

impl Placing {
    /// For a node.
    pub(super) fn new(node: Arc<Node>) -> Placing {
        Placing { node, in_flight: SharedInFlight::default() }
    }

    fn known(&self) -> Option<(State, Liveness)> {
        Some((self.node.raft().ok()?.view(), self.node.liveness().ok()?))
    }
}

impl raft::Prepare for Placing {
    fn prepare(&self, bytes: Vec<u8>) -> Prepared {
        // What can't be read is refused where it is applied.
        let Ok(mut command) = Command::decode(&bytes) else { return Prepared::bare(bytes) };
        self.node.note_leadership();
        let mut changed = self.node.heartbeats.leases().prepare_fence(&mut command);
        let mut promise = None;
        if let Some((state, liveness)) = self.known() {
            let (placed, held) =
                plan::prepare_held(&state, &liveness, &self.in_flight, &mut command);
            changed |= placed;
            promise = held;
        }
        let command = if changed { command.encode() } else { bytes };
        Prepared { command, held: promise.map(|promise| Box::new(promise) as Box<dyn Any + Send>) }
    }
}

//! Placement, on the leader, before a command enters the log.

use super::Node;
use controller::plan::{self, InFlight, Liveness};
use controller::state::{Command, State};
use std::sync::{Arc, Mutex, PoisonError};

/// Fills placements in.
pub(super) struct Placing {
    node: Arc<Node>,
    in_flight: Mutex<InFlight>,
}

impl Placing {
    /// For a node.
    pub(super) fn new(node: Arc<Node>) -> Placing {
        Placing { node, in_flight: Mutex::default() }
    }

    fn known(&self) -> Option<(State, Liveness)> {
        Some((self.node.raft().ok()?.view(), self.node.liveness().ok()?))
    }
}

impl raft::Prepare for Placing {
    fn prepare(&self, bytes: Vec<u8>) -> Vec<u8> {
        let mut in_flight = self.in_flight.lock().unwrap_or_else(PoisonError::into_inner);
        // What can't be read is refused where it is applied.
        let Ok(mut command) = Command::decode(&bytes) else { return bytes };
        self.node.note_leadership();
        let mut changed = self.node.heartbeats.leases().prepare_fence(&mut command);
        if let Some((state, liveness)) = self.known() {
            changed |= plan::prepare(&state, &liveness, &mut in_flight, &mut command);
        }
        if changed { command.encode() } else { bytes }
    }
}

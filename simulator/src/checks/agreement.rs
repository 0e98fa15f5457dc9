//! Every node applies the same command at the same place, with the same outcome, and then has
//! the same state.

use std::collections::BTreeMap;

use controller::state::State;

/// States are compared whole at each of so many places; outcomes at every place.
const EVERY: u64 = 64;

/// What the first node found at each place.
#[derive(Default)]
pub(crate) struct Agreement {
    commands: BTreeMap<u64, ([u8; 16], u64)>,
    states: BTreeMap<u64, u64>,
}

impl Agreement {
    /// Compares what a node applied with what the first one did.
    pub(crate) fn applied(
        &mut self,
        node: u64,
        index: u64,
        command_id: [u8; 16],
        outcome: &[u8],
        state: &State,
    ) -> Result<(), String> {
        let this = (command_id, digest(outcome));
        let known = *self.commands.entry(index).or_insert(this);
        if known.0 != this.0 {
            return Err(format!("node {node} applied another command at {index} than others"));
        }
        if known.1 != this.1 {
            return Err(format!("at {index} the command came to something else on node {node}"));
        }
        if index.is_multiple_of(EVERY) {
            let this = digest(&state.snapshot());
            if *self.states.entry(index).or_insert(this) != this {
                return Err(format!("node {node} has another state at {index} than others"));
            }
        }
        Ok(())
    }

    /// The id of the command at a place.
    pub(crate) fn command_at(&self, index: u64) -> Option<[u8; 16]> {
        self.commands.get(&index).map(|(id, _)| *id)
    }
}

/// FNV-1a over words: the same everywhere.
pub(crate) fn digest(bytes: &[u8]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for chunk in bytes.chunks(8) {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        hash = (hash ^ u64::from_le_bytes(word)).wrapping_mul(0x0000_0100_0000_01b3);
        hash ^= hash >> 29;
    }
    hash ^ bytes.len() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_outcome_or_another_command_at_the_same_place_is_found() {
        let mut agreement = Agreement::default();
        let state = State::default();
        assert!(agreement.applied(1, 5, [1; 16], b"done", &state).is_ok());
        assert!(agreement.applied(2, 5, [1; 16], b"done", &state).is_ok());
        assert!(agreement.applied(3, 5, [1; 16], b"refused", &state).is_err());
        assert!(agreement.applied(3, 5, [2; 16], b"done", &state).is_err());
    }

    #[test]
    fn another_state_at_the_same_place_is_found() {
        let mut agreement = Agreement::default();
        let mut other = State::default();
        other.time_ms = 1;
        assert!(agreement.applied(1, EVERY, [1; 16], b"", &State::default()).is_ok());
        assert!(agreement.applied(2, EVERY, [1; 16], b"", &other).is_err());
    }
}

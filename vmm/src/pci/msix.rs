//! MSI-X: the table and pending bits of one function, and the delivery of its vectors.

use crate::machine::Interrupts;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// `queue_msix_vector` of a queue without one (virtio 1.2, section 4.1.5.1.2).
pub const NO_VECTOR: u16 = 0xFFFF;
const ENTRY_BYTES: usize = 16;
const ENTRY_MASKED: u32 = 1;

/// MSI-X of one function, shared by vCPUs and the device's thread.
pub struct Msix {
    interrupts: Interrupts,
    state: Mutex<State>,
}

struct State {
    enabled: bool,
    masked: bool,
    table: Vec<[u32; 4]>,
    pending: u64,
}

impl Msix {
    /// A table of `vectors` (at most 64) masked entries.
    pub fn new(interrupts: Interrupts, vectors: u16) -> Msix {
        let table = vec![[0, 0, 0, ENTRY_MASKED]; usize::from(vectors.min(64))];
        Msix {
            interrupts,
            state: Mutex::new(State { enabled: false, masked: false, table, pending: 0 }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the function's control bits; what waited is delivered.
    pub fn set_control(&self, (enabled, masked): (bool, bool)) {
        let mut state = self.lock();
        (state.enabled, state.masked) = (enabled, masked);
        for vector in 0..state.table.len() {
            self.deliver_pending(&mut state, vector);
        }
    }

    /// Sends a vector; masked ones wait. Without MSI-X nothing is sent: the guest polls.
    pub fn signal(&self, vector: u16) {
        let mut state = self.lock();
        let vector = usize::from(vector);
        if state.enabled && vector < state.table.len() {
            state.pending |= 1 << vector;
            self.deliver_pending(&mut state, vector);
        }
    }

    fn deliver_pending(&self, state: &mut State, vector: usize) {
        let [low, high, data, control] = state.table[vector];
        let waits = state.pending & 1 << vector != 0;
        if waits && state.enabled && !state.masked && control & ENTRY_MASKED == 0 {
            state.pending &= !(1 << vector);
            self.interrupts.signal(u64::from(low) | u64::from(high) << 32, data);
        }
    }

    /// Reads the table.
    pub fn read_table(&self, offset: usize, data: &mut [u8]) {
        let state = self.lock();
        for (index, byte) in data.iter_mut().enumerate() {
            let at = offset + index;
            let word =
                state.table.get(at / ENTRY_BYTES).map_or(0, |entry| entry[at % ENTRY_BYTES / 4]);
            *byte = word.to_le_bytes()[at % 4];
        }
    }

    /// Writes the table (aligned 4 or 8 bytes, as the specification asks; anything else is ignored).
    pub fn write_table(&self, offset: usize, data: &[u8]) {
        if !offset.is_multiple_of(4) || !matches!(data.len(), 4 | 8) {
            return;
        }
        let mut state = self.lock();
        for (index, bytes) in data.chunks_exact(4).enumerate() {
            let at = offset + index * 4;
            let vector = at / ENTRY_BYTES;
            if let Some(entry) = state.table.get_mut(vector) {
                entry[at % ENTRY_BYTES / 4] =
                    u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
                self.deliver_pending(&mut state, vector);
            }
        }
    }

    /// Reads the pending bits.
    pub fn read_pending(&self, offset: usize, data: &mut [u8]) {
        let pending = self.lock().pending.to_le_bytes();
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = pending.get(offset + index).copied().unwrap_or(0);
        }
    }
}

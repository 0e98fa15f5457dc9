//! A device's configuration (virtio 1.2, section 2.5): the guest reads it and may write some of it,
//! the host changes it while the guest runs.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The bytes of a device's configuration, shared by the bus, the device and control threads.
#[derive(Clone, Debug)]
pub struct Fields(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    bytes: Vec<u8>,
    /// What the guest may write.
    writable: Range<usize>,
    generation: u8,
}

impl From<Vec<u8>> for Fields {
    fn from(bytes: Vec<u8>) -> Fields {
        Fields::new(bytes, 0..0)
    }
}

impl Fields {
    /// Fields of which the guest may write `writable`.
    pub fn new(bytes: Vec<u8>, writable: Range<usize>) -> Fields {
        Fields(Arc::new(Mutex::new(State { bytes, writable, generation: 0 })))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest reads; beyond the end are zeroes.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        let state = self.lock();
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = state.bytes.get(offset + index).copied().unwrap_or(0);
        }
    }

    /// The guest writes; what it may not write keeps its value.
    pub fn write(&self, offset: usize, data: &[u8]) {
        let mut state = self.lock();
        for (index, byte) in data.iter().enumerate() {
            let at = offset + index;
            if state.writable.contains(&at)
                && let Some(place) = state.bytes.get_mut(at)
            {
                *place = *byte;
            }
        }
    }

    /// A 32-bit field.
    pub fn word(&self, offset: usize) -> u32 {
        let mut word = [0; 4];
        self.read(offset, &mut word);
        u32::from_le_bytes(word)
    }

    /// The host changes a 32-bit field; the guest sees another generation.
    pub fn set_word(&self, offset: usize, value: u32) {
        let mut state = self.lock();
        if let Some(place) = state.bytes.get_mut(offset..offset + 4) {
            place.copy_from_slice(&value.to_le_bytes());
            state.generation = state.generation.wrapping_add(1);
        }
    }

    /// `config_generation`: another one after every change by the host.
    pub fn generation(&self) -> u8 {
        self.lock().generation
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_writes_only_what_it_may_and_sees_what_the_host_changed() {
        let fields = Fields::new(vec![1, 0, 0, 0, 2, 0, 0, 0], 4..8);
        fields.write(2, &[9; 8]);
        assert_eq!((fields.word(0), fields.word(4), fields.word(6)), (1, 0x0909_0909, 0x0909));
        assert_eq!(fields.generation(), 0);
        fields.set_word(0, 7);
        fields.set_word(5, 7);
        assert_eq!((fields.word(0), fields.generation()), (7, 1));
    }
}

//! An I/O APIC (Intel 82093AA), as a split interrupt chip leaves it to the VMM.
//!
//! Each pin's redirection entry is a message to the LAPICs; a pulse on the pin sends it. All
//! lines of this machine are pulses (edge-triggered), so nothing waits for an end of interrupt.

use super::Interrupts;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Interrupt pins.
pub const PINS: usize = 24;

const REGISTER_SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;
const INDEX_ID: u8 = 0;
const INDEX_VERSION: u8 = 1;
const INDEX_ARBITRATION: u8 = 2;
const INDEX_TABLE: u8 = 0x10;
/// Version 0x20: with the highest entry in bits 16 to 23.
const VERSION: u32 = 0x20 | (PINS as u32 - 1) << 16;
const ENTRY_MASKED: u64 = 1 << 16;
/// Delivery status (12) and remote IRR (14) are the chip's.
const ENTRY_READ_ONLY: u64 = 1 << 12 | 1 << 14;
const MSI_ADDRESS: u64 = 0xFEE0_0000;

/// The chip.
pub struct IoApic {
    interrupts: Interrupts,
    state: Mutex<State>,
}

struct State {
    select: u8,
    id: u32,
    entries: [u64; PINS],
    /// Pulses that came while their pin was masked: delivered once it is not.
    pending: u32,
}

impl IoApic {
    /// A chip after reset: every pin masked.
    pub fn new(interrupts: Interrupts) -> IoApic {
        let state = State { select: 0, id: 0, entries: [ENTRY_MASKED; PINS], pending: 0 };
        IoApic { interrupts, state: Mutex::new(state) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A pulse on a pin.
    pub fn pulse(&self, pin: u8) {
        let mut state = self.lock();
        if usize::from(pin) < PINS {
            state.pending |= 1 << pin;
            self.deliver(&mut state, usize::from(pin));
        }
    }

    fn deliver(&self, state: &mut State, pin: usize) {
        let entry = state.entries[pin];
        if state.pending & 1 << pin != 0 && entry & ENTRY_MASKED == 0 {
            state.pending &= !(1 << pin);
            let (address, data) = message(entry);
            self.interrupts.signal(address, data);
        }
    }

    /// Reads the register at `offset` in the chip's window.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let state = self.lock();
        let value = match offset {
            REGISTER_SELECT => u32::from(state.select),
            WINDOW => state.register(),
            _ => 0,
        };
        data.fill(0);
        for (byte, value) in data.iter_mut().zip(value.to_le_bytes()) {
            *byte = value;
        }
    }

    /// Writes the register at `offset` in the chip's window; it takes 4 bytes.
    pub fn write(&self, offset: u64, data: &[u8]) {
        let Ok(bytes) = <[u8; 4]>::try_from(data) else { return };
        let value = u32::from_le_bytes(bytes);
        let mut state = self.lock();
        match offset {
            REGISTER_SELECT => state.select = value as u8,
            WINDOW => {
                if let Some(pin) = state.set_register(value) {
                    self.deliver(&mut state, pin);
                }
            }
            _ => {}
        }
    }
}

impl State {
    fn register(&self) -> u32 {
        match self.select {
            INDEX_ID | INDEX_ARBITRATION => self.id,
            INDEX_VERSION => VERSION,
            index => self
                .entry(index)
                .map_or(0, |(pin, high)| (self.entries[pin] >> if high { 32 } else { 0 }) as u32),
        }
    }

    /// Sets the selected register; returns the pin whose entry it was.
    fn set_register(&mut self, value: u32) -> Option<usize> {
        if self.select == INDEX_ID {
            self.id = value & 0x0F00_0000;
        }
        let (pin, high) = self.entry(self.select)?;
        let (old, value) = (self.entries[pin], u64::from(value));
        self.entries[pin] = if high {
            old & 0xFFFF_FFFF | value << 32
        } else {
            old & !0xFFFF_FFFF | value & !ENTRY_READ_ONLY
        };
        Some(pin)
    }

    /// Pin and half of an index in the redirection table.
    fn entry(&self, index: u8) -> Option<(usize, bool)> {
        let index = usize::from(index.checked_sub(INDEX_TABLE)?);
        (index < PINS * 2).then_some((index / 2, index % 2 == 1))
    }
}

/// The message of a redirection entry: its bits, where an MSI has them (Intel SDM 3A, 11.11).
fn message(entry: u64) -> (u64, u32) {
    let destination = entry >> 56 & 0xFF;
    let logical = entry >> 11 & 1;
    let vector_and_delivery = entry & 0x7FF;
    (MSI_ADDRESS | destination << 12 | logical << 2, vector_and_delivery as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> State {
        State { select: 0, id: 0, entries: [ENTRY_MASKED; PINS], pending: 0 }
    }

    #[test]
    fn an_entry_becomes_the_message_that_linux_expects() {
        assert_eq!(message(0x0300_0000_0000_0031), (0xFEE0_3000, 0x31));
        assert_eq!(message(0xFF00_0000_0000_0931), (0xFEEF_F004, 0x131));
    }

    #[test]
    fn halves_of_an_entry_are_written_apart_and_status_bits_stay() {
        let mut state = state();
        state.select = INDEX_TABLE + 9;
        assert_eq!(state.set_register(0x0300_0000), Some(4));
        state.select = INDEX_TABLE + 8;
        assert_eq!(state.set_register(0x0000_5031), Some(4));
        assert_eq!(state.entries[4], 0x0300_0000_0000_0031);
        assert_eq!(state.register(), 0x31);
        state.select = INDEX_VERSION;
        assert_eq!(state.register(), 0x0017_0020);
    }

    #[test]
    fn no_index_is_out_of_range() {
        let mut state = state();
        for select in 0..=u8::MAX {
            state.select = select;
            state.set_register(u32::MAX);
            state.register();
        }
        assert!(state.entries.iter().all(|entry| entry & ENTRY_READ_ONLY == 0));
    }
}

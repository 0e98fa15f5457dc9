//! What a guest finds beside memory, processors and PCI.
//!
//! A unikernel has a console ring and its boot timer. Linux has what it can't do without on a PC:
//! an I/O APIC, a serial port, and the registers by which ACPI sleeps and resets. Its interrupts
//! otherwise are MSI-X, its time is kvm-clock, the TSC and the LAPIC's timer.

use super::Interrupts;
use super::ioapic::IoApic;
use super::memory::Ram;
use super::vcpu::End;
use crate::devices::console::{Console, Sink};
use crate::devices::serial::SerialPort;
use std::sync::{Arc, Mutex, PoisonError};

/// The I/O APIC's window.
pub const IOAPIC_ADDRESS: u64 = 0xFEC0_0000;
const IOAPIC_BYTES: u64 = 0x1000;
/// First of the serial port's eight ports.
pub const PORT_SERIAL: u16 = 0x3F8;
const PORT_SERIAL_END: u16 = PORT_SERIAL + 8;
/// I/O APIC pin of the serial port.
pub const SERIAL_PIN: u8 = 4;
/// I/O APIC pin that announces a change on PCI.
pub const HOTPLUG_PIN: u8 = 16;
/// ACPI's sleep control register.
pub const PORT_SLEEP_CONTROL: u16 = 0x600;
/// ACPI's sleep status register.
pub const PORT_SLEEP_STATUS: u16 = 0x601;
/// ACPI's reset register.
pub const PORT_RESET: u16 = 0x602;
/// What the reset register takes.
pub const RESET_VALUE: u8 = 1;
/// Sleep type of S5, off.
pub const SLEEP_TYPE_OFF: u8 = 5;
/// Command port of a keyboard controller, by which a PC without ACPI resets itself.
const PORT_KEYBOARD_COMMAND: u16 = 0x64;
const KEYBOARD_RESET: u8 = 0xFE;

const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE_SHIFT: u8 = 2;

/// What is there.
pub enum Board {
    /// A unikernel's console.
    Unikernel(Mutex<Console>),
    /// A PC for Linux.
    Pc {
        /// Interrupts of the lines below and of hot-plug.
        ioapic: Arc<IoApic>,
        /// COM1.
        serial: Mutex<SerialPort>,
    },
}

/// What became of a write to a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PortWrite {
    /// The board took it.
    Taken {
        /// Bytes that came out of the console.
        spoken: usize,
    },
    /// It ended the guest.
    End(End),
    /// It is not the board's.
    NotMine,
}

impl Board {
    /// A unikernel's board.
    pub fn unikernel(sink: Sink) -> Board {
        Board::Unikernel(Mutex::new(Console::new(sink)))
    }

    /// Linux's board.
    pub fn pc(sink: Sink, interrupts: Interrupts) -> Board {
        let ioapic = Arc::new(IoApic::new(interrupts));
        let serial = Mutex::new(SerialPort::new(Arc::clone(&ioapic), sink));
        Board::Pc { ioapic, serial }
    }

    /// Passes on what the guest said and nobody has taken yet; returns the number of bytes.
    pub fn drain_console(&self, ram: &Ram) -> usize {
        match self {
            Board::Unikernel(console) => {
                console.lock().unwrap_or_else(PoisonError::into_inner).drain(ram)
            }
            Board::Pc { serial, .. } => {
                serial.lock().unwrap_or_else(PoisonError::into_inner).flush()
            }
        }
    }

    /// A port is written.
    pub fn port_write(&self, port: u16, value: u8) -> PortWrite {
        let Board::Pc { serial, .. } = self else { return PortWrite::NotMine };
        match port {
            PORT_SERIAL..PORT_SERIAL_END => {
                let mut serial = serial.lock().unwrap_or_else(PoisonError::into_inner);
                return PortWrite::Taken {
                    spoken: serial.write((port - PORT_SERIAL) as u8, value),
                };
            }
            PORT_SLEEP_CONTROL if value & SLEEP_ENABLE != 0 => {
                if value >> SLEEP_TYPE_SHIFT & 7 == SLEEP_TYPE_OFF {
                    return PortWrite::End(End::PowerOff(0));
                }
            }
            PORT_RESET if value == RESET_VALUE => return PortWrite::End(End::Reset),
            PORT_KEYBOARD_COMMAND if value == KEYBOARD_RESET => return PortWrite::End(End::Reset),
            PORT_SLEEP_CONTROL..=PORT_RESET | PORT_KEYBOARD_COMMAND => {}
            _ => return PortWrite::NotMine,
        }
        PortWrite::Taken { spoken: 0 }
    }

    /// A port is read; `false`: it is not the board's.
    pub fn port_read(&self, port: u16, data: &mut [u8]) -> bool {
        let Board::Pc { serial, .. } = self else { return false };
        match port {
            PORT_SERIAL..PORT_SERIAL_END => {
                let mut serial = serial.lock().unwrap_or_else(PoisonError::into_inner);
                let value = serial.read((port - PORT_SERIAL) as u8);
                if let Some(byte) = data.first_mut() {
                    *byte = value;
                }
            }
            PORT_SLEEP_CONTROL..=PORT_RESET | PORT_KEYBOARD_COMMAND => data.fill(0),
            _ => return false,
        }
        true
    }

    /// An address is written; `false`: it is not the board's.
    pub fn mmio_write(&self, address: u64, data: &[u8]) -> bool {
        let Some((ioapic, offset)) = self.ioapic_at(address) else { return false };
        ioapic.write(offset, data);
        true
    }

    /// An address is read; `false`: it is not the board's.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) -> bool {
        let Some((ioapic, offset)) = self.ioapic_at(address) else { return false };
        ioapic.read(offset, data);
        true
    }

    fn ioapic_at(&self, address: u64) -> Option<(&IoApic, u64)> {
        let Board::Pc { ioapic, .. } = self else { return None };
        let offset = address.checked_sub(IOAPIC_ADDRESS)?;
        (offset < IOAPIC_BYTES).then_some((ioapic, offset))
    }
}

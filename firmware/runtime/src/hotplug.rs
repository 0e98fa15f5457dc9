//! Devices that come and go while the guest runs: the hot-plug controller of `abi::boot`, and
//! PCI configuration space (ECAM) to find out what came.

use crate::cpu::Registers;
use crate::virtio::Transport;
use abi::boot::{
    DeviceEntry, HOTPLUG_REG_DOWN, HOTPLUG_REG_EJECT, HOTPLUG_REG_UP, HOTPLUG_START,
    PCI_ECAM_START, PCI_MMIO_PER_SLOT, PCI_MMIO_START, PCI_SLOTS,
};

// SAFETY: `abi::boot` places the controller here, and its window is mapped.
const CONTROLLER: Registers = unsafe { Registers::new(HOTPLUG_START) };

/// Slots where a device came since the last call, as a bitmap.
#[must_use]
pub fn take_plugged() -> u32 {
    CONTROLLER.read32(HOTPLUG_REG_UP)
}

/// Slots whose device the host asks back, as a bitmap.
#[must_use]
pub fn leaving() -> u32 {
    CONTROLLER.read32(HOTPLUG_REG_DOWN)
}

/// The guest has let go of this slot's device.
pub fn eject(slot: u16) {
    CONTROLLER.write32(HOTPLUG_REG_EJECT, 1 << (slot & 31));
}

/// The slots of a bitmap, lowest first.
pub fn slots(bitmap: u32) -> impl Iterator<Item = u16> {
    (0..PCI_SLOTS as u16).filter(move |slot| bitmap >> slot & 1 != 0)
}

const VENDOR_VIRTIO: u32 = 0x1AF4;
const DEVICE_VIRTIO_MODERN: u32 = 0x1040;
const REG_COMMAND: u64 = 0x04;
const REG_BAR0: u64 = 0x10;
const REG_CAPABILITIES: u64 = 0x34;
const COMMAND_MEMORY_AND_BUS_MASTER: u16 = 0x6;
const CAPABILITY_VENDOR: u32 = 0x09;
const CAPABILITY_MSIX: u32 = 0x11;
const MSIX_ENABLE: u16 = 1 << 15;
const CAPABILITIES_MAX: usize = 48;

/// Looks at a slot, assigns its BAR where nobody did, enables it, and returns its transport;
/// `None` where no modern virtio function answers.
#[must_use]
pub fn probe(slot: u16) -> Option<Transport> {
    // SAFETY: 32 KiB of the ECAM window for each slot below PCI_SLOTS, mapped by the VMM.
    let config = unsafe { Registers::new(PCI_ECAM_START + ((u64::from(slot) & 31) << 15)) };
    let id = config.read32(0);
    let device = (id >> 16).checked_sub(DEVICE_VIRTIO_MODERN)?;
    if id & 0xFFFF != VENDOR_VIRTIO || device == 0 || device > 0x3F {
        return None;
    }
    let mut entry = DeviceEntry {
        slot,
        virtio_type: device as u16,
        bar: bar_of(config, slot),
        ..Default::default()
    };
    config.write16(REG_COMMAND, COMMAND_MEMORY_AND_BUS_MASTER);
    let mut at = u64::from(config.read8(REG_CAPABILITIES)) & !3;
    for _ in 0..CAPABILITIES_MAX {
        if at == 0 {
            break;
        }
        let header = config.read32(at);
        match header & 0xFF {
            CAPABILITY_VENDOR => read_virtio_capability(config, at, header >> 24, &mut entry),
            CAPABILITY_MSIX => {
                let control = (header >> 16) as u16;
                entry.msix_vectors = u32::from(control & 0x7FF) + 1;
                entry.msix_table = config.read32(at + 4) & !7;
                config.write16(at + 2, control | MSIX_ENABLE);
            }
            _ => {}
        }
        at = u64::from(header >> 8) & 0xFC;
    }
    Transport::from_entry(&entry)
}

fn bar_of(config: Registers, slot: u16) -> u64 {
    let low = config.read32(REG_BAR0);
    let assigned = u64::from(config.read32(REG_BAR0 + 4)) << 32 | u64::from(low & !0xF);
    if assigned != 0 {
        return assigned;
    }
    let address = PCI_MMIO_START + u64::from(slot) * PCI_MMIO_PER_SLOT;
    config.write32(REG_BAR0, address as u32);
    config.write32(REG_BAR0 + 4, (address >> 32) as u32);
    address
}

/// virtio 1.2, section 4.1.4: structures in BAR 0.
fn read_virtio_capability(config: Registers, at: u64, kind: u32, entry: &mut DeviceEntry) {
    if config.read8(at + 4) != 0 {
        return;
    }
    let offset = config.read32(at + 8);
    match kind {
        1 => entry.common = offset,
        2 => {
            entry.notify = offset;
            entry.notify_multiplier = config.read32(at + 16);
        }
        3 => entry.isr = offset,
        4 => entry.device = offset,
        _ => {}
    }
}

//! The modern PCI transport (virtio 1.2, section 4.1), written for few exits: a register that
//! is known to hold the wanted value after reset is not written.

use super::queue::{QUEUE_SIZE_MAX, Queue};
use crate::cpu::Registers;
use crate::interrupts::{DEVICE_VECTOR, MESSAGE_ADDRESS};
use abi::boot::DeviceEntry;
use core::fmt;

const DEVICE_FEATURE_SELECT: u64 = 0x00;
const DEVICE_FEATURE: u64 = 0x04;
const DRIVER_FEATURE_SELECT: u64 = 0x08;
const DRIVER_FEATURE: u64 = 0x0C;
const STATUS: u64 = 0x14;
const QUEUE_SELECT: u64 = 0x16;
const QUEUE_SIZE: u64 = 0x18;
const QUEUE_MSIX_VECTOR: u64 = 0x1A;
const QUEUE_ENABLE: u64 = 0x1C;
const QUEUE_NOTIFY_OFF: u64 = 0x1E;
const QUEUE_DESC: u64 = 0x20;
const QUEUE_DRIVER: u64 = 0x28;
const QUEUE_DEVICE: u64 = 0x30;

const STATUS_ACKNOWLEDGE_AND_DRIVER: u8 = 1 | 2;
const STATUS_DRIVER_OK: u8 = 4;
const STATUS_FEATURES_OK: u8 = 8;

/// The device follows virtio 1.x.
pub(crate) const FEATURE_VERSION_1: u64 = 1 << 32;
/// Both sides say at which index they want to be told.
pub(crate) const FEATURE_EVENT_IDX: u64 = 1 << 29;

/// Why a device could not be started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VirtioError {
    /// It does not speak virtio 1.x.
    Legacy,
    /// It did not accept a subset of its own features.
    Features,
    /// It lacks a queue, or the queue has no usable size.
    Queue(u16),
}

impl fmt::Display for VirtioError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            VirtioError::Legacy => out.write_str("the device does not offer virtio 1"),
            VirtioError::Features => out.write_str("the device refused its own features"),
            VirtioError::Queue(index) => {
                write!(out, "queue {index} is missing or has no usable size")
            }
        }
    }
}

/// One queue's doorbell.
#[derive(Clone, Copy, Debug)]
pub struct Doorbell {
    registers: Registers,
    queue: u16,
}

impl Doorbell {
    /// Tells the device that the queue has new buffers.
    pub fn ring(self) {
        self.registers.write16(0, self.queue);
    }
}

/// One virtio-pci function.
#[derive(Clone, Copy, Debug)]
pub struct Transport {
    common: Registers,
    notify: Registers,
    notify_multiplier: u32,
    device: Registers,
    msix: Option<Registers>,
    slot: u16,
    virtio_type: u16,
}

impl Transport {
    /// From an entry of the device table, or one filled from configuration space. `None` where
    /// it has no BAR.
    #[must_use]
    pub fn from_entry(entry: &DeviceEntry) -> Option<Transport> {
        if entry.bar == 0 {
            return None;
        }
        // SAFETY: the VMM's promise: BAR 0 is assigned, enabled and mapped, the offsets lie in it.
        let bar = unsafe { Registers::new(entry.bar) };
        Some(Transport {
            common: bar.from(u64::from(entry.common)),
            notify: bar.from(u64::from(entry.notify)),
            notify_multiplier: entry.notify_multiplier,
            device: bar.from(u64::from(entry.device)),
            msix: (entry.msix_vectors > 0).then(|| bar.from(u64::from(entry.msix_table))),
            slot: entry.slot,
            virtio_type: entry.virtio_type,
        })
    }

    /// Slot on bus 0.
    #[must_use]
    pub fn slot(&self) -> u16 {
        self.slot
    }

    /// virtio device type.
    #[must_use]
    pub fn virtio_type(&self) -> u16 {
        self.virtio_type
    }

    /// The device configuration.
    #[must_use]
    pub fn config(&self) -> Registers {
        self.device
    }

    /// Accepts the wanted features that the device offers, and returns them. The device is
    /// fresh: nobody has used it since its reset.
    pub fn negotiate(&self, wanted: u64) -> Result<u64, VirtioError> {
        let common = self.common;
        common.write8(STATUS, STATUS_ACKNOWLEDGE_AND_DRIVER);
        let low = common.read32(DEVICE_FEATURE);
        common.write32(DEVICE_FEATURE_SELECT, 1);
        let offered = u64::from(common.read32(DEVICE_FEATURE)) << 32 | u64::from(low);
        let accepted = offered & (wanted | FEATURE_VERSION_1 | FEATURE_EVENT_IDX);
        if accepted & FEATURE_VERSION_1 == 0 {
            return Err(VirtioError::Legacy);
        }
        common.write32(DRIVER_FEATURE, accepted as u32);
        common.write32(DRIVER_FEATURE_SELECT, 1);
        common.write32(DRIVER_FEATURE, (accepted >> 32) as u32);
        common.write8(STATUS, STATUS_ACKNOWLEDGE_AND_DRIVER | STATUS_FEATURES_OK);
        if common.read8(STATUS) & STATUS_FEATURES_OK == 0 {
            return Err(VirtioError::Features);
        }
        self.route_interrupts();
        Ok(accepted)
    }

    /// Entry 0 of the MSI-X table serves every queue.
    fn route_interrupts(&self) {
        if let Some(table) = self.msix {
            table.write32(0, MESSAGE_ADDRESS);
            table.write32(4, 0);
            table.write32(8, u32::from(DEVICE_VECTOR));
            table.write32(12, 0);
        }
    }

    /// Makes queue `index` with at most `size_wanted` entries.
    pub fn open_queue(
        &self,
        index: u16,
        size_wanted: u16,
        features: u64,
    ) -> Result<(Queue, Doorbell), VirtioError> {
        let common = self.common;
        if index != 0 {
            common.write16(QUEUE_SELECT, index);
        }
        let size_offered = common.read16(QUEUE_SIZE);
        let size = size_offered.min(size_wanted).min(QUEUE_SIZE_MAX);
        if !size.is_power_of_two() {
            return Err(VirtioError::Queue(index));
        }
        if size != size_offered {
            common.write16(QUEUE_SIZE, size);
        }
        let queue = Queue::new(size, features & FEATURE_EVENT_IDX != 0);
        common.write16(QUEUE_MSIX_VECTOR, 0);
        // Without a multiplier all queues share one doorbell, and the read's exit is saved.
        let notify_off =
            if self.notify_multiplier == 0 { 0 } else { common.read16(QUEUE_NOTIFY_OFF) };
        self.write_address(QUEUE_DESC, queue.descriptors_address());
        self.write_address(QUEUE_DRIVER, queue.driver_address());
        self.write_address(QUEUE_DEVICE, queue.device_address());
        common.write16(QUEUE_ENABLE, 1);
        let offset = u64::from(notify_off) * u64::from(self.notify_multiplier);
        Ok((queue, Doorbell { registers: self.notify.from(offset), queue: index }))
    }

    fn write_address(&self, register: u64, address: u64) {
        self.common.write32(register, address as u32);
        if address >> 32 != 0 {
            self.common.write32(register + 4, (address >> 32) as u32);
        }
    }

    /// The device may use its queues from now on.
    pub fn start(&self) {
        self.common
            .write8(STATUS, STATUS_ACKNOWLEDGE_AND_DRIVER | STATUS_FEATURES_OK | STATUS_DRIVER_OK);
    }

    /// The device forgets its queues; their memory is the driver's again.
    pub fn reset(&self) {
        self.common.write8(STATUS, 0);
    }
}

//! The common configuration of a virtio-pci function (virtio 1.2, section 4.1.4.3): registers
//! only; what a change of `device_status` means is the function's matter.

use super::msix::NO_VECTOR;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;

/// Bytes of the common configuration.
const BYTES: usize = 0x40;
/// `device_status`: the driver accepted features (and they were fine).
pub const STATUS_FEATURES_OK: u8 = 8;
/// `device_status`: the driver is ready.
pub const STATUS_DRIVER_OK: u8 = 4;
/// `device_status`: the device can't go on until it is reset.
pub const STATUS_NEEDS_RESET: u8 = 0x40;

/// One queue as the driver set it up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueSetup {
    /// Largest size.
    pub size_max: u16,
    /// Size chosen by the driver.
    pub size: u16,
    /// Vector of its interrupts.
    pub vector: u16,
    /// Whether the driver enabled it.
    pub enabled: bool,
    /// Descriptor table.
    pub descriptors: u64,
    /// Available ring.
    pub available: u64,
    /// Used ring.
    pub used: u64,
}

/// What a write asks of the function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Nothing more.
    None,
    /// The driver wrote 0 to `device_status`.
    Reset,
    /// The driver is ready: the device starts.
    Start,
}

/// The registers.
#[derive(Clone, Debug)]
pub struct Registers {
    offered: u64,
    accepted: u64,
    device_select: u32,
    driver_select: u32,
    config_vector: u16,
    status: u8,
    queue_select: u16,
    queues: Vec<QueueSetup>,
}

impl Registers {
    /// Registers after reset.
    pub fn new(features: u64, queue_sizes: &[u16]) -> Registers {
        let queues = queue_sizes
            .iter()
            .map(|&size_max| QueueSetup {
                size_max,
                size: size_max,
                vector: NO_VECTOR,
                enabled: false,
                descriptors: 0,
                available: 0,
                used: 0,
            })
            .collect();
        Registers {
            offered: features | 1 << VIRTIO_F_VERSION_1,
            accepted: 0,
            device_select: 0,
            driver_select: 0,
            config_vector: NO_VECTOR,
            status: 0,
            queue_select: 0,
            queues,
        }
    }

    /// Back to the state after power-on.
    pub fn reset(&mut self) {
        let sizes: Vec<u16> = self.queues.iter().map(|queue| queue.size_max).collect();
        *self = Registers::new(self.offered, &sizes);
    }

    /// Features both sides agreed on.
    pub fn accepted(&self) -> u64 {
        self.accepted
    }

    /// The queues.
    pub fn queues(&self) -> &[QueueSetup] {
        &self.queues
    }

    /// Vector of configuration changes.
    pub fn config_vector(&self) -> u16 {
        self.config_vector
    }

    /// Reads; `needs_reset` is shown in `device_status`, `generation` is the configuration's.
    pub fn read(&self, offset: usize, data: &mut [u8], needs_reset: bool, generation: u8) {
        let image = self.image(needs_reset, generation);
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = image.get(offset + index).copied().unwrap_or(0);
        }
    }

    fn image(&self, needs_reset: bool, generation: u8) -> [u8; BYTES] {
        let mut image = [0; BYTES];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        let half = |features: u64, select: u32| match select {
            0 => features as u32,
            1 => (features >> 32) as u32,
            _ => 0,
        };
        put(0x00, &self.device_select.to_le_bytes());
        put(0x04, &half(self.offered, self.device_select).to_le_bytes());
        put(0x08, &self.driver_select.to_le_bytes());
        put(0x0C, &half(self.accepted, self.driver_select).to_le_bytes());
        put(0x10, &self.config_vector.to_le_bytes());
        put(0x12, &(self.queues.len() as u16).to_le_bytes());
        put(0x14, &[self.status | if needs_reset { STATUS_NEEDS_RESET } else { 0 }]);
        put(0x15, &[generation]);
        put(0x16, &self.queue_select.to_le_bytes());
        if let Some(queue) = self.queues.get(usize::from(self.queue_select)) {
            put(0x18, &queue.size.to_le_bytes());
            put(0x1A, &queue.vector.to_le_bytes());
            put(0x1C, &u16::from(queue.enabled).to_le_bytes());
            put(0x1E, &self.queue_select.to_le_bytes());
            put(0x20, &queue.descriptors.to_le_bytes());
            put(0x28, &queue.available.to_le_bytes());
            put(0x30, &queue.used.to_le_bytes());
        }
        image
    }

    /// Writes a register; accesses of a width the register does not have are ignored.
    pub fn write(&mut self, offset: usize, data: &[u8], vectors: u16) -> Change {
        let mut bytes = [0; 8];
        let Some(low) = bytes.get_mut(..data.len()) else { return Change::None };
        low.copy_from_slice(data);
        let value = u64::from_le_bytes(bytes);
        match (offset, data.len()) {
            (0x00, 4) => self.device_select = value as u32,
            (0x08, 4) => self.driver_select = value as u32,
            (0x0C, 4) => self.accept_features(value as u32),
            (0x10, 2) => self.config_vector = known_vector(value as u16, vectors),
            (0x14, 1) => return self.write_status(value as u8),
            (0x16, 2) => self.queue_select = value as u16,
            (0x18..0x40, _) => self.write_queue(offset, data.len(), value, vectors),
            _ => {}
        }
        Change::None
    }

    fn accept_features(&mut self, value: u32) {
        if self.status & STATUS_FEATURES_OK != 0 {
            return;
        }
        match self.driver_select {
            0 => self.accepted = self.accepted & !0xFFFF_FFFF | u64::from(value),
            1 => self.accepted = self.accepted & 0xFFFF_FFFF | u64::from(value) << 32,
            _ => {}
        }
    }

    fn write_status(&mut self, value: u8) -> Change {
        if value == 0 {
            return Change::Reset;
        }
        let started = self.status & STATUS_DRIVER_OK != 0;
        let mut value = value & !STATUS_NEEDS_RESET;
        let fine =
            self.accepted & !self.offered == 0 && self.accepted & 1 << VIRTIO_F_VERSION_1 != 0;
        if !fine {
            value &= !(STATUS_FEATURES_OK | STATUS_DRIVER_OK);
        }
        self.status |= value;
        let ready = STATUS_FEATURES_OK | STATUS_DRIVER_OK;
        if !started && self.status & ready == ready { Change::Start } else { Change::None }
    }

    fn write_queue(&mut self, offset: usize, len: usize, value: u64, vectors: u16) {
        if self.status & STATUS_DRIVER_OK != 0 {
            return;
        }
        let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) else { return };
        if offset == 0x1A && len == 2 {
            queue.vector = known_vector(value as u16, vectors);
            return;
        }
        if queue.enabled {
            return;
        }
        let low = |old: u64| old & !0xFFFF_FFFF | value & 0xFFFF_FFFF;
        let high = |old: u64| old & 0xFFFF_FFFF | value << 32;
        match (offset, len) {
            (0x18, 2) => {
                let size = value as u16;
                if size.is_power_of_two() && size <= queue.size_max {
                    queue.size = size;
                }
            }
            (0x1C, 2) => queue.enabled = value == 1,
            (0x20, 8) => queue.descriptors = value,
            (0x20, 4) => queue.descriptors = low(queue.descriptors),
            (0x24, 4) => queue.descriptors = high(queue.descriptors),
            (0x28, 8) => queue.available = value,
            (0x28, 4) => queue.available = low(queue.available),
            (0x2C, 4) => queue.available = high(queue.available),
            (0x30, 8) => queue.used = value,
            (0x30, 4) => queue.used = low(queue.used),
            (0x34, 4) => queue.used = high(queue.used),
            _ => {}
        }
    }
}

fn known_vector(vector: u16, vectors: u16) -> u16 {
    if vector < vectors { vector } else { NO_VECTOR }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(registers: &Registers, offset: usize) -> u32 {
        let mut data = [0; 4];
        registers.read(offset, &mut data, false, 0);
        u32::from_le_bytes(data)
    }

    #[test]
    fn features_that_were_not_offered_are_not_ok() {
        let mut registers = Registers::new(1 << 5, &[256]);
        registers.write(0x08, &1u32.to_le_bytes(), 2);
        registers.write(0x0C, &1u32.to_le_bytes(), 2);
        registers.write(0x08, &0u32.to_le_bytes(), 2);
        registers.write(0x0C, &(1u32 << 6).to_le_bytes(), 2);
        assert_eq!(registers.write(0x14, &[11], 2), Change::None);
        assert_eq!(read(&registers, 0x14) as u8, 3);
        registers.write(0x0C, &(1u32 << 5).to_le_bytes(), 2);
        registers.write(0x14, &[11], 2);
        assert_eq!(read(&registers, 0x14) as u8, 11);
        assert_eq!(registers.write(0x14, &[15], 2), Change::Start);
        assert_eq!(registers.write(0x14, &[15], 2), Change::None);
        assert_eq!(registers.write(0x14, &[0], 2), Change::Reset);
    }

    #[test]
    fn a_queue_is_frozen_once_enabled() {
        let mut registers = Registers::new(0, &[256, 64]);
        registers.write(0x16, &1u16.to_le_bytes(), 3);
        registers.write(0x18, &128u16.to_le_bytes(), 3);
        registers.write(0x18, &33u16.to_le_bytes(), 3);
        assert_eq!(registers.queues()[1].size, 64);
        registers.write(0x18, &16u16.to_le_bytes(), 3);
        registers.write(0x20, &0x1000u32.to_le_bytes(), 3);
        registers.write(0x24, &1u32.to_le_bytes(), 3);
        registers.write(0x1A, &9u16.to_le_bytes(), 3);
        registers.write(0x1C, &1u16.to_le_bytes(), 3);
        registers.write(0x20, &0u64.to_le_bytes(), 3);
        let queue = registers.queues()[1];
        assert_eq!(
            (queue.size, queue.descriptors, queue.vector, queue.enabled),
            (16, 0x1_0000_1000, NO_VECTOR, true)
        );
    }

    #[test]
    fn any_access_is_survived() {
        let mut registers = Registers::new(u64::MAX, &[256]);
        let mut random = 0x9E37_79B9_7F4A_7C15u64;
        for _ in 0..200_000 {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let (offset, len) = ((random >> 32) as usize % 0x50, (random >> 56) as usize % 9);
            if registers.write(offset, &random.to_le_bytes()[..len], 2) == Change::Reset {
                registers.reset();
            }
            registers.read(offset, &mut [0; 8][..len], true, 1);
        }
    }
}

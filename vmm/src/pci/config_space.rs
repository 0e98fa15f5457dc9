//! Configuration space of one function: bytes, and which of their bits a guest may write.
//!
//! That is all there is to it: sizing a BAR works because its low bits can't be written, and a
//! capability is a few bytes in the list. (PCI Local Bus 3.0, section 6; virtio 1.2, section 4.1.)

// Types of virtio capabilities (virtio 1.2, section 4.1.4).
const CAP_COMMON: u8 = 1;
const CAP_NOTIFY: u8 = 2;
const CAP_ISR: u8 = 3;
const CAP_DEVICE: u8 = 4;
const CAP_PCI: u8 = 5;

const BYTES: usize = 256;
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BAR0: usize = 0x10;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3C;
const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_BUS_MASTER: u16 = 1 << 2;
const COMMAND_INTX_OFF: u16 = 1 << 10;
const STATUS_CAPABILITIES: u16 = 1 << 4;
const CAPABILITY_MSIX: u8 = 0x11;
const CAPABILITY_VENDOR: u8 = 0x09;
const MSIX_ENABLE: u16 = 1 << 15;
const MSIX_MASK_ALL: u16 = 1 << 14;

const VENDOR_VIRTIO: u16 = 0x1AF4;
const DEVICE_VIRTIO_MODERN: u16 = 0x1040;
const VENDOR_BRIDGE: u16 = 0x1B36;
const DEVICE_BRIDGE: u16 = 0x0008;

/// Size of BAR 0.
pub const BAR_BYTES: u64 = 0x8000;
/// Common configuration in BAR 0.
pub const COMMON: u64 = 0x0000;
/// ISR status byte in BAR 0.
pub const ISR: u64 = 0x1000;
/// Device configuration in BAR 0.
pub const DEVICE: u64 = 0x2000;
/// Notification area in BAR 0: one address for all queues (`notify_off_multiplier` is 0), so one
/// ioeventfd serves a device.
pub const NOTIFY: u64 = 0x3000;
/// MSI-X table in BAR 0.
pub const MSIX_TABLE: u64 = 0x4000;
/// MSI-X pending bits in BAR 0.
pub const MSIX_PENDING: u64 = 0x5000;
/// Bytes of each window above.
pub const WINDOW_BYTES: u64 = 0x1000;

/// Configuration space of one function.
pub struct ConfigSpace {
    bytes: [u8; BYTES],
    writable: [u8; BYTES],
    msix_control: usize,
    pci_window: usize,
}

/// What the window capability (VIRTIO_PCI_CAP_PCI_CFG) points at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Offset in BAR 0.
    pub offset: u64,
    /// 1, 2 or 4.
    pub len: usize,
}

impl ConfigSpace {
    /// The host bridge in slot 0.
    pub fn host_bridge() -> ConfigSpace {
        let mut space =
            ConfigSpace { bytes: [0; BYTES], writable: [0; BYTES], msix_control: 0, pci_window: 0 };
        space.put(0, &VENDOR_BRIDGE.to_le_bytes());
        space.put(2, &DEVICE_BRIDGE.to_le_bytes());
        space.put(0x0A, &[0x00, 0x06]);
        space
    }

    /// A virtio function with BAR 0 at `bar`, decoding enabled.
    pub fn virtio(virtio_type: u16, bar: u64, msix_vectors: u16) -> ConfigSpace {
        let mut space =
            ConfigSpace { bytes: [0; BYTES], writable: [0; BYTES], msix_control: 0, pci_window: 0 };
        let class: [u8; 2] = match virtio_type {
            1 => [0x00, 0x02],
            2 => [0x00, 0x01],
            _ => [0x00, 0xFF],
        };
        space.put(0, &VENDOR_VIRTIO.to_le_bytes());
        space.put(2, &(DEVICE_VIRTIO_MODERN + virtio_type).to_le_bytes());
        space.put(COMMAND, &(COMMAND_MEMORY | COMMAND_BUS_MASTER).to_le_bytes());
        space.allow(
            COMMAND,
            &(COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_INTX_OFF).to_le_bytes(),
        );
        space.put(STATUS, &STATUS_CAPABILITIES.to_le_bytes());
        space.put(8, &[1]);
        space.put(0x0A, &class);
        const MEMORY_64_BIT: u64 = 0b100;
        space.put(BAR0, &(bar | MEMORY_64_BIT).to_le_bytes());
        space.allow(BAR0, &(!(BAR_BYTES - 1)).to_le_bytes());
        space.put(0x2C, &VENDOR_VIRTIO.to_le_bytes());
        space.put(0x2E, &(0x40 + virtio_type).to_le_bytes());
        space.allow(INTERRUPT_LINE, &[0xFF]);
        space.add_capabilities(msix_vectors);
        space
    }

    fn add_capabilities(&mut self, msix_vectors: u16) {
        let mut at = 0x40;
        self.put(CAPABILITIES, &[at as u8]);
        let windows = [
            (CAP_COMMON, COMMON, 16),
            (CAP_ISR, ISR, 16),
            (CAP_DEVICE, DEVICE, 16),
            (CAP_NOTIFY, NOTIFY, 20),
            (CAP_PCI, 0, 20),
        ];
        for (kind, offset, len) in windows {
            let window = if kind == CAP_PCI { 0 } else { WINDOW_BYTES as u32 };
            self.put(at, &[CAPABILITY_VENDOR, (at + len) as u8, len as u8, kind]);
            self.put(at + 8, &(offset as u32).to_le_bytes());
            self.put(at + 12, &window.to_le_bytes());
            if kind == CAP_PCI {
                self.pci_window = at;
                self.allow(at + 4, &[0xFF]);
                self.allow(at + 8, &[0xFF; 12]);
            }
            at += len;
        }
        self.put(at, &[CAPABILITY_MSIX, 0]);
        self.put(at + 2, &(msix_vectors - 1).to_le_bytes());
        self.put(at + 4, &(MSIX_TABLE as u32).to_le_bytes());
        self.put(at + 8, &(MSIX_PENDING as u32).to_le_bytes());
        self.allow(at + 2, &(MSIX_ENABLE | MSIX_MASK_ALL).to_le_bytes());
        self.msix_control = at + 2;
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn allow(&mut self, at: usize, mask: &[u8]) {
        self.writable[at..at + mask.len()].copy_from_slice(mask);
    }

    /// Reads; bytes beyond the first 256 are zero (there are no extended capabilities).
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = self.bytes.get(offset.saturating_add(index)).copied().unwrap_or(0);
        }
    }

    /// Writes what may be written.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        for (index, value) in data.iter().enumerate() {
            let at = offset.saturating_add(index);
            if let (Some(byte), Some(mask)) = (self.bytes.get_mut(at), self.writable.get(at)) {
                *byte = *byte & !mask | value & mask;
            }
        }
    }

    fn half(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    fn word(&self, at: usize) -> u32 {
        u32::from(self.half(at)) | u32::from(self.half(at + 2)) << 16
    }

    /// Address of BAR 0, where memory decoding is on.
    pub fn bar(&self) -> Option<u64> {
        let bar =
            (u64::from(self.word(BAR0)) | u64::from(self.word(BAR0 + 4)) << 32) & !(BAR_BYTES - 1);
        (self.half(COMMAND) & COMMAND_MEMORY != 0).then_some(bar)
    }

    /// Whether MSI-X is on, and whether all its vectors are masked.
    pub fn msix(&self) -> (bool, bool) {
        let control = self.half(self.msix_control);
        (control & MSIX_ENABLE != 0, control & MSIX_MASK_ALL != 0)
    }

    /// Turns MSI-X on, as a device table promises a unikernel.
    pub fn enable_msix(&mut self) {
        let control = self.half(self.msix_control) | MSIX_ENABLE;
        self.put(self.msix_control, &control.to_le_bytes());
    }

    /// The BAR window that an access to `offset` goes through, where it touches the window's data.
    pub fn window(&self, offset: usize) -> Option<Window> {
        let data = self.pci_window + 16;
        if self.pci_window == 0 || offset != data || self.bytes[self.pci_window + 4] != 0 {
            return None;
        }
        let len = self.word(self.pci_window + 12) as usize;
        let offset = u64::from(self.word(self.pci_window + 8));
        (matches!(len, 1 | 2 | 4) && offset < BAR_BYTES).then_some(Window { offset, len })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(space: &ConfigSpace, at: usize) -> u32 {
        let mut data = [0; 4];
        space.read(at, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn a_bar_is_sized_and_moved_as_generic_enumeration_does() {
        let mut space = ConfigSpace::virtio(2, 0xC010_0000, 2);
        assert_eq!(space.bar(), Some(0xC010_0000));
        space.write(BAR0, &u32::MAX.to_le_bytes());
        space.write(BAR0 + 4, &u32::MAX.to_le_bytes());
        assert_eq!(word(&space, BAR0), !(BAR_BYTES as u32 - 1) | 0b100);
        assert_eq!(word(&space, BAR0 + 4), u32::MAX);
        space.write(BAR0, &0xC020_0000u32.to_le_bytes());
        space.write(BAR0 + 4, &[0; 4]);
        assert_eq!(space.bar(), Some(0xC020_0000));
        space.write(COMMAND, &[0, 0]);
        assert_eq!(space.bar(), None);
    }

    #[test]
    fn the_capability_list_ends_and_names_every_virtio_window_and_msix() {
        let space = ConfigSpace::virtio(1, 0xC010_0000, 3);
        let (mut at, mut kinds) = (word(&space, CAPABILITIES) as usize & 0xFF, Vec::new());
        while at != 0 {
            assert!(kinds.len() < 16);
            let header = word(&space, at).to_le_bytes();
            kinds.push(if header[0] == CAPABILITY_VENDOR { header[3] } else { header[0] });
            at = header[1] as usize;
        }
        assert_eq!(kinds, [1, 3, 4, 2, 5, CAPABILITY_MSIX]);
        assert_eq!(space.msix(), (false, false));
    }

    #[test]
    fn random_accesses_never_change_what_is_read_only() {
        let mut space = ConfigSpace::virtio(2, 0xC010_0000, 2);
        let mut random = 0x1234_5678_9ABC_DEF0u64;
        for _ in 0..100_000 {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let (offset, len) = ((random >> 20) as usize % 300, 1 + (random >> 40) as usize % 8);
            space.write(offset, &random.to_le_bytes()[..len]);
            let mut data = [0; 8];
            space.read((random >> 50) as usize, &mut data[..len]);
            space.window(offset);
        }
        assert_eq!(word(&space, 0), 0x1042_1AF4);
        assert_eq!(word(&space, CAPABILITIES), 0x40);
        space.read(usize::MAX - 2, &mut [0; 8]);
    }
}

//! A guest that follows a script: machine code for stores, waits and loops, put together by a test,
//! so that a real vCPU drives real devices.
//!
//! Memory is identity-mapped. A device's queue lies at [`ring`]; its chains all begin at descriptor 0.
#![allow(dead_code)]

use abi::boot::{
    HOTPLUG_REG_DOWN, HOTPLUG_REG_EJECT, HOTPLUG_REG_UP, HOTPLUG_START, PCI_MMIO_PER_SLOT,
    PCI_MMIO_START, PORT_CONSOLE, PORT_EXIT,
};
use vmm::machine::boot::unikernel::CONSOLE;
use vmm::probe;

/// Where each slot's rings and buffers lie.
pub(crate) const RINGS: u64 = 0x20_0000;
/// What a slot has of it: queues of 0x4000 bytes, then its header, status and data.
const SLOT_BYTES: u64 = 0x2_0000;
const HEADER: u64 = 0x1_0000;
/// Data of a slot's requests, from [`RINGS`] + its slot's share.
const DATA: u64 = 0x1_1000;
const NOTIFY: u64 = 0x3000;
const MSIX_TABLE: u64 = 0x4000;

/// Address of a slot's queue: descriptors, then the available ring, then the used ring, a page each.
pub(crate) fn ring(slot: u64, queue: u64) -> u64 {
    RINGS + slot * SLOT_BYTES + queue * 0x4000
}

/// Address of a slot's data.
pub(crate) fn data(slot: u64) -> u64 {
    RINGS + slot * SLOT_BYTES + DATA
}

fn bar(slot: u64) -> u64 {
    PCI_MMIO_START + slot * PCI_MMIO_PER_SLOT
}

/// A piece of a chain: address, length, whether the device writes it.
pub(crate) type Piece = (u64, u32, bool);

/// The guest's program so far.
#[derive(Clone, Default)]
pub(crate) struct Script(Vec<u8>, u32);

impl Script {
    /// An ELF that runs the script, then ends with `code`.
    pub(crate) fn image(mut self, code: u8) -> Vec<u8> {
        let port = PORT_EXIT.to_le_bytes();
        self.0.extend_from_slice(&[0x66, 0xBA, port[0], port[1], 0xB0, code, 0xEE, 0xF4]);
        probe::elf(&self.0)
    }

    fn address(&mut self, address: u64) {
        self.0.extend_from_slice(&[0x48, 0xB8]); // mov rax, imm64
        self.0.extend_from_slice(&address.to_le_bytes());
    }

    /// Stores four bytes.
    pub(crate) fn store32(&mut self, address: u64, value: u32) {
        self.address(address);
        self.0.extend_from_slice(&[0xC7, 0x00]);
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    /// Stores two bytes.
    pub(crate) fn store16(&mut self, address: u64, value: u16) {
        self.address(address);
        self.0.extend_from_slice(&[0x66, 0xC7, 0x00]);
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    /// Stores a byte.
    pub(crate) fn store8(&mut self, address: u64, value: u8) {
        self.address(address);
        self.0.extend_from_slice(&[0xC6, 0x00, value]);
    }

    /// Stores eight bytes as two halves, as a driver does with registers.
    pub(crate) fn store64(&mut self, address: u64, value: u64) {
        self.store32(address, value as u32);
        self.store32(address + 4, (value >> 32) as u32);
    }

    /// Waits until two bytes of memory are `value`.
    pub(crate) fn wait16(&mut self, address: u64, value: u16) {
        self.address(address);
        self.0.extend_from_slice(&[0xF3, 0x90, 0x66, 0x81, 0x38]); // pause; cmp word [rax], imm16
        self.0.extend_from_slice(&value.to_le_bytes());
        self.0.extend_from_slice(&[0x75, 0xF7]); // jne to the pause
    }

    /// Waits until four bytes (of a register, too) are not zero; they are in ebx then.
    pub(crate) fn wait_not_zero(&mut self, address: u64) {
        self.address(address);
        // mov ebx, [rax]; test ebx, ebx; je to the mov
        self.0.extend_from_slice(&[0x8B, 0x18, 0x85, 0xDB, 0x74, 0xFA]);
    }

    /// Does `body` for ever.
    pub(crate) fn forever(&mut self, body: impl FnOnce(&mut Script)) {
        let start = self.0.len();
        body(self);
        let back = start as i64 - (self.0.len() as i64 + 5);
        self.0.push(0xE9); // jmp rel32
        self.0.extend_from_slice(&(back as i32).to_le_bytes());
    }

    /// Prints a short line.
    pub(crate) fn print(&mut self, line: &str) {
        for byte in line.bytes() {
            self.store8(CONSOLE + 16 + u64::from(self.1), byte);
            self.1 += 1;
        }
        self.store32(CONSOLE, self.1);
        let port = PORT_CONSOLE.to_le_bytes();
        self.0.extend_from_slice(&[0x66, 0xBA, port[0], port[1], 0xEE]);
    }

    /// Adds one to four bytes of memory.
    pub(crate) fn increment(&mut self, address: u64) {
        self.address(address);
        self.0.extend_from_slice(&[0x83, 0x00, 0x01]);
    }
}

impl Script {
    /// Brings the function in `slot` to DRIVER_OK with `queues` queues of 16 and an interrupt.
    pub(crate) fn start(&mut self, slot: u64, queues: u64) {
        let bar = bar(slot);
        for (at, value) in [(0, 0xFEE0_0000), (4, 0), (8, 0x40), (12, 0)] {
            self.store32(bar + MSIX_TABLE + at, value);
        }
        self.store8(bar + 0x14, 0);
        self.store8(bar + 0x14, 3);
        self.store32(bar + 0x08, 1);
        self.store32(bar + 0x0C, 1);
        self.store8(bar + 0x14, 11);
        for queue in 0..queues {
            let at = ring(slot, queue);
            self.store16(at + 0x1002, 0);
            self.store16(at + 0x2002, 0);
            self.store16(bar + 0x16, queue as u16);
            self.store16(bar + 0x18, 16);
            self.store16(bar + 0x1A, 0);
            self.store64(bar + 0x20, at);
            self.store64(bar + 0x28, at + 0x1000);
            self.store64(bar + 0x30, at + 0x2000);
            self.store16(bar + 0x1C, 1);
        }
        self.store8(bar + 0x14, 15);
    }

    /// Resets the function in `slot`.
    pub(crate) fn reset(&mut self, slot: u64) {
        self.store8(bar(slot) + 0x14, 0);
    }

    /// Writes the chain that begins at descriptor 0.
    pub(crate) fn chain(&mut self, slot: u64, queue: u64, pieces: &[Piece]) {
        for (index, &(address, len, writable)) in pieces.iter().enumerate() {
            let at = ring(slot, queue) + index as u64 * 16;
            let more = u32::from(index + 1 < pieces.len());
            self.store64(at, address);
            self.store32(at + 8, len);
            self.store32(at + 12, more | u32::from(writable) << 1 | (index as u32 + 1) << 16);
        }
    }

    /// Writes a block request's chain: its header, `len` bytes of data, its status.
    pub(crate) fn block(&mut self, slot: u64, kind: u32, sector: u64, len: u32) {
        let header = RINGS + slot * SLOT_BYTES + HEADER;
        self.store64(header, u64::from(kind));
        self.store64(header + 8, sector);
        let mut pieces = vec![(header, 16, false)];
        if len > 0 {
            pieces.push((data(slot), len, matches!(kind, 0 | 8)));
        }
        pieces.push((header + 16, 1, true));
        self.chain(slot, 0, &pieces);
    }

    /// Offers the chain as the queue's `count`th and rings.
    pub(crate) fn offer(&mut self, slot: u64, queue: u64, count: u16) {
        self.store16(ring(slot, queue) + 0x1002, count);
        self.store16(bar(slot) + NOTIFY, queue as u16);
    }

    /// Waits until the device has used `count` chains.
    pub(crate) fn used(&mut self, slot: u64, queue: u64, count: u16) {
        self.wait16(ring(slot, queue) + 0x2002, count);
    }

    /// Offers the same chain again and again, each time after the one before it was used; a counter
    /// at `data` grows each time.
    pub(crate) fn offer_forever(&mut self, slot: u64, queue: u64) {
        self.0.extend_from_slice(&[0x4D, 0x31, 0xFF]); // xor r15, r15
        self.forever(|script| {
            script.increment(data(slot));
            script.0.extend_from_slice(&[0x41, 0xFF, 0xC7]); // inc r15d
            script.address(ring(slot, queue) + 0x1002);
            script.0.extend_from_slice(&[0x66, 0x44, 0x89, 0x38]); // mov [rax], r15w
            script.store16(bar(slot) + NOTIFY, queue as u16);
            script.address(ring(slot, queue) + 0x2002);
            // pause; cmp [rax], r15w; jne to the pause
            script.0.extend_from_slice(&[0xF3, 0x90, 0x66, 0x44, 0x39, 0x38, 0x75, 0xF8]);
        });
    }

    /// Waits until a device is plugged.
    pub(crate) fn wait_for_plug(&mut self) {
        self.wait_not_zero(HOTPLUG_START + HOTPLUG_REG_UP);
    }

    /// Waits until devices are asked for, and lets go of them.
    pub(crate) fn let_go(&mut self) {
        self.wait_not_zero(HOTPLUG_START + HOTPLUG_REG_DOWN);
        self.address(HOTPLUG_START + HOTPLUG_REG_EJECT);
        self.0.extend_from_slice(&[0x89, 0x18]); // mov [rax], ebx
    }
}

//! One virtio function, driven by hand: the right way, to see whether it still works, and with
//! whatever values an attack wants.

use crate::raw::{self, ARENA, Random};
use abi::boot::{DeviceEntry, PCI_ECAM_START};
use core::sync::atomic::{AtomicU32, Ordering};
use runtime::clock;

/// How often a device was seen to ask for a reset: proof that an attack has bitten.
pub(crate) static REFUSALS: AtomicU32 = AtomicU32::new(0);

const STATUS: u64 = 0x14;
/// `device_status`: the device can't go on until it is reset.
pub(crate) const NEEDS_RESET: u8 = 0x40;
/// All that a driver sets on its way to a running device.
pub(crate) const RUNNING: u8 = 15;
/// Entries of the queues here.
pub(crate) const QUEUE_SIZE: u16 = 16;
/// Where attacks put what descriptors point at.
pub(crate) const BUFFERS: u64 = ARENA + 0x80_0000;
const QUEUES_MAX: u16 = 64;
const RING_BYTES: u64 = 0x4000;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const ANSWER_MICROS_MAX: u64 = 20_000_000;
const DISK: u16 = 2;
const RANDOM: u16 = 4;

/// Where the descriptor table of a queue lies; the rings follow it.
pub(crate) fn ring(queue: u16) -> u64 {
    ARENA + u64::from(queue) * RING_BYTES
}

/// A function on the bus.
#[derive(Clone, Copy)]
pub(crate) struct Function {
    /// Where it was at the start.
    pub(crate) entry: DeviceEntry,
    /// Its BAR, where an attack has not moved it.
    pub(crate) bar: u64,
}

/// A descriptor: address, length, flags, next.
pub(crate) type Descriptor = (u64, u32, u16, u16);

impl Function {
    /// From the device table.
    pub(crate) fn new(entry: DeviceEntry) -> Function {
        Function { entry, bar: entry.bar }
    }

    /// Its configuration space.
    pub(crate) fn space(&self) -> u64 {
        PCI_ECAM_START + u64::from(self.entry.slot) * 0x8000
    }

    /// Writes a register of the common configuration.
    pub(crate) fn put(&self, offset: u64, width: u64, value: u64) {
        raw::write(self.bar + u64::from(self.entry.common) + offset, width, value);
    }

    /// Reads one.
    pub(crate) fn get(&self, offset: u64, width: u64) -> u64 {
        raw::read(self.bar + u64::from(self.entry.common) + offset, width)
    }

    /// `device_status`.
    pub(crate) fn status(&self) -> u8 {
        let status = self.get(STATUS, 1) as u8;
        if status & NEEDS_RESET != 0 {
            REFUSALS.fetch_add(1, Ordering::Relaxed);
        }
        status
    }

    /// Sets `device_status`.
    pub(crate) fn set_status(&self, status: u8) {
        self.put(STATUS, 1, u64::from(status));
    }

    /// Number of its queues; a BAR that was moved over something else says anything.
    pub(crate) fn queues(&self) -> u16 {
        (self.get(0x12, 2) as u16).min(QUEUES_MAX)
    }

    /// Features offered.
    pub(crate) fn offered(&self) -> u64 {
        self.put(0x00, 4, 0);
        let low = self.get(0x04, 4);
        self.put(0x00, 4, 1);
        low | self.get(0x04, 4) << 32
    }

    /// Accepts features, whatever they are.
    pub(crate) fn accept(&self, features: u64) {
        self.put(0x08, 4, 0);
        self.put(0x0C, 4, features & 0xFFFF_FFFF);
        self.put(0x08, 4, 1);
        self.put(0x0C, 4, features >> 32);
    }

    /// Sets a queue up with any values, and enables it.
    pub(crate) fn place(&self, queue: u16, size: u16, [descriptors, available, used]: [u64; 3]) {
        self.put(0x16, 2, u64::from(queue));
        self.put(0x18, 2, u64::from(size));
        self.put(0x20, 8, descriptors);
        self.put(0x28, 8, available);
        self.put(0x30, 8, used);
        self.put(0x1C, 2, 1);
    }

    /// Resets it and brings it up to FEATURES_OK.
    pub(crate) fn begin(&self, features: u64) {
        self.set_status(0);
        self.set_status(3);
        self.accept(features);
        self.set_status(11);
    }

    /// Resets it and starts it with right queues; `true`: it runs.
    pub(crate) fn start(&self, features: u64) -> bool {
        self.begin(features);
        for queue in 0..self.queues() {
            let at = ring(queue);
            raw::fill(at, RING_BYTES, 0);
            self.place(queue, QUEUE_SIZE, [at, at + AVAILABLE, at + USED]);
        }
        self.set_status(RUNNING);
        self.status() == RUNNING
    }

    /// Writes a descriptor.
    pub(crate) fn describe(&self, queue: u16, index: u16, descriptor: Descriptor) {
        write_descriptor(ring(queue) + u64::from(index) * 16, descriptor);
    }

    /// Makes the chain that begins at `head` available.
    pub(crate) fn offer(&self, queue: u16, head: u16) {
        let at = ring(queue) + AVAILABLE;
        let index = raw::read16(at + 2);
        raw::write16(at + 4 + u64::from(index % QUEUE_SIZE) * 2, head);
        raw::fence();
        raw::write16(at + 2, index.wrapping_add(1));
        raw::fence();
    }

    /// Sets the available ring's index, whatever is there.
    pub(crate) fn claim(&self, queue: u16, index: u16) {
        raw::write16(ring(queue) + AVAILABLE + 2, index);
        raw::fence();
    }

    /// Rings its doorbell.
    pub(crate) fn kick(&self, queue: u16) {
        raw::write16(self.bar + u64::from(self.entry.notify), queue);
    }

    /// The used ring's index.
    pub(crate) fn used(&self, queue: u16) -> u16 {
        raw::read16(ring(queue) + USED + 2)
    }

    /// Waits until a queue's used index is `index`; `false`: the device failed or stays silent.
    pub(crate) fn wait(&self, queue: u16, index: u16) -> bool {
        let deadline = clock::now().after_micros(ANSWER_MICROS_MAX);
        let mut looks = 0u32;
        while self.used(queue) != index {
            looks = looks.wrapping_add(1);
            let failed = looks.is_multiple_of(4096) && self.status() & NEEDS_RESET != 0;
            if failed || clock::now() > deadline {
                return false;
            }
            core::hint::spin_loop();
        }
        true
    }

    /// Whether it does what it is for, after a reset: a disk keeps what is written to it, a source of
    /// random numbers gives some, any other device comes up.
    pub(crate) fn works(&self, random: &mut Random) -> Result<(), &'static str> {
        if !self.start(1 << 32) {
            return Err("it does not start after a reset");
        }
        match self.entry.virtio_type {
            DISK => self.round_trip(random, 0, 8),
            RANDOM => self.random_bytes(),
            _ => Ok(()),
        }
    }

    /// Asks for 64 random bytes.
    fn random_bytes(&self) -> Result<(), &'static str> {
        const WRITE: u16 = 2;
        raw::fill(BUFFERS, 64, 0);
        self.describe(0, 0, (BUFFERS, 64, WRITE, 0));
        self.offer(0, 0);
        self.kick(0);
        if !self.wait(0, 1) {
            return Err("no random numbers come");
        }
        let given = (0..8).any(|word| raw::read64(BUFFERS + word * 8) != 0);
        if given { Ok(()) } else { Err("the random numbers are all zero") }
    }

    /// Writes sectors, makes them durable, reads them back and compares.
    pub(crate) fn round_trip(
        &self,
        random: &mut Random,
        sector: u64,
        sectors: u32,
    ) -> Result<(), &'static str> {
        let seed = random.any();
        let words = u64::from(sectors) * 64;
        let mut pattern = Random::new(seed);
        (0..words).for_each(|word| raw::write64(BUFFERS + word * 8, pattern.any()));
        self.block(1, sector, sectors)?;
        self.block(4, 0, 0)?;
        raw::fill(BUFFERS, words * 8, 0);
        self.block(0, sector, sectors)?;
        let mut pattern = Random::new(seed);
        let same = (0..words).all(|word| raw::read64(BUFFERS + word * 8) == pattern.any());
        if same { Ok(()) } else { Err("the disk gives back other bytes than were written") }
    }

    /// One request of a disk that is well formed.
    pub(crate) fn block(&self, kind: u32, sector: u64, sectors: u32) -> Result<(), &'static str> {
        const HEADER: u64 = BUFFERS - 0x1000;
        raw::write64(HEADER, u64::from(kind));
        raw::write64(HEADER + 8, sector);
        raw::write8(HEADER + 16, 0xEE);
        let to_guest = if kind == 0 { 2 } else { 0 };
        let data = u16::from(sectors > 0);
        self.describe(0, 0, (HEADER, 16, 1, 2 - data));
        self.describe(0, 1, (BUFFERS, sectors * 512, 1 | to_guest, 2));
        self.describe(0, 2, (HEADER + 16, 1, 2, 0));
        let done = self.used(0).wrapping_add(1);
        self.offer(0, 0);
        self.kick(0);
        if !self.wait(0, done) {
            return Err("a request is not answered");
        }
        if raw::read8(HEADER + 16) == 0 { Ok(()) } else { Err("a request fails") }
    }
}

/// Writes a descriptor anywhere.
pub(crate) fn write_descriptor(at: u64, (address, len, flags, next): Descriptor) {
    raw::write64(at, address);
    raw::write32(at + 8, len);
    raw::write16(at + 12, flags);
    raw::write16(at + 14, next);
}

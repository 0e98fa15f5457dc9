//! The test's guest: a machine without running vCPUs, and a driver of one function.

use super::READ;
use abi::boot::{PCI_MMIO_PER_SLOT, PCI_MMIO_START};
use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress};
use vmm::machine::memory::Ram;
use vmm::machine::{Host, Interrupts, Machine};
use vmm::pci::Bus;

pub(crate) const DEADLINE: Duration = Duration::from_secs(20);

pub(crate) struct Rig {
    pub(crate) bus: Arc<Bus>,
    pub(crate) ram: Ram,
    _machine: Machine,
}

pub(crate) fn rig() -> Option<Rig> {
    if File::options().read(true).write(true).open("/dev/kvm").is_err() {
        eprintln!("SKIPPED: no /dev/kvm");
        return None;
    }
    let machine = Machine::create(&Host::open().unwrap(), 16, Default::default(), 1).unwrap();
    let bus = Bus::new(machine.ram.clone(), Interrupts::new(Arc::clone(&machine.vm)));
    Some(Rig { bus: Arc::new(bus), ram: machine.ram.clone(), _machine: machine })
}

pub(crate) fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < DEADLINE, "{what} did not happen");
        std::thread::yield_now();
    }
}

/// A buffer of a request: its address, its length, whether the device writes it.
pub(crate) type Piece = (u64, u32, bool);

/// A driver of the function in one slot; its rings lie at `base + queue * 0x4000`.
pub(crate) struct Driver<'a> {
    pub(crate) rig: &'a Rig,
    pub(crate) bar: u64,
    pub(crate) base: u64,
    pub(crate) used: [u16; 2],
}

impl<'a> Driver<'a> {
    pub(crate) fn start(rig: &'a Rig, slot: u64, queues: u64) -> Driver<'a> {
        let driver = Driver {
            rig,
            bar: PCI_MMIO_START + slot * PCI_MMIO_PER_SLOT,
            base: 0x20_0000 + slot * 0x1_0000,
            used: [0; 2],
        };
        driver.set_up(queues);
        driver
    }

    pub(crate) fn set_up(&self, queues: u64) {
        self.put(0x14, &[0]);
        self.put(0x14, &[3]);
        self.put(0x08, &1u32.to_le_bytes());
        self.put(0x0C, &1u32.to_le_bytes());
        self.put(0x14, &[11]);
        for queue in 0..queues {
            let at = self.base + queue * 0x4000;
            self.rig.ram.write_slice(&[0; 0x4000], GuestAddress(at)).unwrap();
            self.put(0x16, &(queue as u16).to_le_bytes());
            self.put(0x18, &16u16.to_le_bytes());
            self.put(0x20, &at.to_le_bytes());
            self.put(0x28, &(at + 0x1000).to_le_bytes());
            self.put(0x30, &(at + 0x2000).to_le_bytes());
            self.put(0x1C, &1u16.to_le_bytes());
        }
        self.put(0x14, &[15]);
        assert_eq!(self.status(), 15);
    }

    pub(crate) fn put(&self, offset: u64, data: &[u8]) {
        self.rig.bus.write(self.bar + offset, data);
    }

    pub(crate) fn status(&self) -> u8 {
        let mut status = [0];
        self.rig.bus.read(self.bar + 0x14, &mut status);
        status[0]
    }

    /// Makes a chain available as descriptor 0 onwards, and rings.
    pub(crate) fn offer(&mut self, queue: u64, pieces: &[Piece]) {
        let (ram, at) = (&self.rig.ram, self.base + queue * 0x4000);
        for (index, &(address, len, writable)) in pieces.iter().enumerate() {
            let descriptor = at + index as u64 * 16;
            let more = index + 1 < pieces.len();
            ram.write_obj(address, GuestAddress(descriptor)).unwrap();
            ram.write_obj(len, GuestAddress(descriptor + 8)).unwrap();
            ram.write_obj(
                u16::from(more) | u16::from(writable) << 1,
                GuestAddress(descriptor + 12),
            )
            .unwrap();
            ram.write_obj(index as u16 + 1, GuestAddress(descriptor + 14)).unwrap();
        }
        let index: u16 = ram.read_obj(GuestAddress(at + 0x1002)).unwrap();
        ram.write_obj(0u16, GuestAddress(at + 0x1004 + u64::from(index % 16) * 2)).unwrap();
        ram.store(
            index.wrapping_add(1),
            GuestAddress(at + 0x1002),
            std::sync::atomic::Ordering::Release,
        )
        .unwrap();
        self.put(0x3000, &(queue as u16).to_le_bytes());
    }

    pub(crate) fn is_used(&self, queue: u64) -> bool {
        let at = GuestAddress(self.base + queue * 0x4000 + 0x2002);
        self.rig.ram.load::<u16>(at, std::sync::atomic::Ordering::Acquire).unwrap()
            != self.used[queue as usize]
    }

    /// Waits for the device and returns the length it wrote.
    pub(crate) fn finish(&mut self, queue: u64) -> u32 {
        until("a used buffer", || self.is_used(queue));
        let at =
            self.base + queue * 0x4000 + 0x2004 + u64::from(self.used[queue as usize] % 16) * 8;
        self.used[queue as usize] = self.used[queue as usize].wrapping_add(1);
        self.rig.ram.read_obj(GuestAddress(at + 4)).unwrap()
    }

    /// A block request with data at `0x80_0000`; returns its status and the length written.
    pub(crate) fn block(&mut self, kind: u32, sector: u64, len: u32, to_guest: bool) -> (u8, u32) {
        let header = 0x70_0000u64;
        let ram = &self.rig.ram;
        ram.write_obj(u64::from(kind), GuestAddress(header)).unwrap();
        ram.write_obj(sector, GuestAddress(header + 8)).unwrap();
        ram.write_obj(0xEEu8, GuestAddress(header + 16)).unwrap();
        let mut pieces = vec![(header, 16, false)];
        if len > 0 {
            let half = len / 2;
            pieces.push((0x80_0000, half, to_guest));
            pieces.push((0x80_0000 + u64::from(half), len - half, to_guest));
        }
        pieces.push((header + 16, 1, true));
        self.offer(0, &pieces);
        let written = self.finish(0);
        (self.rig.ram.read_obj(GuestAddress(header + 16)).unwrap(), written)
    }

    /// Asks for `sectors` at `sector` without waiting, as request `number` with descriptors, header
    /// and 64 KiB of data of its own.
    pub(crate) fn submit(&mut self, number: u16, kind: u32, sector: u64, sectors: u32) {
        let (ram, at) = (&self.rig.ram, self.base);
        let (header, data) = (waiting_header(number), waiting_data(number));
        ram.write_obj(u64::from(kind), GuestAddress(header)).unwrap();
        ram.write_obj(sector, GuestAddress(header + 8)).unwrap();
        ram.write_obj(0xEEu8, GuestAddress(header + 16)).unwrap();
        let to_guest = u16::from(kind == READ) << 1;
        let first = number * 3;
        let pieces = [(header, 16, 1), (data, sectors * 512, 1 | to_guest), (header + 16, 1, 2)];
        for (index, (address, len, flags)) in pieces.into_iter().enumerate() {
            let index = first + index as u16;
            let descriptor = at + u64::from(index) * 16;
            ram.write_obj(address, GuestAddress(descriptor)).unwrap();
            ram.write_obj(len, GuestAddress(descriptor + 8)).unwrap();
            ram.write_obj(flags, GuestAddress(descriptor + 12)).unwrap();
            ram.write_obj(index + 1, GuestAddress(descriptor + 14)).unwrap();
        }
        let index: u16 = ram.read_obj(GuestAddress(at + 0x1002)).unwrap();
        ram.write_obj(first, GuestAddress(at + 0x1004 + u64::from(index % 16) * 2)).unwrap();
        let next = index.wrapping_add(1);
        ram.store(next, GuestAddress(at + 0x1002), std::sync::atomic::Ordering::Release).unwrap();
        self.put(0x3000, &[0, 0]);
    }

    /// The status of request `number`: 0xEE while it waits.
    pub(crate) fn outcome(&self, number: u16) -> u8 {
        self.rig.ram.read_obj(GuestAddress(waiting_header(number) + 16)).unwrap()
    }

    pub(crate) fn data(&self, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.rig.ram.read_slice(&mut data, GuestAddress(0x80_0000)).unwrap();
        data
    }

    pub(crate) fn set_data(&self, data: &[u8]) {
        self.rig.ram.write_slice(data, GuestAddress(0x80_0000)).unwrap();
    }
}

pub(crate) fn waiting_header(number: u16) -> u64 {
    0x60_0000 + u64::from(number) * 0x100
}

pub(crate) fn waiting_data(number: u16) -> u64 {
    0xB0_0000 + u64::from(number) * 0x1_0000
}

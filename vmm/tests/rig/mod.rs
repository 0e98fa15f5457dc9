//! A bus with devices and a driver for them: registers through the bus, rings in guest memory. No
//! vCPU runs; the test is the guest.

#![allow(dead_code, reason = "each test program uses a part of it")]

use abi::boot::{PCI_MMIO_PER_SLOT, PCI_MMIO_START};
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress};
use vmm::devices::Device;
use vmm::machine::memory::Ram;
use vmm::machine::{Host, Interrupts, Machine};
use vmm::pci::Bus;

pub(crate) const DEADLINE: Duration = Duration::from_secs(20);
/// The guest's memory.
pub(crate) const MEMORY_MIB: u32 = 16;
/// Entries of each queue.
const QUEUE_SIZE: u16 = 64;
const DEVICE_FIELDS: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;

pub(crate) struct Rig {
    pub(crate) bus: Arc<Bus>,
    pub(crate) ram: Ram,
    _machine: Machine,
}

/// A machine with `devices` in its first slots; `None` without KVM.
pub(crate) fn rig(devices: Vec<Device>) -> Option<Rig> {
    if File::options().read(true).write(true).open("/dev/kvm").is_err() {
        eprintln!("SKIPPED: no /dev/kvm");
        return None;
    }
    let host = Host::open().unwrap();
    let machine = Machine::create(&host, MEMORY_MIB, Default::default(), 1).unwrap();
    let bus = Bus::new(machine.ram.clone(), Interrupts::new(Arc::clone(&machine.vm)));
    for device in devices {
        bus.add_at_boot(device).unwrap();
    }
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

/// One queue's rings as the driver keeps them.
#[derive(Clone, Copy, Default)]
struct Ring {
    next_descriptor: u16,
    used: u16,
}

/// A driver of the function in one slot; its rings lie at `base + queue * 0x4000`.
pub(crate) struct Driver<'a> {
    rig: &'a Rig,
    bar: u64,
    base: u64,
    rings: Vec<Ring>,
}

impl<'a> Driver<'a> {
    /// Starts the device with `queues` queues and `features` beside VIRTIO_F_VERSION_1.
    pub(crate) fn start(rig: &'a Rig, slot: u64, queues: usize, features: u32) -> Driver<'a> {
        let mut driver = Driver {
            rig,
            bar: PCI_MMIO_START + slot * PCI_MMIO_PER_SLOT,
            base: 0x20_0000 + slot * 0x2_0000,
            rings: Vec::new(),
        };
        driver.set_up(queues, features);
        driver
    }

    /// Resets the device and starts it anew.
    pub(crate) fn set_up(&mut self, queues: usize, features: u32) {
        self.rings = vec![Ring::default(); queues];
        self.put(0x14, &[0]);
        self.put(0x14, &[3]);
        for (half, features) in [(0u32, features), (1, 1)] {
            self.put(0x08, &half.to_le_bytes());
            self.put(0x0C, &features.to_le_bytes());
        }
        self.put(0x14, &[11]);
        for queue in 0..queues {
            let at = self.ring(queue);
            self.rig.ram.write_slice(&[0; 0x4000], GuestAddress(at)).unwrap();
            self.put(0x16, &(queue as u16).to_le_bytes());
            self.put(0x18, &QUEUE_SIZE.to_le_bytes());
            self.put(0x20, &at.to_le_bytes());
            self.put(0x28, &(at + 0x1000).to_le_bytes());
            self.put(0x30, &(at + 0x2000).to_le_bytes());
            self.put(0x1C, &1u16.to_le_bytes());
        }
        self.put(0x14, &[15]);
        assert_eq!(self.status(), 15);
    }

    fn ring(&self, queue: usize) -> u64 {
        self.base + queue as u64 * 0x4000
    }

    fn put(&self, offset: u64, data: &[u8]) {
        self.rig.bus.write(self.bar + offset, data);
    }

    pub(crate) fn status(&self) -> u8 {
        let mut status = [0];
        self.rig.bus.read(self.bar + 0x14, &mut status);
        status[0]
    }

    /// `config_generation`.
    pub(crate) fn generation(&self) -> u8 {
        let mut generation = [0];
        self.rig.bus.read(self.bar + 0x15, &mut generation);
        generation[0]
    }

    /// A 32-bit field of the device's configuration.
    pub(crate) fn field(&self, offset: u64) -> u32 {
        let mut field = [0; 4];
        self.rig.bus.read(self.bar + DEVICE_FIELDS + offset, &mut field);
        u32::from_le_bytes(field)
    }

    pub(crate) fn set_field(&self, offset: u64, value: u32) {
        self.put(DEVICE_FIELDS + offset, &value.to_le_bytes());
    }

    /// Makes a chain available; returns its head.
    pub(crate) fn offer(&mut self, queue: usize, pieces: &[Piece]) -> u16 {
        let (ram, at) = (&self.rig.ram, self.ring(queue));
        let head = self.rings[queue].next_descriptor;
        for (index, &(address, len, writable)) in pieces.iter().enumerate() {
            let number = (head + index as u16) % QUEUE_SIZE;
            let descriptor = at + u64::from(number) * 16;
            let more = u16::from(index + 1 < pieces.len());
            let flags = more | u16::from(writable) << 1;
            ram.write_obj(address, GuestAddress(descriptor)).unwrap();
            ram.write_obj(len, GuestAddress(descriptor + 8)).unwrap();
            ram.write_obj(flags, GuestAddress(descriptor + 12)).unwrap();
            ram.write_obj((number + 1) % QUEUE_SIZE, GuestAddress(descriptor + 14)).unwrap();
        }
        self.rings[queue].next_descriptor = (head + pieces.len() as u16) % QUEUE_SIZE;
        let index: u16 = ram.read_obj(GuestAddress(at + 0x1002)).unwrap();
        let place = at + 0x1004 + u64::from(index % QUEUE_SIZE) * 2;
        ram.write_obj(head, GuestAddress(place)).unwrap();
        let next = index.wrapping_add(1);
        ram.store(next, GuestAddress(at + 0x1002), Ordering::Release).unwrap();
        self.put(NOTIFY, &(queue as u16).to_le_bytes());
        head
    }

    /// Says that more is available than there is.
    pub(crate) fn lie(&self, queue: usize, index: u16) {
        let at = GuestAddress(self.ring(queue) + 0x1002);
        self.rig.ram.store(index, at, Ordering::Release).unwrap();
        self.put(NOTIFY, &(queue as u16).to_le_bytes());
    }

    /// The next chain that the device has used: its head and the length it wrote.
    pub(crate) fn used(&mut self, queue: usize) -> Option<(u16, u32)> {
        let at = self.ring(queue) + 0x2000;
        let seen = self.rings[queue].used;
        let index = self.rig.ram.load::<u16>(GuestAddress(at + 2), Ordering::Acquire).unwrap();
        if index == seen {
            return None;
        }
        self.rings[queue].used = seen.wrapping_add(1);
        let entry = at + 4 + u64::from(seen % QUEUE_SIZE) * 8;
        let head: u32 = self.rig.ram.read_obj(GuestAddress(entry)).unwrap();
        let len = self.rig.ram.read_obj(GuestAddress(entry + 4)).unwrap();
        Some((head as u16, len))
    }

    /// Waits for the next used chain.
    pub(crate) fn finish(&mut self, queue: usize) -> (u16, u32) {
        let mut used = None;
        until("a used buffer", || {
            used = self.used(queue);
            used.is_some()
        });
        used.unwrap()
    }

    pub(crate) fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.rig.ram.read_slice(&mut data, GuestAddress(address)).unwrap();
        data
    }

    pub(crate) fn write(&self, address: u64, data: &[u8]) {
        self.rig.ram.write_slice(data, GuestAddress(address)).unwrap();
    }
}

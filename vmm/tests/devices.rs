//! Devices as a driver sees them: registers through the bus, rings in guest memory, real files,
//! sockets and packet rings behind. No vCPU runs; the test is the guest.

use abi::boot::{
    HOTPLUG_REG_DOWN, HOTPLUG_REG_EJECT, HOTPLUG_REG_UP, HOTPLUG_START, PCI_ECAM_START,
    PCI_MMIO_PER_SLOT, PCI_MMIO_START,
};
use abi::lease::{self, LeasePage, LeaseView};
use abi::packet_ring::{Direction, FRAME_BYTES_MAX, Region};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress};
use vmm::config::{DiskConfig, DiskSource, NetBackend, NetConfig, Resource};
use vmm::devices::{DeviceKind, blk, net};
use vmm::machine::memory::Ram;
use vmm::machine::{Host, Interrupts, Machine};
use vmm::pci::{Bus, PlugError};
use vmm::process::resources::Supply;

const DEADLINE: Duration = Duration::from_secs(20);

struct Rig {
    bus: Arc<Bus>,
    ram: Ram,
    _machine: Machine,
}

fn rig() -> Option<Rig> {
    if File::options().read(true).write(true).open("/dev/kvm").is_err() {
        eprintln!("SKIPPED: no /dev/kvm");
        return None;
    }
    let machine = Machine::create(&Host::open().unwrap(), 16, Default::default(), 1).unwrap();
    let bus = Bus::new(machine.ram.clone(), Interrupts::new(Arc::clone(&machine.vm)));
    Some(Rig { bus: Arc::new(bus), ram: machine.ram.clone(), _machine: machine })
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < DEADLINE, "{what} did not happen");
        std::thread::yield_now();
    }
}

/// A buffer of a request: its address, its length, whether the device writes it.
type Piece = (u64, u32, bool);

/// A driver of the function in one slot; its rings lie at `base + queue * 0x4000`.
struct Driver<'a> {
    rig: &'a Rig,
    bar: u64,
    base: u64,
    used: [u16; 2],
}

impl<'a> Driver<'a> {
    fn start(rig: &'a Rig, slot: u64, queues: u64) -> Driver<'a> {
        let driver = Driver {
            rig,
            bar: PCI_MMIO_START + slot * PCI_MMIO_PER_SLOT,
            base: 0x20_0000 + slot * 0x1_0000,
            used: [0; 2],
        };
        driver.set_up(queues);
        driver
    }

    fn set_up(&self, queues: u64) {
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

    fn put(&self, offset: u64, data: &[u8]) {
        self.rig.bus.write(self.bar + offset, data);
    }

    fn status(&self) -> u8 {
        let mut status = [0];
        self.rig.bus.read(self.bar + 0x14, &mut status);
        status[0]
    }

    /// Makes a chain available as descriptor 0 onwards, and rings.
    fn offer(&mut self, queue: u64, pieces: &[Piece]) {
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

    fn is_used(&self, queue: u64) -> bool {
        let at = GuestAddress(self.base + queue * 0x4000 + 0x2002);
        self.rig.ram.load::<u16>(at, std::sync::atomic::Ordering::Acquire).unwrap()
            != self.used[queue as usize]
    }

    /// Waits for the device and returns the length it wrote.
    fn finish(&mut self, queue: u64) -> u32 {
        until("a used buffer", || self.is_used(queue));
        let at =
            self.base + queue * 0x4000 + 0x2004 + u64::from(self.used[queue as usize] % 16) * 8;
        self.used[queue as usize] = self.used[queue as usize].wrapping_add(1);
        self.rig.ram.read_obj(GuestAddress(at + 4)).unwrap()
    }

    /// A block request with data at `0x80_0000`; returns its status and the length written.
    fn block(&mut self, kind: u32, sector: u64, len: u32, to_guest: bool) -> (u8, u32) {
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
    fn submit(&mut self, number: u16, kind: u32, sector: u64, sectors: u32) {
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
    fn outcome(&self, number: u16) -> u8 {
        self.rig.ram.read_obj(GuestAddress(waiting_header(number) + 16)).unwrap()
    }

    fn data(&self, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.rig.ram.read_slice(&mut data, GuestAddress(0x80_0000)).unwrap();
        data
    }

    fn set_data(&self, data: &[u8]) {
        self.rig.ram.write_slice(data, GuestAddress(0x80_0000)).unwrap();
    }
}

fn waiting_header(number: u16) -> u64 {
    0x60_0000 + u64::from(number) * 0x100
}

fn waiting_data(number: u16) -> u64 {
    0xB0_0000 + u64::from(number) * 0x1_0000
}

const WAITS: u8 = 0xEE;
const READ: u32 = 0;
const WRITE: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const OK: u8 = 0;
const FAILED: u8 = 1;
const UNSUPPORTED: u8 = 2;

fn disk_config(id: &str, source: DiskSource) -> DiskConfig {
    DiskConfig {
        id: id.into(),
        source,
        read_only: false,
        serial: "0123456789-serial-number".into(),
    }
}

fn raw_disk(rig: &Rig, size_bytes: u64, read_only: bool) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(size_bytes).unwrap();
    let mut config = disk_config("disk", DiskSource::Raw(Resource::Descriptor(0)));
    config.read_only = read_only;
    let mut supply = Supply::descriptors(vec![file.try_clone().unwrap().into()]);
    rig.bus.add_at_boot(blk::open(&config, &mut supply, None).unwrap()).unwrap();
    file
}

#[test]
fn a_disk_reads_writes_flushes_and_says_its_serial() {
    let Some(rig) = rig() else { return };
    let file = raw_disk(&rig, 1 << 20, false);
    let mut driver = Driver::start(&rig, 1, 1);
    let pattern: Vec<u8> = (0..4096).map(|byte| (byte % 251) as u8).collect();
    driver.set_data(&pattern);
    assert_eq!(driver.block(WRITE, 3, 4096, false), (OK, 1));
    assert_eq!(driver.block(FLUSH, 0, 0, false), (OK, 1));
    let mut on_disk = vec![0; 4096];
    file.read_exact_at(&mut on_disk, 3 * 512).unwrap();
    assert_eq!(on_disk, pattern);
    driver.set_data(&[0; 4096]);
    assert_eq!(driver.block(READ, 3, 4096, true), (OK, 4097));
    assert_eq!(driver.data(4096), pattern);
    assert_eq!(driver.block(GET_ID, 0, 20, true), (OK, 21));
    assert_eq!(driver.data(20), b"0123456789-serial-nu");
}

#[test]
fn requests_beyond_the_disk_or_not_in_sectors_fail_and_change_nothing() {
    let Some(rig) = rig() else { return };
    let file = raw_disk(&rig, 1 << 20, false);
    let mut driver = Driver::start(&rig, 1, 1);
    driver.set_data(&[7; 4096]);
    assert_eq!(driver.block(WRITE, 2048, 512, false).0, FAILED);
    assert_eq!(driver.block(WRITE, 2047, 1024, false).0, FAILED);
    assert_eq!(driver.block(WRITE, u64::MAX, 512, false).0, FAILED);
    assert_eq!(driver.block(WRITE, 0, 100, false).0, FAILED);
    assert_eq!(driver.block(READ, 1 << 55, 512, true).0, FAILED);
    assert_eq!(driver.block(99, 0, 0, false).0, UNSUPPORTED);
    assert_eq!(file.metadata().unwrap().len(), 1 << 20);
    let mut all = vec![1; 1 << 20];
    file.read_exact_at(&mut all, 0).unwrap();
    assert!(all.iter().all(|byte| *byte == 0));
}

#[test]
fn a_read_only_disk_refuses_writes() {
    let Some(rig) = rig() else { return };
    let _file = raw_disk(&rig, 4096, true);
    let mut driver = Driver::start(&rig, 1, 1);
    assert_eq!(driver.block(WRITE, 0, 512, false).0, FAILED);
    assert_eq!(driver.block(DISCARD, 0, 16, false).0, FAILED);
    assert_eq!(driver.block(READ, 0, 512, true).0, OK);
}

#[test]
fn discarded_sectors_read_as_zeroes() {
    let Some(rig) = rig() else { return };
    let file = raw_disk(&rig, 1 << 20, false);
    file.write_all_at(&[9; 65536], 0).unwrap();
    let mut driver = Driver::start(&rig, 1, 1);
    let range: Vec<u8> =
        8u64.to_le_bytes().into_iter().chain(16u32.to_le_bytes()).chain([0; 4]).collect();
    driver.set_data(&range);
    assert_eq!(driver.block(DISCARD, 0, 16, false).0, OK);
    let mut after = vec![0; 65536];
    file.read_exact_at(&mut after, 0).unwrap();
    assert!(after[4096..12288].iter().all(|byte| *byte == 0));
    assert!(after[..4096].iter().chain(&after[12288..]).all(|byte| *byte == 9));
}

#[test]
fn a_malformed_chain_is_returned_and_the_queue_goes_on() {
    let Some(rig) = rig() else { return };
    let _file = raw_disk(&rig, 4096, false);
    let mut driver = Driver::start(&rig, 1, 1);
    for bad in [
        vec![(0x70_0000, 8, false)],
        vec![(0x70_0000, 16, false)],
        vec![(1 << 40, 16, false), (0x70_0010, 1, true)],
    ] {
        driver.offer(0, &bad);
        assert_eq!(driver.finish(0), 0);
    }
    assert_eq!(driver.block(READ, 0, 512, true).0, OK);
    assert_eq!(driver.status(), 15);
}

#[test]
fn an_index_beyond_the_queue_needs_reset_instead_of_spinning() {
    let Some(rig) = rig() else { return };
    let _file = raw_disk(&rig, 4096, false);
    let driver = Driver::start(&rig, 1, 1);
    rig.ram.write_obj(1000u16, GuestAddress(driver.base + 0x1002)).unwrap();
    driver.put(0x3000, &[0, 0]);
    until("the device to ask for a reset", || driver.status() & 0x40 != 0);
    driver.set_up(1);
    assert_eq!(driver.status(), 15);
}

#[test]
fn a_queue_outside_of_memory_needs_reset_and_reset_brings_the_disk_back() {
    let Some(rig) = rig() else { return };
    let _file = raw_disk(&rig, 4096, false);
    let mut driver = Driver {
        rig: &rig,
        bar: PCI_MMIO_START + PCI_MMIO_PER_SLOT,
        base: 0x20_0000,
        used: [0; 2],
    };
    driver.put(0x14, &[3]);
    driver.put(0x08, &1u32.to_le_bytes());
    driver.put(0x0C, &1u32.to_le_bytes());
    driver.put(0x14, &[11]);
    for offset in [0x20, 0x28, 0x30] {
        driver.put(offset, &(1u64 << 40).to_le_bytes());
    }
    driver.put(0x1C, &1u16.to_le_bytes());
    driver.put(0x14, &[15]);
    assert_eq!(driver.status(), 15 | 0x40);
    for _ in 0..3 {
        driver.set_up(1);
        driver.used = [0; 2];
        assert_eq!(driver.block(READ, 0, 512, true).0, OK);
    }
}

/// An NBD server in its transmission phase over `bytes`, where offset 1 MiB can't be written.
fn nbd_server(mut socket: UnixStream, mut bytes: Vec<u8>) -> Vec<u8> {
    let mut head = [0; 28];
    while socket.read_exact(&mut head).is_ok() {
        assert_eq!(head[..4], 0x2560_9513u32.to_be_bytes());
        let kind = u16::from_be_bytes([head[6], head[7]]);
        let offset = u64::from_be_bytes(head[16..24].try_into().unwrap()) as usize;
        let len = u32::from_be_bytes(head[24..28].try_into().unwrap()) as usize;
        let mut reply = 0x6744_6698u32.to_be_bytes().to_vec();
        let refused = kind == 1 && offset == 1 << 20;
        reply.extend(if refused { 5u32 } else { 0 }.to_be_bytes());
        reply.extend(&head[8..16]);
        match kind {
            0 => reply.extend(&bytes[offset..offset + len]),
            1 => {
                let mut data = vec![0; len];
                socket.read_exact(&mut data).unwrap();
                if !refused {
                    bytes[offset..offset + len].copy_from_slice(&data);
                }
            }
            3 => {}
            other => panic!("command {other}"),
        }
        socket.write_all(&reply).unwrap();
    }
    bytes
}

#[test]
fn an_nbd_disk_works_and_its_servers_errors_are_io_errors() {
    let Some(rig) = rig() else { return };
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = std::thread::spawn(move || nbd_server(theirs, vec![0; 2 << 20]));
    let config = disk_config(
        "far",
        DiskSource::Nbd { socket: Resource::Descriptor(0), size_bytes: 2 << 20 },
    );
    let device =
        blk::open(&config, &mut Supply::descriptors(vec![OwnedFd::from(ours)]), None).unwrap();
    rig.bus.add_at_boot(device).unwrap();
    let mut driver = Driver::start(&rig, 1, 1);
    let pattern: Vec<u8> = (0..1 << 20).map(|byte| (byte % 253) as u8).collect();
    driver.set_data(&pattern);
    assert_eq!(driver.block(WRITE, 8, 1 << 19, false).0, OK);
    assert_eq!(driver.block(WRITE, 2048, 512, false).0, FAILED);
    assert_eq!(driver.block(FLUSH, 0, 0, false).0, OK);
    driver.set_data(&[0; 1 << 19]);
    assert_eq!(driver.block(READ, 8, 1 << 19, true), (OK, (1 << 19) + 1));
    assert_eq!(driver.data(1 << 19), pattern[..1 << 19]);
    // Once the disk was taken away its connection is closed, so the server ends.
    eject(&rig, "far", DeviceKind::Disk);
    let bytes = server.join().unwrap();
    assert_eq!(bytes[4096..4096 + (1 << 19)], pattern[..1 << 19]);
    assert!(bytes[1 << 20..(1 << 20) + 512].iter().all(|byte| *byte == 0));
}

#[test]
fn frames_cross_between_queues_and_packet_ring() {
    let Some(rig) = rig() else { return };
    let switch = Region::create().unwrap();
    let config = NetConfig {
        id: "eth0".into(),
        mac: "fa:16:3e:01:02:03".into(),
        mtu: 1450,
        backend: NetBackend::Ring([0, 1, 2]),
    };
    let descriptors = switch.descriptors().unwrap().into();
    rig.bus
        .add_at_boot(net::open(&config, &mut Supply::descriptors(descriptors)).unwrap())
        .unwrap();
    let mut from_guest = switch.consumer(Direction::FromGuest).unwrap();
    let mut to_guest = switch.producer(Direction::ToGuest).unwrap();
    let mut driver = Driver::start(&rig, 1, 2);
    let mut device_config = [0; 12];
    rig.bus.read(driver.bar + 0x2000, &mut device_config);
    assert_eq!(device_config, [0xFA, 0x16, 0x3E, 1, 2, 3, 1, 0, 1, 0, 0xAA, 0x05]);

    // Guest to switch, twice: the second time the device had gone to sleep.
    let mut frame = [0; FRAME_BYTES_MAX];
    for round in 1..=2u8 {
        rig.ram.write_slice(&[0; 12], GuestAddress(0x90_0000)).unwrap();
        rig.ram.write_slice(&[round; 60], GuestAddress(0x91_0000)).unwrap();
        driver.offer(1, &[(0x90_0000, 12, false), (0x91_0000, 60, false)]);
        assert_eq!(driver.finish(1), 0);
        let mut len = None;
        until("a frame", || {
            len = from_guest.pop(&mut frame).unwrap();
            len.is_some()
        });
        assert_eq!(frame[..len.unwrap()], [round; 60]);
    }
    // Switch to guest: a frame that waits for a buffer, then one for which a buffer waits.
    to_guest.push(&[5; 100]).unwrap();
    to_guest.publish().unwrap();
    for value in [5, 6] {
        driver.offer(0, &[(0xA0_0000, 2048, true)]);
        if value == 6 {
            to_guest.push(&[6; 100]).unwrap();
            to_guest.publish().unwrap();
        }
        assert_eq!(driver.finish(0), 112);
        let mut received = [0; 112];
        rig.ram.read_slice(&mut received, GuestAddress(0xA0_0000)).unwrap();
        assert_eq!(received[..12], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
        assert_eq!(received[12..], [value; 100]);
    }
    // A buffer too small, and a frame too short: lost, and the device goes on.
    driver.offer(0, &[(0xA0_0000, 50, true)]);
    to_guest.push(&[7; 100]).unwrap();
    to_guest.publish().unwrap();
    assert_eq!(driver.finish(0), 0);
    driver.offer(1, &[(0x90_0000, 12, false)]);
    assert_eq!(driver.finish(1), 0);
    assert_eq!(from_guest.pop(&mut frame).unwrap(), None);
    assert_eq!(driver.status(), 15);
}

/// Lets go of whatever the hot-plug controller asks for, as a guest would, while it is removed.
fn eject(rig: &Rig, id: &str, kind: DeviceKind) {
    let guest = std::thread::spawn({
        let bus = Arc::clone(&rig.bus);
        move || {
            let mut down = [0; 4];
            until("a request to let go", || {
                bus.read(HOTPLUG_START + HOTPLUG_REG_DOWN, &mut down);
                down != [0; 4]
            });
            bus.write(HOTPLUG_START + HOTPLUG_REG_EJECT, &down);
        }
    });
    rig.bus.remove(id, kind, DEADLINE).unwrap();
    guest.join().unwrap();
}

fn word(rig: &Rig, address: u64) -> u32 {
    let mut data = [0xFF; 4];
    rig.bus.read(address, &mut data);
    u32::from_le_bytes(data)
}

#[test]
fn a_disk_is_plugged_found_used_and_taken_away() {
    let Some(rig) = rig() else { return };
    assert_eq!(word(&rig, PCI_ECAM_START), 0x0008_1B36);
    assert_eq!(word(&rig, PCI_ECAM_START + 0x8000), u32::MAX);
    for round in 0..3 {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        let config = disk_config("hot", DiskSource::Raw(Resource::Descriptor(0)));
        let device = blk::open(&config, &mut Supply::descriptors(vec![file.into()]), None).unwrap();
        rig.bus.add(device).unwrap();
        assert_eq!(word(&rig, HOTPLUG_START + HOTPLUG_REG_UP), 1 << 1, "round {round}");
        assert_eq!(word(&rig, HOTPLUG_START + HOTPLUG_REG_UP), 0);
        assert_eq!(word(&rig, PCI_ECAM_START + 0x8000), 0x1042_1AF4);
        assert_eq!(
            word(&rig, PCI_ECAM_START + 0x8000 + 0x10),
            (PCI_MMIO_START + PCI_MMIO_PER_SLOT) as u32 | 4
        );
        let mut driver = Driver::start(&rig, 1, 1);
        assert_eq!(driver.block(READ, 0, 512, true).0, OK);
        // The guest may only let go of what it is asked for.
        rig.bus.write(HOTPLUG_START + HOTPLUG_REG_EJECT, &2u32.to_le_bytes());
        assert_eq!(rig.bus.plugged().disks, ["hot"]);
        eject(&rig, "hot", DeviceKind::Disk);
        assert!(rig.bus.plugged().disks.is_empty() && rig.bus.plugged().disks_leaving.is_empty());
        assert_eq!(word(&rig, PCI_ECAM_START + 0x8000), u32::MAX);
    }
}

#[test]
fn a_guest_that_keeps_a_disk_is_a_refusal_and_may_let_go_later() {
    let Some(rig) = rig() else { return };
    let _file = raw_disk(&rig, 4096, false);
    let refused = rig.bus.remove("disk", DeviceKind::Disk, Duration::from_millis(1));
    assert!(matches!(refused, Err(PlugError::GuestRefused(..))));
    let plugged = rig.bus.plugged();
    assert_eq!(
        (plugged.disks, plugged.disks_leaving),
        (vec!["disk".to_string()], vec!["disk".to_string()])
    );
    let mut driver = Driver::start(&rig, 1, 1);
    assert_eq!(driver.block(READ, 0, 512, true).0, OK);
    rig.bus.write(HOTPLUG_START + HOTPLUG_REG_EJECT, &2u32.to_le_bytes());
    until("the disk to be closed", || rig.bus.plugged().disks_leaving.is_empty());
    assert!(matches!(
        rig.bus.remove("disk", DeviceKind::Disk, DEADLINE),
        Err(PlugError::NotFound(..))
    ));
}

/// Random accesses to everything the bus decodes, with a disk and a ring behind.
#[test]
fn any_access_is_survived() {
    let Some(rig) = rig() else { return };
    let _file = raw_disk(&rig, 1 << 20, false);
    let mut random = 0xC0FF_EE00_1234_5678u64;
    for _ in 0..50_000 {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let base = [
            PCI_MMIO_START + PCI_MMIO_PER_SLOT,
            PCI_ECAM_START,
            PCI_ECAM_START + 0x8000,
            HOTPLUG_START,
        ][random as usize % 4];
        let address = base + (random >> 8) % 0x8000;
        let len = [1, 2, 4, 8][(random >> 40) as usize % 4];
        if random & 1 << 50 != 0 {
            rig.bus.write(address, &random.to_le_bytes()[..len]);
        } else {
            rig.bus.read(address, &mut [0; 8][..len]);
        }
    }
}

/// A lease page and a disk that needs it.
fn leased_disk(rig: &Rig, page: &LeasePage) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    let config = disk_config("leased", DiskSource::Raw(Resource::Descriptor(0)));
    let mut supply = Supply::descriptors(vec![file.try_clone().unwrap().into()]);
    let view = Arc::new(LeaseView::map(page.reader().unwrap()).unwrap());
    rig.bus.add_at_boot(blk::open(&config, &mut supply, Some(view)).unwrap()).unwrap();
    file
}

#[test]
fn changes_wait_for_the_lease_while_reads_go_on() {
    let Some(rig) = rig() else { return };
    let place = tempfile::tempdir().unwrap();
    let page = LeasePage::open(&place.path().join("lease")).unwrap();
    let file = leased_disk(&rig, &page);
    let mut driver = Driver::start(&rig, 1, 1);
    rig.ram.write_slice(&[7; 512], GuestAddress(waiting_data(0))).unwrap();
    driver.submit(0, WRITE, 1, 1);
    // A read that was asked for later is answered, so the write was looked at and held back.
    driver.submit(1, READ, 1, 1);
    until("the read", || driver.outcome(1) == OK);
    assert_eq!(driver.outcome(0), WAITS);
    let mut sector = [0; 512];
    file.read_exact_at(&mut sector, 512).unwrap();
    assert_eq!(sector, [0; 512]);
    page.renew(lease::now() + Duration::from_secs(600)).unwrap();
    until("the write", || driver.outcome(0) == OK);
    file.read_exact_at(&mut sector, 512).unwrap();
    assert_eq!(sector, [7; 512]);
    // Taken back, it holds again, whatever passed before.
    page.renew(Duration::ZERO).unwrap();
    driver.submit(2, WRITE, 2, 1);
    driver.submit(3, READ, 2, 1);
    until("the read", || driver.outcome(3) == OK);
    assert_eq!(driver.outcome(2), WAITS);
    // A disk with something held back is still taken away at once, and nothing is written later.
    eject(&rig, "leased", DeviceKind::Disk);
    page.renew(lease::now() + Duration::from_secs(600)).unwrap();
    file.read_exact_at(&mut sector, 1024).unwrap();
    assert_eq!(sector, [0; 512]);
}

#[test]
fn a_driver_resets_a_disk_whose_changes_wait() {
    let Some(rig) = rig() else { return };
    let place = tempfile::tempdir().unwrap();
    let page = LeasePage::open(&place.path().join("lease")).unwrap();
    let _file = leased_disk(&rig, &page);
    let mut driver = Driver::start(&rig, 1, 1);
    driver.submit(0, WRITE, 1, 1);
    driver.submit(1, READ, 1, 1);
    until("the read", || driver.outcome(1) == OK);
    driver.set_up(1);
    driver.used = [0; 2];
    page.renew(lease::now() + Duration::from_secs(600)).unwrap();
    assert_eq!(driver.block(WRITE, 3, 512, false).0, OK);
    assert_eq!(driver.outcome(0), WAITS);
}

fn remote_disk(rig: &Rig) -> UnixStream {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let config = disk_config(
        "far",
        DiskSource::Nbd { socket: Resource::Descriptor(0), size_bytes: 2 << 20 },
    );
    let mut supply = Supply::descriptors(vec![OwnedFd::from(ours)]);
    rig.bus.add_at_boot(blk::open(&config, &mut supply, None).unwrap()).unwrap();
    theirs.set_read_timeout(Some(DEADLINE)).unwrap();
    theirs
}

/// The next request's command, cookie and offset, with a write's data read and dropped.
fn nbd_request(mut socket: &UnixStream) -> (u16, [u8; 8], u64) {
    let mut head = [0; 28];
    socket.read_exact(&mut head).unwrap();
    let kind = u16::from_be_bytes([head[6], head[7]]);
    if kind == 1 {
        let len = u32::from_be_bytes(head[24..28].try_into().unwrap()) as usize;
        socket.read_exact(&mut vec![0; len]).unwrap();
    }
    let cookie = head[8..16].try_into().unwrap();
    (kind, cookie, u64::from_be_bytes(head[16..24].try_into().unwrap()))
}

fn nbd_reply(mut socket: &UnixStream, cookie: [u8; 8], error: u32, data: &[u8]) {
    let mut reply = 0x6744_6698u32.to_be_bytes().to_vec();
    reply.extend(error.to_be_bytes());
    reply.extend(cookie);
    reply.extend(data);
    socket.write_all(&reply).unwrap();
}

#[test]
fn a_remote_disk_has_several_requests_under_way_answered_in_any_order() {
    let Some(rig) = rig() else { return };
    let server = remote_disk(&rig);
    let mut driver = Driver::start(&rig, 1, 1);
    for number in 0..4 {
        driver.submit(number, READ, u64::from(number), 1);
    }
    let asked: Vec<_> = (0..4).map(|_| nbd_request(&server)).collect();
    for (kind, cookie, offset) in asked.into_iter().rev() {
        assert_eq!(kind, 0);
        nbd_reply(&server, cookie, 0, &[offset as u8 / 2 + 1; 512][..]);
    }
    for number in 0..4 {
        until("an answer", || driver.outcome(number) == OK);
        let byte: u8 = rig.ram.read_obj(GuestAddress(waiting_data(number) + 511)).unwrap();
        assert_eq!(u64::from(byte), (u64::from(number) * 512) as u8 as u64 / 2 + 1);
    }
}

#[test]
fn a_lost_connection_is_a_pause_and_what_was_unanswered_is_asked_again() {
    let Some(rig) = rig() else { return };
    let server = remote_disk(&rig);
    let mut driver = Driver::start(&rig, 1, 1);
    driver.submit(0, WRITE, 8, 128);
    driver.submit(1, READ, 8, 1);
    driver.submit(2, WRITE, 9, 1);
    // One answer, half of another one's, none to the third.
    let (_, cookie, _) = nbd_request(&server);
    nbd_reply(&server, cookie, 0, &[]);
    until("the first write", || driver.outcome(0) == OK);
    let (_, cookie, _) = nbd_request(&server);
    nbd_reply(&server, cookie, 0, &[1; 100]);
    nbd_request(&server);
    drop(server);
    until("the loss to show", || rig.bus.plugged().disks_disconnected == ["far"]);
    assert_eq!((driver.outcome(1), driver.outcome(2)), (WAITS, WAITS));

    let link = rig.bus.disk_link("far").unwrap();
    let (ours, server) = UnixStream::pair().unwrap();
    link.replace(ours).unwrap();
    let (kind, cookie, offset) = nbd_request(&server);
    assert_eq!((kind, offset), (0, 8 * 512));
    nbd_reply(&server, cookie, 0, &[5; 512]);
    let (kind, cookie, offset) = nbd_request(&server);
    assert_eq!((kind, offset), (1, 9 * 512));
    nbd_reply(&server, cookie, 0, &[]);
    until("the rest", || driver.outcome(1) == OK && driver.outcome(2) == OK);
    let mut sector = [0; 512];
    rig.ram.read_slice(&mut sector, GuestAddress(waiting_data(1))).unwrap();
    assert_eq!(sector, [5; 512]);
    assert!(rig.bus.plugged().disks_disconnected.is_empty());
    // A disk whose connection is lost is taken away at once.
    driver.submit(0, READ, 0, 1);
    drop(server);
    until("the loss to show", || rig.bus.plugged().disks_disconnected == ["far"]);
    eject(&rig, "far", DeviceKind::Disk);
    assert!(matches!(rig.bus.disk_link("far"), Err(PlugError::NotFound(..))));
}

#[test]
fn a_full_server_is_a_pause() {
    let Some(rig) = rig() else { return };
    let server = remote_disk(&rig);
    let mut driver = Driver::start(&rig, 1, 1);
    driver.submit(0, WRITE, 8, 1);
    for error in [28, 28, 0] {
        let (kind, cookie, offset) = nbd_request(&server);
        assert_eq!((kind, offset, driver.outcome(0)), (1, 8 * 512, WAITS));
        nbd_reply(&server, cookie, error, &[]);
    }
    until("the write", || driver.outcome(0) == OK);
}

/// A small file system of its own, which only root can make.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount() -> Option<SmallDisk> {
        let place = tempfile::tempdir().unwrap();
        let mount = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=256k", "trine-test"])
            .arg(place.path())
            .status();
        mount.is_ok_and(|status| status.success()).then_some(SmallDisk(place))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

#[test]
fn a_full_disk_is_a_pause_until_there_is_room() {
    let Some(rig) = rig() else { return };
    let Some(small) = SmallDisk::mount() else {
        eprintln!("SKIPPED: mounting a small file system needs root");
        return;
    };
    let filler = small.0.path().join("filler");
    std::fs::write(&filler, vec![1; 192 << 10]).unwrap();
    let path = small.0.path().join("disk");
    let file = File::options().read(true).write(true).create_new(true).open(path).unwrap();
    file.set_len(1 << 20).unwrap();
    let config = disk_config("disk", DiskSource::Raw(Resource::Descriptor(0)));
    let mut supply = Supply::descriptors(vec![file.try_clone().unwrap().into()]);
    rig.bus.add_at_boot(blk::open(&config, &mut supply, None).unwrap()).unwrap();
    let mut driver = Driver::start(&rig, 1, 1);
    driver.submit(0, WRITE, 0, 128);
    driver.submit(1, WRITE, 128, 128);
    driver.submit(2, READ, 0, 1);
    until("the read", || driver.outcome(2) == OK);
    assert!(driver.outcome(0) == WAITS || driver.outcome(1) == WAITS);
    std::fs::remove_file(&filler).unwrap();
    until("both writes", || driver.outcome(0) == OK && driver.outcome(1) == OK);
    drop((rig, file));
}

//! Devices as a driver sees them: registers through the bus, rings in guest memory, real files,
//! sockets and packet rings behind. No vCPU runs; the test is the guest.

use abi::boot::{
    HOTPLUG_REG_DOWN, HOTPLUG_REG_EJECT, HOTPLUG_REG_UP, HOTPLUG_START, PCI_ECAM_START,
    PCI_MMIO_PER_SLOT, PCI_MMIO_START,
};
use abi::packet_ring::{Direction, FRAME_BYTES_MAX, Region};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;
use vm_memory::{Bytes, GuestAddress};
use vmm::config::{DiskConfig, DiskEngine, DiskSource, NetBackend, NetConfig, Resource};
use vmm::devices::{DeviceKind, blk, net};
use vmm::pci::PlugError;
use vmm::process::resources::Supply;

mod disks;
mod driver;
mod limits;

use disks::raw_disk;
use driver::{DEADLINE, Driver, Rig, rig, until, waiting_data};

const WAITS: u8 = 0xEE;
const READ: u32 = 0;
const WRITE: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const OK: u8 = 0;
const FAILED: u8 = 1;
const UNSUPPORTED: u8 = 2;

fn disk_config(id: &str, source: DiskSource) -> DiskConfig {
    DiskConfig::new(id, source, "0123456789-serial-number")
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
        DiskSource::Nbd { socket: Resource::Descriptor(0), size_bytes: 2 << 20, epoch: 1 },
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
    let config = NetConfig::new("eth0", "fa:16:3e:01:02:03", 1450, NetBackend::Ring([0, 1, 2]));
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
    let _file = raw_disk(&rig, DiskEngine::Auto, 4096, false);
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
    let _file = raw_disk(&rig, DiskEngine::Auto, 1 << 20, false);
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

fn remote_disk(rig: &Rig) -> UnixStream {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let config = disk_config(
        "far",
        DiskSource::Nbd { socket: Resource::Descriptor(0), size_bytes: 2 << 20, epoch: 1 },
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
    link.replace(ours, 1).unwrap();
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

/// Answers the next request, which must be of this kind.
fn serve_next(server: &UnixStream, expected: u16) {
    let (kind, cookie, _) = nbd_request(server);
    assert_eq!(kind, expected);
    nbd_reply(server, cookie, 0, &[]);
}

#[test]
fn a_flush_fails_once_where_writes_may_be_lost_with_their_server() {
    const NBD_WRITE: u16 = 1;
    const NBD_FLUSH: u16 = 3;
    let Some(rig) = rig() else { return };
    let mut server = remote_disk(&rig);
    let mut driver = Driver::start(&rig, 1, 1);
    let link = rig.bus.disk_link("far").unwrap();
    let connect = |epoch| {
        let (ours, server) = UnixStream::pair().unwrap();
        link.replace(ours, epoch).unwrap();
        server
    };
    // Each round: writes that are answered, the flush after them, the epoch of the next connection,
    // and what the first flush on it says. A flush that waits when the connection ends is one, too.
    let rounds = [
        (1, None, 1, OK),
        (1, Some(OK), 2, OK),
        (1, None, 3, FAILED),
        (0, None, 4, OK),
        (2, Some(WAITS), 5, FAILED),
        (1, Some(WAITS), 5, OK),
    ];
    for (round, (writes, flush, epoch, expected)) in rounds.into_iter().enumerate() {
        for _ in 0..writes {
            driver.submit(0, WRITE, 8, 1);
            serve_next(&server, NBD_WRITE);
            until("the write", || driver.outcome(0) == OK);
        }
        if let Some(outcome) = flush {
            driver.submit(1, FLUSH, 0, 0);
            let (kind, cookie, _) = nbd_request(&server);
            assert_eq!(kind, NBD_FLUSH);
            if outcome == OK {
                nbd_reply(&server, cookie, 0, &[]);
            }
            until("the flush", || driver.outcome(1) == outcome);
        }
        server = connect(epoch);
        if flush != Some(WAITS) {
            driver.submit(1, FLUSH, 0, 0);
        }
        if expected == OK {
            serve_next(&server, NBD_FLUSH);
        }
        until("the outcome", || driver.outcome(1) != WAITS);
        assert_eq!(driver.outcome(1), expected, "round {round}");
        // It failed once: the next one goes to the server.
        driver.submit(1, FLUSH, 0, 0);
        serve_next(&server, NBD_FLUSH);
        until("the next flush", || driver.outcome(1) == OK);
    }
}

//! What paused means for devices: once they are held, neither the guest's memory nor what is behind
//! a device changes; what was in flight was finished, and what came meanwhile is done afterwards.
//! And devices that a guest does not let go of.

mod rig;

use abi::boot::{HOTPLUG_REG_DOWN, HOTPLUG_START, PCI_ECAM_START};
use abi::packet_ring::{Direction, Region};
use rig::{DEADLINE, Driver, Rig, rig, until};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
use vmm::config::{BalloonConfig, DiskConfig, NetConfig, Resource, RngConfig, VsockConfig};
use vmm::devices::vsock::packet::HEADER_BYTES;
use vmm::devices::{Device, DeviceKind, balloon, blk, net, rng, vsock};
use vmm::pci::PlugError;
use vmm::process::resources::Supply;

const HEADER: u64 = 0x70_0000;
const DATA: u64 = 0x80_0000;
const WRITE: u32 = 1;
const WAITS: u8 = 0xEE;
/// How long nothing may happen: a device that is not held answers in microseconds.
const QUIET: Duration = Duration::from_millis(100);

fn disk(source: serde_json::Value, engine: &str, descriptor: OwnedFd) -> Device {
    let config = serde_json::json!({"id": "disk", "source": source, "engine": engine});
    let config: DiskConfig = serde_json::from_value(config).unwrap();
    blk::open(&config, &mut Supply::descriptors(vec![descriptor]), None).unwrap()
}

fn remote_disk() -> (Device, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs.set_read_timeout(Some(DEADLINE)).unwrap();
    let source = serde_json::json!({"nbd": {"socket": {"descriptor": 0}, "size_bytes": 1 << 20}});
    (disk(source, "auto", ours.into()), theirs)
}

/// Asks for a write of one sector full of `byte`, as request `number`.
fn submit_write(driver: &mut Driver<'_>, number: u64, byte: u8) {
    let header = HEADER + number * 0x100;
    let request = [&u64::from(WRITE).to_le_bytes()[..], &number.to_le_bytes(), &[WAITS]].concat();
    driver.write(header, &request);
    let data = DATA + number * 512;
    driver.write(data, &[byte; 512]);
    driver.offer(0, &[(header, 16, false), (data, 512, false), (header + 16, 1, true)]);
}

fn status(driver: &Driver<'_>, number: u64) -> u8 {
    driver.read(HEADER + number * 0x100 + 16, 1)[0]
}

/// Asserts that `holds` all the time.
fn stays(what: &str, holds: impl Fn() -> bool) {
    let start = Instant::now();
    while start.elapsed() < QUIET {
        assert!(holds(), "{what}");
        std::thread::yield_now();
    }
}

#[test]
fn a_held_disk_changes_nothing_and_does_afterwards_what_it_was_asked() {
    // By a ring where the host has it, and by a thread.
    for engine in ["auto", "thread"] {
        a_held_disk_changes_nothing(engine);
    }
}

fn a_held_disk_changes_nothing(engine: &str) {
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    let raw = serde_json::json!({"raw": {"descriptor": 0}});
    let Some(rig) = rig(vec![disk(raw, engine, file.try_clone().unwrap().into())]) else { return };
    let mut driver = Driver::start(&rig, 1, 1, 0);
    let sector = |number: u64| {
        let mut bytes = [0; 512];
        file.read_exact_at(&mut bytes, number * 512).unwrap();
        bytes
    };
    for round in 0..20u64 {
        // One that may be under way when the disk is held, and one that comes while it is.
        let (before, during) = (round * 2 % 16, round * 2 % 16 + 1);
        submit_write(&mut driver, before, round as u8 + 1);
        rig.bus.hold(DEADLINE).unwrap();
        let (held, held_sector) = (status(&driver, before), sector(before));
        submit_write(&mut driver, during, round as u8 + 1);
        if round == 0 {
            stays("nothing is answered or written", || {
                status(&driver, during) == WAITS
                    && status(&driver, before) == held
                    && sector(before) == held_sector
                    && sector(during) == [0; 512]
            });
        }
        assert_eq!(status(&driver, during), WAITS);
        rig.bus.go_on();
        for number in [before, during] {
            driver.finish(0);
            assert_eq!((status(&driver, number), sector(number)), (0, [round as u8 + 1; 512]));
        }
    }
}

/// Takes a write's header and data off the socket; returns its cookie.
fn take_write(mut server: &UnixStream) -> [u8; 8] {
    let mut request = [0; 28 + 512];
    server.read_exact(&mut request).unwrap();
    request[8..16].try_into().unwrap()
}

fn reply(mut server: &UnixStream, cookie: [u8; 8]) {
    server.write_all(&[&0x6744_6698u32.to_be_bytes()[..], &[0; 4], &cookie].concat()).unwrap();
}

#[test]
fn what_a_remote_disk_has_in_flight_is_finished_before_it_is_held() {
    let (device, server) = remote_disk();
    let Some(rig) = rig(vec![device]) else { return };
    let mut driver = Driver::start(&rig, 1, 1, 0);
    submit_write(&mut driver, 0, 1);
    let cookie = take_write(&server);
    let bus = Arc::clone(&rig.bus);
    let holding = std::thread::spawn(move || bus.hold(DEADLINE));
    stays("the server has not answered", || !holding.is_finished());
    submit_write(&mut driver, 1, 2);
    reply(&server, cookie);
    holding.join().unwrap().unwrap();
    assert_eq!((status(&driver, 0), status(&driver, 1)), (0, WAITS));
    server.set_nonblocking(true).unwrap();
    stays("nothing is sent", || (&server).read(&mut [0]).is_err());
    server.set_nonblocking(false).unwrap();
    rig.bus.go_on();
    reply(&server, take_write(&server));
    until("the second answer", || status(&driver, 1) == 0);
}

#[test]
fn a_device_that_does_not_come_to_rest_is_named_and_serves_on() {
    let (device, server) = remote_disk();
    let Some(rig) = rig(vec![device]) else { return };
    let mut driver = Driver::start(&rig, 1, 1, 0);
    submit_write(&mut driver, 0, 1);
    let cookie = take_write(&server);
    let refused = rig.bus.hold(Duration::from_millis(50));
    assert_eq!(refused, Err(PlugError::Busy("disk".into())));
    reply(&server, cookie);
    until("the answer", || status(&driver, 0) == 0);
    submit_write(&mut driver, 1, 2);
    reply(&server, take_write(&server));
    until("the second answer", || status(&driver, 1) == 0);
}

#[test]
fn frames_wait_while_a_network_device_is_held() {
    let switch = Region::create().unwrap();
    let config = serde_json::json!(
        {"id": "eth0", "mac": "fa:16:3e:00:00:01", "backend": {"ring": [0, 1, 2]}}
    );
    let config: NetConfig = serde_json::from_value(config).unwrap();
    let mut supply = Supply::descriptors(switch.descriptors().unwrap().into());
    let Some(rig) = rig(vec![net::open(&config, &mut supply).unwrap()]) else { return };
    let mut driver = Driver::start(&rig, 1, 2, 0);
    driver.offer(0, &[(DATA, 2048, true)]);
    rig.bus.hold(DEADLINE).unwrap();
    let mut to_guest = switch.producer(Direction::ToGuest).unwrap();
    to_guest.push(&[5; 100]).unwrap();
    to_guest.publish().unwrap();
    driver.write(DATA + 0x1000, &[7; 72]);
    driver.offer(1, &[(DATA + 0x1000, 72, false)]);
    let mut from_guest = switch.consumer(Direction::FromGuest).unwrap();
    let mut frame = [0; 4096];
    let start = Instant::now();
    while start.elapsed() < QUIET {
        assert_eq!(driver.read(DATA, 112), vec![0; 112], "the guest's memory is as it was");
        assert_eq!((driver.used(0), driver.used(1)), (None, None));
        assert_eq!(from_guest.pop(&mut frame).unwrap(), None);
    }
    rig.bus.go_on();
    assert_eq!(driver.finish(0).1, 112);
    driver.finish(1);
    assert_eq!(driver.read(DATA + 12, 100), [5; 100]);
    assert_eq!(from_guest.pop(&mut frame).unwrap(), Some(60));
    let counts = rig.bus.metrics()[0].counts;
    assert_eq!((counts.reads, counts.read_bytes), (1, 100));
    assert_eq!((counts.writes, counts.written_bytes), (1, 60));
}

#[test]
fn a_held_device_is_reset_or_pulled_out_without_serving_again() {
    let (device, server) = remote_disk();
    let Some(rig) = rig(vec![device]) else { return };
    let mut driver = Driver::start(&rig, 1, 1, 0);
    rig.bus.hold(DEADLINE).unwrap();
    submit_write(&mut driver, 0, 1);
    rig.bus.force_remove("disk").unwrap();
    assert_eq!(status(&driver, 0), WAITS);
    let mut rest = Vec::new();
    (&server).read_to_end(&mut rest).unwrap();
    assert_eq!(rest, Vec::<u8>::new(), "the connection is closed, and nothing was sent");
    rig.bus.go_on();
}

#[test]
fn random_numbers_and_pages_wait_while_their_devices_are_held() {
    let balloon_config: BalloonConfig = serde_json::from_str("{}").unwrap();
    let devices = vec![
        rng::open(&RngConfig { bytes_per_second: 1 << 20 }),
        balloon::open(&balloon_config).unwrap(),
    ];
    let Some(rig) = rig(devices) else { return };
    let mut numbers = Driver::start(&rig, 1, 1, 0);
    let mut pages = Driver::start(&rig, 2, 2, 0);
    let (page, list) = (DATA + 0x10_0000, DATA + 0x20_0000);
    rig.bus.hold(DEADLINE).unwrap();
    numbers.offer(0, &[(DATA, 512, true)]);
    pages.write(page, &[7; 4096]);
    pages.write(list, &((page >> 12) as u32).to_le_bytes());
    pages.offer(0, &[(list, 4, false)]);
    stays("nothing is given or taken", || {
        numbers.read(DATA, 512) == [0; 512] && pages.read(page, 4096) == [7; 4096]
    });
    assert_eq!((numbers.used(0), pages.used(0)), (None, None));
    rig.bus.go_on();
    assert_eq!(numbers.finish(0).1, 512);
    pages.finish(0);
    assert_ne!(numbers.read(DATA, 512), [0; 512]);
    assert_eq!(pages.read(page, 4096), [0; 4096], "the host has the page");
}

#[test]
fn a_connection_of_the_hosts_waits_while_vsock_is_held() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vsock");
    let config = VsockConfig { cid: 7, socket: Resource::Path(path.clone()), connector: None };
    let (device, _outside) = vsock::open(&config, &mut Supply::Paths).unwrap();
    let Some(rig) = rig(vec![device]) else { return };
    let mut driver = Driver::start(&rig, 1, 3, 0);
    driver.offer(0, &[(DATA, 4096, true)]);
    rig.bus.hold(DEADLINE).unwrap();
    let mut asking = UnixStream::connect(&path).unwrap();
    asking.write_all(b"CONNECT 9\n").unwrap();
    stays("the guest is told nothing", || driver.read(DATA, 44) == [0; 44]);
    assert_eq!(driver.used(0), None);
    rig.bus.go_on();
    assert_eq!(driver.finish(0).1 as usize, HEADER_BYTES);
    assert_eq!(driver.read(DATA + 20, 4), 9u32.to_le_bytes(), "the port that was asked for");
}

fn word(rig: &Rig, address: u64) -> u32 {
    let mut data = [0xFF; 4];
    rig.bus.read(address, &mut data);
    u32::from_le_bytes(data)
}

#[test]
fn a_disk_that_the_guest_keeps_is_unplugging_since_then_and_can_be_pulled_out() {
    let (device, server) = remote_disk();
    let Some(rig) = rig(vec![device]) else { return };
    let mut driver = Driver::start(&rig, 1, 1, 0);
    assert!(rig.bus.plugged().unplugging.is_empty());
    let asked = SystemTime::now();
    for _ in 0..2 {
        let refused = rig.bus.remove("disk", DeviceKind::Disk, Duration::from_millis(1));
        assert_eq!(refused, Err(PlugError::GuestRefused("disk".into(), 0)));
    }
    let unplugging = rig.bus.plugged().unplugging;
    let [(id, since)] = unplugging.as_slice() else { panic!("{unplugging:?}") };
    assert_eq!(id, "disk");
    assert!(*since >= asked && *since <= SystemTime::now(), "since the first time it was asked");
    assert!(rig.bus.metrics()[0].unplugging);
    // It still works.
    submit_write(&mut driver, 0, 1);
    reply(&server, take_write(&server));
    until("the answer", || status(&driver, 0) == 0);

    rig.bus.force_remove("disk").unwrap();
    let plugged = rig.bus.plugged();
    assert!(plugged.disks.is_empty() && plugged.disks_leaving.is_empty());
    assert!(plugged.unplugging.is_empty());
    assert_eq!(word(&rig, PCI_ECAM_START + 0x8000), u32::MAX, "the slot is empty");
    assert_eq!(word(&rig, HOTPLUG_START + HOTPLUG_REG_DOWN), 0);
    assert_eq!((&server).read(&mut [0]).unwrap(), 0, "the connection is closed");
    assert_eq!(rig.bus.force_remove("disk"), Err(PlugError::Unknown("disk".into())));
    // Its place is free for another one.
    let (device, _server) = remote_disk();
    rig.bus.add(device).unwrap();
    assert_eq!(rig.bus.plugged().disks, ["disk"]);
}

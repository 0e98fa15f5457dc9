//! Rate limits, kept by the devices' threads and changed while they wait.

use super::driver::{Driver, Rig, rig, until};
use super::{OK, READ, WRITE, disk_config};
use abi::packet_ring::{Direction, Region};
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress};
use vmm::config::{DiskSource, NetBackend, NetConfig, RateLimits, Resource, TokenBucket};
use vmm::devices::{DeviceKind, blk, net};
use vmm::process::resources::Supply;

/// One byte a second: the first request passes, and the next one has to wait for minutes.
const SLOW: RateLimits =
    RateLimits { operations: None, bytes: Some(TokenBucket { per_second: 1, burst: None }) };

fn limited_disk(rig: &Rig, limits: RateLimits) {
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    let mut config = disk_config("disk", DiskSource::Raw(Resource::Descriptor(0)));
    config.limits = limits;
    let mut supply = Supply::descriptors(vec![file.into()]);
    rig.bus.add_at_boot(blk::open(&config, &mut supply, None).unwrap()).unwrap();
}

#[test]
fn a_disk_does_no_more_operations_than_its_limit() {
    let Some(rig) = rig() else { return };
    let operations = Some(TokenBucket { per_second: 20, burst: Some(2) });
    limited_disk(&rig, RateLimits { operations, bytes: None });
    let mut driver = Driver::start(&rig, 1, 1);
    let start = Instant::now();
    for _ in 0..6 {
        assert_eq!(driver.block(READ, 0, 512, true).0, OK);
    }
    // Two at once, and four more at 50 ms each.
    assert!(start.elapsed() >= Duration::from_millis(200), "{:?}", start.elapsed());
}

#[test]
fn a_disk_that_waits_for_its_limit_goes_on_when_the_limit_is_taken_away() {
    let Some(rig) = rig() else { return };
    limited_disk(&rig, SLOW);
    let mut driver = Driver::start(&rig, 1, 1);
    driver.submit(0, WRITE, 0, 1);
    until("the first write", || driver.outcome(0) == OK);
    driver.submit(1, WRITE, 1, 1);
    rig.bus.set_rates("disk", DeviceKind::Disk, &[RateLimits::default()]).unwrap();
    until("the second write", || driver.outcome(1) == OK);
    let error = rig.bus.set_rates("disk", DeviceKind::Net, &[SLOW]).unwrap_err();
    assert!(error.to_string().contains("disk"), "{error}");
}

#[test]
fn a_network_devices_directions_have_limits_of_their_own() {
    let Some(rig) = rig() else { return };
    let switch = Region::create().unwrap();
    let mut config = NetConfig::new("eth0", "fa:16:3e:01:02:03", 1450, NetBackend::Ring([0, 1, 2]));
    config.from_guest = SLOW;
    let mut supply = Supply::descriptors(switch.descriptors().unwrap().into());
    rig.bus.add_at_boot(net::open(&config, &mut supply).unwrap()).unwrap();
    let mut from_guest = switch.consumer(Direction::FromGuest).unwrap();
    let mut to_guest = switch.producer(Direction::ToGuest).unwrap();
    let mut driver = Driver::start(&rig, 1, 2);
    let mut frame = vec![0; 2048];
    let sends = |driver: &mut Driver<'_>, mark: u8| {
        rig.ram.write_slice(&[0; 12], GuestAddress(0x70_0000)).unwrap();
        rig.ram.write_slice(&[mark; 60], GuestAddress(0x70_0100)).unwrap();
        driver.offer(1, &[(0x70_0000, 12, false), (0x70_0100, 60, false)]);
    };
    sends(&mut driver, 1);
    driver.finish(1);
    until("the first frame", || from_guest.pop(&mut frame).unwrap() == Some(60));
    sends(&mut driver, 2);
    // The other direction has no limit, and goes on while this one waits.
    for mark in 3..6 {
        driver.offer(0, &[(0x72_0000, 2048, true)]);
        assert!(to_guest.push(&[mark; 64]).unwrap());
        to_guest.publish().unwrap();
        assert_eq!(driver.finish(0), 12 + 64);
    }
    assert!(!driver.is_used(1));
    assert_eq!(from_guest.pop(&mut frame).unwrap(), None);
    rig.bus.set_rates("eth0", DeviceKind::Net, &[RateLimits::default(); 2]).unwrap();
    driver.finish(1);
    until("the second frame", || from_guest.pop(&mut frame).unwrap() == Some(60));
    assert_eq!(frame[..60], [2; 60]);
}

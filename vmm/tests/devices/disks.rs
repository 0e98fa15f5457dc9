//! Raw disks: every story is told once and holds on both engines.

use super::driver::{Driver, Rig, rig, until, waiting_data};
use super::{
    DISCARD, FAILED, FLUSH, GET_ID, OK, READ, UNSUPPORTED, WAITS, WRITE, WRITE_ZEROES, disk_config,
    eject,
};
use abi::boot::{PCI_MMIO_PER_SLOT, PCI_MMIO_START};
use abi::lease::{self, LeasePage, LeaseView};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;
use vm_memory::{Bytes, GuestAddress};
use vmm::config::{DiskEngine, DiskSource, Resource};
use vmm::devices::blk::ring::Ring;
use vmm::devices::{DeviceKind, blk};
use vmm::process::resources::Supply;

macro_rules! on_both_engines {
    ($($story:ident,)*) => {
        mod io_uring {
            $(#[test] fn $story() { super::$story(super::DiskEngine::IoUring) })*
        }
        mod thread {
            $(#[test] fn $story() { super::$story(super::DiskEngine::Thread) })*
        }
    };
}

on_both_engines! {
    a_disk_reads_writes_flushes_and_says_its_serial,
    requests_beyond_the_disk_or_not_in_sectors_fail_and_change_nothing,
    a_read_only_disk_refuses_writes,
    discarded_sectors_read_as_zeroes,
    a_malformed_chain_is_returned_and_the_queue_goes_on,
    an_index_beyond_the_queue_needs_reset_instead_of_spinning,
    a_queue_outside_of_memory_needs_reset_and_reset_brings_the_disk_back,
    changes_wait_for_the_lease_while_reads_go_on,
    a_driver_resets_a_disk_whose_changes_wait,
    a_full_disk_is_a_pause_until_there_is_room,
    zeroed_sectors_read_as_zeroes_with_or_without_their_room,
    requests_under_way_together_keep_their_own_data,
    every_queue_of_a_disk_is_served,
}

/// A machine, where this host has what `engine` needs.
fn rig_for(engine: DiskEngine) -> Option<Rig> {
    if engine == DiskEngine::IoUring
        && let Err(error) = Ring::new(&tempfile::tempfile().unwrap())
    {
        eprintln!("SKIPPED: io_uring: {error}");
        return None;
    }
    rig()
}

pub(crate) fn raw_disk(rig: &Rig, engine: DiskEngine, size_bytes: u64, read_only: bool) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(size_bytes).unwrap();
    let mut config = disk_config("disk", DiskSource::Raw(Resource::Descriptor(0)));
    config.read_only = read_only;
    config.engine = engine;
    let mut supply = Supply::descriptors(vec![file.try_clone().unwrap().into()]);
    rig.bus.add_at_boot(blk::open(&config, &mut supply, None).unwrap()).unwrap();
    file
}

/// A lease page and a disk that needs it.
fn leased_disk(rig: &Rig, engine: DiskEngine, page: &LeasePage) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    let mut config = disk_config("leased", DiskSource::Raw(Resource::Descriptor(0)));
    config.engine = engine;
    let mut supply = Supply::descriptors(vec![file.try_clone().unwrap().into()]);
    let view = Arc::new(LeaseView::map(page.reader().unwrap()).unwrap());
    rig.bus.add_at_boot(blk::open(&config, &mut supply, Some(view)).unwrap()).unwrap();
    file
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

fn a_disk_reads_writes_flushes_and_says_its_serial(engine: DiskEngine) {
    let Some(rig) = rig_for(engine) else { return };
    let file = raw_disk(&rig, engine, 1 << 20, false);
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

fn requests_beyond_the_disk_or_not_in_sectors_fail_and_change_nothing(engine: DiskEngine) {
    let Some(rig) = rig_for(engine) else { return };
    let file = raw_disk(&rig, engine, 1 << 20, false);
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

fn a_read_only_disk_refuses_writes(engine: DiskEngine) {
    let Some(rig) = rig_for(engine) else { return };
    let _file = raw_disk(&rig, engine, 4096, true);
    let mut driver = Driver::start(&rig, 1, 1);
    assert_eq!(driver.block(WRITE, 0, 512, false).0, FAILED);
    assert_eq!(driver.block(DISCARD, 0, 16, false).0, FAILED);
    assert_eq!(driver.block(READ, 0, 512, true).0, OK);
}

fn discarded_sectors_read_as_zeroes(engine: DiskEngine) {
    let Some(rig) = rig_for(engine) else { return };
    let file = raw_disk(&rig, engine, 1 << 20, false);
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

fn a_malformed_chain_is_returned_and_the_queue_goes_on(engine: DiskEngine) {
    let Some(rig) = rig_for(engine) else { return };
    let _file = raw_disk(&rig, engine, 4096, false);
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

fn an_index_beyond_the_queue_needs_reset_instead_of_spinning(engine: DiskEngine) {
    let Some(rig) = rig_for(engine) else { return };
    let _file = raw_disk(&rig, engine, 4096, false);
    let driver = Driver::start(&rig, 1, 1);
    rig.ram.write_obj(1000u16, GuestAddress(driver.base + 0x1002)).unwrap();
    driver.put(0x3000, &[0, 0]);
    until("the device to ask for a reset", || driver.status() & 0x40 != 0);
    driver.set_up(1);
    assert_eq!(driver.status(), 15);
}

fn a_queue_outside_of_memory_needs_reset_and_reset_brings_the_disk_back(engine: DiskEngine) {
    let Some(rig) = rig_for(engine) else { return };
    let _file = raw_disk(&rig, engine, 4096, false);
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

fn changes_wait_for_the_lease_while_reads_go_on(engine: DiskEngine) {
    let Some(rig) = rig_for(engine) else { return };
    let place = tempfile::tempdir().unwrap();
    let page = LeasePage::open(&place.path().join("lease")).unwrap();
    let file = leased_disk(&rig, engine, &page);
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

fn a_driver_resets_a_disk_whose_changes_wait(engine: DiskEngine) {
    let Some(rig) = rig_for(engine) else { return };
    let place = tempfile::tempdir().unwrap();
    let page = LeasePage::open(&place.path().join("lease")).unwrap();
    let _file = leased_disk(&rig, engine, &page);
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

fn a_full_disk_is_a_pause_until_there_is_room(engine: DiskEngine) {
    let Some(rig) = rig_for(engine) else { return };
    let Some(small) = SmallDisk::mount() else {
        eprintln!("SKIPPED: mounting a small file system needs root");
        return;
    };
    let filler = small.0.path().join("filler");
    std::fs::write(&filler, vec![1; 192 << 10]).unwrap();
    let path = small.0.path().join("disk");
    let file = File::options().read(true).write(true).create_new(true).open(path).unwrap();
    file.set_len(1 << 20).unwrap();
    let mut config = disk_config("disk", DiskSource::Raw(Resource::Descriptor(0)));
    config.engine = engine;
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

fn zeroed_sectors_read_as_zeroes_with_or_without_their_room(engine: DiskEngine) {
    let Some(rig) = rig_for(engine) else { return };
    let file = raw_disk(&rig, engine, 1 << 20, false);
    let mut driver = Driver::start(&rig, 1, 1);
    for (unmap, sector) in [(0u32, 8u64), (1, 32)] {
        file.write_all_at(&[9; 65536], 0).unwrap();
        let mut range = sector.to_le_bytes().to_vec();
        range.extend(16u32.to_le_bytes());
        range.extend(unmap.to_le_bytes());
        driver.set_data(&range);
        assert_eq!(driver.block(WRITE_ZEROES, 0, 16, false), (OK, 1));
        let mut after = vec![0; 65536];
        file.read_exact_at(&mut after, 0).unwrap();
        let (from, to) = (sector as usize * 512, (sector as usize + 16) * 512);
        assert!(after[from..to].iter().all(|byte| *byte == 0));
        assert!(after[..from].iter().chain(&after[to..]).all(|byte| *byte == 9));
    }
    assert_eq!(file.metadata().unwrap().len(), 1 << 20);
}

fn requests_under_way_together_keep_their_own_data(engine: DiskEngine) {
    let Some(rig) = rig_for(engine) else { return };
    let file = raw_disk(&rig, engine, 1 << 20, false);
    let mut driver = Driver::start(&rig, 1, 1);
    for round in 0..20u64 {
        for number in 0..5u16 {
            let pattern = vec![(round * 5) as u8 + number as u8 + 1; 64 << 10];
            rig.ram.write_slice(&pattern, GuestAddress(waiting_data(number))).unwrap();
            driver.submit(number, WRITE, u64::from(number) * 128, 128);
        }
        until("the writes", || (0..5).all(|number| driver.outcome(number) == OK));
        for number in 0..5u16 {
            rig.ram.write_slice(&[0; 64 << 10], GuestAddress(waiting_data(number))).unwrap();
            driver.submit(number, READ, u64::from(4 - number) * 128, 128);
        }
        until("the reads", || (0..5).all(|number| driver.outcome(number) == OK));
        for number in 0..5u16 {
            let wanted = (round * 5) as u8 + (4 - number) as u8 + 1;
            let mut data = vec![0; 64 << 10];
            rig.ram.read_slice(&mut data, GuestAddress(waiting_data(number))).unwrap();
            assert!(data.iter().all(|byte| *byte == wanted), "round {round}, request {number}");
            file.read_exact_at(&mut data, u64::from(4 - number) << 16).unwrap();
            assert!(data.iter().all(|byte| *byte == wanted));
        }
    }
}

fn every_queue_of_a_disk_is_served(engine: DiskEngine) {
    let Some(rig) = rig_for(engine) else { return };
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&[5; 4096], 0).unwrap();
    let mut config = disk_config("disk", DiskSource::Raw(Resource::Descriptor(0)));
    (config.engine, config.queues) = (engine, 4);
    let mut supply = Supply::descriptors(vec![file.try_clone().unwrap().into()]);
    rig.bus.add_at_boot(blk::open(&config, &mut supply, None).unwrap()).unwrap();
    // A driver may set up fewer queues than there are.
    let mut driver = Driver::start(&rig, 1, 2);
    let mut queues = [0; 2];
    rig.bus.read(driver.bar + 0x2000 + 34, &mut queues);
    assert_eq!(u16::from_le_bytes(queues), 4);
    for queue in [1, 0, 1] {
        let header = 0x70_0000;
        rig.ram.write_slice(&[0; 16], GuestAddress(header)).unwrap();
        rig.ram.write_slice(&[0; 512], GuestAddress(0x80_0000)).unwrap();
        driver.offer(queue, &[(header, 16, false), (0x80_0000, 512, true), (header + 16, 1, true)]);
        assert_eq!(driver.finish(queue), 513);
        assert_eq!(driver.data(512), [5; 512]);
    }
}

#[test]
fn inside_of_the_sandbox_a_disk_has_no_ring() {
    let mut config = disk_config("disk", DiskSource::Raw(Resource::Descriptor(0)));
    config.engine = DiskEngine::IoUring;
    let file = tempfile::tempfile().unwrap();
    file.set_len(4096).unwrap();
    let mut supply = Supply::descriptors(vec![file.into()]);
    let error = blk::open_inside(&config, &mut supply, None).err().unwrap().to_string();
    assert!(
        error.contains("engine io_uring: only for disks that are there at the start"),
        "{error}"
    );
}

//! The bus: any accesses to configuration space, BARs, hot-plug controller and ports, in any order.

use crate::queues::open_disk;
use crate::world;
use abi::boot::{HOTPLUG_START, PCI_ECAM_SIZE, PCI_ECAM_START, PCI_MMIO_PER_SLOT, PCI_MMIO_START};
use fuzz::{Source, Target, check};
use std::time::Duration;
use vm_memory::{Bytes, GuestAddress};
use vmm::config::DiskEngine;
use vmm::devices::DeviceKind;
use vmm::machine::Interrupts;
use vmm::machine::memory::Ram;
use vmm::pci::{Bus, PlugError};

/// Most accesses of one input.
const ACCESSES_MAX: u32 = 64;
const BAR0: u64 = 0x10;
const MSIX: u64 = 0x98;
const WINDOW: u64 = 0x84;

#[test]
fn pci() {
    let Some((machine, interrupts)) = world::machine("pci") else { return };
    let file = tempfile::tempfile().unwrap();
    file.set_len(64 << 10).unwrap();
    let run = &mut |source: &mut Source<'_>| {
        let bus = Bus::new(machine.ram.clone(), interrupts.clone());
        bus.add_at_boot(open_disk(&file, DiskEngine::Auto)).unwrap();
        access(&bus, source);
        take_away(&bus);
        assert_eq!(file.metadata().unwrap().len(), 64 << 10);
    };
    check(Target { name: "pci", inputs: 2_000, samples: samples(), run });
    works_as_ever(&machine.ram, interrupts);
}

/// One access: what is touched, where, how wide, and the value.
fn access(bus: &Bus, source: &mut Source<'_>) {
    let slot = PCI_MMIO_START + PCI_MMIO_PER_SLOT;
    let space = PCI_ECAM_START + 0x8000;
    for _ in 0..ACCESSES_MAX {
        if source.is_empty() {
            break;
        }
        let (kind, width) = (source.byte(), source.pick(&[1usize, 2, 4, 8]));
        let at = u64::from(source.byte());
        let address = match kind >> 1 {
            0..32 => slot + at % 0x40,
            32..48 => slot + source.pick(&[0x1000, 0x2000, 0x3000, 0x4000, 0x5000, 0x7FF8]) + at,
            48..64 => space + at,
            64..72 => space + source.pick(&[BAR0, BAR0 + 4, 4, MSIX, WINDOW, WINDOW + 16]),
            72..80 => PCI_ECAM_START + u64::from(source.word()) % PCI_ECAM_SIZE,
            80..88 => HOTPLUG_START + at % 16,
            88..96 => source.double(),
            _ => {
                port(bus, kind, source);
                continue;
            }
        };
        let mut data = source.double().to_le_bytes();
        if kind & 1 == 0 {
            bus.write(address, &data[..width]);
        } else {
            bus.read(address, &mut data[..width]);
        }
    }
}

fn port(bus: &Bus, kind: u8, source: &mut Source<'_>) {
    let port = source.pick(&[0xCF8, 0xCF9, 0xCFA, 0xCFC, 0xCFD, 0xCFF, 0xFFFF, 0]);
    // A string instruction brings many bytes at once.
    let width = source.pick(&[1usize, 2, 4, 3, 64]);
    let mut data = [0; 64];
    let bytes = (1 << 31 | u32::from(source.half())).to_le_bytes();
    data[..4].copy_from_slice(&bytes);
    if kind & 1 == 0 {
        bus.port_write(port, &data[..width]);
    } else {
        bus.port_read(port, &mut data[..width]);
    }
}

/// The device leaves as a driver lets it go, with its thread and its doorbell.
fn take_away(bus: &Bus) {
    match bus.remove("disk", DeviceKind::Disk, Duration::ZERO) {
        Err(PlugError::GuestRefused(..)) => {
            bus.write(HOTPLUG_START + 8, &(1u32 << 1).to_le_bytes());
            match bus.remove("disk", DeviceKind::Disk, Duration::from_secs(20)) {
                Ok(()) | Err(PlugError::NotFound(..)) => {}
                Err(error) => panic!("{error}"),
            }
        }
        other => panic!("it left before it was let go: {other:?}"),
    }
    assert!(bus.plugged().disks.is_empty());
}

/// Accesses that start the device, as `access` reads them.
fn samples() -> Vec<Vec<u8>> {
    let mut start = Vec::new();
    let mut put = |register: u8, width: u8, value: u64| {
        start.extend([0, width, register]);
        start.extend(value.to_le_bytes());
    };
    put(0x14, 0, 3);
    put(0x08, 2, 1);
    put(0x0C, 2, 1);
    put(0x14, 0, 11);
    put(0x18, 1, 16);
    put(0x20, 3, world::ring(0));
    put(0x28, 3, world::ring(0) + 0x1000);
    put(0x30, 3, world::ring(0) + 0x2000);
    put(0x1C, 1, 1);
    put(0x14, 0, 15);
    let mut stopped = start.clone();
    stopped.extend([0, 0, 0x14, 0]);
    vec![start, stopped]
}

/// After all that, a device of the same machine comes up and fails as it should.
fn works_as_ever(ram: &Ram, interrupts: Interrupts) {
    ram.write_slice(&[0; 0x3000], GuestAddress(world::ring(0))).unwrap();
    let file = tempfile::tempfile().unwrap();
    file.set_len(4096).unwrap();
    let bus = Bus::new(ram.clone(), interrupts);
    bus.add_at_boot(open_disk(&file, DiskEngine::Auto)).unwrap();
    access(&bus, &mut Source::new(&samples()[0]));
    let mut status = [0];
    bus.read(PCI_MMIO_START + PCI_MMIO_PER_SLOT + 0x14, &mut status);
    assert_eq!(status, [15], "the sample no longer starts the device");
}

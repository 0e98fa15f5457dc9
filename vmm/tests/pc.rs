//! What Linux finds beside memory and processors, as its drivers use it: ports, the I/O APIC's
//! window, configuration space by ports. No vCPU runs; the test is the guest.

use abi::boot::PCI_ECAM_START;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use vmm::config::{CONSOLE_HEADER_BYTES, DiskConfig};
use vmm::devices::blk;
use vmm::devices::console::{RingFile, Sink};
use vmm::machine::board::{
    Board, HOTPLUG_PIN, IOAPIC_ADDRESS, PORT_RESET, PORT_SERIAL, PORT_SLEEP_CONTROL, PortWrite,
};
use vmm::machine::vcpu::End;
use vmm::machine::{Host, Interrupts, Machine};
use vmm::pci::Bus;
use vmm::process::resources::Supply;

fn machine() -> Option<Machine> {
    if File::options().read(true).write(true).open("/dev/kvm").is_err() {
        eprintln!("SKIPPED: no /dev/kvm");
        return None;
    }
    Some(Machine::create(&Host::open().unwrap(), 16, Default::default(), 1).unwrap())
}

fn board(machine: &Machine, sink: Sink) -> Board {
    Board::pc(sink, Interrupts::new(Arc::clone(&machine.vm)))
}

#[test]
fn configuration_space_is_the_same_by_ports_and_by_ecam() {
    let Some(machine) = machine() else { return };
    let bus = Bus::new(machine.ram.clone(), Interrupts::new(Arc::clone(&machine.vm)));
    let disk: DiskConfig =
        serde_json::from_str(r#"{"id": "d", "source": {"raw": {"descriptor": 0}}}"#).unwrap();
    let file = tempfile::tempfile().unwrap();
    file.set_len(4096).unwrap();
    let mut supply = Supply::descriptors(vec![file.into()]);
    bus.add(blk::open(&disk, &mut supply, None).unwrap()).unwrap();
    let by_port = |address: u32, offset: u16, len: usize| {
        bus.port_write(0xCF8, &address.to_le_bytes());
        let mut data = vec![0xFF; len];
        bus.port_read(0xCFC + offset, &mut data);
        data
    };
    const SLOT_1: u32 = 1 << 31 | 1 << 11;
    for register in (0..256u32).step_by(4) {
        let mut by_ecam = [0xFF; 4];
        bus.read(PCI_ECAM_START + 0x8000 + u64::from(register), &mut by_ecam);
        assert_eq!(by_port(SLOT_1 | register, 0, 4), by_ecam, "register {register:#x}");
        assert_eq!(by_port(SLOT_1 | register, 2, 2), by_ecam[2..]);
    }
    assert_eq!(by_port(SLOT_1, 0, 4)[..2], [0xF4, 0x1A]);
    // Without the enable bit, on another bus, in an empty slot, across the data's end: nothing.
    for (address, offset, len) in
        [(1 << 11, 0, 4), (SLOT_1 | 1 << 16, 0, 4), (1 << 31 | 2 << 11, 0, 4), (SLOT_1, 2, 4)]
    {
        assert_eq!(by_port(address, offset, len), vec![0xFF; len], "{address:#x}+{offset}");
    }
    let mut address = [0; 4];
    bus.port_read(0xCF8, &mut address);
    assert_eq!(u32::from_le_bytes(address), SLOT_1);
}

#[test]
fn serial_output_comes_out_a_line_at_a_time_and_when_the_driver_is_done() {
    let Some(machine) = machine() else { return };
    let file = tempfile::tempfile().unwrap();
    let ring = RingFile::open(file.try_clone().unwrap(), 4096).unwrap();
    let board = board(&machine, Sink::Ring(ring));
    let say = |text: &[u8]| {
        text.iter()
            .map(|byte| match board.port_write(PORT_SERIAL, *byte) {
                PortWrite::Taken { spoken } => spoken,
                other => panic!("{other:?}"),
            })
            .sum::<usize>()
    };
    assert_eq!(say(b"Linux version 6\nlog"), 16);
    let interrupt_enable = |value| board.port_write(PORT_SERIAL + 1, value);
    assert_eq!(interrupt_enable(0), PortWrite::Taken { spoken: 3 });
    assert_eq!(say(b"in: "), 0);
    assert_eq!(board.drain_console(&machine.ram), 4);
    assert_eq!(say(&[b'x'; 1024]), 1024);
    let mut text = [0; 23];
    file.read_exact_at(&mut text, CONSOLE_HEADER_BYTES).unwrap();
    assert_eq!(&text, b"Linux version 6\nlogin: ");
    let mut status = [0];
    assert!(board.port_read(PORT_SERIAL + 5, &mut status));
    assert_eq!(status[0] & 0x60, 0x60, "the transmitter is always empty");
}

#[test]
fn sleep_and_reset_registers_end_the_guest() {
    let Some(machine) = machine() else { return };
    let board = board(&machine, Sink::Nowhere);
    let taken = PortWrite::Taken { spoken: 0 };
    for (port, value, outcome) in [
        (PORT_SLEEP_CONTROL, 5 << 2 | 1 << 5, PortWrite::End(End::PowerOff(0))),
        (PORT_SLEEP_CONTROL, 5 << 2, taken.clone()),
        (PORT_SLEEP_CONTROL, 3 << 2 | 1 << 5, taken.clone()),
        (PORT_RESET, 1, PortWrite::End(End::Reset)),
        (PORT_RESET, 0, taken.clone()),
        (0x64, 0xFE, PortWrite::End(End::Reset)),
        (0x64, 0xD1, taken),
        (0x80, 0, PortWrite::NotMine),
    ] {
        assert_eq!(board.port_write(port, value), outcome, "{port:#x} {value:#x}");
    }
    let unikernel = Board::unikernel(Sink::Nowhere);
    assert_eq!(unikernel.port_write(PORT_RESET, 1), PortWrite::NotMine);
    assert!(!unikernel.mmio_read(IOAPIC_ADDRESS, &mut [0; 4]));
}

#[test]
fn the_io_apic_answers_in_its_window_only_and_survives_anything() {
    let Some(machine) = machine() else { return };
    let board = board(&machine, Sink::Nowhere);
    let Board::Pc { ioapic, .. } = &board else { panic!("a unikernel's board") };
    let mut random = 0x9E37_79B9_7F4A_7C15u64;
    for _ in 0..50_000 {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let (address, len) =
            (IOAPIC_ADDRESS + (random >> 20) % 0x20, 1 + (random >> 60) as usize % 8);
        assert!(board.mmio_write(address, &random.to_le_bytes()[..len]));
        assert!(board.mmio_read(address, &mut [0; 8][..len]));
        ioapic.pulse((random >> 30) as u8 % 32);
    }
    ioapic.pulse(HOTPLUG_PIN);
    assert!(!board.mmio_write(IOAPIC_ADDRESS + 0x1000, &[0; 4]));
    assert!(!board.mmio_read(IOAPIC_ADDRESS - 1, &mut [0; 4]));
}

//! The PC's board and the unikernel's console: any port, any register, any head of the ring.

use crate::world;
use fuzz::{Source, Target, check};
use vm_memory::{Bytes, GuestAddress};
use vmm::devices::console::Sink;
use vmm::machine::board::{Board, IOAPIC_ADDRESS, PORT_SERIAL, PORT_SLEEP_CONTROL};
use vmm::machine::boot::unikernel::{CONSOLE, CONSOLE_BYTES};

#[test]
fn board() {
    let Some((machine, interrupts)) = world::machine("board") else { return };
    let run = &mut |source: &mut Source<'_>| {
        let pc = Board::pc(Sink::Nowhere, interrupts.clone());
        let unikernel = Board::unikernel(Sink::Nowhere);
        while !source.is_empty() {
            let value = source.byte();
            let port = source.pick(&[PORT_SERIAL, PORT_SLEEP_CONTROL, 0x60]) + source.half() % 9;
            let address = IOAPIC_ADDRESS + source.pick(&[0, 0x10, 0x40, 1, 0xFFD]);
            let width = source.pick(&[1usize, 2, 4, 8]);
            let mut data = source.double().to_le_bytes();
            pc.port_write(port, value);
            pc.port_read(port, &mut data[..width]);
            pc.mmio_write(address, &data[..width]);
            pc.mmio_read(address, &mut data[..width]);
            machine.ram.write_obj(source.word(), GuestAddress(CONSOLE)).unwrap();
            let spoken = unikernel.drain_console(&machine.ram);
            assert!(spoken <= CONSOLE_BYTES as usize, "{spoken} bytes of one ring");
            pc.drain_console(&machine.ram);
        }
    };
    check(Target { name: "board", inputs: 5_000, samples: Vec::new(), run });
}

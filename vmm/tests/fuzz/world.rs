//! What targets share: a machine whose vCPU never runs, and queues in its memory.

use fuzz::Source;
use std::fs::File;
use std::sync::Arc;
use vm_memory::{Bytes, GuestAddress};
use vmm::machine::memory::Ram;
use vmm::machine::{Host, Interrupts, Machine};

/// Guest memory, MiB.
pub(crate) const MEMORY_MIB: u32 = 16;
/// Guest memory, bytes.
pub(crate) const RAM_BYTES: u64 = (MEMORY_MIB as u64) << 20;
/// Entries of a queue.
pub(crate) const QUEUE_SIZE: u16 = 16;
/// Where what descriptors point at lies.
pub(crate) const BUFFERS: u64 = 0x80_0000;
/// Addresses at which something ends or begins.
const EDGES: [u64; 8] =
    [0, RAM_BYTES - 16, RAM_BYTES - 1, RAM_BYTES, 0xC010_0000, 1 << 32, u64::MAX - 15, u64::MAX];

/// A machine and its interrupts; `None` without KVM, which it says.
pub(crate) fn machine(test: &str) -> Option<(Machine, Interrupts)> {
    if File::options().read(true).write(true).open("/dev/kvm").is_err() {
        eprintln!("SKIPPED {test}: no /dev/kvm");
        return None;
    }
    let machine = Machine::create(&Host::open().unwrap(), MEMORY_MIB, Default::default(), 1);
    let machine = machine.unwrap();
    let interrupts = Interrupts::new(Arc::clone(&machine.vm));
    Some((machine, interrupts))
}

/// Where a queue's descriptor table lies; the rings follow it.
pub(crate) fn ring(queue: usize) -> u64 {
    0x20_0000 + queue as u64 * 0x4000
}

/// Writes a queue: descriptors that are nearly right, and an available ring.
pub(crate) fn write_queue(ram: &Ram, queue: usize, source: &mut Source<'_>) {
    let at = ring(queue);
    ram.write_slice(&[0; 0x3000], GuestAddress(at)).unwrap();
    for index in 0..u64::from(QUEUE_SIZE) {
        ram.write_slice(&descriptor(source), GuestAddress(at + index * 16)).unwrap();
        let head = u16::from(source.byte() % 20);
        ram.write_obj(head, GuestAddress(at + 0x1004 + index * 2)).unwrap();
    }
    // An indirect table where some descriptors say that one is.
    for index in 0..8 {
        ram.write_slice(&descriptor(source), GuestAddress(BUFFERS + index * 16)).unwrap();
    }
    let available = if source.byte() == 0 { source.half() } else { u16::from(source.byte() % 17) };
    ram.write_obj(available, GuestAddress(at + 0x1002)).unwrap();
    ram.write_obj(source.half(), GuestAddress(at + 0x1004 + 32)).unwrap();
}

fn descriptor(source: &mut Source<'_>) -> [u8; 16] {
    let address = match source.byte() {
        0 => source.double(),
        1..8 => source.pick(&EDGES),
        8..32 => BUFFERS,
        _ => BUFFERS + 0x1000 + u64::from(source.byte()) * 0x200,
    };
    let len = match source.byte() % 16 {
        0 => source.word(),
        1 => 0,
        2 => 1,
        3..8 => 16,
        _ => u32::from(source.byte()) * 64,
    };
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&address.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    bytes[12..14].copy_from_slice(&u16::from(source.byte() % 8).to_le_bytes());
    bytes[14..].copy_from_slice(&u16::from(source.byte() % 18).to_le_bytes());
    bytes
}

//! PCI and the board: vectors, BARs, configuration space, hot-plug, ports, console.

use crate::function::{Function, RUNNING};
use crate::raw::{self, Random};
use abi::boot::{
    ConsoleRing, HOTPLUG_START, PCI_ECAM_SIZE, PCI_ECAM_START, PCI_MMIO_PER_SLOT, PCI_MMIO_START,
    PORT_CONSOLE, PORT_EXIT,
};
use core::sync::atomic::Ordering;
use runtime::boot;

const COMMAND: u64 = 0x04;
const COMMAND_ON: u64 = 0b110;
const BAR0: u64 = 0x10;
const MSIX_CONTROL: u64 = 0x9A;
const MSIX_ON: u64 = 1 << 15;
/// The capability that is a window into the BARs.
const WINDOW: u64 = 0x84;
/// Delivery modes by which a message ends this guest (SMI, NMI, INIT); those are `deaths`.
const DELIVERY_MODE: u64 = 0x700;
const WIDTHS: [u64; 4] = [1, 2, 4, 8];

/// Where a BAR must not be, and where another device is.
const PLACES: [u64; 14] = [
    0,
    0x10_0000,
    PCI_MMIO_START,
    PCI_MMIO_START + PCI_MMIO_PER_SLOT,
    PCI_MMIO_START + 2 * PCI_MMIO_PER_SLOT,
    PCI_MMIO_START + 2 * PCI_MMIO_PER_SLOT + 0x3000,
    PCI_ECAM_START,
    0xFEC0_0000,
    0xFED0_0000,
    0xFEE0_0000,
    0xFFFF_8000,
    1 << 32,
    1 << 52,
    u64::MAX,
];

/// Tables of random messages, unmasked, for every queue and for changes of the configuration.
pub(crate) fn wild_vectors(function: &Function, random: &mut Random) {
    let table = function.bar + u64::from(function.entry.msix_table);
    for round in 0..64 {
        function.set_status(0);
        for vector in 0..u64::from(function.entry.msix_vectors) {
            let entry = table + vector * 16;
            raw::write32(entry, random.any() as u32);
            raw::write32(entry + 4, (random.any() >> random.below(64)) as u32);
            raw::write32(entry + 8, (random.any() & !DELIVERY_MODE) as u32);
            raw::write32(entry + 12, random.below(2) as u32);
        }
        // Beside the table: behind its end, and of a wrong width.
        raw::write(table + 0x40 + random.below(0xF00), random.pick(&[1, 2]), random.any());
        raw::read(table + random.below(0xF00), random.pick(&WIDTHS));
        raw::write(function.bar + 0x5000 + random.below(64), random.pick(&WIDTHS), random.any());
        raw::write16(function.space() + MSIX_CONTROL, random.any() as u16);
        function.begin(1 << 32);
        function.put(0x10, 2, random.below(70));
        for queue in 0..function.queues() {
            function.put(0x16, 2, u64::from(queue));
            function.put(0x1A, 2, random.pick(&[0, 1, 2, 3, 63, 64, 0xFFFE, 0xFFFF]));
            let at = crate::function::ring(queue);
            raw::fill(at, 0x4000, 0);
            function.place(queue, 16, [at, at + 0x1000, at + 0x2000]);
        }
        function.set_status(RUNNING);
        if round % 2 == 0 {
            for queue in 0..function.queues() {
                function.describe(queue, 0, (crate::function::BUFFERS, 64, 0, 0));
                function.offer(queue, 0);
                function.kick(queue);
                super::queues::linger(function, queue, 0);
            }
        } else {
            // The device fails and says so by a message.
            function.claim(0, 999);
            function.kick(0);
        }
        raw::write16(function.space() + MSIX_CONTROL, MSIX_ON as u16);
    }
    (0..function.entry.msix_vectors).for_each(|vector| {
        raw::write32(table + u64::from(vector) * 16 + 12, 1);
    });
}

fn move_bar(function: &Function, place: u64) {
    raw::write32(function.space() + BAR0, place as u32);
    raw::write32(function.space() + BAR0 + 4, (place >> 32) as u32);
}

fn put_back(function: &Function) {
    raw::write16(function.space() + MSIX_CONTROL, MSIX_ON as u16);
    raw::write32(function.space() + WINDOW + 4, 0);
    move_bar(function, function.entry.bar);
    raw::write16(function.space() + COMMAND, COMMAND_ON as u16);
}

/// The BAR over memory, over other devices, over the interrupt controller, beyond every address,
/// while the device runs and while it does not.
pub(crate) fn bars_anywhere(function: &Function, random: &mut Random) {
    for place in PLACES {
        for running in [false, true] {
            function.start(1 << 32);
            if !running {
                function.set_status(0);
            }
            move_bar(function, place);
            let in_hole = (PCI_MMIO_START..1 << 32).contains(&place);
            let at = place & !0x7FFF;
            // Only a place that is neither memory nor unmapped can be touched.
            if in_hole && at != PCI_ECAM_START {
                for _ in 0..16 {
                    let offset = random.pick(&[0x00, 0x14, 0x16, 0x1000, 0x2000, 0x3000, 0x5000]);
                    raw::read(at + offset, 4);
                    raw::write(at + 0x3000, random.pick(&WIDTHS), random.any());
                }
                let moved = Function { bar: at, ..*function };
                moved.start(1 << 32);
                moved.kick(0);
            }
            function.kick(0);
            raw::write16(function.space() + COMMAND, random.below(8) as u16);
            raw::read(function.bar, 4);
            put_back(function);
        }
    }
}

/// The window in configuration space, at every place of the BAR and beyond it.
pub(crate) fn window_capability(function: &Function, random: &mut Random) {
    let space = function.space();
    for _ in 0..500 {
        let offset = match random.below(3) {
            0 => random.any(),
            1 => random.below(0x40),
            _ => random.pick(&[0x14, 0x1000, 0x2000, 0x3000, 0x5000, 0x7FFF, 0x8000]),
        };
        raw::write(space + WINDOW + 4, 1, random.below(6) / 5);
        raw::write32(space + WINDOW + 8, offset as u32);
        raw::write32(space + WINDOW + 12, random.pick(&[0, 1, 2, 3, 4, 8, 0xFFFF_FFFF]) as u32);
        raw::read(space + WINDOW + 16, random.pick(&WIDTHS));
        // Not into the MSI-X table: see `wild_vectors`.
        if !(0x4000..0x5000).contains(&(offset & 0xFFFF)) {
            raw::write(space + WINDOW + 16, random.pick(&WIDTHS), random.any());
        }
    }
    put_back(function);
}

/// Configuration space anywhere: of this function, of the bridge, of functions that aren't there.
pub(crate) fn random_configuration(function: &Function, random: &mut Random) {
    for _ in 0..2_000 {
        let offset = match random.below(3) {
            0 => function.space() - PCI_ECAM_START + random.below(0x100),
            1 => random.below(0x8000),
            _ => random.below(PCI_ECAM_SIZE - 8),
        };
        let width = random.pick(&WIDTHS);
        raw::read(PCI_ECAM_START + offset, width);
        // Other devices must find theirs as it was: they are attacked in their turn.
        let others = offset >= 0x8000 && offset & !0x7FFF != function.space() - PCI_ECAM_START;
        if !others && !(WINDOW + 12..WINDOW + 20).contains(&(offset & 0x7FFF)) {
            raw::write(PCI_ECAM_START + offset, width, random.any());
        }
    }
    put_back(function);
}

/// The hot-plug controller: devices are given back that nobody asked for.
pub(crate) fn hotplug_controller(_: &Function, random: &mut Random) {
    for offset in 0..64 {
        raw::read(HOTPLUG_START + offset, random.pick(&WIDTHS));
        raw::write(HOTPLUG_START + offset, random.pick(&WIDTHS), u64::MAX);
    }
    for _ in 0..1_000 {
        raw::write32(HOTPLUG_START + random.pick(&[0, 4, 8]), random.any() as u32);
    }
}

/// Ports, but for the one that ends this guest.
pub(crate) fn random_ports(function: &Function, random: &mut Random) {
    for _ in 0..3_000 {
        let width = random.pick(&[1, 2, 4]);
        let port = random.below(0x0FFC) as u16;
        let ends = (PORT_EXIT - 3..=PORT_EXIT).contains(&port);
        // What goes through the ports into configuration space is `random_configuration`'s.
        let configures = (0xCF0..0xD00).contains(&port);
        raw::port_read(port, width);
        if !ends && !configures {
            raw::port_write(port, width, random.any() as u32);
        }
    }
    for _ in 0..500 {
        let address = 1 << 31 | (function.space() - PCI_ECAM_START) as u32 >> 4 & 0xFFFF00;
        raw::port_write(0xCF8, 4, address | random.below(256) as u32);
        raw::port_read(0xCFC + random.below(4) as u16, random.pick(&[1, 2, 4]));
        raw::port_write(0xCF8, random.pick(&[1, 2, 4]), random.any() as u32);
        raw::port_read(0xCFC + random.below(4) as u16, random.pick(&[1, 2, 4]));
    }
    put_back(function);
}

/// A console whose head is anywhere.
pub(crate) fn console_that_lies(_: &Function, random: &mut Random) {
    // SAFETY: the VMM's promise about `console`; the head is atomic and this is the only thread.
    let ring = unsafe { &*(boot::parameters().console as *const ConsoleRing) };
    let head = ring.head.load(Ordering::SeqCst);
    for lie in [u32::MAX, 0, head.wrapping_sub(1), head.wrapping_add(1 << 31), random.any() as u32]
    {
        ring.head.store(lie, Ordering::SeqCst);
        raw::port_write(PORT_CONSOLE, random.pick(&[1, 2, 4]), 0);
    }
    ring.head.store(head, Ordering::SeqCst);
    raw::port_write(PORT_CONSOLE, 1, 0);
}

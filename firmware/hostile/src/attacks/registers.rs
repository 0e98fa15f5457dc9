//! Registers: reserved, unaligned, of a wrong width, in a wrong order.

use crate::function::{Function, QUEUE_SIZE, RUNNING, ring};
use crate::raw::{self, Random};

/// The windows of BAR 0 but for the MSI-X table, which has an attack of its own: a random vector
/// may end this guest.
const WINDOWS: [u64; 6] = [0x0000, 0x1000, 0x2000, 0x3000, 0x5000, 0x7000];
const WINDOW_HEAD: u64 = 0x48;
const WIDTHS: [u64; 4] = [1, 2, 4, 8];
const RANDOM_ACCESSES: u32 = 3_000;

/// Reads and writes the head of every window, at every offset, with every width.
pub(crate) fn every_offset_and_width(function: &Function, random: &mut Random) {
    for window in WINDOWS {
        for offset in 0..WINDOW_HEAD {
            let width = random.pick(&WIDTHS);
            raw::read(function.bar + window + offset, width);
            raw::write(function.bar + window + offset, width, random.any());
        }
        // Across the end of a window, and across the end of the BAR.
        raw::read(function.bar + window + 0xFFD, 8);
        raw::read(function.bar + 0x7FFD, 8);
        raw::write(function.bar + 0x7FFD, 8, u64::MAX);
    }
}

/// Any register at any time, the start of a device with what happens to be there included.
pub(crate) fn random_accesses(function: &Function, random: &mut Random) {
    function.start(1 << 32);
    for _ in 0..RANDOM_ACCESSES {
        let width = random.pick(&WIDTHS);
        let register = function.bar + random.pick(&WINDOWS) + random.below(0x40);
        match random.below(4) {
            0 => drop(raw::read(register, width)),
            1 => function.set_status(random.pick(&[0, 1, 3, 11, 15, 0x40, 0x80, 0xFF]) as u8),
            _ => raw::write(register, width, random.any() >> random.below(64)),
        }
    }
}

/// Accepts what was never offered, lies about what is used, and changes its mind.
pub(crate) fn features_never_offered(function: &Function, random: &mut Random) {
    let offered = function.offered();
    for bit in 0..64 {
        if offered >> bit & 1 == 0 {
            function.begin(offered | 1 << bit);
            // The device must not take it: FEATURES_OK stays off and it never runs.
            if function.status() & 8 != 0 {
                runtime::println!("hostile: bit {bit} was taken and never offered");
                runtime::cpu::exit(1);
            }
            function.set_status(RUNNING);
            function.kick(0);
        }
    }
    // None at all, not even virtio 1.
    function.begin(0);
    function.set_status(RUNNING);
    // All that are offered; then indices for event suppression that mean nothing.
    if function.start(offered) {
        function.accept(0);
        for queue in 0..function.queues() {
            raw::write16(ring(queue) + 0x1000 + 4 + u64::from(QUEUE_SIZE) * 2, random.any() as u16);
            raw::write16(ring(queue) + 0x2000 + 4 + u64::from(QUEUE_SIZE) * 8, random.any() as u16);
            function.describe(queue, 0, (crate::function::BUFFERS, 64, 0, 0));
            function.offer(queue, 0);
            function.kick(queue);
        }
    }
}

/// Every status in every order.
pub(crate) fn status_out_of_order(function: &Function, random: &mut Random) {
    for status in 0..=255u8 {
        function.set_status(status);
        function.kick(0);
    }
    for _ in 0..64 {
        function.set_status(random.any() as u8);
        if random.below(4) == 0 {
            function.accept(1 << 32);
        }
        if random.below(4) == 0 {
            let at = ring(0);
            function.place(0, QUEUE_SIZE, [at, at + 0x1000, at + 0x2000]);
        }
    }
}

//! Virtqueues: rings where no ring can be, chains that never end, indices that lie, kicks and
//! resets at the worst of times.

use crate::function::{
    BUFFERS, Function, NEEDS_RESET, QUEUE_SIZE, RUNNING, ring, write_descriptor,
};
use crate::raw::{self, ARENA, ARENA_BYTES, Random};
use core::hint::spin_loop;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const RAM_END: u64 = ARENA + ARENA_BYTES + 0x10_0000;
/// Addresses that no buffer and no ring should have.
const NOWHERE: [u64; 12] = [
    0,
    1,
    RAM_END - 1,
    RAM_END - 16,
    RAM_END,
    0xC010_0000,
    0xE000_0000,
    0xFEE0_0000,
    0xFFFF_FFFF,
    1 << 32,
    u64::MAX - 15,
    u64::MAX,
];
/// The first page: nothing is there.
const LOW_BYTES: u64 = 0x1000;
const LENGTHS: [u64; 8] = [0, 1, 15, 16, 512, 0xFFFF, 0x7FFF_FFFF, 0xFFFF_FFFF];
const ROUNDS: u32 = 150;
const KICKS: u32 = 5_000;
const RESETS: u32 = 100;
/// How long an attack looks whether the device does something with what it got.
const LOOKS: u32 = 20_000;

/// Gives the device a moment for what it was told.
pub(super) fn linger(function: &Function, queue: u16, before: u16) {
    for _ in 0..LOOKS {
        if function.used(queue) != before {
            break;
        }
        spin_loop();
    }
}

fn restart_if_needed(function: &Function) {
    if function.status() != RUNNING || function.status() & NEEDS_RESET != 0 {
        function.start(1 << 32);
    }
}

/// Each part of each queue where there is no memory, not enough of it, or no alignment.
pub(crate) fn rings_out_of_range(function: &Function, random: &mut Random) {
    let queues = function.queues();
    for part in 0..3 {
        for address in NOWHERE {
            function.begin(1 << 32);
            for queue in 0..queues {
                let at = ring(queue);
                let mut parts = [at, at + 0x1000, at + 0x2000];
                parts[part] = address;
                let size = random.pick(&[0, 1, 2, 3, 16, 256, 257, 0x8000, 0xFFFF]) as u16;
                function.place(queue, size, parts);
            }
            function.set_status(RUNNING);
            (0..queues).for_each(|queue| function.kick(queue));
            function.status();
        }
    }
}

/// The parts of a queue on top of each other and of its buffers, so that the device's own writes
/// change what it reads.
pub(crate) fn rings_in_each_other(function: &Function, random: &mut Random) {
    for _ in 0..32 {
        function.begin(1 << 32);
        let at = ring(0);
        raw::fill(at, 0x4000, random.any() as u8);
        for queue in 0..function.queues() {
            let part = |random: &mut Random| at + random.below(0x40) * 16;
            function.place(queue, QUEUE_SIZE, [part(random), part(random), part(random)]);
        }
        function.set_status(RUNNING);
        (0..function.queues()).for_each(|queue| function.kick(queue));
        linger(function, 0, function.used(0));
    }
}

/// Chains of one, two and all descriptors that lead back to themselves.
pub(crate) fn looped_descriptors(function: &Function, random: &mut Random) {
    for len in [1u16, 2, 3, QUEUE_SIZE] {
        for flags in [NEXT, NEXT | WRITE] {
            function.start(1 << 32);
            for queue in 0..function.queues() {
                for index in 0..len {
                    let address = BUFFERS + random.below(64) * 512;
                    function.describe(queue, index, (address, 512, flags, (index + 1) % len));
                }
                for _ in 0..QUEUE_SIZE {
                    function.offer(queue, random.below(u64::from(len)) as u16);
                }
                function.kick(queue);
                linger(function, queue, 0);
            }
        }
    }
}

fn random_descriptor(random: &mut Random) -> (u64, u32, u16, u16) {
    let address = match random.below(4) {
        0 => random.pick(&NOWHERE),
        1 => random.any(),
        _ => BUFFERS + random.below(0x10_0000),
    };
    let mut len = random.pick(&LENGTHS) as u32;
    if address < LOW_BYTES {
        // Behind it lies what this guest itself needs: a device that fills what it gets would end it.
        len = len.min((LOW_BYTES - address) as u32);
    }
    (address, len, random.below(16) as u16, random.below(20) as u16)
}

/// Tables of anything, offered from any head.
pub(crate) fn random_descriptors(function: &Function, random: &mut Random) {
    for _ in 0..ROUNDS {
        restart_if_needed(function);
        for queue in 0..function.queues() {
            let before = function.used(queue);
            (0..QUEUE_SIZE)
                .for_each(|index| function.describe(queue, index, random_descriptor(random)));
            for _ in 0..random.below(4) {
                function.offer(queue, random.below(20) as u16);
            }
            function.kick(queue);
            linger(function, queue, before);
        }
    }
}

/// Indirect tables in indirect tables, of no length, of every length, outside of memory.
pub(crate) fn indirect_tables(function: &Function, random: &mut Random) {
    for indirect in [1u64 << 32, 1 << 32 | 1 << 28] {
        function.start(indirect);
        for _ in 0..ROUNDS {
            restart_if_needed(function);
            let table = BUFFERS + 0x20_0000;
            for index in 0..64 {
                let mut descriptor = random_descriptor(random);
                if random.below(4) == 0 {
                    descriptor = (table, 64 * 16, INDIRECT, 0);
                }
                write_descriptor(table + index * 16, descriptor);
            }
            let address = if random.below(4) == 0 { random.pick(&NOWHERE) } else { table };
            let len = random.pick(&[0, 1, 15, 16, 17, 1024, 0x10_0000, 0xFFFF_FFF0, 0xFFFF_FFFF]);
            let flags = INDIRECT | random.below(4) as u16;
            let before = function.used(0);
            function.describe(0, 0, (address, len as u32, flags, random.below(20) as u16));
            function.offer(0, 0);
            function.kick(0);
            linger(function, 0, before);
        }
    }
}

/// More available than a queue holds, less than there was, and any number after another.
pub(crate) fn available_index_that_lies(function: &Function, random: &mut Random) {
    for index in [QUEUE_SIZE + 1, 0x7FFF, 0x8000, 0xFFFF] {
        function.start(1 << 32);
        function.claim(0, index);
        function.kick(0);
        linger(function, 0, 0);
    }
    function.start(1 << 32);
    for _ in 0..ROUNDS {
        restart_if_needed(function);
        for queue in 0..function.queues() {
            function.claim(queue, random.any() as u16);
            function.kick(queue);
        }
    }
}

/// Requests in the right form that ask for what is not there.
pub(crate) fn requests_beyond_the_device(function: &Function, random: &mut Random) {
    const HEADER: u64 = BUFFERS + 0x30_0000;
    function.start(1 << 32);
    for _ in 0..ROUNDS {
        restart_if_needed(function);
        for word in 0..64 {
            let value = random.any() >> random.below(64);
            raw::write64(HEADER + word * 8, value);
        }
        raw::write64(HEADER, random.pick(&[0, 1, 4, 8, 11, 13, 99]) | random.below(2) << 32);
        let len = random.pick(&LENGTHS) as u32 & 0x3F_FFFF;
        let before = function.used(0);
        function.describe(0, 0, (HEADER, random.pick(&[1, 8, 15, 16, 17, 64]) as u32, NEXT, 1));
        function.describe(0, 1, (BUFFERS, len, NEXT | (random.below(2) as u16 * WRITE), 2));
        function.describe(0, 2, (HEADER + 512, random.below(3) as u32, WRITE, 0));
        function.offer(0, 0);
        function.kick(0);
        linger(function, 0, before);
    }
}

/// Doorbells without end: of no queue, of every width, with nothing to do, before the start too.
pub(crate) fn storm_of_kicks(function: &Function, random: &mut Random) {
    for running in [false, true] {
        if running {
            function.start(1 << 32);
        } else {
            function.set_status(0);
        }
        let doorbell = function.bar + u64::from(function.entry.notify);
        for kick in 0..KICKS {
            if kick % 16 == 0 {
                raw::write(doorbell + random.below(0x1000 - 8), 4, random.any());
            } else {
                raw::write(doorbell, random.pick(&[1, 2, 4, 8]), random.any());
            }
        }
    }
}

/// Resets while requests are under way, and takes the memory back at once.
pub(crate) fn resets_in_the_middle(function: &Function, random: &mut Random) {
    const HEADERS: u64 = BUFFERS + 0x30_0000;
    for _ in 0..RESETS {
        function.start(1 << 32);
        for chain in 0..QUEUE_SIZE / 3 {
            let header = HEADERS + u64::from(chain) * 64;
            let to_guest = random.below(2) as u16;
            raw::write64(header, u64::from(1 - to_guest));
            raw::write64(header + 8, random.below(1024));
            let first = chain * 3;
            function.describe(0, first, (header, 16, NEXT, first + 1));
            let data = BUFFERS + u64::from(chain) * 0x1_0000;
            function.describe(0, first + 1, (data, 0x1_0000, NEXT | (to_guest * WRITE), first + 2));
            function.describe(0, first + 2, (header + 16, 1, WRITE, 0));
            function.offer(0, first);
        }
        function.kick(0);
        (0..random.below(200)).for_each(|_| spin_loop());
        function.set_status(0);
        raw::fill(ring(0), 0x4000, random.any() as u8);
        raw::fill(HEADERS, 0x1000, random.any() as u8);
    }
}

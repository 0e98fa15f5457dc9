//! A guest that means harm: it does to its VMM what no driver does, and after each attack looks
//! whether the device still works once it is reset. Words of the command line say what it does:
//!
//! - `attack seed=N`: all attacks that a guest survives, on each device, then power-off;
//! - `die=NAME`: one of the attacks that end a guest ([`deaths`]);
//! - `neighbour`: no attack at all, but a disk that is written, read back and compared for ever.
//!
//! It is never part of the product. Start at [`attack`], then [`attacks`].
#![no_std]
#![no_main]

mod attacks;
mod deaths;
mod function;
mod raw;

use abi::boot::MARK_MAIN;
use core::sync::atomic::Ordering;
use function::{Function, REFUSALS};
use raw::Random;
use runtime::{boot, clock, cpu, interrupts, println};

/// Pause of a neighbour between two rounds, so that it leaves the processor to others.
const ROUND_MICROS: u64 = 2_000;

#[unsafe(no_mangle)]
#[unsafe(link_section = ".text.entry")]
fn guest_main() -> ! {
    cpu::mark(MARK_MAIN);
    live()
}

#[inline(never)]
fn live() -> ! {
    if boot::has_word("neighbour") {
        neighbour()
    }
    match word("die=") {
        Some(name) => deaths::die(name),
        None => attack(word("seed=").and_then(|seed| seed.parse().ok()).unwrap_or(1)),
    }
}

fn word(start: &str) -> Option<&'static str> {
    boot::command_line().split_ascii_whitespace().find_map(|word| word.strip_prefix(start))
}

/// Every attack on every device; ends with 0 where all devices work after each of them.
fn attack(seed: u64) -> ! {
    let mut random = Random::new(seed);
    for attack in attacks::ALL {
        for entry in boot::devices() {
            let function = Function::new(*entry);
            REFUSALS.store(0, Ordering::Relaxed);
            (attack.run)(&function, &mut random);
            function.status();
            let refusals = REFUSALS.load(Ordering::Relaxed);
            // A BAR on top of another one may have started the device below.
            boot::devices().iter().for_each(|other| Function::new(*other).set_status(0));
            let (name, slot, kind) = (attack.name, entry.slot, entry.virtio_type);
            match function.works(&mut random) {
                Ok(()) => {
                    println!("hostile: {name} slot {slot} type {kind} ok after {refusals} refusals")
                }
                Err(problem) => {
                    println!("hostile: {name} slot {slot} type {kind} failed: {problem}");
                    cpu::exit(1)
                }
            }
        }
    }
    println!("hostile: done");
    cpu::exit(0)
}

/// Does honest work until it is ended.
fn neighbour() -> ! {
    interrupts::open();
    let mut random = Random::new(1);
    let disk = boot::devices().iter().find(|entry| entry.virtio_type == 2).copied();
    let Some(disk) = disk.map(Function::new).filter(|disk| disk.start(1 << 32)) else {
        println!("neighbour: no disk");
        cpu::exit(1)
    };
    for round in 1u64.. {
        if let Err(problem) = disk.round_trip(&mut random, round % 64 * 8, 8) {
            println!("neighbour: round {round} failed: {problem}");
            cpu::exit(1)
        }
        println!("neighbour: round {round} ok");
        interrupts::clear();
        interrupts::halt_until(Some(clock::now().after_micros(ROUND_MICROS)));
    }
    cpu::exit(2)
}

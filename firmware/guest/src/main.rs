//! x
#![no_std]
#![no_main]
use abi::boot::MARK_MAIN;
#[unsafe(no_mangle)]
fn guest_main() -> ! {
    runtime::cpu::mark(MARK_MAIN);
    runtime::println!("trine: booted {}", env!("CARGO_PKG_VERSION"));
    runtime::interrupts::open();
    for n in 0..3 {
        runtime::interrupts::clear();
        runtime::interrupts::halt_until(Some(runtime::clock::now().after_micros(1000)));
        runtime::println!("tick {n} {}", runtime::clock::now().micros());
    }
    runtime::cpu::exit(0)
}

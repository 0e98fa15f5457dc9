//! A panic is one line on the console and exit code 101.

use crate::{cpu, println};
use core::panic::PanicInfo;

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    match info.location() {
        Some(at) => println!("trine: panic {}:{} {}", at.file(), at.line(), info.message()),
        None => println!("trine: panic ?:0 {}", info.message()),
    }
    cpu::exit(101)
}

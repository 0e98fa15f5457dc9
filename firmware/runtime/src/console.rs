//! The console: bytes into the ring of the boot parameters, then one port write for each line.

#[cfg(not(test))]
use crate::boot;
use crate::{OneThread, cpu};
use abi::boot::{ConsoleRing, PORT_CONSOLE};
use core::fmt::{self, Write};
use core::sync::atomic::Ordering;

static RING: OneThread<Option<Ring>> = OneThread::new(None);

/// The guest's end of a console ring.
struct Ring {
    shared: &'static ConsoleRing,
    bytes: *mut u8,
    capacity: u32,
    head: u32,
    published: u32,
}

impl Ring {
    /// # Safety
    /// `address` is a `ConsoleRing` followed by its `capacity` bytes, for good.
    #[cfg(not(test))]
    unsafe fn at(address: u64) -> Option<Ring> {
        // SAFETY: the caller's promise.
        let shared = unsafe { &*(address as *const ConsoleRing) };
        let capacity = shared.capacity;
        let head = shared.head.load(Ordering::Relaxed);
        let bytes = (address as usize + size_of::<ConsoleRing>()) as *mut u8;
        capacity.is_power_of_two().then_some(Ring {
            shared,
            bytes,
            capacity,
            head,
            published: head,
        })
    }

    fn push(&mut self, byte: u8) {
        if self.head.wrapping_sub(self.published) >= self.capacity {
            self.publish();
        }
        let at = (self.head & (self.capacity - 1)) as usize;
        // SAFETY: `at` is below the capacity, and the host reads only up to the published head.
        unsafe { self.bytes.add(at).write_volatile(byte) };
        self.head = self.head.wrapping_add(1);
    }

    /// The host has read everything when this returns.
    fn publish(&mut self) {
        self.shared.head.store(self.head, Ordering::Release);
        cpu::out8(PORT_CONSOLE, 0);
        self.published = self.head;
    }
}

impl Write for Ring {
    /// Control characters become blanks: a line stays one line, whatever others put into it.
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.bytes().for_each(|byte| self.push(if byte < b' ' { b' ' } else { byte }));
        Ok(())
    }
}

#[cfg(not(test))]
pub(crate) fn open() {
    let address = boot::parameters().console;
    if address != 0 {
        // SAFETY: the VMM's promise about `console`; the slot is the one thread's.
        unsafe { *RING.as_ptr() = Ring::at(address) };
    }
}

/// Prints one line; `println!` is the way to call it.
pub fn print_line(text: fmt::Arguments<'_>) {
    // SAFETY: the one thread; formatting runs no code that prints.
    if let Some(ring) = unsafe { &mut *RING.as_ptr() } {
        // Ring::write_str never fails, and a failing Display must not end the guest.
        let _ = ring.write_fmt(text);
        ring.push(b'\n');
        ring.publish();
    }
}

/// Prints one line on the console, with one exit.
#[macro_export]
macro_rules! println {
    ($($argument:tt)*) => { $crate::console::print_line(format_args!($($argument)*)) };
}

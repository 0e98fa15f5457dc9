//! Single instructions: ports, device registers, the time stamp counter.
//!
//! Device registers are reached with plain `mov`s, because each access may be decoded by the
//! host's emulator and a compiler is free to pick an exotic form for a volatile access.

use abi::boot::{PORT_BOOT_TIMER, PORT_EXIT};
use core::arch::asm;

/// Writes a byte to a port.
pub fn out8(port: u16, value: u8) {
    // SAFETY: the TSS opens the ports of `abi::boot`; none of them changes memory under us.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nostack, preserves_flags)) }
}

/// Records a boot-timer mark (`abi::boot::MARK_*`).
pub fn mark(value: u8) {
    out8(PORT_BOOT_TIMER, value);
}

/// Ends the guest with this exit code.
pub fn exit(code: u8) -> ! {
    loop {
        out8(PORT_EXIT, code);
    }
}

/// The time stamp counter.
pub fn tsc() -> u64 {
    // SAFETY: reads a counter that every x86-64 CPU has and that CR4.TSD leaves open.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// A device register window: an address outside RAM, or a test's buffer.
#[derive(Clone, Copy, Debug)]
pub struct Registers(u64);

macro_rules! access {
    ($read:ident, $write:ident, $type:ty, $load:literal, $store:literal, $class:ident) => {
        #[doc = concat!("Reads a `", stringify!($type), "` at an offset.")]
        #[must_use]
        pub fn $read(self, offset: u64) -> $type {
            let value: $type;
            // SAFETY: `new`'s caller vouched for the window; the access is aligned and in it.
            unsafe {
                asm!($load, out($class) value, in(reg) self.0 + offset, options(nostack, preserves_flags));
            }
            value
        }

        #[doc = concat!("Writes a `", stringify!($type), "` at an offset.")]
        pub fn $write(self, offset: u64, value: $type) {
            // SAFETY: as for reading.
            unsafe {
                asm!($store, in(reg) self.0 + offset, in($class) value, options(nostack, preserves_flags));
            }
        }
    };
}

impl Registers {
    /// A window at an address.
    ///
    /// # Safety
    /// The address is a device's window that is mapped and covers every offset used later.
    #[must_use]
    pub const unsafe fn new(address: u64) -> Self {
        Registers(address)
    }

    /// The window's address.
    #[must_use]
    pub const fn address(self) -> u64 {
        self.0
    }

    /// The window from an offset on.
    #[must_use]
    pub const fn from(self, offset: u64) -> Self {
        Registers(self.0 + offset)
    }

    access!(read8, write8, u8, "mov {0}, byte ptr [{1}]", "mov byte ptr [{0}], {1}", reg_byte);
    access!(read16, write16, u16, "mov {0:x}, word ptr [{1}]", "mov word ptr [{0}], {1:x}", reg);
    access!(read32, write32, u32, "mov {0:e}, dword ptr [{1}]", "mov dword ptr [{0}], {1:e}", reg);
}

//! Memory and registers without manners: any address, any width, any alignment.
//!
//! All addresses are real: the VMM maps RAM and the hole one to one, and what lies nowhere is a
//! fault or an exit. Nothing here is sound for a program that minds what becomes of it; this one
//! keeps what it needs (its image, its stack) out of the addresses that it picks.

use core::arch::asm;

/// First byte of the RAM that attacks write in: above image and heap, below 32 MiB.
pub(crate) const ARENA: u64 = 0x100_0000;
/// Bytes of it.
pub(crate) const ARENA_BYTES: u64 = 0xF0_0000;

macro_rules! access {
    ($read:ident, $write:ident, $type:ty, $load:literal, $store:literal, $class:ident) => {
        #[doc = concat!("Reads a `", stringify!($type), "`.")]
        pub(crate) fn $read(address: u64) -> $type {
            let value: $type;
            // SAFETY: a read of RAM or of a device's register; see the head of this file.
            unsafe { asm!($load, out($class) value, in(reg) address, options(nostack, preserves_flags)) };
            value
        }

        #[doc = concat!("Writes a `", stringify!($type), "`.")]
        pub(crate) fn $write(address: u64, value: $type) {
            // SAFETY: the callers pick addresses in the arena or outside of RAM.
            unsafe { asm!($store, in(reg) address, in($class) value, options(nostack, preserves_flags)) };
        }
    };
}

access!(read8, write8, u8, "mov {0}, byte ptr [{1}]", "mov byte ptr [{0}], {1}", reg_byte);
access!(read16, write16, u16, "mov {0:x}, word ptr [{1}]", "mov word ptr [{0}], {1:x}", reg);
access!(read32, write32, u32, "mov {0:e}, dword ptr [{1}]", "mov dword ptr [{0}], {1:e}", reg);
access!(read64, write64, u64, "mov {0}, qword ptr [{1}]", "mov qword ptr [{0}], {1}", reg);

/// Reads 1, 2, 4 or 8 bytes.
pub(crate) fn read(address: u64, width: u64) -> u64 {
    match width {
        1 => u64::from(read8(address)),
        2 => u64::from(read16(address)),
        4 => u64::from(read32(address)),
        _ => read64(address),
    }
}

/// Writes 1, 2, 4 or 8 bytes.
pub(crate) fn write(address: u64, width: u64, value: u64) {
    match width {
        1 => write8(address, value as u8),
        2 => write16(address, value as u16),
        4 => write32(address, value as u32),
        _ => write64(address, value),
    }
}

/// Fills RAM with a byte.
pub(crate) fn fill(address: u64, bytes: u64, value: u8) {
    // SAFETY: as for `write8`; the direction flag is clear.
    unsafe {
        asm!("rep stosb", inout("rdi") address => _, inout("rcx") bytes => _, in("al") value, options(nostack));
    }
}

/// Everything written before is seen before what is written after.
pub(crate) fn fence() {
    core::sync::atomic::fence(core::sync::atomic::Ordering::SeqCst);
}

/// Writes a port with 1, 2 or 4 bytes.
pub(crate) fn port_write(port: u16, width: u64, value: u32) {
    // SAFETY: ports change no memory of this guest.
    unsafe {
        match width {
            1 => asm!("out dx, al", in("dx") port, in("al") value as u8, options(nostack)),
            2 => asm!("out dx, ax", in("dx") port, in("ax") value as u16, options(nostack)),
            _ => asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack)),
        }
    }
}

/// Reads a port with 1, 2 or 4 bytes.
pub(crate) fn port_read(port: u16, width: u64) -> u32 {
    let value: u32;
    // SAFETY: as for writing.
    unsafe {
        match width {
            1 => asm!("xor eax, eax", "in al, dx", in("dx") port, out("eax") value),
            2 => asm!("xor eax, eax", "in ax, dx", in("dx") port, out("eax") value),
            _ => asm!("in eax, dx", in("dx") port, out("eax") value),
        }
    }
    value
}

/// Random numbers that a seed decides (xorshift64).
pub(crate) struct Random(u64);

impl Random {
    /// Numbers of this seed.
    pub(crate) fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// Any number.
    pub(crate) fn any(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A number below `end`.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        (self.any() >> 8) % end.max(1)
    }

    /// One of these.
    pub(crate) fn pick(&mut self, of: &[u64]) -> u64 {
        of[self.below(of.len() as u64) as usize]
    }
}

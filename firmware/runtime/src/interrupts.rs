//! Interrupts leave a note; the main loop reads it. Nothing else ever happens in one.
//!
//! # Halting without lost wake-ups
//! The loop calls [`clear`], looks at every device, asks each for an interrupt, looks once more
//! and calls [`halt_until`]. An interrupt after `clear` leaves a note, and the CPL0 stub halts
//! only where there is none, with `sti; hlt` as the last word.

use crate::clock::{self, Instant};
use crate::cpu;
use core::arch::asm;
use core::sync::atomic::{AtomicU32, Ordering};

/// Set by every interrupt.
pub(crate) static NOTE: AtomicU32 = AtomicU32::new(0);
/// Set by the hot-plug controller's interrupt.
pub(crate) static HOTPLUG_NOTE: AtomicU32 = AtomicU32::new(0);

/// Vector of every virtio device's MSI-X entry.
pub const DEVICE_VECTOR: u8 = 0x31;
/// Address of a message for APIC id 0, fixed delivery.
pub const MESSAGE_ADDRESS: u32 = 0xFEE0_0000;

const TIMER_VECTOR: u8 = 0x40;
const SPURIOUS_VECTOR: u8 = 0xFF;

#[cfg(not(test))]
mod gates {
    use super::{DEVICE_VECTOR, SPURIOUS_VECTOR, TIMER_VECTOR};
    use abi::boot::HOTPLUG_VECTOR;

    unsafe extern "C" {
        static mut interrupt_gates: [[u64; 2]; 256];
        fn supervisor_call();
        fn interrupt_hotplug();
        fn interrupt_any();
        fn interrupt_spurious();
        fn fault_stubs();
    }

    const KERNEL_CODE: u64 = 0x08;
    const PRESENT_INTERRUPT_GATE: u64 = 0x8E;
    const OPEN_TO_CPL3: u64 = 0x60;
    const FAULT_VECTORS: usize = 32;
    const FAULT_STUB_BYTES: usize = 16;
    const BREAKPOINT: usize = 3;

    fn gate(handler: usize, stack: u64, kind: u64) -> [u64; 2] {
        let handler = handler as u64;
        let low = (handler & 0xFFFF)
            | KERNEL_CODE << 16
            | stack << 32
            | kind << 40
            | (handler >> 16 & 0xFFFF) << 48;
        [low, handler >> 32]
    }

    /// Writes the gates. It runs at CPL3, where it costs nothing; the stub has loaded the table.
    pub(super) fn fill() {
        let stubs = fault_stubs as *const () as usize;
        for vector in 0..FAULT_VECTORS {
            set(vector, gate(stubs + vector * FAULT_STUB_BYTES, 0, PRESENT_INTERRUPT_GATE));
        }
        let call = supervisor_call as *const () as usize;
        set(BREAKPOINT, gate(call, 0, PRESENT_INTERRUPT_GATE | OPEN_TO_CPL3));
        let any = gate(interrupt_any as *const () as usize, 1, PRESENT_INTERRUPT_GATE);
        set(DEVICE_VECTOR as usize, any);
        set(TIMER_VECTOR as usize, any);
        let hotplug = interrupt_hotplug as *const () as usize;
        set(HOTPLUG_VECTOR as usize, gate(hotplug, 1, PRESENT_INTERRUPT_GATE));
        let spurious = interrupt_spurious as *const () as usize;
        set(SPURIOUS_VECTOR as usize, gate(spurious, 1, PRESENT_INTERRUPT_GATE));
    }

    fn set(vector: usize, gate: [u64; 2]) {
        // SAFETY: a static of this file's assembly that only the CPU reads; vector is below 256.
        unsafe { (&raw mut interrupt_gates).cast::<[u64; 2]>().add(vector).write_volatile(gate) };
    }
}

const CALL_HALT: u64 = 0;
const CALL_WRMSR: u64 = 1;

fn write_msr(msr: u32, value: u64) {
    // SAFETY: the stub runs `wrmsr` and changes nothing else; only this file picks MSRs.
    unsafe {
        asm!("int3", in("rdi") CALL_WRMSR, in("ecx") msr, in("eax") value as u32, in("edx") (value >> 32) as u32);
    }
}

/// Opens the interrupt gates, the local APIC (x2APIC) and its timer. Without it nothing wakes a
/// halted guest, and a fault ends it without a word.
pub fn open() {
    #[cfg(not(test))]
    gates::fill();
    const APIC_BASE: u32 = 0x1B;
    const SPURIOUS: u32 = 0x80F;
    const TIMER: u32 = 0x832;
    const TIMER_TSC_DEADLINE: u64 = 1 << 18;
    // Address 0xFEE00000, bootstrap processor, enabled, x2APIC.
    write_msr(APIC_BASE, 0xFEE0_0D00);
    write_msr(SPURIOUS, 1 << 8 | u64::from(SPURIOUS_VECTOR));
    write_msr(TIMER, TIMER_TSC_DEADLINE | u64::from(TIMER_VECTOR));
}

/// Forgets earlier interrupts; call it before looking at the devices.
pub fn clear() {
    NOTE.store(0, Ordering::SeqCst);
}

/// Has the hot-plug controller called since the last time this was asked?
pub fn take_hotplug() -> bool {
    HOTPLUG_NOTE.load(Ordering::Relaxed) != 0 && HOTPLUG_NOTE.swap(0, Ordering::SeqCst) != 0
}

/// Halts until an interrupt or the deadline, or not at all where a note is left already.
pub fn halt_until(deadline: Option<Instant>) {
    let ticks = deadline.map_or(0, clock::tsc_at);
    if ticks != 0 && cpu::tsc() >= ticks {
        return;
    }
    // SAFETY: the stub arms the timer, halts and returns; it clobbers what is listed.
    unsafe {
        asm!("int3", in("rdi") CALL_HALT, inout("rsi") ticks => _, out("rax") _, out("rcx") _, out("rdx") _);
    }
}

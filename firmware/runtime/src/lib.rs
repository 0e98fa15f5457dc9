//! The unikernel runtime: what a guest of one program needs between the VMM and its `main`.
//!
//! The body of a guest runs at CPL3 and calls tiny CPL0 stubs (`entry`): that is full speed on
//! a KVM that interprets CPL0, and right on every other. There is one vCPU, one thread, no
//! preemption: interrupts only leave a note that the main loop reads ([`interrupts`]).
//!
//! It must never depend on `std`, probe for hardware (the boot parameters list it), or use
//! `cpuid`, `cli`, `sti`, `syscall` or `int n` at CPL3.
//!
//! Start at [`start`]: it is what `_start` reaches, and it calls the guest's `guest_main`.
#![cfg_attr(not(test), no_std)]

extern crate alloc;

pub mod boot;
pub mod clock;
pub mod console;
pub mod cpu;
#[cfg(not(test))]
mod entry;
pub mod hotplug;
pub mod interrupts;
pub mod memory;
#[cfg(not(test))]
mod memory_functions;
#[cfg(not(test))]
mod panic;
pub mod virtio;

#[cfg(not(test))]
pub use entry::start;

/// A value that only the one thread of the guest touches.
pub(crate) struct OneThread<T>(core::cell::UnsafeCell<T>);

// SAFETY: a guest has one vCPU and no preemption; interrupt stubs touch only the atomics of
// `interrupts`. So no two threads ever exist to share the value.
unsafe impl<T> Sync for OneThread<T> {}

impl<T> OneThread<T> {
    pub(crate) const fn new(value: T) -> Self {
        OneThread(core::cell::UnsafeCell::new(value))
    }

    pub(crate) fn as_ptr(&self) -> *mut T {
        self.0.get()
    }
}

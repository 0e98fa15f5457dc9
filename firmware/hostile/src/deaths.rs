//! What ends the guest that does it, and nobody else. Each says what it is about to do; the test
//! knows how each must end.

use crate::function::Function;
use crate::raw;
use abi::boot::{PCI_ECAM_START, PCI_HOLE_START};
use core::arch::asm;
use runtime::{boot, cpu, println};

/// Ends this guest in the named way; one that goes on says so and powers off.
pub(crate) fn die(name: &str) -> ! {
    println!("hostile: now {name}");
    match name {
        "run-nowhere" => run_at(PCI_HOLE_START + 0x1000_0000),
        "run-registers" => run_at(boot::devices().first().map_or(PCI_ECAM_START, |it| it.bar)),
        "run-configuration" => run_at(PCI_ECAM_START),
        "wipe" => wipe(),
        "stack-nowhere" => stack_nowhere(),
        "exotic" => exotic(),
        "nmi" => message(4 << 8),
        "init" => message(5 << 8),
        "smi" => message(2 << 8),
        "hypercalls" => hypercalls(),
        "spin" => loop {
            core::hint::spin_loop();
        },
        _ => println!("hostile: nobody knows how to do that"),
    }
    println!("hostile: still here");
    cpu::exit(0)
}

/// Takes instructions from where there is no memory.
fn run_at(address: u64) {
    // SAFETY: nothing is safe about it, which is the point; it does not come back.
    unsafe { asm!("jmp {0}", in(reg) address, options(noreturn)) }
}

/// Clears all memory below this guest's own code, page tables and descriptor tables with it.
fn wipe() {
    raw::fill(0, 0x10_0000, 0);
    // Pages that no translation is cached for.
    for page in 0..4096u64 {
        raw::read64(PCI_HOLE_START + page * 0x2_0000);
        raw::read64(page * 0x2000);
    }
}

/// Has no memory where an exception would be pushed, and causes one.
fn stack_nowhere() {
    // SAFETY: as for `run_at`.
    unsafe { asm!("mov rsp, {0}", "push rax", "ud2", in(reg) 1u64 << 47, options(noreturn)) }
}

/// Instructions on registers that no driver uses: strings, locks, vectors, a stack.
fn exotic() {
    let bar = boot::devices().first().map_or(PCI_ECAM_START, |it| it.bar);
    // SAFETY: they read and write device registers and their own stack pointer, restored at once.
    unsafe {
        asm!("rep movsb", inout("rsi") bar => _, inout("rdi") bar + 0x2000 => _, inout("rcx") 64u64 => _);
        asm!("rep stosd", inout("rdi") bar + 0x3000 => _, inout("rcx") 8u64 => _, in("eax") 0);
        asm!("lock xadd dword ptr [{0}], {1:e}", in(reg) bar, inout(reg) 1u32 => _);
        asm!("xchg qword ptr [{0}], {1}", in(reg) bar + 8, inout(reg) u64::MAX => _);
        asm!("lock cmpxchg qword ptr [{0}], {1}", in(reg) bar + 0x2000, in(reg) 7u64, inout("rax") 0u64 => _);
        asm!("movups xmm0, xmmword ptr [{0}]", "movups xmmword ptr [{0}], xmm0", in(reg) bar + 0x2008, out("xmm0") _);
        asm!("mov {0}, rsp", "mov rsp, {1}", "push 5", "pop {1}", "mov rsp, {0}",
            out(reg) _, inout(reg) bar + 0x2040 => _);
    }
}

/// A message to itself that is not an interrupt.
fn message(delivery_mode: u32) {
    let Some(entry) = boot::devices().first() else { return };
    let function = Function::new(*entry);
    let table = function.bar + u64::from(entry.msix_table);
    raw::write32(table, 0xFEE0_0000);
    raw::write32(table + 4, 0);
    raw::write32(table + 8, delivery_mode);
    raw::write32(table + 12, 0);
    function.begin(1 << 32);
    // Changes of the configuration are told by it, and a queue that can't be is one.
    function.put(0x10, 2, 0);
    function.set_status(15);
    (0..2_000_000).for_each(|_| core::hint::spin_loop());
}

/// Calls the hypervisor with whatever is in the registers.
fn hypercalls() {
    for call in 0..64u64 {
        // SAFETY: a call that the hypervisor refuses changes RAX only.
        unsafe {
            asm!("push rbx", "xor ebx, ebx", ".byte 0x0f, 0x01, 0xc1", "pop rbx", inout("rax") call => _, in("rcx") call, in("rdx") u64::MAX);
        }
    }
}

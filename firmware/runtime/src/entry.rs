//! From the VMM's jump to the guest's `main`: everything that runs at CPL0 is in this file.
//!
//! ```text
//! _start (CPL0) ── own GDT, IDT, TSS ── iretq ──▶ start (CPL3) ──▶ guest_main
//!                                                    │ int3 (rdi = call)
//!                           supervisor_call (CPL0) ◀─┘  wrmsr, or arm the timer and halt
//! interrupt_* (CPL0, own stack): leave a note, end of interrupt, iretq
//! fault_* (CPL0, from `interrupts::open` on): write down what happened, continue at CPL3 in `fault`
//! ```
//! Stubs are as short as can be and touch no SSE register: a KVM without hardware support
//! interprets them. Interrupts have a stack of their own (IST1), because they may arrive while
//! `supervisor_call` halts on the stack that calls use.

use crate::{boot, clock, console, cpu, interrupts, memory};
use abi::boot::BootParams;
use core::arch::global_asm;

/// Stack of `guest_main`.
const STACK_BYTES: usize = 128 << 10;

global_asm!(
    r#"
    .section .text.entry, "ax"
    .global _start
_start:
    lea rsp, [rip + call_stack_top]
    lea rax, [rip + tss]
    mov word ptr [rip + tss_descriptor + 2], ax
    shr eax, 16
    mov byte ptr [rip + tss_descriptor + 4], al
    mov byte ptr [rip + tss_descriptor + 7], ah
    lgdt [rip + gdt_pointer]
    lidt [rip + idt_pointer]
    mov eax, 0x28
    ltr ax
    push 0x1b
    lea rax, [rip + guest_stack_top - 8]
    push rax
    push 0x202
    push 0x23
    lea rax, [rip + {start}]
    push rax
    iretq

    .section .text, "ax"
    .global supervisor_call
    // rdi = 0: rsi = TSC deadline (0 = none); halts unless a note is left.
    // rdi = 1: wrmsr with rcx, rax, rdx as that instruction takes them.
supervisor_call:
    test edi, edi
    jnz 2f
    mov ecx, 0x6e0
    mov eax, esi
    mov rdx, rsi
    shr rdx, 32
    wrmsr
    cmp dword ptr [rip + {note}], 0
    jne 1f
    sti
    hlt
    cli
1:  iretq
2:  wrmsr
    iretq

    .global interrupt_hotplug
interrupt_hotplug:
    mov dword ptr [rip + {hotplug_note}], 1
    .global interrupt_any
interrupt_any:
    mov dword ptr [rip + {note}], 1
    push rax
    push rcx
    push rdx
    mov ecx, 0x80b
    xor eax, eax
    xor edx, edx
    wrmsr
    pop rdx
    pop rcx
    pop rax
    .global interrupt_spurious
interrupt_spurious:
    iretq

    .macro fault_stub vector, has_code
    .balign 16
    .if \has_code == 0
    push 0
    .endif
    push \vector
    jmp fault_common
    .endm

    .balign 16
    .global fault_stubs
fault_stubs:
    .irp vector, 0,1,2,3,4,5,6,7
    fault_stub \vector, 0
    .endr
    fault_stub 8, 1
    fault_stub 9, 0
    .irp vector, 10,11,12,13,14
    fault_stub \vector, 1
    .endr
    .irp vector, 15,16
    fault_stub \vector, 0
    .endr
    fault_stub 17, 1
    .irp vector, 18,19,20
    fault_stub \vector, 0
    .endr
    fault_stub 21, 1
    .irp vector, 22,23,24,25,26,27,28
    fault_stub \vector, 0
    .endr
    .irp vector, 29,30
    fault_stub \vector, 1
    .endr
    fault_stub 31, 0

fault_common:
    pop qword ptr [rip + fault_record]
    pop qword ptr [rip + fault_record + 8]
    mov rax, [rsp]
    mov [rip + fault_record + 16], rax
    mov rax, [rsp + 24]
    mov [rip + fault_record + 24], rax
    mov rax, cr2
    mov [rip + fault_record + 32], rax
    lea rax, [rip + {fault}]
    mov [rsp], rax
    mov qword ptr [rsp + 8], 0x23
    mov qword ptr [rsp + 16], 0x2
    lea rax, [rip + fault_stack_top - 8]
    mov [rsp + 24], rax
    mov qword ptr [rsp + 32], 0x1b
    iretq

    .section .data, "aw"
    .balign 16
gdt:
    .quad 0
    .quad 0x00af9b000000ffff    // 0x08 code, CPL0
    .quad 0x00cf93000000ffff    // 0x10 data, CPL0
    .quad 0x00cff3000000ffff    // 0x18 data, CPL3
    .quad 0x00affb000000ffff    // 0x20 code, CPL3
tss_descriptor:                 // 0x28 TSS; its base is filled in by _start
    .word tss_end - tss - 1
    .word 0
    .byte 0, 0x89, 0, 0
    .quad 0
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt
idt_pointer:
    .word 256 * 16 - 1
    .quad interrupt_gates
    .balign 8
    .long 0
tss:                            // preceded by 4 bytes, so that its quads are aligned
    .long 0
    .quad call_stack_top, 0, 0  // rsp0..2
    .quad 0
    .quad interrupt_stack_top, 0, 0, 0, 0, 0, 0
    .quad 0
    .word 0
    .word tss_ports - tss
tss_ports:
    .zero 512                   // ports 0 to 0xfff are open to CPL3
    .byte 0xff
tss_end:

    // Beside GDT and TSS, so that the first instructions touch one page of data.
    .zero 1024
    .balign 16
call_stack_top:
    .zero 1024
interrupt_stack_top:

    .section .stacks, "aw", @nobits
    .balign 4096
    .global interrupt_gates
interrupt_gates:
    .zero 4096
    .global fault_record
fault_record:
    .zero 40
    .balign 16
    .zero 8192
fault_stack_top:
    .balign 4096
    .zero {stack}
guest_stack_top:
"#,
    start = sym start,
    fault = sym fault,
    note = sym interrupts::NOTE,
    hotplug_note = sym interrupts::HOTPLUG_NOTE,
    stack = const STACK_BYTES,
);

unsafe extern "Rust" {
    /// The guest's program.
    safe fn guest_main() -> !;
}

unsafe extern "C" {
    static fault_record: [u64; 5];
}

/// First code at CPL3: checks the boot parameters, opens console and heap, runs `guest_main`.
///
/// # Safety
/// Called once, by `_start`, with what the VMM left in `rdi`.
#[unsafe(link_section = ".text.entry")]
pub unsafe extern "C" fn start(parameters: *const BootParams) -> ! {
    // SAFETY: the caller's promise is the one that `accept` asks for.
    if !unsafe { boot::accept(parameters) } {
        cpu::exit(100);
    }
    console::open();
    memory::open();
    guest_main()
}

/// Continuation of a fault: says what and where, and ends the guest.
extern "C" fn fault() -> ! {
    // SAFETY: written by the stub just before, and a second fault only rewrites it.
    let [vector, code, rip, rsp, address] = unsafe { fault_record };
    crate::println!(
        "trine: fault {vector} code {code:#x} at {rip:#x} stack {rsp:#x} address {address:#x} after {} us",
        clock::now().micros()
    );
    cpu::exit(102)
}

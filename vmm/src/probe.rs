//! The smallest guest: it marks its `main`, prints one line and powers off. Launch benchmarks and
//! tests use it where no other image is at hand.

use abi::boot::{MARK_MAIN, PORT_BOOT_TIMER, PORT_CONSOLE, PORT_EXIT};

/// Where it is loaded.
const START: u32 = 0x10_0000;
const HEADERS: usize = 64 + 56;
/// Offset of `BootParams::console`.
const CONSOLE_AT: u8 = core::mem::offset_of!(abi::boot::BootParams, console) as u8;
/// What it prints.
pub const LINE: &str = "trine: probe\n";

/// A 64-bit ELF that writes [`MARK_MAIN`], then (`talk`) [`LINE`] on the console, and ends with `code`.
pub fn image(talk: bool, code: u8) -> Vec<u8> {
    let mut text = Vec::new();
    out(&mut text, PORT_BOOT_TIMER, MARK_MAIN);
    if talk {
        print(&mut text);
    }
    out(&mut text, PORT_EXIT, code);
    text.push(0xF4); // hlt
    elf(&text)
}

/// A guest that marks its `main` and then spins for ever.
pub fn spinning_image() -> Vec<u8> {
    let mut text = Vec::new();
    out(&mut text, PORT_BOOT_TIMER, MARK_MAIN);
    text.extend_from_slice(&[0xEB, 0xFE]); // jmp to itself
    elf(&text)
}

/// A guest whose first instruction is undefined: without an IDT, a triple fault.
pub fn crashing_image() -> Vec<u8> {
    elf(&[0x0F, 0x0B])
}

/// mov dx, port; mov al, value; out dx, al
fn out(text: &mut Vec<u8>, port: u16, value: u8) {
    let port = port.to_le_bytes();
    text.extend_from_slice(&[0x66, 0xBA, port[0], port[1], 0xB0, value, 0xEE]);
}

/// Stores the line in the ring at `BootParams::console` (whose address is in `rdi`) and kicks.
fn print(text: &mut Vec<u8>) {
    text.extend_from_slice(&[0x48, 0x8B, 0x5F, CONSOLE_AT]); // mov rbx, [rdi + console]
    for (index, byte) in LINE.bytes().enumerate() {
        text.extend_from_slice(&[0xC6, 0x43, 16 + index as u8, byte]); // mov byte [rbx + 16 + index], byte
    }
    text.extend_from_slice(&[0xC7, 0x03, LINE.len() as u8, 0, 0, 0]); // mov dword [rbx], length
    out(text, PORT_CONSOLE, 0);
}

/// A 64-bit ELF whose code is `text`.
pub fn elf(text: &[u8]) -> Vec<u8> {
    let mut image = Vec::with_capacity(HEADERS + text.len());
    let entry = u64::from(START) + HEADERS as u64;
    let size = (HEADERS + text.len()) as u64;
    image.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    image.extend_from_slice(&[2, 0, 62, 0, 1, 0, 0, 0]); // ET_EXEC, x86-64, version 1
    image.extend_from_slice(&entry.to_le_bytes());
    image.extend_from_slice(&64u64.to_le_bytes()); // program headers
    image.extend_from_slice(&[0; 12]); // no sections, no flags
    for half in [64u16, 56, 1, 0, 0, 0] {
        image.extend_from_slice(&half.to_le_bytes());
    }
    image.extend_from_slice(&[1, 0, 0, 0, 7, 0, 0, 0]); // PT_LOAD, read, write, execute
    for value in [0, u64::from(START), u64::from(START), size, size, 4096] {
        image.extend_from_slice(&value.to_le_bytes());
    }
    image.extend_from_slice(text);
    image
}

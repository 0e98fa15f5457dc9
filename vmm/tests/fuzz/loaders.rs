//! Loaders: any file is refused or loaded inside RAM, above what is the VMM's.

use crate::world::{MEMORY_MIB, RAM_BYTES};
use fuzz::{Source, Target, check};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use std::fs::File;
use std::os::unix::fs::FileExt;
use vmm::machine::boot::{self, IMAGE_START, Loaded, Source as Boot};
use vmm::machine::memory::{self, Ram};

#[test]
fn loaders() {
    let ram = memory::map(MEMORY_MIB).unwrap();
    let kernel = File::from(memfd_create("kernel", MemfdFlags::CLOEXEC).unwrap());
    let initrd = File::from(memfd_create("initrd", MemfdFlags::CLOEXEC).unwrap());
    initrd.write_all_at(&[7; 5000], 0).unwrap();
    let run = &mut |source: &mut Source<'_>| load(&ram, &kernel, &initrd, source);
    let samples = vec![with_choice(elf(&[])), with_choice(elf(&[note()])), with_choice(bzimage())];
    check(Target { name: "loaders", inputs: 10_000, samples, run });
}

fn load(ram: &Ram, kernel: &File, initrd: &File, source: &mut Source<'_>) {
    let with_initrd = source.byte() & 3 == 1;
    let cmdline = "x".repeat(usize::from(source.byte()) * 2);
    let bytes = source.rest();
    ftruncate(kernel, 0).unwrap();
    kernel.write_all_at(bytes, 0).unwrap();
    let initrd = with_initrd.then_some(initrd);
    let boot = Boot { kernel, initrd, cmdline: &cmdline };
    match boot::load(ram, MEMORY_MIB, &boot) {
        Err(error) => assert!(!error.to_string().is_empty()),
        Ok(Loaded::Unikernel(image)) => assert!((IMAGE_START..RAM_BYTES).contains(&image.entry)),
        Ok(Loaded::Linux64 { zero_page: told, .. } | Loaded::Pvh { start_info: told, .. }) => {
            assert!(told < RAM_BYTES);
        }
    }
}

/// A sample without initrd and command line.
fn with_choice(mut file: Vec<u8>) -> Vec<u8> {
    file.splice(0..0, [0, 0]);
    file
}

/// A program header: type, offset, address, bytes in the file, bytes in memory.
type Header = (u32, u64, u64, u64, u64);

fn note() -> Header {
    (4, 64 + 2 * 56, 0, 20, 20)
}

/// An ELF of one segment, and of more headers; a PVH note follows them.
fn elf(more: &[Header]) -> Vec<u8> {
    let mut bytes = vec![0u8; 64];
    bytes[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    (bytes[16], bytes[18], bytes[32], bytes[54]) = (2, 62, 64, 56);
    bytes[24..32].copy_from_slice(&IMAGE_START.to_le_bytes());
    bytes[56] = 1 + more.len() as u8;
    for (kind, offset, address, in_file, in_memory) in
        [(1, 0, IMAGE_START, 64, 0x1000)].iter().chain(more)
    {
        let mut header = [0u8; 56];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..16].copy_from_slice(&u64::to_le_bytes(*offset));
        header[24..32].copy_from_slice(&u64::to_le_bytes(*address));
        header[32..40].copy_from_slice(&u64::to_le_bytes(*in_file));
        header[40..48].copy_from_slice(&u64::to_le_bytes(*in_memory));
        bytes.extend_from_slice(&header);
    }
    for word in [4, 4, 18, u32::from_le_bytes(*b"Xen\0"), IMAGE_START as u32] {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes
}

/// A bzImage with its 64-bit entry (boot.rst, "The Real-Mode Kernel Header").
fn bzimage() -> Vec<u8> {
    let mut bytes = vec![0u8; 1024 + 2048];
    let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
    put(0x1F1, &[1]);
    put(0x1FE, &[0x55, 0xAA, 0xEB, 0x66]);
    put(0x202, b"HdrS");
    put(0x206, &0x020Fu16.to_le_bytes());
    put(0x211, &[1]);
    put(0x214, &0x10_0000u32.to_le_bytes());
    put(0x22C, &0x7FFF_FFFFu32.to_le_bytes());
    put(0x230, &0x20_0000u32.to_le_bytes());
    put(0x234, &[1, 21, 1, 0]);
    put(0x238, &2047u32.to_le_bytes());
    put(0x258, &0x10_0000u64.to_le_bytes());
    put(0x260, &0x20_0000u32.to_le_bytes());
    bytes
}

#[test]
fn samples_of_the_loaders_load() {
    let ram = memory::map(MEMORY_MIB).unwrap();
    for sample in [elf(&[]), elf(&[note()]), bzimage()] {
        let kernel = File::from(memfd_create("kernel", MemfdFlags::CLOEXEC).unwrap());
        kernel.write_all_at(&sample, 0).unwrap();
        let boot = Boot { kernel: &kernel, initrd: None, cmdline: "" };
        boot::load(&ram, MEMORY_MIB, &boot).unwrap();
    }
}

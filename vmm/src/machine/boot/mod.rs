//! From the files of a boot source to a guest that can take its first instruction.
//!
//! What a kernel is, its file says: a Linux `bzImage` by the magic of its setup header, a Linux
//! `vmlinux` by its PVH entry note, and any other ELF is a unikernel (`abi::boot`).
//!
//! Everything here runs inside the sandbox: a tenant wrote these files.

pub mod elf;
pub mod linux;
mod positioned;
pub mod unikernel;

use super::MachineError;
use super::memory::{self, Ram};
use std::fs::File;
use std::os::unix::fs::FileExt;
use vm_memory::{Bytes, GuestAddress};

/// Longest command line, bytes.
pub const CMDLINE_BYTES_MAX: usize = 4096;
/// First address an image may use: the VMM's own data and the holes of a PC lie below.
pub const IMAGE_START: u64 = 0x10_0000;
/// Bytes of a file in which all headers must lie.
const HEAD_BYTES: usize = 4096;

const GIB: u64 = 1 << 30;
/// Root of the page tables.
pub const PAGE_TABLE_ROOT: u64 = 0x1_0000;
const PAGE_DIRECTORY_POINTERS: u64 = 0x1_1000;
const PAGE_DIRECTORIES: u64 = 0x1_2000;
const PAGE_PRESENT_WRITE_USER: u64 = 0b111;
const PAGE_LARGE: u64 = 1 << 7;

/// What is booted: open files, and the command line.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    /// The kernel.
    pub kernel: &'a File,
    /// Linux's first file system.
    pub initrd: Option<&'a File>,
    /// The command line.
    pub cmdline: &'a str,
}

/// A kernel in guest memory, by what it expects at its first instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loaded {
    /// As `abi::boot` states it.
    Unikernel(unikernel::Image),
    /// Linux's 64-bit boot protocol: the entry, and the address of its zero page.
    Linux64 {
        /// First instruction.
        entry: u64,
        /// Zero page.
        zero_page: u64,
    },
    /// PVH: 32-bit mode without paging.
    Pvh {
        /// First instruction.
        entry: u64,
        /// Its `hvm_start_info`.
        start_info: u64,
    },
}

/// Loads `source` into fresh (zero) memory.
pub fn load(ram: &Ram, memory_mib: u32, source: &Source<'_>) -> Result<Loaded, MachineError> {
    let head = read_head(source.kernel)?;
    if linux::is_bzimage(&head) {
        return linux::load_bzimage(ram, memory_mib, source, &head);
    }
    if !head.starts_with(b"\x7fELF") {
        let magic = head.get(..4).unwrap_or(&head);
        return Err(MachineError::Kernel(format!(
            "neither an ELF nor a Linux bzImage (it begins with {magic:02x?})"
        )));
    }
    let elf = elf::load(ram, source.kernel, &head)?;
    match elf.pvh_entry {
        Some(entry) => linux::start_pvh(ram, memory_mib, source, entry, elf.end),
        None if source.initrd.is_some() => {
            Err(MachineError::Initrd("a unikernel takes none; leave boot.initrd out".into()))
        }
        None => unikernel::check(elf).map(Loaded::Unikernel),
    }
}

/// The beginning of a file, by position: its descriptor may be shared with guests starting meanwhile.
fn read_head(file: &File) -> Result<Vec<u8>, MachineError> {
    let failed = |error| MachineError::Kernel(format!("fstat: {error}"));
    let size = positioned::len(file).map_err(failed)?.min(HEAD_BYTES as u64) as usize;
    let mut head = vec![0; size];
    let mut len = 0;
    while len < size {
        match file.read_at(&mut head[len..], len as u64) {
            Ok(0) => break,
            Ok(read) => len += read,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(MachineError::Kernel(format!("read: {error}"))),
        }
    }
    head.truncate(len);
    Ok(head)
}

/// Random bytes from the host.
pub(crate) fn random<const N: usize>() -> Result<[u8; N], MachineError> {
    let mut bytes = [0; N];
    // SAFETY: the buffer is ours and its length is given.
    let filled = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), N, 0) };
    if filled != N as isize {
        let error = std::io::Error::last_os_error();
        return Err(MachineError::Boot(format!("getrandom: {error}")));
    }
    Ok(bytes)
}

/// An integer in little-endian bytes; what lies beyond their end is zero.
fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u64_at(bytes, at) as u16
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u64_at(bytes, at) as u32
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let byte = |index: usize| bytes.get(at.saturating_add(index)).copied().unwrap_or(0);
    u64::from_le_bytes(std::array::from_fn(byte))
}

fn write(ram: &Ram, address: u64, bytes: &[u8]) -> Result<(), MachineError> {
    ram.write_slice(bytes, GuestAddress(address))
        .map_err(|error| MachineError::Boot(error.to_string()))
}

/// Identity-maps RAM and the PCI hole with 2 MiB pages that CPL3 may use.
fn write_page_tables(ram: &Ram, (low, high): (u64, u64)) -> Result<(), MachineError> {
    let mut pointers = Vec::new();
    let mut next = PAGE_DIRECTORIES;
    let high_start = memory::HIGH_RAM_START;
    for (start, end) in
        [(0, low), (abi::boot::PCI_HOLE_START, high_start), (high_start, high_start + high)]
    {
        let mut gib = start / GIB;
        while gib * GIB < end {
            let pages = (end - gib * GIB).min(GIB).div_ceil(2 << 20);
            let directory: Vec<u8> = (0..pages)
                .flat_map(|page| {
                    ((gib * GIB + (page << 21)) | PAGE_PRESENT_WRITE_USER | PAGE_LARGE)
                        .to_le_bytes()
                })
                .collect();
            write(ram, next, &directory)?;
            pointers.resize((gib + 1) as usize * 8, 0);
            pointers[gib as usize * 8..]
                .copy_from_slice(&(next | PAGE_PRESENT_WRITE_USER).to_le_bytes());
            next += 4096;
            gib += 1;
        }
    }
    write(ram, PAGE_DIRECTORY_POINTERS, &pointers)?;
    write(ram, PAGE_TABLE_ROOT, &(PAGE_DIRECTORY_POINTERS | PAGE_PRESENT_WRITE_USER).to_le_bytes())
}

/// Files for the tests of this folder.
#[cfg(test)]
pub(crate) fn memory_file(bytes: &[u8]) -> File {
    use std::io::Write;
    let mut file =
        File::from(rustix::fs::memfd_create("file", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
    file.write_all(bytes).unwrap();
    file
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_tables_of_the_largest_unikernel_stay_below_the_console() {
        let gibs = u64::from(unikernel::MEMORY_MIB_MAX).div_ceil(1024) + 1;
        assert!(PAGE_DIRECTORIES + gibs * 4096 <= unikernel::CONSOLE);
        let ram = memory::map(5 << 10).unwrap();
        write_page_tables(&ram, memory::split(5 << 10)).unwrap();
        let pointer: u64 = ram.read_obj(GuestAddress(PAGE_DIRECTORY_POINTERS + 5 * 8)).unwrap();
        let entry: u64 = ram.read_obj(GuestAddress(pointer & !0xfff)).unwrap();
        assert_eq!(entry, (5 * GIB) | PAGE_PRESENT_WRITE_USER | PAGE_LARGE);
        let none: u64 = ram.read_obj(GuestAddress(PAGE_DIRECTORY_POINTERS + 6 * 8)).unwrap();
        assert_eq!(none, 0);
    }

    #[test]
    fn files_that_are_no_kernel_are_refused_with_what_they_begin_with() {
        let ram = memory::map(16).unwrap();
        for (bytes, expected) in [
            (&b"#!/bin/sh\n"[..], "neither an ELF nor a Linux bzImage (it begins with [23, 21"),
            (b"", "begins with []"),
            (b"\x7fELF\x01\x01", "not a 64-bit x86 ELF"),
        ] {
            let source = Source { kernel: &memory_file(bytes), initrd: None, cmdline: "" };
            let error = load(&ram, 16, &source).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}

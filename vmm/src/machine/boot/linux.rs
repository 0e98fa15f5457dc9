//! Linux, unmodified: `bzImage` by the 64-bit boot protocol (Documentation/arch/x86/boot.rst),
//! `vmlinux` by PVH (Documentation/arch/x86 and Xen's `start_info.h`).
//!
//! | address | what |
//! |---|---|
//! | 0x6000 | PVH `hvm_start_info`, then the module list, then the memory map |
//! | 0x7000 | zero page |
//! | 0x8000 | descriptor table |
//! | 0x1_0000 … | page tables of the 64-bit entry |
//! | 0x2_0000 | command line |
//! | 0xE_0000 … 0x10_0000 | ACPI tables ([`crate::machine::acpi`]) |
//! | top of the RAM below the hole | initrd |

use super::positioned::{self, Positioned};
use super::{IMAGE_START, Loaded, Source, u16_at, u32_at, u64_at, write};
use crate::machine::acpi::{ACPI_END, ACPI_START, GENERATION_PAGE};
use crate::machine::memory::{self, HIGH_RAM_START, Ram};
use crate::machine::{MachineError, acpi};
use abi::boot::{PCI_ECAM_SIZE, PCI_ECAM_START};
use linux_loader::loader::{BzImage, KernelLoader};
use std::fs::File;
use vm_memory::{Bytes, GuestAddress};

const START_INFO: u64 = 0x6000;
const MODULES: u64 = 0x6080;
const MEMORY_MAP: u64 = 0x6100;
const ZERO_PAGE: u64 = 0x7000;
/// Descriptor table of both entries.
pub const GDT: u64 = 0x8000;
const CMDLINE: u64 = 0x2_0000;
/// End of the RAM below a PC's hole for adapters.
const LOW_RAM_END: u64 = 0xA_0000;

/// Flat segments for both entries: null, null, code, data, as Linux names them
/// (`__BOOT_CS` 0x10, `__BOOT_DS` 0x18), then a task.
const DESCRIPTORS_64: [u64; 5] =
    [0, 0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF, 0x0000_8B00_0000_0067];
const DESCRIPTORS_32: [u64; 5] =
    [0, 0, 0x00CF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF, 0x0000_8B00_0000_0067];
/// Bytes of the descriptor table.
pub const GDT_BYTES: u16 = 40;

// The setup header (boot.rst, "The Real-Mode Kernel Header") and the zero page, by offset.
const SETUP_HEADER: usize = 0x1F1;
const BOOT_FLAG: usize = 0x1FE;
const HEADER_MAGIC: usize = 0x202;
const VERSION: usize = 0x206;
const TYPE_OF_LOADER: usize = 0x210;
const LOADFLAGS: usize = 0x211;
const RAMDISK_IMAGE: usize = 0x218;
const RAMDISK_SIZE: usize = 0x21C;
const CMD_LINE_PTR: usize = 0x228;
const INITRD_ADDR_MAX: usize = 0x22C;
const XLOADFLAGS: usize = 0x236;
const CMDLINE_SIZE: usize = 0x238;
const PREF_ADDRESS: usize = 0x258;
const INIT_SIZE: usize = 0x260;
const SETUP_HEADER_END: usize = 0x26C;
const ACPI_RSDP: usize = 0x070;
const E820_ENTRIES: usize = 0x1E8;
const E820_TABLE: usize = 0x2D0;

const LOADED_HIGH: u8 = 1;
const KERNEL_64: u16 = 1;
/// Version 2.12: the first with `xloadflags`.
const VERSION_MIN: u16 = 0x20C;
const LOADER_UNDEFINED: u8 = 0xFF;
/// Offset of the 64-bit entry in the protected-mode kernel.
const ENTRY_64: u64 = 0x200;

const PVH_MAGIC: u32 = 0x336E_C578;
const PVH_VERSION: u32 = 1;

/// Whether a file that begins so is a Linux `bzImage`.
pub(crate) fn is_bzimage(head: &[u8]) -> bool {
    u16_at(head, BOOT_FLAG) == 0xAA55 && head.get(HEADER_MAGIC..HEADER_MAGIC + 4) == Some(b"HdrS")
}

/// What lies where, as both protocols number it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
enum Kind {
    Ram = 1,
    Reserved = 2,
    Acpi = 3,
    AcpiKept = 4,
}

/// The memory map: start, bytes, kind.
fn memory_map(memory_mib: u32) -> Vec<(u64, u64, Kind)> {
    let (low, high) = memory::split(memory_mib);
    let mut map = vec![
        (0, LOW_RAM_END, Kind::Ram),
        (ACPI_START, GENERATION_PAGE - ACPI_START, Kind::Acpi),
        (GENERATION_PAGE, ACPI_END - GENERATION_PAGE, Kind::AcpiKept),
        (IMAGE_START, low - IMAGE_START, Kind::Ram),
        (PCI_ECAM_START, PCI_ECAM_SIZE, Kind::Reserved),
    ];
    if high > 0 {
        map.push((HIGH_RAM_START, high, Kind::Ram));
    }
    map
}

/// Loads a `bzImage` whose first bytes are `head`.
pub(crate) fn load_bzimage(
    ram: &Ram,
    memory_mib: u32,
    source: &Source<'_>,
    head: &[u8],
) -> Result<Loaded, MachineError> {
    let refuse = |reason: &str| Err(MachineError::Kernel(reason.into()));
    let version = u16_at(head, VERSION);
    if version < VERSION_MIN {
        return refuse(&format!(
            "bzImage of boot protocol {version:#x}; {VERSION_MIN:#x} (Linux 3.8) or later is needed"
        ));
    }
    if u16_at(head, XLOADFLAGS) & KERNEL_64 == 0 {
        return refuse("a 32-bit bzImage; only 64-bit ones are booted");
    }
    let loaded = BzImage::load(ram, None, &mut Positioned::new(source.kernel, head), None)
        .map_err(|error| MachineError::Kernel(format!("bzImage loader: {error}")))?;
    let start = loaded.kernel_load.0;
    let longest = u32_at(head, CMDLINE_SIZE) as usize;
    if source.cmdline.len() > longest {
        return Err(MachineError::Boot(format!(
            "boot.cmdline: {} bytes; this kernel takes at most {longest}",
            source.cmdline.len()
        )));
    }
    // While it unpacks itself the kernel uses this much, where it was put or where it wants to be.
    let in_use = u64::from(u32_at(head, INIT_SIZE));
    let end = start.max(u64_at(head, PREF_ADDRESS)).saturating_add(in_use).max(loaded.kernel_end);
    let (low, _) = memory::split(memory_mib);
    if start < IMAGE_START || end > low {
        return refuse(&format!(
            "it needs the memory from {start:#x} to {end:#x}; this guest's ends at {low:#x} (memory_mib: {memory_mib})"
        ));
    }
    let top = u64::from(u32_at(head, INITRD_ADDR_MAX)) + 1;
    let initrd = load_initrd(ram, source.initrd, end, low.min(top))?;
    write(ram, CMDLINE, source.cmdline.as_bytes())?;
    write(ram, ZERO_PAGE, &zero_page(head, memory_mib, initrd))?;
    write(ram, GDT, &DESCRIPTORS_64.map(u64::to_le_bytes).concat())?;
    super::write_page_tables(ram, (low, 0))?;
    Ok(Loaded::Linux64 { entry: start + ENTRY_64, zero_page: ZERO_PAGE })
}

fn zero_page(head: &[u8], memory_mib: u32, initrd: (u64, u64)) -> [u8; 4096] {
    let mut page = [0; 4096];
    let mut put = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);
    // The header's length is where its jump goes (boot.rst, "Details of Header Fields").
    let header_end = head.get(0x201).map_or(0, |length| HEADER_MAGIC + usize::from(*length));
    let header_end = header_end.min(SETUP_HEADER_END);
    put(SETUP_HEADER, head.get(SETUP_HEADER..header_end).unwrap_or(&[]));
    put(TYPE_OF_LOADER, &[LOADER_UNDEFINED]);
    put(LOADFLAGS, &[LOADED_HIGH]);
    put(RAMDISK_IMAGE, &(initrd.0 as u32).to_le_bytes());
    put(RAMDISK_SIZE, &(initrd.1 as u32).to_le_bytes());
    put(CMD_LINE_PTR, &(CMDLINE as u32).to_le_bytes());
    put(ACPI_RSDP, &acpi::RSDP.to_le_bytes());
    let map = memory_map(memory_mib);
    put(E820_ENTRIES, &[map.len() as u8]);
    for (index, (start, bytes, kind)) in map.into_iter().enumerate() {
        let at = E820_TABLE + index * 20;
        put(at, &start.to_le_bytes());
        put(at + 8, &bytes.to_le_bytes());
        put(at + 16, &(kind as u32).to_le_bytes());
    }
    page
}

/// Puts an initrd below `top`, above `bottom`: its address and its length.
fn load_initrd(
    ram: &Ram,
    initrd: Option<&File>,
    bottom: u64,
    top: u64,
) -> Result<(u64, u64), MachineError> {
    let Some(file) = initrd else { return Ok((0, 0)) };
    let failed = |error: String| MachineError::Initrd(error);
    let len = positioned::len(file).map_err(|error| failed(format!("fstat: {error}")))?;
    let start = top.checked_sub(len).map_or(0, |start| start & !4095);
    if len == 0 || start < bottom {
        return Err(failed(format!(
            "{len} bytes do not fit between the kernel's end at {bottom:#x} and {top:#x}; raise memory_mib or make it smaller"
        )));
    }
    ram.read_exact_volatile_from(
        GuestAddress(start),
        &mut Positioned::new(file, &[]),
        len as usize,
    )
    .map_err(|error| failed(format!("read {len} bytes: {error}")))?;
    Ok((start, len))
}

/// Prepares the PVH entry of an ELF that is loaded up to `end`.
pub(crate) fn start_pvh(
    ram: &Ram,
    memory_mib: u32,
    source: &Source<'_>,
    entry: u64,
    end: u64,
) -> Result<Loaded, MachineError> {
    if entry < IMAGE_START || entry >= end {
        return Err(MachineError::Kernel(format!(
            "its PVH entry {entry:#x} lies outside of the image, which ends at {end:#x}"
        )));
    }
    let (low, _) = memory::split(memory_mib);
    let (initrd, initrd_bytes) = load_initrd(ram, source.initrd, end.next_multiple_of(4096), low)?;
    write(ram, CMDLINE, source.cmdline.as_bytes())?;
    let map = memory_map(memory_mib);
    let mut info = Vec::new();
    for word in [PVH_MAGIC, PVH_VERSION, 0, u32::from(initrd_bytes > 0)] {
        info.extend_from_slice(&word.to_le_bytes());
    }
    for address in [MODULES, CMDLINE, acpi::RSDP, MEMORY_MAP, map.len() as u64] {
        info.extend_from_slice(&address.to_le_bytes());
    }
    write(ram, START_INFO, &info)?;
    write(ram, MODULES, &[initrd, initrd_bytes, 0, 0].map(u64::to_le_bytes).concat())?;
    let entries =
        map.iter().map(|(start, bytes, kind)| [*start, *bytes, *kind as u64].map(u64::to_le_bytes));
    write(ram, MEMORY_MAP, &entries.flatten().flatten().collect::<Vec<u8>>())?;
    write(ram, GDT, &DESCRIPTORS_32.map(u64::to_le_bytes).concat())?;
    Ok(Loaded::Pvh { entry, start_info: START_INFO })
}

#[cfg(test)]
mod tests {
    use super::super::{elf, load, memory_file};
    use super::*;

    /// A bzImage of four setup sectors and `payload` bytes.
    fn bzimage(payload: usize) -> Vec<u8> {
        let mut image = vec![0u8; 5 * 512 + payload];
        image[SETUP_HEADER] = 4;
        image[BOOT_FLAG..BOOT_FLAG + 4].copy_from_slice(&[0x55, 0xAA, 0xEB, 0x6A]);
        image[HEADER_MAGIC..HEADER_MAGIC + 4].copy_from_slice(b"HdrS");
        image[VERSION..VERSION + 2].copy_from_slice(&0x20Fu16.to_le_bytes());
        image[LOADFLAGS] = 1;
        image[0x214..0x218].copy_from_slice(&0x10_0000u32.to_le_bytes());
        image[INITRD_ADDR_MAX..INITRD_ADDR_MAX + 4].copy_from_slice(&0x7FFF_FFFFu32.to_le_bytes());
        image[XLOADFLAGS] = 1;
        image[CMDLINE_SIZE..CMDLINE_SIZE + 4].copy_from_slice(&2047u32.to_le_bytes());
        image[PREF_ADDRESS..PREF_ADDRESS + 8].copy_from_slice(&0x100_0000u64.to_le_bytes());
        image[INIT_SIZE..INIT_SIZE + 4].copy_from_slice(&0x10_0000u32.to_le_bytes());
        for (index, byte) in image[5 * 512..].iter_mut().enumerate() {
            *byte = index as u8;
        }
        image
    }

    fn map(mib: u32) -> Ram {
        memory::map(mib).unwrap()
    }

    #[test]
    fn the_memory_map_leaves_the_holes_out_and_counts_all_memory() {
        for mib in [16, 128, 3 << 10, 5 << 10] {
            let map = memory_map(mib);
            for pair in map.windows(2) {
                assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{pair:x?}");
            }
            let ram = map.iter().filter(|(_, _, kind)| *kind == Kind::Ram).map(|(_, len, _)| len);
            assert_eq!(ram.sum::<u64>(), (u64::from(mib) << 20) - (IMAGE_START - LOW_RAM_END));
        }
    }

    #[test]
    fn a_bzimage_is_placed_with_its_initrd_and_command_line() {
        let ram = map(64);
        let (kernel, initrd) = (memory_file(&bzimage(5000)), memory_file(&[7; 5000]));
        let source = Source { kernel: &kernel, initrd: Some(&initrd), cmdline: "console=ttyS0" };
        let loaded = load(&ram, 64, &source).unwrap();
        assert_eq!(loaded, Loaded::Linux64 { entry: 0x10_0200, zero_page: ZERO_PAGE });
        assert_eq!(ram.read_obj::<u8>(GuestAddress(0x10_0000 + 4999)).unwrap(), 4999u16 as u8);
        let word = |at: usize| ram.read_obj::<u32>(GuestAddress(ZERO_PAGE + at as u64)).unwrap();
        assert_eq!(word(RAMDISK_IMAGE), (64 << 20) - 8192);
        assert_eq!(word(RAMDISK_SIZE), 5000);
        assert_eq!(ram.read_obj::<u8>(GuestAddress((64 << 20) - 8192)).unwrap(), 7);
        assert_eq!(word(HEADER_MAGIC), u32::from_le_bytes(*b"HdrS"));
        let mut cmdline = [0; 14];
        ram.read_slice(&mut cmdline, GuestAddress(u64::from(word(CMD_LINE_PTR)))).unwrap();
        assert_eq!(&cmdline, b"console=ttyS0\0");
    }

    #[test]
    fn what_does_not_fit_is_refused_by_name() {
        let (small, big) = (map(16), map(64));
        let kernel = memory_file(&bzimage(5000));
        let huge = memory_file(&vec![0; 64 << 20]);
        let long = "x".repeat(2048);
        let old = {
            let mut old = bzimage(16);
            old[VERSION] = 0;
            memory_file(&old)
        };
        let narrow = {
            let mut narrow = bzimage(16);
            narrow[XLOADFLAGS] = 0;
            memory_file(&narrow)
        };
        let plain = Source { kernel: &kernel, initrd: None, cmdline: "" };
        for (ram, mib, source, expected) in [
            (&small, 16, plain, "memory_mib: 16"),
            (&big, 64, Source { initrd: Some(&huge), ..plain }, "raise memory_mib"),
            (&big, 64, Source { cmdline: &long, ..plain }, "boot.cmdline: 2048 bytes"),
            (&big, 64, Source { kernel: &old, ..plain }, "boot protocol 0x200"),
            (&big, 64, Source { kernel: &narrow, ..plain }, "32-bit"),
        ] {
            let error = load(ram, mib, &source).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn a_pvh_elf_finds_its_start_information() {
        let ram = map(64);
        let kernel = memory_file(&elf::tests::pvh_image(0x10_0040));
        let initrd = memory_file(&[1, 2, 3]);
        let source = Source { kernel: &kernel, initrd: Some(&initrd), cmdline: "quiet" };
        let loaded = load(&ram, 64, &source).unwrap();
        assert_eq!(loaded, Loaded::Pvh { entry: 0x10_0040, start_info: START_INFO });
        let at = |offset: u64| ram.read_obj::<u64>(GuestAddress(START_INFO + offset)).unwrap();
        assert_eq!((at(16), at(24), at(32)), (MODULES, CMDLINE, acpi::RSDP));
        assert_eq!(at(48) as usize, memory_map(64).len());
        let module: u64 = ram.read_obj(GuestAddress(MODULES)).unwrap();
        assert_eq!(module, (64 << 20) - 4096);
        let outside = memory_file(&elf::tests::pvh_image(0x20_0000));
        let error = load(&ram, 64, &Source { kernel: &outside, ..source }).unwrap_err();
        assert!(error.to_string().contains("PVH entry"), "{error}");
    }

    #[test]
    fn no_damage_to_a_setup_header_panics() {
        let (ram, whole) = (map(64), bzimage(64));
        let mut random = 0x9E37_79B9_7F4A_7C15u64;
        for _ in 0..5_000 {
            let mut bytes = whole.clone();
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let at = SETUP_HEADER + random as usize % (SETUP_HEADER_END - SETUP_HEADER);
            bytes[at] = (random >> 40) as u8;
            let kernel = memory_file(&bytes);
            let _ = load(&ram, 64, &Source { kernel: &kernel, initrd: None, cmdline: "" });
        }
    }
}

//! Boot protocol of a unikernel, as `abi::boot` states it: image, page tables, parameters.
//!
//! | address | what |
//! |---|---|
//! | 0x1000 | [`BootParams`] |
//! | 0x2000 | device table |
//! | 0x3000 | command line |
//! | 0x1_0000 … 0x8_0000 | page tables |
//! | 0x8_0000 | console ring: header, then 256 KiB |

use super::MachineError;
use super::memory::{self, HIGH_RAM_START, Ram};
use abi::boot::{BOOT_MAGIC, BOOT_VERSION, BootParams, DeviceEntry, PCI_HOLE_START, PCI_SLOTS};
use linux_loader::loader::{Elf, KernelLoader};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, ReadVolatile, VolatileMemoryError, VolatileSlice,
};

/// Where [`BootParams`] lie.
pub const PARAMS: u64 = 0x1000;
const DEVICES: u64 = 0x2000;
const CMDLINE: u64 = 0x3000;
/// Longest command line, bytes.
pub const CMDLINE_BYTES_MAX: usize = 4096;
/// Root of the page tables.
pub const PAGE_TABLE_ROOT: u64 = 0x1_0000;
const PAGE_DIRECTORY_POINTERS: u64 = 0x1_1000;
const PAGE_DIRECTORIES: u64 = 0x1_2000;
/// Console ring header; its bytes follow.
pub const CONSOLE: u64 = 0x8_0000;
/// Bytes of the console ring.
pub const CONSOLE_BYTES: u32 = 256 << 10;
/// First address an image may use.
pub const IMAGE_START: u64 = 0x10_0000;
/// Most program headers of an image.
const PROGRAM_HEADERS_MAX: u16 = 64;

const GIB: u64 = 1 << 30;
const PAGE_PRESENT_WRITE_USER: u64 = 0b111;
const PAGE_LARGE: u64 = 1 << 7;

/// A loaded image.
#[derive(Clone, Copy, Debug)]
pub struct Image {
    /// Its first instruction.
    pub entry: u64,
    /// First free byte after it, page aligned.
    pub end: u64,
}

/// Loads an ELF into fresh (zero) memory; `end` counts what has no file content too.
///
/// The file is read by position: its descriptor may be shared with guests starting meanwhile.
pub fn load(ram: &Ram, kernel: &File) -> Result<Image, MachineError> {
    let mut file = Positioned { file: kernel, offset: 0 };
    let end = check_segments(&mut file, ram)?;
    let loaded = Elf::load(ram, None, &mut file, Some(GuestAddress(IMAGE_START)))
        .map_err(|error| MachineError::Kernel(format!("ELF loader: {error}")))?;
    let entry = loaded.kernel_load.0;
    if entry < IMAGE_START || entry >= end {
        return Err(MachineError::Kernel(format!(
            "entry {entry:#x} lies outside of the image, which ends at {end:#x}"
        )));
    }
    Ok(Image { entry, end: end.next_multiple_of(4096) })
}

/// Checks that every segment lies in RAM above the VMM's area, before a byte is copied.
fn check_segments(file: &mut Positioned<'_>, ram: &Ram) -> Result<u64, MachineError> {
    let unreadable = |error: io::Error| MachineError::Kernel(format!("read ELF headers: {error}"));
    let mut header = [0u8; 64];
    file.read_exact(&mut header).map_err(unreadable)?;
    if &header[..6] != b"\x7fELF\x02\x01" || u16_at(&header, 18) != 62 {
        return Err(MachineError::Kernel("not a 64-bit x86 ELF".into()));
    }
    let (table, size, count) = (u64_at(&header, 32), u16_at(&header, 54), u16_at(&header, 56));
    if size != 56 || count > PROGRAM_HEADERS_MAX {
        return Err(MachineError::Kernel(format!(
            "{count} program headers of {size} bytes; at most {PROGRAM_HEADERS_MAX} of 56 are taken"
        )));
    }
    let mut end = 0;
    file.seek(SeekFrom::Start(table)).map_err(unreadable)?;
    for _ in 0..count {
        let mut segment = [0u8; 56];
        file.read_exact(&mut segment).map_err(unreadable)?;
        const PT_LOAD: u32 = 1;
        if u32::from_le_bytes([segment[0], segment[1], segment[2], segment[3]]) != PT_LOAD {
            continue;
        }
        let (address, in_file, in_memory) =
            (u64_at(&segment, 24), u64_at(&segment, 32), u64_at(&segment, 40));
        if in_memory == 0 {
            continue;
        }
        let fits =
            usize::try_from(in_memory).is_ok_and(|len| ram.check_range(GuestAddress(address), len));
        if address < IMAGE_START || in_file > in_memory || !fits || address >= PCI_HOLE_START {
            return Err(MachineError::Kernel(format!(
                "segment of {in_memory} bytes ({in_file} in the file) at {address:#x} does not fit the guest's memory"
            )));
        }
        end = end.max(address + in_memory);
    }
    if end == 0 {
        return Err(MachineError::Kernel("no segment to load".into()));
    }
    Ok(end)
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut value = [0; 8];
    value.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(value)
}

/// A file read by `pread`, so that the descriptor's own position is never used.
struct Positioned<'a> {
    file: &'a File,
    offset: u64,
}

impl Read for Positioned<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read_at(buffer, self.offset)?;
        self.offset += read as u64;
        Ok(read)
    }
}

impl Seek for Positioned<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let offset = match to {
            SeekFrom::Start(offset) => Some(offset),
            SeekFrom::Current(by) => self.offset.checked_add_signed(by),
            SeekFrom::End(by) => self.file.metadata()?.len().checked_add_signed(by),
        };
        self.offset = offset.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.offset)
    }
}

impl ReadVolatile for Positioned<'_> {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        buffer: &mut VolatileSlice<B>,
    ) -> Result<usize, VolatileMemoryError> {
        let guard = buffer.ptr_guard_mut();
        // SAFETY: the guard is `buffer.len()` bytes of mapped guest memory; no vCPU runs yet and
        // no other reference to it exists while the image is loaded.
        let target = unsafe { std::slice::from_raw_parts_mut(guard.as_ptr(), buffer.len()) };
        let read = self.read(target).map_err(VolatileMemoryError::IOError)?;
        vm_memory::bitmap::Bitmap::mark_dirty(buffer.bitmap(), 0, read);
        Ok(read)
    }
}

/// What [`write_parameters`] puts in front of the guest.
pub struct Parameters<'a> {
    /// Guest memory, MiB.
    pub memory_mib: u32,
    /// The loaded image.
    pub image: Image,
    /// Command line.
    pub cmdline: &'a str,
    /// Devices there at start.
    pub devices: &'a [DeviceEntry],
    /// TSC frequency.
    pub tsc_hz: u64,
    /// `abi::boot::CPU_*` bits.
    pub cpu_features: u64,
}

/// Writes parameters, device table, command line and console ring header.
pub fn write_parameters(ram: &Ram, parameters: &Parameters<'_>) -> Result<(), MachineError> {
    let (ram_low_bytes, ram_high_bytes) = memory::split(parameters.memory_mib);
    let mut seed = [0u8; 32];
    // SAFETY: the buffer is ours and its length is given.
    let filled = unsafe { libc::getrandom(seed.as_mut_ptr().cast(), seed.len(), 0) };
    if filled != seed.len() as isize {
        return Err(MachineError::Boot(format!("getrandom: {}", io::Error::last_os_error())));
    }
    let clock = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    let params = BootParams {
        magic: BOOT_MAGIC,
        version: BOOT_VERSION,
        size: size_of::<BootParams>() as u32,
        ram_low_bytes,
        ram_high_bytes,
        free_start: parameters.image.end,
        tsc_hz: parameters.tsc_hz,
        clock_unix_ns: clock.tv_sec as u64 * 1_000_000_000 + clock.tv_nsec as u64,
        clock_tsc: super::vcpu::host_tsc(),
        cpu_features: parameters.cpu_features,
        cmdline: CMDLINE,
        console: CONSOLE,
        devices: DEVICES,
        cmdline_len: parameters.cmdline.len() as u32,
        device_count: parameters.devices.len() as u32,
        seed,
    };
    debug_assert!(
        parameters.devices.len() <= PCI_SLOTS && parameters.cmdline.len() <= CMDLINE_BYTES_MAX
    );
    let mut table = Vec::with_capacity(std::mem::size_of_val(parameters.devices));
    for device in parameters.devices {
        table.extend_from_slice(bytes_of(device));
    }
    let console_header = [0, 0, CONSOLE_BYTES, 0].map(u32::to_le_bytes).concat();
    write(ram, PARAMS, bytes_of(&params))?;
    write(ram, DEVICES, &table)?;
    write(ram, CMDLINE, parameters.cmdline.as_bytes())?;
    write(ram, CONSOLE, &console_header)
}

/// The bytes of one of `abi::boot`'s plain structures (`repr(C)`, integers only, no padding).
fn bytes_of<T: Copy>(value: &T) -> &[u8] {
    // SAFETY: called for BootParams and DeviceEntry only, which have no padding (tested below).
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast(), size_of::<T>()) }
}

fn write(ram: &Ram, address: u64, bytes: &[u8]) -> Result<(), MachineError> {
    ram.write_slice(bytes, GuestAddress(address))
        .map_err(|error| MachineError::Boot(error.to_string()))
}

/// Identity-maps RAM and the PCI hole with 2 MiB pages that CPL3 may use.
pub fn write_page_tables(ram: &Ram, memory_mib: u32) -> Result<(), MachineError> {
    let (low, high) = memory::split(memory_mib);
    let mut pointers = Vec::new();
    let mut next = PAGE_DIRECTORIES;
    for (start, end) in
        [(0, low), (PCI_HOLE_START, HIGH_RAM_START), (HIGH_RAM_START, HIGH_RAM_START + high)]
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
    debug_assert!(next <= CONSOLE);
    write(ram, PAGE_DIRECTORY_POINTERS, &pointers)?;
    write(ram, PAGE_TABLE_ROOT, &(PAGE_DIRECTORY_POINTERS | PAGE_PRESENT_WRITE_USER).to_le_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_structures_have_no_padding() {
        assert_eq!(size_of::<BootParams>(), 8 + 2 * 4 + 10 * 8 + 2 * 4 + 32);
        assert_eq!(size_of::<DeviceEntry>(), 8 + 2 * 2 + 7 * 4);
    }

    #[test]
    fn page_tables_of_the_largest_guest_stay_below_the_console() {
        let gibs = u64::from(memory::MEMORY_MIB_MAX).div_ceil(1024) + 1;
        assert!(PAGE_DIRECTORIES + gibs * 4096 <= CONSOLE);
        let ram = memory::map(5 << 10).unwrap();
        write_page_tables(&ram, 5 << 10).unwrap();
        let pointer: u64 = ram.read_obj(GuestAddress(PAGE_DIRECTORY_POINTERS + 5 * 8)).unwrap();
        let entry: u64 = ram.read_obj(GuestAddress(pointer & !0xfff)).unwrap();
        assert_eq!(entry, (5 * GIB) | PAGE_PRESENT_WRITE_USER | PAGE_LARGE);
        let none: u64 = ram.read_obj(GuestAddress(PAGE_DIRECTORY_POINTERS + 6 * 8)).unwrap();
        assert_eq!(none, 0);
    }

    fn elf(segments: &[(u64, u64, u64)]) -> File {
        use std::io::Write;
        let mut bytes = vec![0u8; 64];
        bytes[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        bytes[16] = 2;
        bytes[18] = 62;
        bytes[24..32].copy_from_slice(&IMAGE_START.to_le_bytes());
        bytes[32] = 64;
        bytes[54] = 56;
        bytes[56] = segments.len() as u8;
        for (address, in_file, in_memory) in segments {
            let mut segment = [0u8; 56];
            segment[0] = 1;
            segment[24..32].copy_from_slice(&address.to_le_bytes());
            segment[32..40].copy_from_slice(&in_file.to_le_bytes());
            segment[40..48].copy_from_slice(&in_memory.to_le_bytes());
            bytes.extend_from_slice(&segment);
        }
        let mut file =
            File::from(rustix::fs::memfd_create("elf", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        file.write_all(&bytes).unwrap();
        file
    }

    #[test]
    fn free_memory_starts_after_segments_without_file_content() {
        let ram = memory::map(16).unwrap();
        let image =
            load(&ram, &elf(&[(IMAGE_START, 64, 100), (IMAGE_START + 0x2000, 0, 0x5001)])).unwrap();
        assert_eq!(image.entry, IMAGE_START);
        assert_eq!(image.end, IMAGE_START + 0x8000);
    }

    #[test]
    fn images_that_do_not_fit_are_refused() {
        let ram = memory::map(16).unwrap();
        for bad in [
            vec![],
            vec![(0x1000, 16, 16)],
            vec![(IMAGE_START, 32, 16)],
            vec![(IMAGE_START, 16, 64 << 20)],
            vec![(u64::MAX - 8, 4, 16)],
            vec![(IMAGE_START, 16, u64::MAX)],
        ] {
            assert!(matches!(load(&ram, &elf(&bad)), Err(MachineError::Kernel(_))), "{bad:x?}");
        }
    }
}

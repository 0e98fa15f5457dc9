//! ELF images: a unikernel, or a Linux `vmlinux` with a PVH entry.

use super::positioned::{self, Positioned};
use super::{HEAD_BYTES, IMAGE_START, u16_at, u32_at, u64_at};
use crate::machine::MachineError;
use crate::machine::memory::Ram;
use abi::boot::PCI_HOLE_START;
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{Elf, KernelLoader};
use std::fs::File;
use vm_memory::{GuestAddress, GuestMemoryBackend};

/// Most program headers of an image.
const PROGRAM_HEADERS_MAX: u16 = 64;
/// Most bytes of notes.
const NOTE_BYTES_MAX: u64 = 64 << 10;

const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;

/// An ELF in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadedElf {
    /// `e_entry`.
    pub entry: u64,
    /// Where the PVH note says Linux starts.
    pub pvh_entry: Option<u64>,
    /// First byte after the segments, what has no file content included.
    pub end: u64,
}

/// Loads an ELF whose first bytes are `head`.
pub(crate) fn load(ram: &Ram, kernel: &File, head: &[u8]) -> Result<LoadedElf, MachineError> {
    let size =
        positioned::len(kernel).map_err(|error| MachineError::Kernel(format!("fstat: {error}")))?;
    let end = check_segments(head, ram, size)?;
    let loaded = Elf::load(ram, None, &mut Positioned::new(kernel, head), None)
        .map_err(|error| MachineError::Kernel(format!("ELF loader: {error}")))?;
    let pvh_entry = match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(entry) => Some(entry.0),
        _ => None,
    };
    Ok(LoadedElf { entry: loaded.kernel_load.0, pvh_entry, end })
}

/// Checks that every segment lies in RAM above the VMM's area, before a byte is copied.
fn check_segments(head: &[u8], ram: &Ram, file_bytes: u64) -> Result<u64, MachineError> {
    let refuse = |reason: String| Err(MachineError::Kernel(reason));
    if !head.starts_with(b"\x7fELF\x02\x01") || head.len() < 64 || u16_at(head, 18) != 62 {
        return refuse("not a 64-bit x86 ELF".into());
    }
    let (table, size, count) = (u64_at(head, 32), u16_at(head, 54), u16_at(head, 56));
    if size != 56 || count > PROGRAM_HEADERS_MAX {
        return refuse(format!(
            "{count} program headers of {size} bytes; at most {PROGRAM_HEADERS_MAX} of 56 are taken"
        ));
    }
    let table_end = table.saturating_add(u64::from(count) * 56);
    if table_end > head.len() as u64 {
        return refuse(format!(
            "program headers end at byte {table_end}; they must lie in the file's first {HEAD_BYTES}"
        ));
    }
    let mut end = 0;
    for segment in head[table as usize..table_end as usize].chunks_exact(56) {
        let (offset, address) = (u64_at(segment, 8), u64_at(segment, 24));
        let (in_file, in_memory) = (u64_at(segment, 32), u64_at(segment, 40));
        if offset.checked_add(in_file).is_none_or(|end| end > file_bytes) {
            return refuse(format!(
                "segment of {in_file} bytes at byte {offset} lies beyond the file's end at {file_bytes}"
            ));
        }
        match u32_at(segment, 0) {
            PT_NOTE if in_file > NOTE_BYTES_MAX => {
                return refuse(format!("{in_file} bytes of notes; at most {NOTE_BYTES_MAX}"));
            }
            PT_LOAD if in_memory > 0 => {}
            _ => continue,
        }
        let fits =
            usize::try_from(in_memory).is_ok_and(|len| ram.check_range(GuestAddress(address), len));
        if address < IMAGE_START || in_file > in_memory || !fits || address >= PCI_HOLE_START {
            return refuse(format!(
                "segment of {in_memory} bytes ({in_file} in the file) at {address:#x} does not fit the guest's memory"
            ));
        }
        end = end.max(address + in_memory);
    }
    if end == 0 {
        return refuse("no segment to load".into());
    }
    Ok(end)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::super::memory_file;
    use super::*;
    use crate::machine::memory;

    /// An image of segments: address, bytes in the file, bytes in memory.
    pub(crate) fn image(segments: &[(u64, u64, u64)]) -> Vec<u8> {
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
        bytes
    }

    /// As `image`, of one segment, with a PVH note.
    pub(crate) fn pvh_image(entry: u32) -> Vec<u8> {
        let mut bytes = image(&[(IMAGE_START, 64, 0x1000), (0, 0, 0)]);
        let note = bytes.len();
        bytes[64 + 56..64 + 60].copy_from_slice(&PT_NOTE.to_le_bytes());
        bytes[64 + 56 + 8..64 + 56 + 16].copy_from_slice(&(note as u64).to_le_bytes());
        bytes[64 + 56 + 32..64 + 56 + 40].copy_from_slice(&20u64.to_le_bytes());
        for word in [4, 4, 18, u32::from_le_bytes(*b"Xen\0"), entry] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    fn try_load(bytes: &[u8]) -> Result<LoadedElf, MachineError> {
        load(&memory::map(16).unwrap(), &memory_file(bytes), bytes)
    }

    #[test]
    fn the_end_counts_segments_without_file_content() {
        let loaded =
            try_load(&image(&[(IMAGE_START, 64, 100), (IMAGE_START + 0x2000, 0, 0x5001)])).unwrap();
        assert_eq!(loaded.entry, IMAGE_START);
        assert_eq!(loaded.end, IMAGE_START + 0x7001);
        assert_eq!(loaded.pvh_entry, None);
    }

    #[test]
    fn a_pvh_note_gives_the_entry() {
        assert_eq!(try_load(&pvh_image(0x10_0040)).unwrap().pvh_entry, Some(0x10_0040));
    }

    #[test]
    fn images_that_do_not_fit_are_refused() {
        for bad in [
            vec![],
            vec![(0x1000, 16, 16)],
            vec![(IMAGE_START, 32, 16)],
            vec![(IMAGE_START, 16, 64 << 20)],
            vec![(IMAGE_START, 4096, 4096)],
            vec![(u64::MAX - 8, 4, 16)],
            vec![(IMAGE_START, 16, u64::MAX)],
        ] {
            assert!(matches!(try_load(&image(&bad)), Err(MachineError::Kernel(_))), "{bad:x?}");
        }
    }

    #[test]
    fn no_damage_to_a_header_panics() {
        let whole = pvh_image(0x10_0040);
        let mut random = 0x2545_F491_4F6C_DD1Du64;
        let ram = memory::map(16).unwrap();
        for _ in 0..20_000 {
            let mut bytes = whole.clone();
            for _ in 0..3 {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                let at = random as usize % bytes.len();
                bytes[at] = (random >> 40) as u8;
            }
            bytes.truncate(bytes.len() - (random >> 60) as usize);
            let _ = load(&ram, &memory_file(&bytes), &bytes);
        }
    }
}

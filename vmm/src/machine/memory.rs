//! Guest memory: anonymous, private, from address 0 to the PCI hole and on from 4 GiB.

use super::{MachineError, kvm};
use crate::config::HugePages;
use abi::boot::PCI_HOLE_START;
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::mmap::{MmapRegionBuilder, NewBitmap};
use vm_memory::{
    Address, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress,
};

/// Guest memory, with a bitmap of pages that devices wrote (KVM's own log misses those).
pub type Ram = GuestMemoryMmap<AtomicBitmap>;

/// Least memory of a guest, MiB.
pub const MEMORY_MIB_MIN: u32 = 16;
/// Most memory of a guest, MiB: 16 TiB, beyond any host (a unikernel has a limit of its own).
pub const MEMORY_MIB_MAX: u32 = 16 << 20;
/// A huge page, MiB.
pub const HUGE_PAGE_MIB: u32 = 2;

/// A page of the host, bytes: what can be given back.
pub const PAGE_BYTES: u64 = 4096;

/// Where RAM goes on above the hole.
pub const HIGH_RAM_START: u64 = 1 << 32;

/// Bytes of RAM below the hole and above 4 GiB for a guest of `memory_mib`.
pub fn split(memory_mib: u32) -> (u64, u64) {
    let bytes = u64::from(memory_mib) << 20;
    let low = bytes.min(PCI_HOLE_START);
    (low, bytes - low)
}

/// Maps the memory in ordinary pages; they are the host's only once the guest touches them.
pub fn map(memory_mib: u32) -> Result<Ram, MachineError> {
    map_in(memory_mib, HugePages::Off)
}

/// Maps the memory; reserved huge pages are taken at once, other pages when the guest touches them.
pub fn map_in(memory_mib: u32, pages: HugePages) -> Result<Ram, MachineError> {
    let (low, high) = split(memory_mib);
    let mut ranges = vec![(GuestAddress(0), low as usize)];
    if high > 0 {
        ranges.push((GuestAddress(HIGH_RAM_START), high as usize));
    }
    let failed = |reason: String| MachineError::Memory { mib: memory_mib, reason };
    if pages == HugePages::Off {
        return Ram::from_ranges(&ranges).map_err(|error| failed(error.to_string()));
    }
    let regions = ranges
        .into_iter()
        .map(|(start, bytes)| map_huge(start, bytes, pages))
        .collect::<Result<Vec<_>, _>>()
        .map_err(|reason| failed(format!("{reason}{}", advice(memory_mib, pages))))?;
    Ram::from_regions(regions).map_err(|error| failed(error.to_string()))
}

fn advice(memory_mib: u32, pages: HugePages) -> String {
    let needed = memory_mib / HUGE_PAGE_MIB;
    match pages {
        HugePages::Reserved => format!(
            "; reserve {needed} huge pages of 2 MiB (sysctl vm.nr_hugepages), or leave huge_pages out"
        ),
        _ => "; leave huge_pages out where the kernel has no transparent huge pages".into(),
    }
}

fn map_huge(
    start: GuestAddress,
    bytes: usize,
    pages: HugePages,
) -> Result<GuestRegionMmap<AtomicBitmap>, String> {
    let mut flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    flags |= match pages {
        // Without MAP_NORESERVE, so that it fails here and not by a signal later.
        HugePages::Reserved => libc::MAP_HUGETLB | libc::MAP_HUGE_2MB,
        _ => libc::MAP_NORESERVE,
    };
    let region = MmapRegionBuilder::new_with_bitmap(bytes, AtomicBitmap::with_len(bytes))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(flags)
        .with_hugetlbfs(pages == HugePages::Reserved)
        .build()
        .map_err(|error| error.to_string())?;
    if pages == HugePages::Transparent {
        // SAFETY: the range is the mapping just made; the advice does not change its contents.
        let advised = unsafe { libc::madvise(region.as_ptr().cast(), bytes, libc::MADV_HUGEPAGE) };
        if advised < 0 {
            return Err(format!("MADV_HUGEPAGE: {}", std::io::Error::last_os_error()));
        }
    }
    GuestRegionMmap::new(region, start).ok_or_else(|| "its end overflows".into())
}

/// Gives the memory to the VM: one slot a range.
pub fn register(vm: &VmFd, ram: &Ram) -> Result<(), MachineError> {
    for (slot, region) in ram.iter().enumerate() {
        let host_address = region.get_host_address(MemoryRegionAddress(0)).map_err(|error| {
            MachineError::Memory { mib: (region.len() >> 20) as u32, reason: error.to_string() }
        })?;
        let region = kvm_userspace_memory_region {
            slot: slot as u32,
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: host_address as u64,
            flags: 0,
        };
        // SAFETY: the range is a live mapping owned by `ram`, which is held as long as the VM runs.
        unsafe { vm.set_user_memory_region(region) }.map_err(kvm("SET_USER_MEMORY_REGION"))?;
    }
    Ok(())
}

/// Gives whole pages back to the host; whoever touches them next finds zeroes. `false`: the range is
/// not wholly RAM, or not in pages, and nothing changed.
pub fn give_back(ram: &Ram, start: u64, bytes: u64) -> bool {
    if bytes == 0 || !start.is_multiple_of(PAGE_BYTES) || !bytes.is_multiple_of(PAGE_BYTES) {
        return false;
    }
    let Ok(slice) = ram.get_slice(GuestAddress(start), bytes as usize) else { return false };
    // SAFETY: the range is a part of the guest's memory, which stays mapped as long as `ram`, and
    // is private and anonymous; nothing in this process holds references into guest memory.
    let given = unsafe {
        libc::madvise(slice.ptr_guard_mut().as_ptr().cast(), slice.len(), libc::MADV_DONTNEED)
    };
    given == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_beyond_the_hole_continues_at_4_gib() {
        assert_eq!(split(128), (128 << 20, 0));
        assert_eq!(split(3 << 10), (3 << 30, 0));
        assert_eq!(split(4 << 10), (3 << 30, 1 << 30));
        let ram = map(3 * 1024 + 16).unwrap();
        assert!(ram.address_in_range(GuestAddress(HIGH_RAM_START + (16 << 20) - 1)));
        assert!(!ram.address_in_range(GuestAddress(PCI_HOLE_START)));
    }

    #[test]
    fn only_whole_pages_of_ram_are_given_back() {
        let ram = map(3 * 1024 + 16).unwrap();
        let last = PCI_HOLE_START - PAGE_BYTES;
        for address in [0, 4096, last, HIGH_RAM_START] {
            vm_memory::Bytes::write_obj(&ram, 7u64, GuestAddress(address)).unwrap();
        }
        for (start, bytes) in
            [(0, 0), (8, 4096), (0, 4095), (last, 2 * PAGE_BYTES), (PCI_HOLE_START, 4096)]
        {
            assert!(!give_back(&ram, start, bytes), "{start:#x} {bytes}");
        }
        assert!(!give_back(&ram, HIGH_RAM_START + (16 << 20), 4096));
        assert!(!give_back(&ram, u64::MAX - 4095, 4096));
        let value = |address| vm_memory::Bytes::read_obj::<u64>(&ram, GuestAddress(address));
        assert_eq!(value(last).unwrap(), 7);
        assert!(give_back(&ram, 4096, 4096) && give_back(&ram, last, PAGE_BYTES));
        assert!(give_back(&ram, HIGH_RAM_START, PAGE_BYTES));
        assert_eq!([0, 4096, last, HIGH_RAM_START].map(|at| value(at).unwrap()), [7, 0, 0, 0]);
    }

    #[test]
    fn huge_pages_are_given_or_the_error_says_what_to_do() {
        for pages in [HugePages::Transparent, HugePages::Reserved] {
            match map_in(64, pages) {
                Ok(ram) => {
                    let last = GuestAddress((64 << 20) - 8);
                    vm_memory::Bytes::write_obj(&ram, 7u64, last).unwrap();
                    assert_eq!(vm_memory::Bytes::read_obj::<u64>(&ram, last).unwrap(), 7);
                }
                Err(error) => assert!(error.to_string().contains("huge_pages out"), "{error}"),
            }
        }
        let error = map_in(MEMORY_MIB_MAX, HugePages::Reserved).unwrap_err().to_string();
        assert!(error.contains("reserve 8388608 huge pages"), "{error}");
    }
}

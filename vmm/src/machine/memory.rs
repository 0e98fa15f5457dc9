//! Guest memory: anonymous, private, from address 0 to the PCI hole and on from 4 GiB.

use super::{MachineError, kvm};
use abi::boot::PCI_HOLE_START;
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{
    Address, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    MemoryRegionAddress,
};

/// Guest memory, with a bitmap of pages that devices wrote (KVM's own log misses those).
pub type Ram = GuestMemoryMmap<AtomicBitmap>;

/// Least memory of a guest, MiB.
pub const MEMORY_MIB_MIN: u32 = 16;
/// Most memory of a guest, MiB: what the boot page tables below 1 MiB can map.
pub const MEMORY_MIB_MAX: u32 = 64 << 10;

/// Where RAM goes on above the hole.
pub const HIGH_RAM_START: u64 = 1 << 32;

/// Bytes of RAM below the hole and above 4 GiB for a guest of `memory_mib`.
pub fn split(memory_mib: u32) -> (u64, u64) {
    let bytes = u64::from(memory_mib) << 20;
    let low = bytes.min(PCI_HOLE_START);
    (low, bytes - low)
}

/// Maps the memory; pages are the host's only once the guest touches them.
pub fn map(memory_mib: u32) -> Result<Ram, MachineError> {
    let (low, high) = split(memory_mib);
    let mut ranges = vec![(GuestAddress(0), low as usize)];
    if high > 0 {
        ranges.push((GuestAddress(HIGH_RAM_START), high as usize));
    }
    Ram::from_ranges(&ranges)
        .map_err(|error| MachineError::Memory { mib: memory_mib, reason: error.to_string() })
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
}

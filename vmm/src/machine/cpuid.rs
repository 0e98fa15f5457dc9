//! The processor that a guest sees.
//!
//! What all vCPUs of all guests share is asked of KVM once ([`super::Host`]); here is what differs
//! between vCPUs: their ids, and a topology of one package whose cores have one thread each.

use super::MachineError;
use abi::boot::{CPU_INVARIANT_TSC, CPU_RDRAND, CPU_SSE42, CPU_TSC_DEADLINE};
use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

pub(crate) const ECX_1_SSE42: u32 = 1 << 20;
pub(crate) const ECX_1_X2APIC: u32 = 1 << 21;
pub(crate) const ECX_1_TSC_DEADLINE: u32 = 1 << 24;
pub(crate) const ECX_1_RDRAND: u32 = 1 << 30;
pub(crate) const ECX_1_HYPERVISOR: u32 = 1 << 31;
const EDX_1_MULTI_THREADING: u32 = 1 << 28;
const EDX_80000007_INVARIANT_TSC: u32 = 1 << 8;

/// Leaves whose entries are replaced as a whole: extended topology.
const TOPOLOGY: u32 = 0xB;
const TOPOLOGY_V2: u32 = 0x1F;
const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;
/// Where the width of an address is unknown.
const ADDRESS_BITS_DEFAULT: u32 = 36;

/// CPUID of vCPU `id` of `count`.
pub fn of_vcpu(shared: &CpuId, id: u8, count: u8) -> Result<CpuId, MachineError> {
    let (id, count) = (u32::from(id), u32::from(count));
    let bits = u32::BITS - (count - 1).leading_zeros();
    let topology = |entry: &&kvm_cpuid_entry2| matches!(entry.function, TOPOLOGY | TOPOLOGY_V2);
    let known = shared.as_slice().iter().any(|entry| entry.function == TOPOLOGY);
    let mut entries: Vec<_> =
        shared.as_slice().iter().filter(|entry| !topology(entry)).copied().collect();
    for entry in &mut entries {
        place(entry, id, count, bits);
    }
    if known {
        entries.extend(levels(id, count, bits));
    }
    CpuId::from_entries(&entries)
        .map_err(|error| MachineError::Boot(format!("CPUID of vCPU {id}: {error:?}")))
}

/// Sets what one entry says about ids and neighbours.
fn place(entry: &mut kvm_cpuid_entry2, id: u32, count: u32, bits: u32) {
    match entry.function {
        1 => {
            entry.ebx = entry.ebx & 0xFFFF | id << 24 | count << 16;
            entry.edx &= !EDX_1_MULTI_THREADING;
            if count > 1 {
                entry.edx |= EDX_1_MULTI_THREADING;
            }
        }
        // Caches: the third level is shared by all, the others belong to one core.
        4 | 0x8000_001D if entry.eax & 0x1F != 0 => {
            let sharing = if entry.eax >> 5 & 7 >= 3 { (1 << bits) - 1 } else { 0 };
            entry.eax = entry.eax & 0x3FFF | sharing << 14;
            if entry.function == 4 {
                entry.eax |= ((1 << bits) - 1).min(0x3F) << 26;
            }
        }
        0x8000_0008 => entry.ecx = entry.ecx & !0xF0FF | bits << 12 | (count - 1),
        0x8000_001E => {
            entry.eax = id;
            entry.ebx = entry.ebx & !0xFFFF | id & 0xFF;
            entry.ecx &= !0x7FF;
        }
        _ => {}
    }
}

fn levels(id: u32, count: u32, bits: u32) -> [kvm_cpuid_entry2; 3] {
    let level = |index: u32, kind: u32, shift: u32, processors: u32| kvm_cpuid_entry2 {
        function: TOPOLOGY,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: processors,
        ecx: kind << 8 | index,
        edx: id,
        ..Default::default()
    };
    [level(0, LEVEL_THREAD, 0, 1), level(1, LEVEL_CORE, bits, count), level(2, 0, 0, 0)]
}

/// Width of a physical address.
pub(crate) fn address_bits(cpuid: &CpuId) -> u32 {
    let leaf = cpuid.as_slice().iter().find(|entry| entry.function == 0x8000_0008);
    leaf.map_or(ADDRESS_BITS_DEFAULT, |entry| (entry.eax & 0xFF).clamp(32, 52))
}

/// `abi::boot::CPU_*` bits of a processor.
pub fn features(cpuid: &CpuId) -> u64 {
    let mut features = 0;
    for entry in cpuid.as_slice() {
        match entry.function {
            1 => {
                for (bit, feature) in [
                    (ECX_1_RDRAND, CPU_RDRAND),
                    (ECX_1_SSE42, CPU_SSE42),
                    (ECX_1_TSC_DEADLINE, CPU_TSC_DEADLINE),
                ] {
                    if entry.ecx & bit != 0 {
                        features |= feature;
                    }
                }
            }
            0x8000_0007 if entry.edx & EDX_80000007_INVARIANT_TSC != 0 => {
                features |= CPU_INVARIANT_TSC
            }
            _ => {}
        }
    }
    features
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, ..Default::default() }
    }

    #[test]
    fn features_come_from_the_guests_cpuid() {
        let one = kvm_cpuid_entry2 { ecx: ECX_1_RDRAND | ECX_1_SSE42, ..leaf(1) };
        let power = kvm_cpuid_entry2 { edx: EDX_80000007_INVARIANT_TSC, ..leaf(0x8000_0007) };
        let cpuid = CpuId::from_entries(&[one, power]).unwrap();
        assert_eq!(features(&cpuid), CPU_RDRAND | CPU_SSE42 | CPU_INVARIANT_TSC);
    }

    #[test]
    fn every_vcpu_has_its_id_in_one_package() {
        let shared = CpuId::from_entries(&[
            kvm_cpuid_entry2 { ebx: 0x0710_0800, ..leaf(1) },
            kvm_cpuid_entry2 { edx: 7, ..leaf(TOPOLOGY) },
            kvm_cpuid_entry2 { eax: 48, ecx: 0x700F, ..leaf(0x8000_0008) },
            kvm_cpuid_entry2 { eax: 7, ebx: 0x103, ..leaf(0x8000_001E) },
        ])
        .unwrap();
        assert_eq!(address_bits(&shared), 48);
        for (id, count, bits) in [(0, 1, 0), (1, 2, 1), (2, 3, 2), (253, 254, 8)] {
            let of = of_vcpu(&shared, id, count).unwrap();
            let find = |function, index| {
                *of.as_slice()
                    .iter()
                    .find(|entry| (entry.function, entry.index) == (function, index))
                    .unwrap()
            };
            let (id, count) = (u32::from(id), u32::from(count));
            assert_eq!(find(1, 0).ebx, id << 24 | count << 16 | 0x0800);
            assert_eq!((find(TOPOLOGY, 1).eax, find(TOPOLOGY, 1).ebx), (bits, count));
            assert_eq!((find(TOPOLOGY, 0).edx, find(TOPOLOGY, 2).ecx), (id, 2));
            assert_eq!(find(0x8000_0008, 0).ecx, bits << 12 | (count - 1));
            assert_eq!(
                (find(0x8000_001E, 0).eax, find(0x8000_001E, 0).ebx & 0xFF),
                (id, id & 0xFF)
            );
        }
    }
}

//! The machine: KVM, guest memory, boot state and vCPUs.
//!
//! [`Host`] is what all guests of a host share and what is asked of the kernel once. A
//! [`Machine`] is built in the order that is fast: memory slots, then the interrupt chip, then
//! vCPUs (a memory slot after the interrupt chip costs milliseconds). Nothing is torn down: a
//! guest's process ends and the kernel takes everything back.

pub(crate) mod acpi;
pub mod board;
pub mod boot;
pub mod cpuid;
pub mod ioapic;
pub mod memory;
pub mod run;
pub mod vcpu;

use crate::config::HugePages;
use kvm_bindings::{CpuId, KVM_CAP_SPLIT_IRQCHIP, KVM_MAX_CPUID_ENTRIES, kvm_enable_cap, kvm_msi};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, NoDatamatch, VcpuFd, VmFd};
use memory::Ram;
use std::sync::Arc;
use vmm_sys_util::eventfd::EventFd;

/// Most vCPUs of a guest: LAPIC ids stay in one byte.
pub const VCPUS_MAX: u8 = 254;

/// Where KVM may hide three pages for real mode on processors without unrestricted guests.
const TSS_ADDRESS: usize = 0xFFFB_D000;

/// Why a machine could not be made or run.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The kernel refused a step.
    #[error("KVM: {step}: {source}")]
    Kvm {
        /// What was asked.
        step: &'static str,
        /// The kernel's answer.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// `/dev/kvm` speaks another version.
    #[error("/dev/kvm has API version {0}, 12 is needed")]
    ApiVersion(i32),
    /// Guest memory could not be mapped.
    #[error("map {mib} MiB of guest memory: {reason}")]
    Memory {
        /// Size asked for.
        mib: u32,
        /// The kernel's answer.
        reason: String,
    },
    /// More vCPUs than this host's KVM runs.
    #[error("vcpus: {asked}; this host's KVM runs at most {most} in a guest")]
    Vcpus {
        /// Asked for.
        asked: u8,
        /// What KVM says.
        most: usize,
    },
    /// More memory than this host's processors address.
    #[error("memory_mib: {mib}; this host's processors address at most {bits} bits")]
    AddressBits {
        /// Size asked for.
        mib: u32,
        /// Width of a physical address.
        bits: u32,
    },
    /// The kernel image is not one this VMM boots.
    #[error("kernel image: {0}")]
    Kernel(String),
    /// The initrd does not go with the kernel or the memory.
    #[error("initrd: {0}")]
    Initrd(String),
    /// Boot data could not be written to guest memory.
    #[error("boot parameters: {0}")]
    Boot(String),
}

/// Names the step that a KVM call was.
pub(crate) fn kvm(step: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> MachineError {
    move |source| MachineError::Kvm { step, source }
}

/// What every guest of this host shares: the open `/dev/kvm` and the processor it offers.
pub struct Host {
    kvm: Kvm,
    cpuid: CpuId,
}

impl Host {
    /// Opens `/dev/kvm` and asks once what the processor offers (0.3 ms, the same for all guests).
    pub fn open() -> Result<Host, MachineError> {
        let kvm_device = Kvm::new().map_err(kvm("open /dev/kvm"))?;
        let version = kvm_device.get_api_version();
        if version != 12 {
            return Err(MachineError::ApiVersion(version));
        }
        let mut cpuid = kvm_device
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(kvm("GET_SUPPORTED_CPUID"))?;
        let deadline_timer = kvm_device.check_extension(Cap::TscDeadlineTimer);
        for entry in cpuid.as_mut_slice() {
            if entry.function == 1 {
                entry.ecx |= cpuid::ECX_1_HYPERVISOR | cpuid::ECX_1_X2APIC;
                if deadline_timer {
                    entry.ecx |= cpuid::ECX_1_TSC_DEADLINE;
                }
            }
        }
        Ok(Host { kvm: kvm_device, cpuid })
    }

    /// The processor every guest sees, before the parts that differ between its vCPUs.
    pub fn cpuid(&self) -> &CpuId {
        &self.cpuid
    }

    /// Refuses what this host can't run.
    fn check(&self, memory_mib: u32, vcpus: u8) -> Result<(), MachineError> {
        if vcpus > 1 {
            let most = self.kvm.get_max_vcpus();
            if usize::from(vcpus) > most {
                return Err(MachineError::Vcpus { asked: vcpus, most });
            }
        }
        let (_, high) = memory::split(memory_mib);
        let bits = cpuid::address_bits(&self.cpuid);
        if high > 0 && (memory::HIGH_RAM_START + high - 1) >> bits != 0 {
            return Err(MachineError::AddressBits { mib: memory_mib, bits });
        }
        Ok(())
    }

    /// The open `/dev/kvm`.
    pub fn kvm_descriptor(&self) -> std::os::fd::RawFd {
        std::os::fd::AsRawFd::as_raw_fd(&self.kvm)
    }
}

/// A virtual machine with memory, interrupt chip and vCPUs, not yet started.
pub struct Machine {
    /// The VM.
    pub vm: Arc<VmFd>,
    /// Its memory.
    pub ram: Ram,
    /// Its vCPUs, in order of their ids.
    pub vcpus: Vec<VcpuFd>,
    /// Frequency of their time stamp counter.
    pub tsc_hz: u64,
}

impl Machine {
    /// Makes the machine in the order that costs least.
    pub fn create(
        host: &Host,
        memory_mib: u32,
        pages: HugePages,
        vcpus: u8,
    ) -> Result<Machine, MachineError> {
        host.check(memory_mib, vcpus)?;
        let vm = host.kvm.create_vm().map_err(kvm("CREATE_VM"))?;
        let ram = memory::map_in(memory_mib, pages)?;
        memory::register(&vm, &ram)?;
        vm.set_tss_address(TSS_ADDRESS).map_err(kvm("SET_TSS_ADDR"))?;
        split_interrupt_chip(&vm)?;
        let vcpus = (0..vcpus)
            .map(|id| vcpu::create(&vm, id, &cpuid::of_vcpu(host.cpuid(), id, vcpus)?))
            .collect::<Result<Vec<_>, _>>()?;
        let tsc_hz = vcpus.first().map_or(Ok(0), vcpu::tsc_hz)?;
        Ok(Machine { vm: Arc::new(vm), ram, vcpus, tsc_hz })
    }
}

fn split_interrupt_chip(vm: &VmFd) -> Result<(), MachineError> {
    let mut cap = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..Default::default() };
    cap.args[0] = ioapic::PINS as u64;
    vm.enable_cap(&cap).map_err(kvm("ENABLE_CAP split irqchip"))
}

/// Interrupts to the guest and doorbells from it, from any thread.
///
/// One `KVM_SIGNAL_MSI` is one system call and needs neither a routing table (whose change waits
/// for every vCPU) nor an eventfd for each vector.
#[derive(Clone)]
pub struct Interrupts {
    vm: Arc<VmFd>,
}

impl Interrupts {
    /// Interrupts of `vm`.
    pub fn new(vm: Arc<VmFd>) -> Interrupts {
        Interrupts { vm }
    }

    /// Sends one message. A guest that programmed nonsense gets no interrupt, and that is all.
    pub fn signal(&self, address: u64, data: u32) {
        let msi = kvm_msi {
            address_lo: address as u32,
            address_hi: (address >> 32) as u32,
            data,
            ..Default::default()
        };
        let _ = self.vm.signal_msi(msi);
    }

    /// Has the kernel write `event` when the guest writes to `address`, whatever the width.
    pub fn register_doorbell(&self, event: &EventFd, address: u64) -> Result<(), MachineError> {
        self.vm
            .register_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(kvm("IOEVENTFD"))
    }

    /// Takes a doorbell back; it waits for every vCPU, milliseconds.
    pub fn unregister_doorbell(&self, event: &EventFd, address: u64) -> Result<(), MachineError> {
        self.vm
            .unregister_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(kvm("IOEVENTFD (deassign)"))
    }
}

//! vCPUs: their creation, their state at the guest's first instruction, and their loop.

use super::boot::linux::{GDT, GDT_BYTES};
use super::boot::unikernel::PARAMS;
use super::boot::{Loaded, PAGE_TABLE_ROOT};
use super::run::Gate;
use super::{MachineError, kvm};
use kvm_bindings::{
    CpuId, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_IO_OUT, KVM_SYSTEM_EVENT_RESET,
    KVM_SYSTEM_EVENT_SHUTDOWN, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, Msrs, kvm_device_attr,
    kvm_dtable, kvm_fpu, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs,
};
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use std::os::fd::AsRawFd;

const CR0_PE_MP_NE_WP_PG: u64 = 1 | 1 << 1 | 1 << 5 | 1 << 16 | 1 << 31;
const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR4_PAE_OSFXSR_OSXMMEXCPT: u64 = 1 << 5 | 1 << 9 | 1 << 10;
const EFER_SCE_LME_LMA_NXE: u64 = 1 | 1 << 8 | 1 << 10 | 1 << 11;
const KVM_SET_DEVICE_ATTR: libc::c_ulong = 0x4018_AEE1;

/// What a vCPU's exits are passed to.
pub trait Exits {
    /// A port was written. `Some`: the guest has ended.
    fn port_write(&self, port: u16, data: &[u8]) -> Option<End>;
    /// A port is read.
    fn port_read(&self, port: u16, data: &mut [u8]);
    /// An address without memory was written.
    fn mmio_write(&self, address: u64, data: &[u8]);
    /// An address without memory is read.
    fn mmio_read(&self, address: u64, data: &mut [u8]);
    /// The guest caused its first exit, or a later one: called at each.
    fn exited(&self);
}

/// How a guest ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// It gave an exit code.
    PowerOff(u8),
    /// It asked for a reset.
    Reset,
    /// It can't go on; one line says why and where.
    Crash(String),
    /// The kernel or the VMM failed.
    Error(String),
}

/// Creates a vCPU with its processor features.
pub fn create(vm: &VmFd, id: u8, cpuid: &CpuId) -> Result<VcpuFd, MachineError> {
    let vcpu = vm.create_vcpu(u64::from(id)).map_err(kvm("CREATE_VCPU"))?;
    vcpu.set_cpuid2(cpuid).map_err(kvm("SET_CPUID2"))?;
    // Guest TSC = host TSC: code at CPL3 may read the host's counter whatever the offset (where
    // KVM has no hardware to apply it), and code at CPL0 or the timer must see the same one.
    // Where the kernel lacks the attribute, its own synchronisation stays.
    let offset: u64 = 0;
    let attribute = kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: std::ptr::from_ref(&offset) as u64,
        flags: 0,
    };
    // SAFETY: the argument and the u64 it points to live through the call.
    let _ = unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_SET_DEVICE_ATTR, &raw const attribute) };
    Ok(vcpu)
}

/// The host's time stamp counter.
pub fn host_tsc() -> u64 {
    // SAFETY: every x86-64 processor has it.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// TSC frequency of a vCPU, Hz.
pub fn tsc_hz(vcpu: &VcpuFd) -> Result<u64, MachineError> {
    let khz = vcpu.get_tsc_khz().map_err(kvm("GET_TSC_KHZ"))?;
    Ok(u64::from(khz.max(1)) * 1000)
}

/// Sets the mode a unikernel starts in: 64-bit, CPL0, paging on, flat segments.
pub fn set_long_mode(vcpu: &VcpuFd) -> Result<(), MachineError> {
    let mut sregs: kvm_sregs = vcpu.get_sregs().map_err(kvm("GET_SREGS"))?;
    let flat = |kind: u8, selector: u16, long: bool| kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_: kind,
        present: 1,
        dpl: 0,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    };
    sregs.cs = flat(0xB, 0x8, true);
    let data = flat(0x3, 0x10, false);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr =
        kvm_segment { limit: 0x67, type_: 0xB, present: 1, selector: 0x18, ..Default::default() };
    sregs.gdt.limit = 0;
    sregs.idt.limit = 0;
    sregs.cr0 = CR0_PE_MP_NE_WP_PG | CR0_ET;
    sregs.cr3 = PAGE_TABLE_ROOT;
    sregs.cr4 = CR4_PAE_OSFXSR_OSXMMEXCPT;
    sregs.efer = EFER_SCE_LME_LMA_NXE;
    vcpu.set_sregs(&sregs).map_err(kvm("SET_SREGS"))?;
    let fpu = kvm_fpu { fcw: 0x37F, mxcsr: 0x1F80, ..Default::default() };
    vcpu.set_fpu(&fpu).map_err(kvm("SET_FPU"))
}

/// Points the first vCPU at what was loaded; its mode is a unikernel's so far.
pub fn set_entry(vcpu: &VcpuFd, loaded: &Loaded) -> Result<(), MachineError> {
    let regs = match *loaded {
        Loaded::Unikernel(image) => {
            kvm_regs { rip: image.entry, rdi: PARAMS, ..Default::default() }
        }
        Loaded::Linux64 { entry, zero_page } => {
            set_linux_mode(vcpu, true)?;
            kvm_regs { rip: entry, rsi: zero_page, ..Default::default() }
        }
        Loaded::Pvh { entry, start_info } => {
            set_linux_mode(vcpu, false)?;
            kvm_regs { rip: entry, rbx: start_info, ..Default::default() }
        }
    };
    vcpu.set_regs(&kvm_regs { rflags: 2, ..regs }).map_err(kvm("SET_REGS"))
}

/// The mode Linux expects at its 64-bit entry (boot.rst, "64-bit Boot Protocol") or at its PVH
/// entry: 32 bit, flat, paging off.
fn set_linux_mode(vcpu: &VcpuFd, long: bool) -> Result<(), MachineError> {
    let mut sregs: kvm_sregs = vcpu.get_sregs().map_err(kvm("GET_SREGS"))?;
    let code = |segment: kvm_segment| kvm_segment {
        selector: 0x10,
        l: u8::from(long),
        db: u8::from(!long),
        ..segment
    };
    let data = |segment: kvm_segment| kvm_segment { selector: 0x18, db: 1, ..segment };
    sregs.cs = code(sregs.cs);
    let flat = data(sregs.ds);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (flat, flat, flat, flat, flat);
    sregs.tr.selector = 0x20;
    sregs.gdt = kvm_dtable { base: GDT, limit: GDT_BYTES - 1, ..Default::default() };
    if !long {
        (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (CR0_PE | CR0_ET, 0, 0, 0);
    }
    vcpu.set_sregs(&sregs).map_err(kvm("SET_SREGS"))
}

/// What firmware leaves in a vCPU's registers for Linux: memory is cached (MTRR), strings are fast.
pub fn set_firmware_state(vcpu: &VcpuFd) -> Result<(), MachineError> {
    const IA32_MISC_ENABLE: u32 = 0x1A0;
    const FAST_STRING: u64 = 1;
    const MTRR_DEFAULT_TYPE: u32 = 0x2FF;
    const ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;
    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    for msr in [entry(MTRR_DEFAULT_TYPE, ENABLED_WRITE_BACK), entry(IA32_MISC_ENABLE, FAST_STRING)]
    {
        let msrs = Msrs::from_entries(&[msr])
            .map_err(|error| MachineError::Boot(format!("MSRs: {error:?}")))?;
        // A processor without the register does without.
        let _ = vcpu.set_msrs(&msrs).map_err(kvm("SET_MSRS"))?;
    }
    Ok(())
}

/// What an exit means for the loop; details are fetched where the vCPU is no longer borrowed.
enum Outcome {
    Continue,
    Ports,
    Interrupted,
    End(End),
    TripleFault,
    InternalError,
}

/// Runs a vCPU until the guest ends.
pub fn run(vcpu: &mut VcpuFd, id: usize, gate: &Gate, exits: &dyn Exits) -> End {
    gate.enter(id, vcpu);
    loop {
        let outcome = match vcpu.run() {
            Ok(exit) => handle(exit, exits),
            Err(error) if error.errno() == libc::EINTR => Outcome::Interrupted,
            Err(error) if error.errno() == libc::EAGAIN => Outcome::Continue,
            Err(error) => Outcome::End(End::Error(format!("KVM_RUN: {error}"))),
        };
        match outcome {
            Outcome::Continue => {}
            Outcome::Ports => {
                if let Some(end) = ports(vcpu, exits) {
                    return end;
                }
            }
            Outcome::Interrupted => {
                vcpu.set_kvm_immediate_exit(0);
                gate.pass();
            }
            Outcome::End(end) => return end,
            Outcome::TripleFault => return End::Crash(format!("triple fault, {}", state(vcpu))),
            Outcome::InternalError => return End::Crash(internal_error(vcpu)),
        }
    }
}

fn handle(exit: VcpuExit<'_>, exits: &dyn Exits) -> Outcome {
    exits.exited();
    match exit {
        VcpuExit::IoOut(..) | VcpuExit::IoIn(..) => return Outcome::Ports,
        VcpuExit::MmioWrite(address, data) => exits.mmio_write(address, data),
        VcpuExit::MmioRead(address, data) => {
            data.fill(0xFF);
            exits.mmio_read(address, data);
        }
        VcpuExit::Intr => return Outcome::Interrupted,
        VcpuExit::Hlt | VcpuExit::IrqWindowOpen | VcpuExit::IoapicEoi(_) => {}
        VcpuExit::Shutdown => return Outcome::TripleFault,
        VcpuExit::InternalError => return Outcome::InternalError,
        VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _) => {
            return Outcome::End(End::PowerOff(0));
        }
        VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _) => return Outcome::End(End::Reset),
        VcpuExit::FailEntry(reason, cpu) => {
            return Outcome::End(End::Crash(format!(
                "the processor refused the guest's state (hardware reason {reason:#x} on CPU {cpu})"
            )));
        }
        other => return Outcome::End(End::Crash(format!("unexpected exit {other:?}"))),
    }
    Outcome::Continue
}

/// An access to a port; a string instruction (`rep outsb`) makes many in one exit.
fn ports(vcpu: &mut VcpuFd, exits: &dyn Exits) -> Option<End> {
    let run = vcpu.get_kvm_run();
    // SAFETY: for KVM_EXIT_IO, which this is, the kernel fills the `io` member; all are integers.
    let io = unsafe { run.__bindgen_anon_1.io };
    let (size, count) = (usize::from(io.size), io.count as usize);
    let start = std::ptr::from_mut(run).cast::<u8>();
    // SAFETY: the kernel gives the place of `size * count` bytes within the mapping of the run
    // structure (Documentation/virt/kvm/api.rst, section 5), which `vcpu` keeps and lends to nobody else.
    let data =
        unsafe { std::slice::from_raw_parts_mut(start.add(io.data_offset as usize), size * count) };
    for element in data.chunks_exact_mut(size.max(1)) {
        if u32::from(io.direction) == KVM_EXIT_IO_OUT {
            if let Some(end) = exits.port_write(io.port, element) {
                return Some(end);
            }
        } else {
            element.fill(0xFF);
            exits.port_read(io.port, element);
        }
    }
    None
}

/// Where a vCPU stands, for people.
fn state(vcpu: &VcpuFd) -> String {
    let (Ok(regs), Ok(sregs)) = (vcpu.get_regs(), vcpu.get_sregs()) else {
        return "state unknown".into();
    };
    format!(
        "rip {:#x} rsp {:#x} cs {:#x} rflags {:#x} cr2 {:#x} cr3 {:#x} rax {:#x} rcx {:#x} rdx {:#x} rdi {:#x} idt {:#x}+{:#x}",
        regs.rip,
        regs.rsp,
        sregs.cs.selector,
        regs.rflags,
        sregs.cr2,
        sregs.cr3,
        regs.rax,
        regs.rcx,
        regs.rdx,
        regs.rdi,
        sregs.idt.base,
        sregs.idt.limit
    )
}

fn internal_error(vcpu: &mut VcpuFd) -> String {
    let run = vcpu.get_kvm_run();
    let (suberror, data) = if run.exit_reason == KVM_EXIT_INTERNAL_ERROR {
        // SAFETY: for this exit reason the kernel fills the `internal` member; all are integers.
        let internal = unsafe { run.__bindgen_anon_1.internal };
        (
            internal.suberror,
            internal.data.iter().take(internal.ndata.min(4) as usize).copied().collect(),
        )
    } else {
        (0, Vec::<u64>::new())
    };
    let what =
        if suberror == 1 { "KVM can't emulate an instruction" } else { "KVM internal error" };
    format!("{what} (suberror {suberror}, data {data:x?}), {}", state(vcpu))
}

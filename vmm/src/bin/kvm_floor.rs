//! `kvm-floor`: the smallest program that runs an instruction in a KVM guest, as the floor that
//! launch benchmarks compare with. One memory slot, split interrupt chip, one vCPU in real mode,
//! one port write; then it exits 0.
//!
//! `kvm-floor [MEMORY_MIB [REPORT_FD [KVM_FD]]]`: with a report descriptor it writes the time of
//! the exit (CLOCK_MONOTONIC) and its CPU time there, two native `u64` of nanoseconds.
#![no_main]

use std::ffi::{c_char, c_int, c_ulong, c_void};
use std::ptr;

const KVM_CREATE_VM: c_ulong = 0xAE01;
const KVM_GET_VCPU_MMAP_SIZE: c_ulong = 0xAE04;
const KVM_CREATE_VCPU: c_ulong = 0xAE41;
const KVM_SET_USER_MEMORY_REGION: c_ulong = 0x4020_AE46;
const KVM_ENABLE_CAP: c_ulong = 0x4068_AEA3;
const KVM_RUN: c_ulong = 0xAE80;
const KVM_SET_REGS: c_ulong = 0x4090_AE82;
const KVM_GET_SREGS: c_ulong = 0x8138_AE83;
const KVM_SET_SREGS: c_ulong = 0x4138_AE84;

/// mov dx, 0x500; mov al, 1; out dx, al; hlt
const CODE: [u8; 7] = [0xBA, 0x00, 0x05, 0xB0, 0x01, 0xEE, 0xF4];
const CODE_AT: usize = 0x1000;

/// The program.
///
/// # Safety
/// Called by the C runtime with `argc` valid arguments.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn main(argc: c_int, argv: *const *const c_char) -> c_int {
    // SAFETY: every call gets pointers to live values of the kernel's layouts; results are checked.
    unsafe {
        let argument = |at: c_int| (at < argc).then(|| libc::atoi(*argv.add(at as usize)));
        let memory_bytes = argument(1).unwrap_or(128).max(1) as usize * (1 << 20);
        let kvm = match argument(3) {
            Some(descriptor) => descriptor,
            None => libc::open(c"/dev/kvm".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC),
        };
        let vm = libc::ioctl(kvm, KVM_CREATE_VM, 0);
        let size = libc::ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
        let memory =
            map(memory_bytes, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE, -1);
        if vm < 0 || size < 4096 || memory == libc::MAP_FAILED {
            return 1;
        }
        ptr::copy_nonoverlapping(CODE.as_ptr(), memory.cast::<u8>().add(CODE_AT), CODE.len());
        let slot: [u64; 4] = [0, 0, memory_bytes as u64, memory as u64];
        let mut split_irqchip = [0u32; 26];
        (split_irqchip[0], split_irqchip[2]) = (121, 24);
        if libc::ioctl(vm, KVM_SET_USER_MEMORY_REGION, slot.as_ptr()) < 0
            || libc::ioctl(vm, KVM_ENABLE_CAP, split_irqchip.as_ptr()) < 0
        {
            return 2;
        }
        let vcpu = libc::ioctl(vm, KVM_CREATE_VCPU, 0);
        let run = map(size as usize, libc::MAP_SHARED, vcpu);
        if vcpu < 0 || run == libc::MAP_FAILED || start(vcpu) < 0 {
            return 3;
        }
        loop {
            if libc::ioctl(vcpu, KVM_RUN, 0) == 0 {
                break;
            }
            if !matches!(*libc::__errno_location(), libc::EINTR | libc::EAGAIN) {
                return 4;
            }
        }
        const EXIT_REASON: usize = 8;
        const KVM_EXIT_IO: u32 = 2;
        if run.cast::<u8>().add(EXIT_REASON).cast::<u32>().read() != KVM_EXIT_IO {
            return 5;
        }
        if let Some(report) = argument(2) {
            let times = [clock_ns(libc::CLOCK_MONOTONIC), clock_ns(libc::CLOCK_PROCESS_CPUTIME_ID)];
            libc::write(report, times.as_ptr().cast(), 16);
        }
        libc::_exit(0)
    }
}

unsafe fn clock_ns(clock: libc::clockid_t) -> u64 {
    // SAFETY: `now` is a live timespec.
    unsafe {
        let mut now: libc::timespec = std::mem::zeroed();
        libc::clock_gettime(clock, &raw mut now);
        now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
    }
}

/// Real mode at `CODE_AT`.
unsafe fn start(vcpu: c_int) -> c_int {
    // SAFETY: 312 and 144 bytes are the sizes of kvm_sregs and kvm_regs, of integers only.
    unsafe {
        let mut sregs = [0u64; 39];
        if libc::ioctl(vcpu, KVM_GET_SREGS, sregs.as_mut_ptr()) < 0 {
            return -1;
        }
        // cs: base, then limit (32 bits), selector (16 bits).
        sregs[0] = 0;
        sregs[1] &= !(0xFFFF << 32);
        if libc::ioctl(vcpu, KVM_SET_SREGS, sregs.as_ptr()) < 0 {
            return -1;
        }
        let mut regs = [0u64; 18];
        (regs[16], regs[17]) = (CODE_AT as u64, 2);
        libc::ioctl(vcpu, KVM_SET_REGS, regs.as_ptr())
    }
}

unsafe fn map(len: usize, flags: c_int, descriptor: c_int) -> *mut c_void {
    // SAFETY: a fresh mapping at an address of the kernel's choice.
    unsafe {
        libc::mmap(ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, descriptor, 0)
    }
}

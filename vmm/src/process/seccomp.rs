//! The system calls a guest's process may make once its machine is built: enough to run, to serve
//! its devices and control socket and to plug descriptors it is sent; not to open a path, make or
//! connect a socket, or start a program.
//!
//! A call outside of the list ends the process, and its exit record names the call.

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};
use std::os::fd::RawFd;
use std::sync::OnceLock;

/// Calls allowed with any arguments.
const CALLS: &[libc::c_long] = &[
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_fdatasync,
    libc::SYS_fallocate,
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_close,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_futex,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_accept4,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_eventfd2,
    libc::SYS_clone,
    libc::SYS_clone3,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigreturn,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_tgkill,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_getrandom,
    libc::SYS_restart_syscall,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// `ioctl` requests that are allowed.
const IOCTLS: &[u32] = &[
    0xAE80,      // KVM_RUN
    0x4020_AEA5, // KVM_SIGNAL_MSI
    0x4040_AE79, // KVM_IOEVENTFD
    0x8090_AE81, // KVM_GET_REGS
    0x4090_AE82, // KVM_SET_REGS
    0x8138_AE83, // KVM_GET_SREGS
    0x5421,      // FIONBIO
];

/// `fcntl` commands that are allowed.
const FCNTLS: &[libc::c_int] =
    &[libc::F_DUPFD_CLOEXEC, libc::F_GETFD, libc::F_GETFL, libc::F_GET_SEALS];

/// Compiles the filter: once for all guests.
pub fn compile() -> Result<BpfProgram, seccompiler::BackendError> {
    let one_of = |argument: u8, values: Vec<u64>| {
        values
            .into_iter()
            .map(|value| {
                let condition = SeccompCondition::new(
                    argument,
                    SeccompCmpArgLen::Dword,
                    SeccompCmpOp::Eq,
                    value,
                )?;
                SeccompRule::new(vec![condition])
            })
            .collect::<Result<Vec<_>, _>>()
    };
    let mut rules: std::collections::BTreeMap<i64, Vec<SeccompRule>> =
        CALLS.iter().map(|call| (*call, Vec::new())).collect();
    rules.insert(
        libc::SYS_ioctl,
        one_of(1, IOCTLS.iter().map(|request| u64::from(*request)).collect())?,
    );
    rules.insert(
        libc::SYS_fcntl,
        one_of(1, FCNTLS.iter().map(|command| *command as u64).collect())?,
    );
    rules.insert(libc::SYS_prctl, one_of(0, vec![libc::PR_SET_NAME as u64])?);
    SeccompFilter::new(rules, SeccompAction::Trap, SeccompAction::Allow, TargetArch::x86_64)?
        .try_into()
}

/// What the signal handler writes, prepared while allocation is possible.
struct Verdict {
    record: RawFd,
    json: Vec<u8>,
    digits_at: usize,
}

static VERDICT: OnceLock<Verdict> = OnceLock::new();
const PLACEHOLDER: &str = "00000";

/// Closes the process: from here on only the listed calls are possible, for this thread and every
/// thread it starts. `record` gets the exit record of a violation.
pub fn apply(
    filter: &BpfProgram,
    record: Option<RawFd>,
    nonce: &str,
) -> Result<(), seccompiler::Error> {
    let exit = crate::control::ExitRecord {
        nonce: nonce.into(),
        reason: "error".into(),
        code: None,
        message: format!("system call {PLACEHOLDER} is not allowed in the sandbox"),
        cpu_ns: 0,
        timings: Default::default(),
    };
    let json = serde_json::to_vec(&exit).unwrap_or_default();
    let needle = format!("system call {PLACEHOLDER}");
    let digits_at =
        json.windows(needle.len()).position(|window| window == needle.as_bytes()).unwrap_or(0)
            + needle.len()
            - PLACEHOLDER.len();
    let _ = VERDICT.set(Verdict { record: record.unwrap_or(-1), json, digits_at });
    // SAFETY: a zeroed sigaction is valid; the handler is async-signal-safe.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = violation
            as extern "C" fn(libc::c_int, *const libc::siginfo_t, *mut libc::c_void)
            as usize;
        action.sa_flags = libc::SA_SIGINFO;
        libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut());
    }
    seccompiler::apply_filter(filter)
}

/// Offset of `si_syscall` in `siginfo_t` of a SIGSYS.
const SI_SYSCALL: usize = 24;

extern "C" fn violation(_: libc::c_int, info: *const libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a siginfo_t; for SIGSYS the call's number is at this offset.
    let mut number = unsafe { info.cast::<u8>().add(SI_SYSCALL).cast::<u32>().read_unaligned() };
    let mut text = [0u8; 2048];
    if let Some(verdict) = VERDICT.get() {
        let len = verdict.json.len().min(text.len());
        text[..len].copy_from_slice(&verdict.json[..len]);
        for place in (0..PLACEHOLDER.len()).rev() {
            if let Some(byte) = text.get_mut(verdict.digits_at + place) {
                *byte = b'0' + (number % 10) as u8;
            }
            number /= 10;
        }
        // SAFETY: write and pwrite are async-signal-safe; the buffer is ours.
        unsafe {
            libc::pwrite(verdict.record, text.as_ptr().cast(), len, 0);
            libc::write(2, text.as_ptr().cast(), len);
        }
    }
    super::ending::exit(super::ending::EXIT_CODE_FAILED)
}

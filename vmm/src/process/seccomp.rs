//! The system calls a guest's process may make once its machine is built: enough to run, to serve
//! its devices and control socket and to plug descriptors it is sent; not to open a path, make or
//! connect a socket, or start a program.
//!
//! A call outside of the list ends the process, and its exit record names the call.

//!
//! The program is assembled here, one comparison a call: a compiler's general output is four
//! times as long, and the kernel's time to install it (0.2 ms) counts at every launch.

use std::io;
use std::os::fd::RawFd;
use std::sync::{Once, OnceLock};

/// A filter, ready to install.
pub type Program = Vec<libc::sock_filter>;

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
    // A disk's ring, made and restricted before; none can be made inside.
    libc::SYS_io_uring_enter,
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
    libc::SYS_shutdown,
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
    0x4138_AE84, // KVM_SET_SREGS
    0x4008_AE89, // KVM_SET_MSRS
    0x5421,      // FIONBIO
];

/// `fcntl` commands that are allowed.
const FCNTLS: &[libc::c_int] =
    &[libc::F_DUPFD_CLOEXEC, libc::F_GETFD, libc::F_GETFL, libc::F_GET_SEALS];

/// `prctl` options that are allowed.
const PRCTLS: &[libc::c_int] = &[libc::PR_SET_NAME];

/// AUDIT_ARCH_X86_64.
const ARCH: u32 = 0xC000_003E;
// Offsets in `struct seccomp_data`; of an argument the low half, which is all that is compared.
const DATA_NR: u32 = 0;
const DATA_ARCH: u32 = 4;
const DATA_ARGS: u32 = 16;

const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;

/// Assembles the filter: once for all guests.
pub fn compile() -> Program {
    let with_argument: [(libc::c_long, u32, Vec<u32>); 3] = [
        (libc::SYS_ioctl, 1, IOCTLS.to_vec()),
        (libc::SYS_fcntl, 1, FCNTLS.iter().map(|command| *command as u32).collect()),
        (libc::SYS_prctl, 0, PRCTLS.iter().map(|option| *option as u32).collect()),
    ];
    let code = |code: u16, k: u32| libc::sock_filter { code, jt: 0, jf: 0, k };
    let allow = code(RETURN, libc::SECCOMP_RET_ALLOW);
    let trap = code(RETURN, libc::SECCOMP_RET_TRAP);
    // Where the value is not `k`, the next `skip` instructions are skipped.
    let unless = |k: u32, skip: u8| libc::sock_filter { code: EQUAL, jt: 0, jf: skip, k };
    let mut program = vec![
        code(LOAD, DATA_ARCH),
        libc::sock_filter { code: EQUAL, jt: 1, jf: 0, k: ARCH },
        trap,
        code(LOAD, DATA_NR),
    ];
    for (call, argument, values) in with_argument {
        // Load, one comparison a value, refusal, leave to proceed.
        program.push(unless(call as u32, values.len() as u8 + 3));
        program.push(code(LOAD, DATA_ARGS + argument * 8));
        for (index, value) in values.iter().enumerate() {
            let to_allow = (values.len() - index) as u8;
            program.push(libc::sock_filter { code: EQUAL, jt: to_allow, jf: 0, k: *value });
        }
        program.extend([trap, allow]);
    }
    for (index, call) in CALLS.iter().enumerate() {
        let to_allow = (CALLS.len() - index) as u8;
        program.push(libc::sock_filter { code: EQUAL, jt: to_allow, jf: 0, k: *call as u32 });
    }
    program.extend([trap, allow]);
    program
}

/// What the signal handler writes, prepared while allocation is possible.
struct Verdict {
    record: RawFd,
    json: Vec<u8>,
    digits_at: usize,
}

static VERDICT: OnceLock<Verdict> = OnceLock::new();
const PLACEHOLDER: &str = "00000";

/// Installs the handler of violations; once, and forked processes have it too.
pub fn prepare() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        // SAFETY: a zeroed sigaction is valid; the handler is async-signal-safe.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = violation
                as extern "C" fn(libc::c_int, *const libc::siginfo_t, *mut libc::c_void)
                as usize;
            action.sa_flags = libc::SA_SIGINFO;
            libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut());
        }
    });
}

/// Closes the process: from here on only the listed calls are possible, for this thread and every
/// thread it starts. `record` gets the exit record of a violation.
pub fn apply(filter: &Program, record: Option<RawFd>, nonce: &str) -> io::Result<()> {
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
    prepare();
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_ptr().cast_mut() };
    // SAFETY: the program lives through the call and its length is right; the kernel checks it.
    let result = unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the program as the kernel does.
    fn verdict(program: &Program, arch: u32, call: libc::c_long, arguments: [u64; 2]) -> u32 {
        let (mut at, mut value) = (0, 0);
        for _ in 0..program.len() {
            let step = program[at];
            at += 1;
            match (step.code, step.k) {
                (LOAD, DATA_ARCH) => value = arch,
                (LOAD, DATA_NR) => value = call as u32,
                (LOAD, offset) => value = arguments[(offset - DATA_ARGS) as usize / 8] as u32,
                (EQUAL, k) => at += usize::from(if value == k { step.jt } else { step.jf }),
                (RETURN, verdict) => return verdict,
                (code, _) => panic!("instruction {code:#x}"),
            }
        }
        panic!("the program does not end");
    }

    #[test]
    fn exactly_the_listed_calls_are_allowed() {
        let program = compile();
        assert!(program.len() < 128, "{} instructions", program.len());
        let allowed =
            |call, arguments| verdict(&program, ARCH, call, arguments) == libc::SECCOMP_RET_ALLOW;
        for call in 0..600 {
            let listed = CALLS.contains(&call);
            assert_eq!(allowed(call, [u64::MAX, u64::MAX]), listed, "call {call}");
        }
        for request in IOCTLS {
            assert!(allowed(libc::SYS_ioctl, [3, u64::from(*request)]));
        }
        assert!(!allowed(libc::SYS_ioctl, [3, 0x5412]));
        assert!(allowed(libc::SYS_fcntl, [3, libc::F_DUPFD_CLOEXEC as u64]));
        assert!(!allowed(libc::SYS_fcntl, [3, libc::F_SETFL as u64]));
        assert!(allowed(libc::SYS_prctl, [libc::PR_SET_NAME as u64, 0]));
        assert!(!allowed(libc::SYS_prctl, [libc::PR_SET_DUMPABLE as u64, 0]));
        // The 32-bit and x32 interfaces have other numbers for the same calls.
        assert_ne!(verdict(&program, 0x4000_0003, libc::SYS_read, [0; 2]), libc::SECCOMP_RET_ALLOW);
        assert!(!allowed(libc::SYS_read | 0x4000_0000, [0; 2]));
    }
}

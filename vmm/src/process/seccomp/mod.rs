//! The system calls a guest's process may make once its machine is built: enough to run, to serve
//! its devices and control socket and to plug descriptors it is sent; not to open a path, make or
//! connect a socket, or start a program.
//!
//! Each kind of thread has a list of its own ([`lists`]). A call outside of it ends the process, and
//! its exit record names the call.
//!
//! The programs are assembled here, one comparison a call: a compiler's general output is four
//! times as long, and the kernel's time to install it (0.2 ms) counts at every launch.

pub mod lists;

pub use lists::Role;

use lists::Allowed;
use std::cell::Cell;
use std::io;
use std::os::fd::RawFd;
use std::sync::{Once, OnceLock};

/// A filter, ready to install.
pub type Program = Vec<libc::sock_filter>;

/// The filter of every kind of thread, assembled once for all guests of a host.
#[derive(Clone)]
pub struct Filters(Vec<(Role, Program)>);

impl Filters {
    /// Assembles them.
    pub fn compile() -> Filters {
        Filters(Role::ALL.iter().map(|role| (*role, compile(&role.allowed()))).collect())
    }

    fn of(&self, role: Role) -> io::Result<&Program> {
        let found = self.0.iter().find(|(listed, _)| *listed == role);
        found.map(|(_, program)| program).ok_or_else(|| {
            io::Error::other(format!("a {} thread has no list of calls", role.thread_name()))
        })
    }
}

/// AUDIT_ARCH_X86_64.
const ARCH: u32 = 0xC000_003E;
// Offsets in `struct seccomp_data`; of an argument the low half, which is all that is compared.
const DATA_NR: u32 = 0;
const DATA_ARCH: u32 = 4;
const DATA_ARGS: u32 = 16;

const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;

/// Assembles the filter that allows exactly `allowed`.
fn compile(allowed: &Allowed) -> Program {
    let with_argument = [
        (libc::SYS_ioctl, 1, &allowed.ioctls),
        (libc::SYS_fcntl, 1, &allowed.fcntls),
        (libc::SYS_prctl, 0, &allowed.prctls),
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
    for (index, call) in allowed.calls.iter().enumerate() {
        let to_allow = (allowed.calls.len() - index) as u8;
        program.push(libc::sock_filter { code: EQUAL, jt: to_allow, jf: 0, k: *call as u32 });
    }
    program.extend([trap, allow]);
    program
}

/// What the signal handler writes, prepared while allocation is possible: the exit record around
/// what only the violation itself tells.
struct Verdict {
    record: RawFd,
    before: Vec<u8>,
    after: Vec<u8>,
}

static VERDICT: OnceLock<Verdict> = OnceLock::new();
static FILTERS: OnceLock<Filters> = OnceLock::new();
const PLACEHOLDER: &str = "system call @";

thread_local! {
    /// Which thread this is, for the record of a violation.
    static THREAD: Cell<&'static str> = const { Cell::new("starting") };
}

/// Parts of the heap, which threads share. Without a number the C library's allocator opens a file
/// to count processors once a process has more than eight threads, which no closed thread may.
const ARENAS_MAX: libc::c_int = 4;

/// Installs the handler of violations and settles what the C library would look up later; once,
/// and forked processes have it too.
pub fn prepare() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        // SAFETY: plain call on integers.
        unsafe { libc::mallopt(libc::M_ARENA_MAX, ARENAS_MAX) };
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

/// Prepares this process for [`narrow`]: which filters there are, and that `record` gets the exit
/// record of a violation.
pub fn arm(filters: Filters, record: Option<RawFd>, nonce: &str) {
    let exit = crate::control::ExitRecord {
        nonce: nonce.into(),
        reason: "error".into(),
        code: None,
        message: PLACEHOLDER.into(),
        cpu_ns: 0,
        timings: Default::default(),
    };
    let mut before = serde_json::to_vec(&exit).unwrap_or_default();
    let message =
        before.windows(PLACEHOLDER.len()).rposition(|part| part == PLACEHOLDER.as_bytes());
    let after = before.split_off(message.map_or(before.len(), |at| at + PLACEHOLDER.len()));
    before.pop();
    let _ = VERDICT.set(Verdict { record: record.unwrap_or(-1), before, after });
    prepare();
    let _ = FILTERS.set(filters);
}

/// Closes the calling thread, and every thread it starts, to the calls of `role`, below what
/// closes it already. In a process that was never prepared (a test of a device alone) it does
/// nothing.
pub fn narrow(role: Role) -> io::Result<()> {
    let Some(filters) = FILTERS.get() else { return Ok(()) };
    let filter = filters.of(role)?;
    THREAD.set(role.thread_name());
    install(filter)
}

/// Says that the calling thread was started by one of `role` and stands under its filter.
pub fn belongs_to(role: Role) {
    THREAD.set(role.thread_name());
}

fn install(filter: &Program) -> io::Result<()> {
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
    let number = unsafe { info.cast::<u8>().add(SI_SYSCALL).cast::<u32>().read_unaligned() };
    if let Some(verdict) = VERDICT.get() {
        let digits = [10_000, 1_000, 100, 10, 1].map(|place| b'0' + (number / place % 10) as u8);
        let mut text = Text { bytes: [0; 2048], len: 0 };
        text.push(&verdict.before);
        text.push(&digits);
        text.push(b" is not allowed in the sandbox to its ");
        text.push(THREAD.get().as_bytes());
        text.push(b" thread");
        text.push(&verdict.after);
        // SAFETY: write and pwrite are async-signal-safe; the buffer is ours.
        unsafe {
            libc::pwrite(verdict.record, text.bytes.as_ptr().cast(), text.len, 0);
            libc::write(2, text.bytes.as_ptr().cast(), text.len);
        }
    }
    super::ending::exit(super::ending::EXIT_CODE_FAILED)
}

/// Text made without allocation.
struct Text {
    bytes: [u8; 2048],
    len: usize,
}

impl Text {
    fn push(&mut self, part: &[u8]) {
        for (to, from) in self.bytes[self.len..].iter_mut().zip(part) {
            *to = *from;
            self.len += 1;
        }
    }
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
        for role in Role::ALL {
            let list = role.allowed();
            let program = compile(&list);
            assert!(program.len() < 128, "{role:?}: {} instructions", program.len());
            let allowed = |call, arguments| {
                verdict(&program, ARCH, call, arguments) == libc::SECCOMP_RET_ALLOW
            };
            for call in 0..600 {
                let listed = list.calls.contains(&call);
                assert_eq!(allowed(call, [u64::MAX, u64::MAX]), listed, "{role:?}: call {call}");
            }
            for (call, at, values) in [
                (libc::SYS_ioctl, 1, &list.ioctls),
                (libc::SYS_fcntl, 1, &list.fcntls),
                (libc::SYS_prctl, 0, &list.prctls),
            ] {
                for value in (0..0x100).chain(list.ioctls.iter().copied()) {
                    let mut arguments = [0x5555; 2];
                    arguments[at] = u64::from(value);
                    let listed = values.contains(&value);
                    assert_eq!(allowed(call, arguments), listed, "{role:?}: {call} of {value:#x}");
                }
            }
            // The 32-bit and x32 interfaces have other numbers for the same calls.
            let other = verdict(&program, 0x4000_0003, libc::SYS_read, [0; 2]);
            assert_ne!(other, libc::SECCOMP_RET_ALLOW);
            assert!(!allowed(libc::SYS_read | 0x4000_0000, [0; 2]));
        }
    }

    #[test]
    fn a_vcpu_may_do_what_the_devices_threads_it_starts_may() {
        let vcpu = Role::Vcpu.allowed();
        for role in Role::ALL.into_iter().filter(|role| matches!(role, Role::Device(_))) {
            let device = role.allowed();
            assert!(device.calls.iter().all(|call| vcpu.calls.contains(call)), "{role:?}");
            assert!(device.ioctls.iter().all(|request| vcpu.ioctls.contains(request)), "{role:?}");
        }
    }

    #[test]
    fn nothing_that_opens_makes_or_connects_is_on_a_list() {
        let never = [
            libc::SYS_open,
            libc::SYS_openat,
            libc::SYS_openat2,
            libc::SYS_creat,
            libc::SYS_socket,
            libc::SYS_connect,
            libc::SYS_bind,
            libc::SYS_listen,
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_fork,
            libc::SYS_vfork,
            libc::SYS_ptrace,
            libc::SYS_process_vm_writev,
            libc::SYS_pidfd_getfd,
            libc::SYS_kill,
            libc::SYS_setuid,
            libc::SYS_setresuid,
            libc::SYS_unshare,
            libc::SYS_setns,
            libc::SYS_mount,
            libc::SYS_bpf,
            libc::SYS_unlink,
            libc::SYS_unlinkat,
            libc::SYS_mkdir,
            libc::SYS_rename,
            libc::SYS_memfd_create,
            libc::SYS_chroot,
            libc::SYS_pivot_root,
        ];
        for role in Role::ALL {
            let list = role.allowed();
            assert!(never.iter().all(|call| !list.calls.contains(call)), "{role:?}");
        }
    }
}

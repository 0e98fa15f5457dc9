//! The system calls of one launch, counted with ptrace: a figure that does not depend on how busy
//! or how fast the machine is.
//!
//! ```text
//!   spawner ──fork──▶ guest's process ──calls──▶ its first KVM_RUN ──▶ … ──▶ its end
//!                     └──────── counted ───────┘
//! ```
//! The thread that traces is the one that asked the kernel for it, and ptrace knows a tracer only
//! as a thread; so it has a thread of its own, and its end sets free what it traced.

use super::BenchError;
use crate::spawner::Client;
use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::Duration;

/// `ioctl` that enters the guest.
const KVM_RUN: u64 = 0xAE80;
/// How long the tracer sleeps where nothing has happened.
const LOOK: Duration = Duration::from_micros(100);
const OPTIONS: libc::c_int = libc::PTRACE_O_TRACESYSGOOD
    | libc::PTRACE_O_TRACEFORK
    | libc::PTRACE_O_TRACEVFORK
    | libc::PTRACE_O_TRACECLONE;
const SYSCALL_STOP: libc::c_int = libc::SIGTRAP | 0x80;

/// System calls between the fork of a guest's process and its first entry into the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Calls {
    /// Their numbers, in order, of all threads of the process.
    pub numbers: Vec<i64>,
}

impl Calls {
    /// How often each one was made, by its number.
    pub fn by_number(&self) -> BTreeMap<i64, usize> {
        let mut counts = BTreeMap::new();
        for number in &self.numbers {
            *counts.entry(*number).or_default() += 1;
        }
        counts
    }
}

/// Runs `launch`, which starts one guest by `spawner`, and counts the calls that guest's process
/// makes before its first `KVM_RUN`. Times of a traced launch mean nothing.
///
/// # Errors
/// What `launch` says, or why this host does not let the spawner be traced.
pub fn count<T>(
    spawner: &Client,
    launch: impl FnOnce() -> Result<T, BenchError>,
) -> Result<(T, Calls), BenchError> {
    let pid = spawner.pid() as libc::pid_t;
    let (ready, is_ready) = mpsc::channel();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let tracer = scope.spawn(|| {
            let attached = request(libc::PTRACE_SEIZE, pid, OPTIONS as usize);
            let failed = attached.is_err();
            let _ = ready.send(attached);
            if failed { Calls::default() } else { Tracer::new(pid).run(&done) }
        });
        let attached = is_ready.recv().map_err(io::Error::other).and_then(|attached| attached);
        let launched = match attached {
            Ok(()) => launch(),
            Err(error) => Err(BenchError::Trace(error)),
        };
        done.store(true, Ordering::Release);
        let calls = tracer.join().unwrap_or_default();
        Ok((launched?, calls))
    })
}

/// Follows the spawner and what it forks.
struct Tracer {
    spawner: libc::pid_t,
    calls: Calls,
    entered: bool,
}

impl Tracer {
    fn new(spawner: libc::pid_t) -> Tracer {
        Tracer { spawner, calls: Calls::default(), entered: false }
    }

    /// Until the launch is over and nothing more happens.
    fn run(mut self, done: &AtomicBool) -> Calls {
        loop {
            let over = done.load(Ordering::Acquire);
            let mut status = 0;
            // Only what this thread traces: others of this process wait for their own children.
            let flags = libc::__WALL | libc::__WNOTHREAD | libc::WNOHANG;
            // SAFETY: `status` is ours.
            match unsafe { libc::waitpid(-1, &raw mut status, flags) } {
                ..0 => return self.calls,
                0 if over => return self.calls,
                0 => std::thread::sleep(LOOK),
                task => self.stopped(task, status),
            }
        }
    }

    fn stopped(&mut self, task: libc::pid_t, status: libc::c_int) {
        if !libc::WIFSTOPPED(status) {
            return;
        }
        let signal = libc::WSTOPSIG(status);
        if signal == SYSCALL_STOP && task != self.spawner && !self.entered {
            self.called(task);
        }
        // The spawner's own calls are none of the guest's; after its entry none matter.
        let quiet = task == self.spawner || self.entered;
        let resume = if quiet { libc::PTRACE_CONT } else { libc::PTRACE_SYSCALL };
        let is_event = status >> 16 != 0 || signal == SYSCALL_STOP;
        let deliver = if is_event { 0 } else { signal as usize };
        // A task that was killed meanwhile is gone, and that is all.
        let _ = request(resume, task, deliver);
    }

    /// Notes the call that `task` is about to make; its return is not counted.
    fn called(&mut self, task: libc::pid_t) {
        let Some((number, second)) = entry(task) else { return };
        if number == libc::SYS_ioctl && second == KVM_RUN {
            self.entered = true;
        } else if (number, second) != (libc::SYS_fcntl, libc::F_GETFD as u64) {
            // The standard library's look at each descriptor it closes, in debug builds only.
            self.calls.numbers.push(number);
        }
    }
}

/// Words of `struct ptrace_syscall_info` that are read: up to the second argument.
const INFO_WORDS: usize = 11;
const INFO_ENTRY: u64 = 1;

/// Number and second argument of the call that a stopped task is about to make.
fn entry(task: libc::pid_t) -> Option<(i64, u64)> {
    let mut info = [0u64; INFO_WORDS];
    // SAFETY: the kernel writes at most the size that is passed, into memory of ours.
    let len = unsafe {
        libc::ptrace(
            libc::PTRACE_GET_SYSCALL_INFO,
            task,
            size_of_val(&info),
            info.as_mut_ptr().cast::<libc::c_void>(),
        )
    };
    // op is one byte; number and arguments are words 3 and 4 onwards.
    (len > 0 && info[0] & 0xFF == INFO_ENTRY).then_some((info[3] as i64, info[5]))
}

fn request(what: TraceRequest, task: libc::pid_t, data: usize) -> io::Result<()> {
    // SAFETY: these requests take integers only.
    match unsafe { libc::ptrace(what, task, std::ptr::null_mut::<libc::c_void>(), data) } {
        ..0 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// The type that the C library gives requests.
#[cfg(target_env = "gnu")]
type TraceRequest = libc::c_uint;
#[cfg(not(target_env = "gnu"))]
type TraceRequest = libc::c_int;

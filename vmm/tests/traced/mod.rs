//! The system calls of a guest's process, thread by thread, seen with ptrace; and one of them turned
//! into another, to see what the sandbox says to it.
//!
//! A thread stands under the filters that it and those who started it took. A call counts for each
//! of them: a vCPU's filter is used by the device's thread that it started.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

const SYSCALL_STOP: i32 = libc::SIGTRAP | 0x80;
const OPTIONS: i32 = libc::PTRACE_O_TRACESYSGOOD
    | libc::PTRACE_O_TRACEFORK
    | libc::PTRACE_O_TRACEVFORK
    | libc::PTRACE_O_TRACECLONE;

/// A call, and the argument that decides about it where one does.
pub(crate) type Call = (i64, Option<u32>);

/// What was called under the filter of each kind of thread.
pub(crate) type Used = BTreeMap<String, BTreeSet<Call>>;

/// Another number for the next call under the filter of a kind of thread.
#[derive(Clone)]
pub(crate) struct Swap {
    /// The thread's name.
    pub(crate) thread: &'static str,
    /// The number of the call that it makes instead.
    pub(crate) call: i64,
}

/// A tracer at work.
pub(crate) struct Tracing {
    done: Arc<AtomicBool>,
    thread: JoinHandle<Used>,
}

impl Tracing {
    /// Follows what process `spawner` forks from now on. Without a call to swap, no filter is
    /// installed, so that every call is seen, whether it is allowed or not.
    pub(crate) fn start(spawner: u32, swap: Option<Swap>) -> Tracing {
        let done = Arc::new(AtomicBool::new(false));
        let (ready, is_ready) = mpsc::channel();
        let over = Arc::clone(&done);
        let thread = std::thread::spawn(move || {
            let spawner = spawner as i32;
            // SAFETY: the request takes integers only.
            let attached = unsafe { libc::ptrace(libc::PTRACE_SEIZE, spawner, 0, OPTIONS) };
            assert_eq!(attached, 0, "trace: {}", std::io::Error::last_os_error());
            ready.send(()).unwrap();
            let open = swap.is_none();
            Tracer {
                open,
                spawner,
                swap,
                used: Used::new(),
                tasks: BTreeMap::new(),
                early: BTreeSet::new(),
            }
            .run(&over)
        });
        is_ready.recv().expect("the tracer is attached");
        Tracing { done, thread }
    }

    /// What was seen, once the guests have ended.
    pub(crate) fn finish(self) -> Used {
        self.done.store(true, Ordering::Release);
        self.thread.join().expect("the tracer ends")
    }
}

/// A task that is followed.
#[derive(Clone, Default)]
struct Task {
    /// The names of the filters over it, the oldest first.
    filters: Vec<String>,
    /// It is inside of `seccomp`.
    narrowing: bool,
}

struct Tracer {
    spawner: i32,
    open: bool,
    swap: Option<Swap>,
    used: Used,
    tasks: BTreeMap<i32, Task>,
    /// Tasks that stopped before the one that made them said so.
    early: BTreeSet<i32>,
}

impl Tracer {
    fn run(mut self, done: &AtomicBool) -> Used {
        self.tasks.insert(self.spawner, Task::default());
        loop {
            let over = done.load(Ordering::Acquire);
            let mut status = 0;
            let flags = libc::__WALL | libc::__WNOTHREAD | libc::WNOHANG;
            // SAFETY: `status` is ours.
            match unsafe { libc::waitpid(-1, &raw mut status, flags) } {
                0 if !over => std::thread::sleep(Duration::from_micros(50)),
                ..=0 => return self.used,
                task if libc::WIFSTOPPED(status) => self.stopped(task, status),
                task => drop(self.tasks.remove(&task)),
            }
        }
    }

    fn stopped(&mut self, task: i32, status: i32) {
        if !self.tasks.contains_key(&task) {
            self.early.insert(task);
            return;
        }
        let (signal, event) = (libc::WSTOPSIG(status), status >> 16);
        if event != 0 && event != libc::PTRACE_EVENT_STOP {
            self.made(task);
        }
        if signal == SYSCALL_STOP && task != self.spawner {
            self.called(task);
        }
        let deliver = if event != 0 || signal == SYSCALL_STOP { 0 } else { signal };
        self.go_on(task, deliver);
    }

    fn go_on(&self, task: i32, signal: i32) {
        let how = if task == self.spawner { libc::PTRACE_CONT } else { libc::PTRACE_SYSCALL };
        // SAFETY: the request takes integers only. A task that was killed meanwhile is gone.
        unsafe { libc::ptrace(how, task, 0, signal) };
    }

    /// `task` made another one, which stands under the same filters.
    fn made(&mut self, task: i32) {
        let mut new: libc::c_ulong = 0;
        // SAFETY: the kernel writes one word, which is ours.
        unsafe { libc::ptrace(libc::PTRACE_GETEVENTMSG, task, 0, &raw mut new) };
        let new = new as i32;
        let filters = self.tasks.get(&task).map(|task| task.filters.clone()).unwrap_or_default();
        self.tasks.insert(new, Task { filters, narrowing: false });
        if self.early.remove(&new) {
            self.go_on(new, 0);
        }
    }

    fn called(&mut self, task: i32) {
        // SAFETY: zeroed registers are valid; the kernel fills them.
        let mut registers: libc::user_regs_struct = unsafe { std::mem::zeroed() };
        let mut info = [0u64; 11];
        // SAFETY: both requests write at most the size of what is passed, which is ours.
        unsafe {
            libc::ptrace(libc::PTRACE_GETREGS, task, 0, &raw mut registers);
            let size = size_of_val(&info);
            libc::ptrace(libc::PTRACE_GET_SYSCALL_INFO, task, size, info.as_mut_ptr());
        }
        let is_entry = info[0] & 0xFF == 1;
        let call = registers.orig_rax as i64;
        let Some(state) = self.tasks.get_mut(&task) else { return };
        if !is_entry {
            if std::mem::take(&mut state.narrowing) {
                state.filters.push(name(task));
            }
            return;
        }
        state.narrowing = call == libc::SYS_seccomp;
        if state.narrowing && self.open {
            // It returns 0 as well, and nothing is closed.
            registers.orig_rax = libc::SYS_sched_yield as u64;
            // SAFETY: the registers are those of the stopped task, but for the call's number.
            unsafe { libc::ptrace(libc::PTRACE_SETREGS, task, 0, &raw const registers) };
        }
        let argument = match call {
            libc::SYS_ioctl | libc::SYS_fcntl => Some(registers.rsi as u32),
            libc::SYS_prctl => Some(registers.rdi as u32),
            _ => None,
        };
        for filter in &state.filters {
            self.used.entry(filter.clone()).or_default().insert((call, argument));
        }
        let under = state.filters.last().cloned();
        if let Some(swap) = self.swap.take_if(|swap| under.as_deref() == Some(swap.thread)) {
            registers.orig_rax = swap.call as u64;
            // SAFETY: the registers are those of the stopped task, but for the call's number.
            unsafe { libc::ptrace(libc::PTRACE_SETREGS, task, 0, &raw const registers) };
        }
    }
}

/// The kind of a thread, by its name.
fn name(task: i32) -> String {
    let name = std::fs::read_to_string(format!("/proc/{task}/comm")).unwrap_or_default();
    match name.trim() {
        "control" | "disk" | "net" | "rng" | "balloon" | "vsock" => name.trim().into(),
        _ => "vcpu".into(),
    }
}

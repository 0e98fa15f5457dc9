//! Pausing and resuming vCPUs.
//!
//! ```text
//!   running ──pause()──▶ pausing ──every vCPU parked──▶ paused ──resume()──▶ running
//! ```
//! A vCPU is told by a signal and by `immediate_exit`, so that the request is seen whether it is
//! in the guest, on its way there, or in an exit.

use kvm_ioctls::VcpuFd;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, Once, PoisonError};
use std::time::Duration;

/// How long `pause` waits for the vCPUs to come out of the guest.
const PAUSE_TIMEOUT: Duration = Duration::from_secs(5);

/// Holds vCPUs back while the guest is paused.
pub struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

struct GateState {
    paused: bool,
    parked: usize,
    vcpus: Vec<Option<Kick>>,
}

/// How to reach a vCPU's thread.
struct Kick {
    thread: libc::pthread_t,
    immediate_exit: *const AtomicU8,
}

// SAFETY: the pointer is into a mapping of `kvm_run` that lives until the process ends, and the
// byte is only written atomically; a thread id may be used from any thread.
unsafe impl Send for Kick {}

impl Gate {
    /// An open gate for `vcpus` vCPUs.
    pub fn new(vcpus: usize) -> Gate {
        prepare();
        let vcpus = (0..vcpus).map(|_| None).collect();
        Gate {
            state: Mutex::new(GateState { paused: false, parked: 0, vcpus }),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, GateState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Called by a vCPU's own thread before its first run.
    pub fn enter(&self, id: usize, vcpu: &mut VcpuFd) {
        let byte = &raw const vcpu.get_kvm_run().immediate_exit;
        // SAFETY: always safe to ask for one's own thread.
        let thread = unsafe { libc::pthread_self() };
        if let Some(slot) = self.lock().vcpus.get_mut(id) {
            *slot = Some(Kick { thread, immediate_exit: byte.cast() });
        }
        self.pass();
    }

    /// Waits while the guest is paused.
    pub fn pass(&self) {
        let mut state = self.lock();
        if !state.paused {
            return;
        }
        state.parked += 1;
        self.changed.notify_all();
        while state.paused {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.parked -= 1;
    }

    /// Stops the vCPUs; `false` where one did not come out of the guest in time.
    pub fn pause(&self) -> bool {
        let mut state = self.lock();
        state.paused = true;
        for kick in state.vcpus.iter().flatten() {
            // SAFETY: see `Kick`: the byte stays mapped, and vCPU threads end only with the process.
            unsafe {
                (*kick.immediate_exit).store(1, Ordering::SeqCst);
                libc::pthread_kill(kick.thread, kick_signal());
            }
        }
        let all = state.vcpus.len();
        let waited = self
            .changed
            .wait_timeout_while(state, PAUSE_TIMEOUT, |state| state.paused && state.parked < all);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        state.parked == all
    }

    /// Lets the vCPUs run.
    pub fn resume(&self) {
        self.lock().paused = false;
        self.changed.notify_all();
    }

    /// How many vCPUs there are.
    pub fn vcpus(&self) -> usize {
        self.lock().vcpus.len()
    }

    /// Whether the guest is paused.
    pub fn is_paused(&self) -> bool {
        self.lock().paused
    }
}

fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

extern "C" fn interrupted(_: libc::c_int) {}

/// Installs the handler of the signal, which only has to interrupt `KVM_RUN`; once, and forked
/// processes have it too.
pub fn prepare() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        // SAFETY: a zeroed sigaction is valid; the handler does nothing.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = interrupted as extern "C" fn(libc::c_int) as usize;
            libc::sigaction(kick_signal(), &raw const action, std::ptr::null_mut());
        }
    });
}

//! When the steps of a launch happened.

use crate::control::Timings;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// CLOCK_MONOTONIC, nanoseconds.
pub fn now_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// CPU time of this process, nanoseconds.
pub fn cpu_ns() -> u64 {
    let used = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    used.tv_sec as u64 * 1_000_000_000 + used.tv_nsec as u64
}

/// [`Timings`] that threads fill in; each is written once.
#[derive(Debug, Default)]
pub struct Clock {
    /// See [`Timings::spawn_ns`].
    pub spawn: Mark,
    /// See [`Timings::process_ns`].
    pub process: Mark,
    /// See [`Timings::run_ns`].
    pub run: Mark,
    /// See [`Timings::first_exit_ns`].
    pub first_exit: Mark,
    /// See [`Timings::main_ns`].
    pub main: Mark,
    /// See [`Timings::network_ns`].
    pub network: Mark,
    /// See [`Timings::console_ns`].
    pub console: Mark,
    exits_to_main: AtomicU32,
}

impl Clock {
    /// The times so far.
    pub fn timings(&self) -> Timings {
        Timings {
            spawn_ns: self.spawn.get(),
            process_ns: self.process.get(),
            run_ns: self.run.get(),
            first_exit_ns: self.first_exit.get(),
            main_ns: self.main.get(),
            network_ns: self.network.get(),
            console_ns: self.console.get(),
            exits_to_main: self.exits_to_main.load(Ordering::Relaxed),
        }
    }

    /// The guest caused an exit.
    pub fn exited(&self) {
        self.first_exit.reach();
        if self.main.get() == 0 {
            self.exits_to_main.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// The time something first happened, or 0.
#[derive(Debug, Default)]
pub struct Mark(AtomicU64);

impl Mark {
    /// Records the time, the first time.
    pub fn reach(&self) {
        if self.0.load(Ordering::Relaxed) == 0 {
            self.set(now_ns());
        }
    }

    /// Records a given time.
    pub fn set(&self, ns: u64) {
        let _ = self.0.compare_exchange(0, ns, Ordering::Relaxed, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

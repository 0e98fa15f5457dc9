//! The end of a guest: its exit record, then the process.
//!
//! Nothing is torn down: closing a VM with devices takes milliseconds, which the kernel spends
//! after the record is there.

use crate::control::{ExitRecord, Timings};
use crate::machine::vcpu::End;
use crate::process::timings::cpu_ns;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;

/// Exit code of the process where the guest gave none.
pub const EXIT_CODE_FAILED: u8 = 125;

/// Why the process ends.
#[derive(Clone, Debug)]
pub enum Cause {
    /// The guest ended.
    Guest(End),
    /// It was asked to kill the guest.
    Killed,
}

/// What is said on standard error at the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Speak {
    /// Nothing: someone reads the record.
    Nothing,
    /// How it ended, where that was not the guest's own wish.
    Failures,
    /// That, and how long the start took.
    BootTimer,
}

/// What is needed to end.
pub struct Ending {
    record: Option<File>,
    nonce: String,
    speak: Speak,
    once: Mutex<()>,
}

impl Ending {
    /// `record` receives the exit record.
    pub fn new(record: Option<File>, nonce: String, speak: Speak) -> Ending {
        Ending { record, nonce, speak, once: Mutex::new(()) }
    }

    /// Writes the record and ends the process; of several threads the first one wins.
    pub fn end(&self, cause: Cause, timings: Timings) -> ! {
        let _first = self.once.lock();
        let record = record(cause, self.nonce.clone(), timings);
        if let Some(file) = &self.record {
            let json = serde_json::to_vec(&record).unwrap_or_default();
            let _ = file.write_all_at(&json, 0);
        }
        if self.speak == Speak::BootTimer {
            eprintln!("trine-vmm: boot timer: {}", boot_timer(&timings));
        }
        if self.speak != Speak::Nothing && record.reason != "power_off" {
            eprintln!("trine-vmm: guest ended: {}: {}", record.reason, record.message);
        }
        exit(record.code.unwrap_or(EXIT_CODE_FAILED))
    }
}

/// The steps of the launch, each with its milliseconds since the request.
fn boot_timer(timings: &Timings) -> String {
    let since = |ns: u64| ns.saturating_sub(timings.spawn_ns) as f64 / 1e6;
    let steps = timings.steps();
    let steps: Vec<_> =
        steps.iter().map(|(step, ns)| format!("{step} {:.3} ms", since(*ns))).collect();
    steps.join(", ")
}

fn record(cause: Cause, nonce: String, timings: Timings) -> ExitRecord {
    let (reason, code, message) = match cause {
        Cause::Guest(End::PowerOff(code)) => {
            ("power_off", Some(code), format!("the guest ended with code {code}"))
        }
        Cause::Guest(End::Reset) => ("reset", None, "the guest asked for a reset".into()),
        Cause::Guest(End::Crash(message)) => ("crash", None, message),
        Cause::Guest(End::Error(message)) => ("error", None, message),
        Cause::Killed => ("killed", None, "ended by request".into()),
    };
    ExitRecord { nonce, reason: reason.into(), code, message, cpu_ns: cpu_ns(), timings }
}

/// Ends the process at once, without destructors.
pub fn exit(code: u8) -> ! {
    // SAFETY: _exit takes no memory and does not return.
    unsafe { libc::_exit(libc::c_int::from(code)) }
}

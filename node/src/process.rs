//! Processes that outlive the node: recorded by id and start time, held by pidfd. An id that was
//! taken by another process since is never signalled.

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

/// Which process: its id, and when it started since an id alone comes again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ProcessRecord {
    /// Process id.
    pub(crate) pid: u32,
    /// Start time, in the kernel's ticks since boot.
    pub(crate) start_ticks: u64,
    /// The kernel's boot id: ticks of another boot mean nothing.
    pub(crate) boot_id: BootId,
}

/// The kernel's boot id.
pub(crate) type BootId = [u8; 16];

/// A living process, held so that its id can't be taken by another.
pub(crate) struct Held {
    pidfd: OwnedFd,
}

impl ProcessRecord {
    /// The record of the living process `pid`.
    pub(crate) fn of(pid: u32) -> io::Result<ProcessRecord> {
        Ok(ProcessRecord { pid, start_ticks: start_ticks(pid)?, boot_id: boot_id() })
    }

    /// The record in a file; `None` where there is none or it makes no sense.
    pub(crate) fn read(path: &Path) -> Option<ProcessRecord> {
        serde_json::from_slice(&fs::read(path).ok()?).ok()
    }

    /// Writes the record.
    pub(crate) fn write(&self, path: &Path) -> io::Result<()> {
        crate::files::replace(path, &serde_json::to_vec(self)?)
    }

    /// Holds the process if it lives.
    pub(crate) fn hold(&self) -> Option<Held> {
        if self.boot_id != boot_id() {
            return None;
        }
        let pid = Pid::from_raw(i32::try_from(self.pid).ok()?)?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).ok()?;
        // The start time is read after the descriptor is there: if it matches, the descriptor is
        // of this very process.
        let same = start_ticks(self.pid).is_ok_and(|ticks| ticks == self.start_ticks);
        let held = Held { pidfd };
        (same && !held.has_ended()).then_some(held)
    }
}

impl Held {
    /// Takes over a pidfd.
    pub(crate) fn from_pidfd(pidfd: OwnedFd) -> Held {
        Held { pidfd }
    }

    /// Another hold on the same process.
    pub(crate) fn try_clone(&self) -> io::Result<Held> {
        Ok(Held { pidfd: self.pidfd.try_clone()? })
    }

    /// The pidfd alone.
    pub(crate) fn into_pidfd(self) -> OwnedFd {
        self.pidfd
    }

    /// The pidfd: readable once the process has ended.
    pub(crate) fn pidfd(&self) -> &OwnedFd {
        &self.pidfd
    }

    /// Sends a signal; a process that is gone is no error.
    pub(crate) fn signal(&self, signal: Signal) {
        let _ = pidfd_send_signal(&self.pidfd, signal);
    }

    /// Whether it has ended.
    pub(crate) fn has_ended(&self) -> bool {
        self.wait(Duration::ZERO)
    }

    /// Waits for its end; `false` where it still lives after `timeout`.
    pub(crate) fn wait(&self, timeout: Duration) -> bool {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let timeout = Timespec {
            tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(timeout.subsec_nanos()),
        };
        loop {
            match poll(&mut [PollFd::new(&self.pidfd, PollFlags::IN)], Some(&timeout)) {
                Err(rustix::io::Errno::INTR) => continue,
                result => return result.is_ok_and(|ready| ready > 0),
            }
        }
    }

    /// Ends it: politely first, then at once. `false` where it lives on even so.
    pub(crate) fn end(&self, grace: Duration) -> bool {
        self.signal(Signal::TERM);
        self.wait(grace) || self.kill()
    }

    /// Ends it at once.
    pub(crate) fn kill(&self) -> bool {
        self.signal(Signal::KILL);
        self.wait(Duration::from_secs(10))
    }
}

/// Field 22 of `/proc/PID/stat` (proc(5)); the name before it may hold blanks and brackets.
fn start_ticks(pid: u32) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let after_name = stat.rsplit_once(')').map(|(_, rest)| rest);
    let ticks = after_name.and_then(|rest| rest.split_whitespace().nth(19)?.parse().ok());
    ticks.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "malformed /proc/PID/stat"))
}

/// The running boot's id.
pub(crate) fn boot_id() -> BootId {
    let mut bytes = [0; 16];
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    let _ = hex::decode_to_slice(&digits, &mut bytes);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_living_process_is_held_and_ended() {
        let mut child = Command::new("sleep").arg("600").spawn().unwrap();
        let record = ProcessRecord::of(child.id()).unwrap();
        let held = record.hold().unwrap();
        assert!(!held.has_ended());
        assert!(held.end(Duration::from_secs(10)));
        assert!(record.hold().is_none(), "it has ended");
        child.wait().unwrap();
    }

    #[test]
    fn another_process_under_the_same_id_is_not_taken_for_it() {
        let me = ProcessRecord::of(std::process::id()).unwrap();
        assert!(me.hold().is_some());
        assert!(ProcessRecord { start_ticks: me.start_ticks + 1, ..me }.hold().is_none());
        assert!(ProcessRecord { boot_id: [1; 16], ..me }.hold().is_none());
    }
}

//! A guest's directory: who it is, whether its process lives, what it said.
//!
//! | file | what |
//! |---|---|
//! | `guest.json` | [`Record`], written before the process is started |
//! | `exit.json` | the VMM's exit record; locked by the VMM as long as it lives |
//! | `console.log` | the console's ring file |
//! | `control.sock` | the VMM's control socket |
//!
//! The node opens and locks `exit.json` before the process is made and hands the descriptor over;
//! the lock goes with the VMM's last descriptor. A free lock means that the process is dead.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use vmm::config::{CONSOLE_HEADER_BYTES, CONSOLE_MAGIC};
use vmm::control::{ExitRecord, Status};

use crate::process::{BootId, Held, ProcessRecord};

/// What must be known of a guest to find it again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// The server's id.
    pub(crate) server_id: String,
    /// The generation it was started with.
    pub(crate) generation: u64,
    /// Minted at each start: another process's answer is not taken for this guest's.
    pub(crate) nonce: String,
    /// The host's boot in which it was started.
    pub(crate) boot_id: BootId,
    /// Its ports, in the order of its network devices.
    pub(crate) ports: Vec<String>,
    /// Set when the node ended it: it may be started again.
    pub(crate) stopped: bool,
}

/// How the process of a guest is.
pub(crate) enum Life {
    /// It lives; this is what its VMM says and the process itself.
    Running(Box<Status>, Held),
    /// A process lives, and does not say that it is this guest: why.
    Silent(String),
    /// It ended by itself, or died.
    Ended(String),
    /// It asked for a reset: it starts again.
    Reset,
    /// It was ended by the node, by the end of the host, or never started.
    Absent,
}

/// The directory of one guest.
#[derive(Clone, Debug)]
pub(crate) struct GuestDirectory {
    path: PathBuf,
}

impl GuestDirectory {
    /// The directory of a server below the data directory's `guests`, there or not.
    pub(crate) fn of(guests: &Path, server_id: &str) -> GuestDirectory {
        GuestDirectory { path: guests.join(server_id) }
    }

    /// All guests' directories.
    pub(crate) fn all(guests: &Path) -> io::Result<Vec<GuestDirectory>> {
        let entries = match fs::read_dir(guests) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        entries.map(|entry| Ok(GuestDirectory { path: entry?.path() })).collect()
    }

    /// Makes the directory for a new start, with an empty console and a locked exit record.
    pub(crate) fn prepare(&self, record: &Record) -> io::Result<Prepared> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.path)?;
        let exit = self.open("exit.json")?;
        flock(&exit, FlockOperation::NonBlockingLockExclusive).map_err(|_| {
            io::Error::new(
                io::ErrorKind::ResourceBusy,
                format!("a process of guest {} still lives", record.server_id),
            )
        })?;
        exit.set_len(0)?;
        let console = self.open("console.log")?;
        console.set_len(0)?;
        let _ = fs::remove_file(self.path.join("control.sock"));
        let control = self.at_short_path(|path| UnixListener::bind(path))?;
        self.write(record)?;
        Ok(Prepared { exit, console, control })
    }

    fn open(&self, name: &str) -> io::Result<File> {
        let options = &mut File::options();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        options.open(self.path.join(name))
    }

    /// Calls with the control socket's path by way of a descriptor: the real one may be longer
    /// than the 108 bytes that a socket address holds.
    fn at_short_path<T>(&self, call: impl FnOnce(&Path) -> io::Result<T>) -> io::Result<T> {
        let directory = File::open(&self.path)?;
        call(&PathBuf::from(format!("/proc/self/fd/{}/control.sock", directory.as_raw_fd())))
    }

    /// Writes the record anew, whole or not at all. It is not synced: the guest does not outlive
    /// a loss of power either.
    pub(crate) fn write(&self, record: &Record) -> io::Result<()> {
        let partial = self.path.join("guest.json.partial");
        fs::write(&partial, serde_json::to_vec(record)?)?;
        fs::rename(partial, self.path.join("guest.json"))
    }

    /// The record; `None` where there is none or it makes no sense.
    pub(crate) fn record(&self) -> Option<Record> {
        serde_json::from_slice(&fs::read(self.path.join("guest.json")).ok()?).ok()
    }

    /// A connection to the guest's VMM.
    pub(crate) fn connect(&self) -> io::Result<vmm::control::Client> {
        self.at_short_path(|path| vmm::control::Client::connect(path).map_err(io::Error::other))
    }

    /// How the guest is.
    pub(crate) fn life(&self, record: &Record) -> io::Result<Life> {
        let exit = self.open("exit.json")?;
        if flock(&exit, FlockOperation::NonBlockingLockExclusive).is_ok() {
            return Ok(dead(record, exit));
        }
        let status = self.connect().and_then(|vmm| vmm.status().map_err(io::Error::other));
        let status = match status {
            Ok(status) if status.nonce == record.nonce => status,
            Ok(_) => return Ok(Life::Silent("it is another guest's: its nonce differs".into())),
            Err(error) => return Ok(Life::Silent(error.to_string())),
        };
        let process = ProcessRecord::of(status.pid)?.hold();
        let process =
            process.ok_or_else(|| io::Error::other("the VMM ended while it was asked"))?;
        Ok(Life::Running(Box::new(status), process))
    }

    /// The record, where it is of the server whose name the directory has.
    pub(crate) fn own_record(&self) -> Option<Record> {
        let name = self.path.file_name()?.to_str()?;
        self.record().filter(|record| record.server_id == name)
    }

    /// Removes the directory, unless a process lives that was started in it; whether it is gone.
    pub(crate) fn remove_if_dead(&self) -> io::Result<bool> {
        let exit = match File::open(self.path.join("exit.json")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            exit => Some(exit?),
        };
        // Held until nothing is left: a start that comes in between fails, and is tried again.
        let dead = exit
            .as_ref()
            .is_none_or(|exit| flock(exit, FlockOperation::NonBlockingLockExclusive).is_ok());
        if dead {
            self.remove()?;
        }
        Ok(dead)
    }

    /// The console's last bytes, at most `limit`.
    pub(crate) fn console(&self, limit: usize) -> io::Result<Vec<u8>> {
        let mut content = Vec::new();
        match File::open(self.path.join("console.log")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(content),
            file => file?.read_to_end(&mut content)?,
        };
        Ok(last_of_ring(&content, limit))
    }

    /// Removes the directory and all in it.
    pub(crate) fn remove(&self) -> io::Result<()> {
        match fs::remove_dir_all(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result,
        }
    }
}

/// The reason in the exit record of a guest that asked for a reset.
const EXIT_RESET: &str = "reset";

/// What a new guest's process gets.
pub(crate) struct Prepared {
    pub(crate) exit: File,
    pub(crate) console: File,
    pub(crate) control: UnixListener,
}

fn dead(record: &Record, mut exit: File) -> Life {
    if record.stopped || record.boot_id != crate::process::boot_id() {
        return Life::Absent;
    }
    let mut text = Vec::new();
    let read = exit.read_to_end(&mut text).ok();
    let exit: Option<ExitRecord> = read.and_then(|_| serde_json::from_slice(&text).ok());
    Life::Ended(match exit {
        Some(exit) if exit.reason == EXIT_RESET => return Life::Reset,
        Some(exit) => format!("{}: {}", exit.reason, exit.message),
        None => "crash: its process died without an exit record".to_string(),
    })
}

/// The newest bytes of a console's ring file.
fn last_of_ring(content: &[u8], limit: usize) -> Vec<u8> {
    let header = CONSOLE_HEADER_BYTES as usize;
    let word = |at: usize| {
        let bytes = content.get(at..at + 8)?;
        Some(u64::from_le_bytes(bytes.try_into().ok()?))
    };
    let (Some(CONSOLE_MAGIC), Some(written)) = (word(0), word(8)) else { return Vec::new() };
    let ring = &content[header.min(content.len())..];
    if ring.is_empty() {
        return Vec::new();
    }
    let length = usize::try_from(written).unwrap_or(usize::MAX).min(ring.len()).min(limit);
    // Before the ring is full its file is as long as what was written.
    let end = if written <= ring.len() as u64 {
        written as usize
    } else {
        (written % ring.len() as u64) as usize
    };
    if length <= end {
        return ring[end - length..end].to_vec();
    }
    let mut last = ring[ring.len() - (length - end)..].to_vec();
    last.extend_from_slice(&ring[..end]);
    last
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ring(written: u64, bytes: &[u8]) -> Vec<u8> {
        let mut content = CONSOLE_MAGIC.to_le_bytes().to_vec();
        content.extend(written.to_le_bytes());
        content.extend(bytes);
        content
    }

    #[test]
    fn the_console_is_the_newest_bytes_in_order() {
        assert_eq!(last_of_ring(&ring(3, b"abc"), 10), b"abc");
        assert_eq!(last_of_ring(&ring(3, b"abc\0\0"), 10), b"abc");
        assert_eq!(last_of_ring(&ring(3, b"abc"), 2), b"bc");
        // Ten bytes were written into a ring of four: g h i j, with i at 0.
        assert_eq!(last_of_ring(&ring(10, b"ijgh"), 10), b"ghij");
        assert_eq!(last_of_ring(&ring(10, b"ijgh"), 3), b"hij");
        assert_eq!(last_of_ring(&ring(8, b"efgh"), 10), b"efgh");
        assert_eq!(last_of_ring(b"short", 10), b"");
        assert_eq!(last_of_ring(&ring(u64::MAX, b""), 10), b"");
    }

    #[test]
    fn a_free_lock_means_dead_and_says_how() {
        let temporary = tempfile::tempdir().unwrap();
        let directory = GuestDirectory::of(temporary.path(), "server");
        let mut record = Record {
            server_id: "server".into(),
            generation: 1,
            nonce: "n".into(),
            boot_id: crate::process::boot_id(),
            ports: vec![],
            stopped: false,
        };
        let prepared = directory.prepare(&record).unwrap();
        assert!(directory.prepare(&record).is_err(), "the first start's lock is held");
        drop(prepared);
        assert!(matches!(directory.life(&record).unwrap(), Life::Ended(_)));
        let mut exit = ExitRecord {
            nonce: "n".into(),
            reason: "crash".into(),
            code: None,
            message: "triple fault".into(),
            cpu_ns: 0,
            timings: Default::default(),
        };
        let end_as = |exit: &ExitRecord| {
            let json = serde_json::to_vec(exit).unwrap();
            fs::write(directory.path.join("exit.json"), json).unwrap();
            directory.life(&record).unwrap()
        };
        assert!(matches!(end_as(&exit), Life::Ended(why) if why == "crash: triple fault"));
        exit.reason = EXIT_RESET.into();
        assert!(matches!(end_as(&exit), Life::Reset));
        record.stopped = true;
        assert!(matches!(directory.life(&record).unwrap(), Life::Absent));
        record = Record { stopped: false, boot_id: [9; 16], ..record };
        assert!(matches!(directory.life(&record).unwrap(), Life::Absent));
    }

    #[test]
    fn a_directory_is_removed_only_after_the_process_that_was_started_in_it() {
        let temporary = tempfile::tempdir().unwrap();
        let directory = GuestDirectory::of(temporary.path(), "server");
        let record = Record {
            server_id: "another".into(),
            generation: 1,
            nonce: "n".into(),
            boot_id: crate::process::boot_id(),
            ports: vec![],
            stopped: false,
        };
        let prepared = directory.prepare(&record).unwrap();
        assert_eq!(directory.own_record(), None);
        assert!(!directory.remove_if_dead().unwrap());
        assert_eq!(directory.record(), Some(record));
        drop(prepared);
        assert!(directory.remove_if_dead().unwrap());
        assert_eq!(GuestDirectory::all(temporary.path()).unwrap().len(), 0);
        assert!(directory.remove_if_dead().unwrap(), "again changes nothing");
    }
}

//! `trine-vmm run --config FILE`: one guest, every resource by path.
//!
//! The guest runs in a child that closes itself in; this process waits, connects what the guest's
//! vsock asks for, and takes away what a closed process can't: the paths of its sockets.

use super::ending::{self, EXIT_CODE_FAILED};
use super::guest::{self, Report, StartError};
use super::resources::{Resources, Supply};
use super::sandbox::Sandbox;
use super::timings::Clock;
use crate::config::{Resource, VmConfig};
use crate::control::ExitRecord;
use crate::devices::console::Sink;
use crate::machine::Host;
use std::convert::Infallible;
use std::fs::File;
use std::io::{PipeWriter, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicI32, Ordering};

/// Exit code where the configuration or the host does not allow to start.
pub const EXIT_CODE_REFUSED: u8 = 2;

/// The guest's process, for the signal handler.
static CHILD: AtomicI32 = AtomicI32::new(0);

/// Runs the guest that `path` describes and returns its exit code; or what is wrong, one line each.
/// `boot_timer`: at the end it is said how long the start took.
pub fn run(path: &Path, boot_timer: bool) -> Result<u8, Vec<String>> {
    let clock = Clock::default();
    clock.spawn.reach();
    let config = VmConfig::read(path)?;
    let one = |error: String| vec![error];
    let host = Host::open().map_err(|error| one(error.to_string()))?;
    let made = files_to_be_made(&config);
    let resources = Resources::open(&config, &mut Supply::Paths, Sink::Stdout);
    let outcome = match resources {
        Ok(resources) => wait_for_child(host, &config, resources, (clock, boot_timer))
            .map_err(|error| one(error.to_string())),
        Err(error) => Err(one(error.to_string())),
    };
    // The paths did not exist before (the configuration was checked), so they are ours.
    let vsock = config.vsock.as_ref().map(|vsock| &vsock.socket);
    for socket in config.control.iter().chain(vsock) {
        if let Resource::Path(path) = socket {
            let _ = std::fs::remove_file(path);
        }
    }
    // A guest that never ran leaves nothing; an empty record would look like one that was lost.
    if !matches!(outcome, Ok(Ended::Guest(_))) {
        for path in made {
            let _ = std::fs::remove_file(path);
        }
    }
    outcome.map(|ended| match ended {
        Ended::Guest(code) => code,
        Ended::Refused => EXIT_CODE_REFUSED,
    })
}

/// The files that a start makes, where they are not there yet.
fn files_to_be_made(config: &VmConfig) -> Vec<PathBuf> {
    let console = config.console.iter().map(|console| &console.file);
    let files = console.chain(&config.exit_record);
    let paths = files.filter_map(|file| match file {
        Resource::Path(path) => Some(path.clone()),
        Resource::Descriptor(_) => None,
    });
    paths.filter(|path| path.symlink_metadata().is_err()).collect()
}

/// How the guest's process ended.
enum Ended {
    /// With the guest's exit code.
    Guest(u8),
    /// Before the guest ran; it has said why.
    Refused,
}

fn wait_for_child(
    host: Host,
    config: &VmConfig,
    mut resources: Resources,
    (clock, boot_timer): (Clock, bool),
) -> std::io::Result<Ended> {
    let outside = resources.outside.take();
    let (mut is_refused, refused) = std::io::pipe()?;
    // SAFETY: this process has one thread, so the child may go on as if it were the parent.
    match unsafe { libc::fork() } {
        ..0 => Err(std::io::Error::last_os_error()),
        0 => {
            drop((outside, is_refused));
            become_guest(Start { host, config, resources, clock, boot_timer }, refused)
        }
        child => {
            let record = resources.exit_record.take();
            drop((host, resources, refused));
            CHILD.store(child, Ordering::SeqCst);
            for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
                // SAFETY: the handler only sends a signal.
                unsafe { libc::signal(signal, end_child as extern "C" fn(libc::c_int) as usize) };
            }
            if let Some(outside) = outside {
                // Without it the guest's connections are refused, and that is all.
                let _ = std::thread::Builder::new().spawn(move || outside.serve());
            }
            let (status, cpu_ns) = wait(child);
            // It is closed without a word where the guest ran.
            if is_refused.read(&mut [0]).is_ok_and(|read| read > 0) {
                return Ok(Ended::Refused);
            }
            if libc::WIFSIGNALED(status) {
                tell_of_signal(libc::WTERMSIG(status), cpu_ns, &config.nonce, record.as_ref());
                return Ok(Ended::Guest(EXIT_CODE_FAILED));
            }
            Ok(Ended::Guest(libc::WEXITSTATUS(status) as u8))
        }
    }
}

extern "C" fn end_child(_: libc::c_int) {
    // SAFETY: kill is async-signal-safe; the child is ours and not yet waited for.
    unsafe { libc::kill(CHILD.load(Ordering::SeqCst), libc::SIGKILL) };
}

/// Waits for the guest's process; returns its status and its CPU time.
fn wait(child: libc::pid_t) -> (libc::c_int, u64) {
    let mut status = libc::c_int::from(EXIT_CODE_FAILED) << 8;
    // SAFETY: a zeroed rusage is valid.
    let mut used: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: `status` and `used` are ours.
    while unsafe { libc::wait4(child, &raw mut status, 0, &raw mut used) } < 0 {
        if std::io::Error::last_os_error().kind() != std::io::ErrorKind::Interrupted {
            break;
        }
    }
    let times = [used.ru_utime, used.ru_stime];
    let cpu_us = times.iter().map(|time| time.tv_sec * 1_000_000 + time.tv_usec).sum::<i64>();
    (status, cpu_us as u64 * 1000)
}

/// The guest's process was ended by a signal, ours or another one's, and could not say so itself.
fn tell_of_signal(signal: libc::c_int, cpu_ns: u64, nonce: &str, record: Option<&File>) {
    let exit = ExitRecord {
        nonce: nonce.into(),
        reason: "killed".into(),
        code: None,
        message: format!("its process was ended by signal {signal}"),
        cpu_ns,
        timings: Default::default(),
    };
    if let Some(record) = record {
        let _ = record.write_all_at(&serde_json::to_vec(&exit).unwrap_or_default(), 0);
    }
    eprintln!("trine-vmm: guest ended: killed: {}", exit.message);
}

/// What the guest's process begins with.
struct Start<'a> {
    host: Host,
    config: &'a VmConfig,
    resources: Resources,
    clock: Clock,
    boot_timer: bool,
}

fn become_guest(start: Start<'_>, mut refused: PipeWriter) -> ! {
    start.clock.process.reach();
    // SAFETY: plain call on integers; the guest shall not outlive who started it.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    let Err(error) = start.run();
    eprintln!("trine-vmm: {error}");
    let _ = refused.write(&[1]);
    ending::exit(EXIT_CODE_REFUSED)
}

impl Start<'_> {
    fn run(self) -> Result<Infallible, StartError> {
        let sandbox = Sandbox::prepare()?;
        sandbox.enter_cgroups(&self.config.sandbox)?;
        let mut report = Report::Standalone { boot_timer: self.boot_timer };
        guest::run(self.host, self.config, self.resources, self.clock, sandbox, &mut report)
    }
}

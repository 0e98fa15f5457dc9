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
use crate::devices::console::Sink;
use crate::machine::Host;
use std::convert::Infallible;
use std::path::Path;
use std::sync::atomic::{AtomicI32, Ordering};

/// Exit code where the configuration or the host does not allow to start.
pub const EXIT_CODE_REFUSED: u8 = 2;

/// The guest's process, for the signal handler.
static CHILD: AtomicI32 = AtomicI32::new(0);

/// Runs the guest that `path` describes and returns its exit code; or what is wrong, one line each.
pub fn run(path: &Path) -> Result<u8, Vec<String>> {
    let clock = Clock::default();
    clock.spawn.reach();
    let config = VmConfig::read(path)?;
    let one = |error: String| vec![error];
    let host = Host::open().map_err(|error| one(error.to_string()))?;
    let resources = Resources::open(&config, &mut Supply::Paths, Sink::Stdout);
    let outcome = match resources {
        Ok(resources) => {
            wait_for_child(host, &config, resources, clock).map_err(|error| one(error.to_string()))
        }
        Err(error) => Err(one(error.to_string())),
    };
    // The paths did not exist before (the configuration was checked), so they are ours.
    let vsock = config.vsock.as_ref().map(|vsock| &vsock.socket);
    for socket in config.control.iter().chain(vsock) {
        if let Resource::Path(path) = socket {
            let _ = std::fs::remove_file(path);
        }
    }
    // A guest that never ran has no record; an empty file would look like one that lost it.
    if let Some(Resource::Path(path)) = &config.exit_record
        && path.metadata().is_ok_and(|file| file.len() == 0)
    {
        let _ = std::fs::remove_file(path);
    }
    outcome
}

fn wait_for_child(
    host: Host,
    config: &VmConfig,
    mut resources: Resources,
    clock: Clock,
) -> std::io::Result<u8> {
    let outside = resources.outside.take();
    // SAFETY: this process has one thread, so the child may go on as if it were the parent.
    match unsafe { libc::fork() } {
        ..0 => Err(std::io::Error::last_os_error()),
        0 => {
            drop(outside);
            become_guest(host, config, resources, clock)
        }
        child => {
            drop((host, resources));
            CHILD.store(child, Ordering::SeqCst);
            for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
                // SAFETY: the handler only sends a signal.
                unsafe { libc::signal(signal, end_child as extern "C" fn(libc::c_int) as usize) };
            }
            if let Some(outside) = outside {
                // Without it the guest's connections are refused, and that is all.
                let _ = std::thread::Builder::new().spawn(move || outside.serve());
            }
            Ok(wait(child))
        }
    }
}

extern "C" fn end_child(_: libc::c_int) {
    // SAFETY: kill is async-signal-safe; the child is ours and not yet waited for.
    unsafe { libc::kill(CHILD.load(Ordering::SeqCst), libc::SIGKILL) };
}

fn wait(child: libc::pid_t) -> u8 {
    let mut status = 0;
    // SAFETY: `status` is ours.
    while unsafe { libc::waitpid(child, &raw mut status, 0) } < 0 {
        if std::io::Error::last_os_error().kind() != std::io::ErrorKind::Interrupted {
            return EXIT_CODE_FAILED;
        }
    }
    if libc::WIFEXITED(status) { libc::WEXITSTATUS(status) as u8 } else { EXIT_CODE_FAILED }
}

fn become_guest(host: Host, config: &VmConfig, resources: Resources, clock: Clock) -> ! {
    clock.process.reach();
    // SAFETY: plain call on integers; the guest shall not outlive who started it.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    let Err(error) = start(host, config, resources, clock);
    eprintln!("trine-vmm: {error}");
    ending::exit(EXIT_CODE_REFUSED)
}

fn start(
    host: Host,
    config: &VmConfig,
    resources: Resources,
    clock: Clock,
) -> Result<Infallible, StartError> {
    let sandbox = Sandbox::prepare()?;
    sandbox.enter_cgroups(&config.sandbox)?;
    guest::run(host, config, resources, clock, sandbox, &mut Report::Standalone)
}

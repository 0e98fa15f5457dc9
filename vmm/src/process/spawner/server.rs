//! The spawner's own process: `trine-vmm spawner`, with its socket as standard input.
//!
//! Its first frame is a [`SpawnerHello`]. Then each frame is a [`SpawnerRequest`]; the answer goes
//! to the socket that is the frame's last descriptor. At the end of its input it exits.

use crate::config::VmConfig;
use crate::control::{
    CONTROL_VERSION, FloorReply, SpawnReply, SpawnRequest, SpawnerHello, SpawnerRequest,
};
use crate::devices::console::Sink;
use crate::machine::Host;
use crate::machine::run::prepare as prepare_kicks;
use crate::process::ending;
use crate::process::guest::{self, Report};
use crate::process::resources::{Resources, Supply};
use crate::process::sandbox::Sandbox;
use crate::process::timings::{Clock, now_ns};
use serde::Serialize;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Where the floor program finds its descriptors.
const FLOOR_REPORT: libc::c_int = 3;
const FLOOR_KVM: libc::c_int = 4;

struct Spawner {
    socket: OwnedFd,
    null: File,
    host: Host,
    sandbox: Sandbox,
}

/// Runs the spawner until its socket is closed.
pub fn run() -> io::Result<()> {
    let (socket, null) = take_socket()?;
    // A failure is the parent's to show: it waits for the first frame.
    let prepared = Host::open()
        .map_err(|error| error.to_string())
        .and_then(|host| Ok((host, Sandbox::prepare().map_err(|error| error.to_string())?)))
        .and_then(|prepared| warm_up().map(|()| prepared));
    let (host, sandbox) = match prepared {
        Ok(prepared) => prepared,
        Err(message) => return reply(&socket, &SpawnerHello::Failed { message }, &[]),
    };
    reply(&socket, &SpawnerHello::Ready { sandbox: sandbox.tier() }, &[])?;
    let mut spawner = Spawner { socket, null, host, sandbox };
    while let Some((message, descriptors)) = abi::control::receive(&spawner.socket)? {
        // In a guest's process this does not return; the spawner goes on.
        spawner = spawner.serve(&message, descriptors);
    }
    Ok(())
}

/// Moves the socket off standard input, and leaves nothing else open.
fn take_socket() -> io::Result<(OwnedFd, File)> {
    // SAFETY: closing descriptors this process was not given on purpose; nothing uses them yet.
    unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, 0) };
    let socket = rustix::io::fcntl_dupfd_cloexec(io::stdin(), 3)?;
    let null = File::options().read(true).write(true).open("/dev/null")?;
    replace(&null, 0);
    replace(&null, 1);
    // SAFETY: plain calls on integers. Without SIGCHLD's handling ended guests would stay zombies;
    // in a session of its own the terminal's signals don't reach it.
    unsafe {
        libc::signal(libc::SIGCHLD, libc::SIG_IGN);
        libc::setsid();
    }
    Ok((socket, null))
}

/// Does here what every guest's process would do again and can inherit: signal handlers, what the
/// C library sets up for a process's first thread, and that thread's stack, which it keeps.
fn warm_up() -> Result<(), String> {
    prepare_kicks();
    let first = std::thread::Builder::new().stack_size(crate::control::server::STACK_BYTES);
    let ended = first.spawn(|| {}).map_err(|error| format!("start a thread: {error}"))?.join();
    ended.map_err(|_| "the first thread panicked".into())
}

fn reply<T: Serialize>(
    socket: impl AsFd,
    message: &T,
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let message = serde_json::to_vec(message).map_err(io::Error::other)?;
    abi::control::send(socket, &message, descriptors)
}

/// Makes standard descriptor `target` the same file as `source`.
fn replace(source: &File, target: libc::c_int) {
    // SAFETY: plain call on integers; the standard descriptors are used by number only.
    unsafe { libc::dup2(source.as_raw_fd(), target) };
}

fn fork() -> io::Result<bool> {
    // SAFETY: this process has one thread, so the child may go on as if it were the parent.
    match unsafe { libc::fork() } {
        ..0 => Err(io::Error::last_os_error()),
        0 => Ok(true),
        _ => Ok(false),
    }
}

impl Spawner {
    fn serve(self, message: &[u8], mut descriptors: Vec<OwnedFd>) -> Spawner {
        let Some(answer_to) = descriptors.pop() else { return self };
        let failed = |message: String| {
            let _ = reply(&answer_to, &SpawnReply::Failed { message }, &[]);
        };
        match serde_json::from_slice::<SpawnerRequest>(message) {
            Err(error) => failed(format!("spawn request: {error}")),
            Ok(SpawnerRequest::Floor { memory_mib }) => {
                self.floor(memory_mib, &descriptors, &answer_to)
            }
            Ok(SpawnerRequest::Spawn(request)) => {
                let problems = request.config.problems();
                if request.version != CONTROL_VERSION {
                    failed(format!(
                        "spawn request version {}; {CONTROL_VERSION} is spoken",
                        request.version
                    ));
                } else if !problems.is_empty() {
                    failed(problems.join("; "));
                } else {
                    let clock = Clock::default();
                    clock.spawn.set(now_ns());
                    match fork() {
                        Ok(false) => {}
                        Ok(true) => self.become_guest(*request, descriptors, clock, answer_to),
                        Err(error) => failed(format!("fork: {error}")),
                    }
                }
            }
        }
        self
    }

    /// The rest of a guest's process.
    fn become_guest(
        self,
        request: SpawnRequest,
        descriptors: Vec<OwnedFd>,
        clock: Clock,
        socket: OwnedFd,
    ) -> ! {
        clock.process.reach();
        let Spawner { socket: requests, null, host, sandbox } = self;
        drop(requests);
        // A process group of its own, in the spawner's session without a terminal: a session of its
        // own would also be a new scheduling group, which on a busy host costs a time slice.
        // SAFETY: plain call on integers.
        unsafe { libc::setpgid(0, 0) };
        replace(&null, 2);
        drop(null);
        let mut report = Report::Reply { socket, pidfd: None };
        let message = start_guest(host, sandbox, &request.config, descriptors, clock, &mut report);
        if let Report::Reply { socket, .. } = report {
            let _ = reply(&socket, &SpawnReply::Failed { message }, &[]);
        }
        ending::exit(ending::EXIT_CODE_FAILED)
    }

    /// Starts the floor program in the way guests are started: by a fork of this process.
    fn floor(&self, memory_mib: u32, descriptors: &[OwnedFd], answer_to: &OwnedFd) {
        let [executable, report] = descriptors else { return };
        let memory = format!("{memory_mib}\0");
        let spawn_ns = now_ns();
        // SAFETY: as in `fork`; the child only moves descriptors and executes.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            self.become_floor(executable, report, &memory);
        }
        let pidfd = rustix::process::Pid::from_raw(pid).and_then(|pid| {
            rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).ok()
        });
        let pidfds: Vec<BorrowedFd<'_>> = pidfd.iter().map(AsFd::as_fd).collect();
        let _ = reply(answer_to, &FloorReply { spawn_ns }, &pidfds);
    }

    fn become_floor(&self, executable: &OwnedFd, report: &OwnedFd, memory: &str) -> ! {
        // SAFETY: dup to high numbers first, so that the fixed ones can't collide with a source;
        // the argument strings are terminated; execveat returns only on failure.
        unsafe {
            let high = 64;
            let executable = libc::fcntl(executable.as_raw_fd(), libc::F_DUPFD_CLOEXEC, high);
            let report = libc::fcntl(report.as_raw_fd(), libc::F_DUPFD_CLOEXEC, high);
            let kvm = libc::fcntl(self.host.kvm_descriptor(), libc::F_DUPFD_CLOEXEC, high);
            libc::dup2(report, FLOOR_REPORT);
            libc::dup2(kvm, FLOOR_KVM);
            let arguments = [
                c"kvm-floor".as_ptr(),
                memory.as_ptr().cast(),
                c"3".as_ptr(),
                c"4".as_ptr(),
                std::ptr::null(),
            ];
            let environment = [std::ptr::null::<libc::c_char>()];
            libc::syscall(
                libc::SYS_execveat,
                executable,
                c"".as_ptr(),
                arguments.as_ptr(),
                environment.as_ptr(),
                libc::AT_EMPTY_PATH,
            );
        }
        ending::exit(ending::EXIT_CODE_FAILED)
    }
}

/// Returns only with why the guest did not start.
fn start_guest(
    host: Host,
    sandbox: Sandbox,
    config: &VmConfig,
    descriptors: Vec<OwnedFd>,
    clock: Clock,
    report: &mut Report,
) -> String {
    let prepared = sandbox
        .enter_cgroups(&config.sandbox)
        .map_err(|error| error.to_string())
        .and_then(|()| own_pidfd().map_err(|error| format!("pidfd: {error}")))
        .and_then(|own| {
            if let Report::Reply { pidfd, .. } = report {
                *pidfd = Some(own);
            }
            Resources::open(config, &mut Supply::descriptors(descriptors), Sink::Nowhere)
                .map_err(|error| error.to_string())
        });
    let resources = match prepared {
        Ok(resources) => resources,
        Err(error) => return error,
    };
    let Err(error) = guest::run(host, config, resources, clock, sandbox, report);
    error.to_string()
}

/// A descriptor of this very process.
fn own_pidfd() -> io::Result<OwnedFd> {
    // SAFETY: plain call on integers; the descriptor is fresh and ours.
    unsafe {
        match libc::syscall(libc::SYS_pidfd_open, libc::getpid(), 0) {
            ..0 => Err(io::Error::last_os_error()),
            fd => Ok(OwnedFd::from_raw_fd(fd as libc::c_int)),
        }
    }
}

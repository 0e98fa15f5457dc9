//! The node's side of the spawner. Blocking; several threads may start guests at once.

use crate::config::VmConfig;
use crate::control::{
    CONTROL_VERSION, FloorReply, SpawnReply, SpawnRequest, SpawnerHello, SpawnerRequest, Timings,
};
use rustix::event::{PollFd, PollFlags, poll};
use serde::de::DeserializeOwned;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::Duration;

/// Longest wait for a guest to start.
const START_TIMEOUT: Duration = Duration::from_secs(30);

/// Why a guest did not start.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// The spawner itself could not be started.
    #[error("start the VMM's spawner {path}: {source}")]
    Start {
        /// Its executable.
        path: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The spawner can't start guests on this host.
    #[error("the VMM's spawner can't work here: {0}")]
    Host(String),
    /// The spawner has gone; start another one. Running guests are not affected.
    #[error("the VMM's spawner has gone: {0}")]
    Gone(#[source] io::Error),
    /// The guest did not start; nothing is left behind.
    #[error("the guest did not start: {0}")]
    Guest(String),
}

/// A guest's process.
#[derive(Debug)]
pub struct Spawned {
    /// Its process id.
    pub pid: u32,
    /// Its pidfd: readable when it has ended.
    pub pidfd: OwnedFd,
    /// Times up to `run_ns`.
    pub timings: Timings,
}

/// One run of the floor program.
#[derive(Clone, Copy, Debug)]
pub struct FloorTimes {
    /// Before the spawner's clone.
    pub spawn_ns: u64,
    /// Its guest's first port write, seen by the program.
    pub first_exit_ns: u64,
    /// The process had ended.
    pub exit_ns: u64,
    /// CPU time it had used at its first exit.
    pub cpu_ns: u64,
}

/// A running spawner. Dropping it ends the spawner; guests run on.
#[derive(Debug)]
pub struct Client {
    socket: Mutex<UnixStream>,
    child: Child,
    sandbox: String,
}

impl Client {
    /// Starts the spawner from `executable` and waits until it is ready.
    pub fn start(executable: &Path) -> Result<Client, SpawnError> {
        let failed = |source| SpawnError::Start { path: executable.display().to_string(), source };
        let (ours, theirs) = UnixStream::pair().map_err(failed)?;
        let mut child = Command::new(executable)
            .arg("spawner")
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .spawn()
            .map_err(failed)?;
        let hello = ours
            .set_read_timeout(Some(START_TIMEOUT))
            .and_then(|()| receive::<SpawnerHello>(&ours));
        match hello {
            Ok((SpawnerHello::Ready { sandbox }, _)) => {
                Ok(Client { socket: Mutex::new(ours), child, sandbox })
            }
            other => {
                let _ = child.kill();
                let _ = child.wait();
                Err(match other {
                    Ok((SpawnerHello::Failed { message }, _)) => SpawnError::Host(message),
                    Err(error) => SpawnError::Gone(error),
                    Ok((SpawnerHello::Ready { .. }, _)) => {
                        SpawnError::Host("it was ready and is not".into())
                    }
                })
            }
        }
    }

    /// How tightly guests are closed, in words.
    pub fn sandbox(&self) -> &str {
        &self.sandbox
    }

    /// The spawner's process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Starts a guest; every resource of `config` is an index into `descriptors`.
    pub fn spawn(
        &self,
        config: &VmConfig,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<Spawned, SpawnError> {
        let request = SpawnRequest { version: CONTROL_VERSION, config: config.clone() };
        let answer = self.ask(&SpawnerRequest::Spawn(Box::new(request)), descriptors)?;
        match receive::<SpawnReply>(&answer) {
            Ok((SpawnReply::Spawned { pid, timings }, mut descriptors)) => {
                match descriptors.pop() {
                    Some(pidfd) => Ok(Spawned { pid, pidfd, timings }),
                    None => Err(SpawnError::Guest("no pidfd came with the answer".into())),
                }
            }
            Ok((SpawnReply::Failed { message }, _)) => Err(SpawnError::Guest(message)),
            Err(error) => {
                Err(SpawnError::Guest(format!("its process ended while it started ({error})")))
            }
        }
    }

    /// Has the spawner run `kvm-floor` (an open executable) once, started as guests are.
    pub fn run_floor(
        &self,
        executable: BorrowedFd<'_>,
        memory_mib: u32,
    ) -> Result<FloorTimes, SpawnError> {
        let (report, report_writer) = io::pipe().map_err(SpawnError::Gone)?;
        let request = SpawnerRequest::Floor { memory_mib };
        let answer = self.ask(&request, &[executable, report_writer.as_fd()])?;
        drop(report_writer);
        let guest = |error: io::Error| SpawnError::Guest(format!("kvm-floor: {error}"));
        let (FloorReply { spawn_ns }, mut descriptors) =
            receive::<FloorReply>(&answer).map_err(guest)?;
        let pidfd =
            descriptors.pop().ok_or_else(|| SpawnError::Guest("kvm-floor did not start".into()))?;
        poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], None)
            .map_err(|error| guest(error.into()))?;
        let exit_ns = crate::process::timings::now_ns();
        let mut times = [[0; 8]; 2];
        (&report).read_exact(times.as_flattened_mut()).map_err(|_| {
            SpawnError::Guest(
                "kvm-floor ended before its first exit; it must be a static executable".into(),
            )
        })?;
        let [first_exit_ns, cpu_ns] = times.map(u64::from_ne_bytes);
        Ok(FloorTimes { spawn_ns, first_exit_ns, exit_ns, cpu_ns })
    }

    /// Sends a request; the answer comes on the returned socket.
    fn ask(
        &self,
        request: &SpawnerRequest,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<UnixStream, SpawnError> {
        let message =
            serde_json::to_vec(request).map_err(|error| SpawnError::Gone(error.into()))?;
        let (ours, theirs) = UnixStream::pair().map_err(SpawnError::Gone)?;
        ours.set_read_timeout(Some(START_TIMEOUT)).map_err(SpawnError::Gone)?;
        let mut all = descriptors.to_vec();
        all.push(theirs.as_fd());
        let socket = self.socket.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        abi::control::send(&*socket, &message, &all).map_err(SpawnError::Gone)?;
        Ok(ours)
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let socket = self.socket.get_mut().unwrap_or_else(std::sync::PoisonError::into_inner);
        let _ = socket.shutdown(std::net::Shutdown::Both);
        let _ = self.child.wait();
    }
}

fn receive<T: DeserializeOwned>(socket: &UnixStream) -> io::Result<(T, Vec<OwnedFd>)> {
    let (message, descriptors) =
        abi::control::receive(socket)?.ok_or(io::Error::from(io::ErrorKind::UnexpectedEof))?;
    Ok((serde_json::from_slice(&message)?, descriptors))
}

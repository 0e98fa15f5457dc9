//! The answering side: one thread accepts, one thread serves each connection.

use super::{
    BalloonStatus, CONTROL_VERSION, Envelope, Metrics, Reply, Request, RunState, Status, Unplugging,
};
use crate::config::{DiskConfig, NetConfig, RateLimits, Resource, balloon_target_problem};
use crate::devices::{Device, DeviceKind, blk, net};
use crate::machine::vcpu::End;
use crate::pci::PlugError;
use crate::process::ending::Cause;
use crate::process::guest::Guest;
use crate::process::resources::{ResourceError, Supply};
use crate::process::sandbox;
use crate::process::seccomp::{self, Role};
use crate::process::timings::cpu_ns;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Most connections served at once; more are closed at once.
const CONNECTIONS_MAX: usize = 16;
/// Longest request, bytes.
pub const REQUEST_BYTES_MAX: usize = 64 << 10;
/// How long a removal waits for the guest.
const REMOVAL_TIMEOUT: Duration = Duration::from_secs(10);
/// How long devices have to finish what they have in flight.
const PAUSE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a guest has to say how its memory is.
const STATISTICS_TIMEOUT: Duration = Duration::from_secs(2);
/// Stack of its threads.
pub(crate) const STACK_BYTES: usize = 256 << 10;

/// The control thread, closed to its own system calls and without a guest yet.
pub struct Control(SyncSender<Arc<Guest>>);

impl Control {
    /// From here it answers for `guest`.
    pub fn serve(self, guest: &Arc<Guest>) {
        // It ends only with the process.
        let _ = self.0.send(Arc::clone(guest));
    }
}

/// Starts the thread that will serve `listener`; its connections have threads of their own.
pub fn start(listener: UnixListener) -> std::io::Result<Control> {
    let (sender, receiver) = sync_channel::<Arc<Guest>>(1);
    let body = move || {
        let closed = sandbox::narrow(Role::Control);
        let Ok(guest) = receiver.recv() else { return };
        match closed {
            Ok(()) => accept(&listener, &guest),
            Err(error) => guest.end(Cause::Guest(End::Error(error.to_string()))),
        }
    };
    let name = Role::Control.thread_name().to_string();
    std::thread::Builder::new().name(name).stack_size(STACK_BYTES).spawn(body)?;
    Ok(Control(sender))
}

fn accept(listener: &UnixListener, guest: &Arc<Guest>) {
    let open = Arc::new(AtomicUsize::new(0));
    loop {
        let Ok((socket, _)) = listener.accept() else {
            // Out of descriptors or memory: others end, and a client that waits is served then.
            std::thread::sleep(Duration::from_millis(10));
            continue;
        };
        if open.fetch_add(1, Ordering::AcqRel) >= CONNECTIONS_MAX {
            open.fetch_sub(1, Ordering::AcqRel);
            continue;
        }
        let (guest, count) = (Arc::clone(guest), Arc::clone(&open));
        let serve = move || {
            seccomp::belongs_to(Role::Control);
            serve(&socket, &guest);
            count.fetch_sub(1, Ordering::AcqRel);
        };
        let name = Role::Control.thread_name().to_string();
        let thread = std::thread::Builder::new().name(name).stack_size(STACK_BYTES);
        if thread.spawn(serve).is_err() {
            open.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

fn serve(socket: &UnixStream, guest: &Guest) {
    loop {
        let (message, descriptors) = match abi::control::receive_at_most(socket, REQUEST_BYTES_MAX)
        {
            Ok(Some(request)) => request,
            Ok(None) => return,
            Err(error) => {
                // Where the next request begins is not known any more.
                let _ = send(socket, &Answer::error("invalid", format!("request: {error}")));
                return;
            }
        };
        let answer = match serde_json::from_slice::<Envelope>(&message) {
            Err(error) => Answer::error("invalid", format!("request: {error}")),
            Ok(envelope) if envelope.version != CONTROL_VERSION => Answer::error(
                "invalid",
                format!("request version {}; this VMM speaks {CONTROL_VERSION}", envelope.version),
            ),
            Ok(Envelope { request: Request::Kill, .. }) => {
                let _ = send(socket, &Answer::done());
                guest.end(Cause::Killed);
            }
            Ok(envelope) if !descriptors.is_empty() && !envelope.request.takes_descriptors() => {
                Answer::error("invalid", "request: no descriptors go with it".into())
            }
            Ok(envelope) => answer(guest, envelope.request, descriptors),
        };
        if send(socket, &answer).is_err() {
            return;
        }
    }
}

fn send(socket: &UnixStream, answer: &Answer) -> std::io::Result<()> {
    let message = serde_json::to_vec(&answer.reply).map_err(std::io::Error::other)?;
    let descriptors: Vec<_> = answer.descriptors.iter().map(AsFd::as_fd).collect();
    abi::control::send(socket, &message, &descriptors)
}

struct Answer {
    reply: Reply,
    descriptors: Vec<OwnedFd>,
}

impl Answer {
    fn done() -> Answer {
        Answer { reply: Reply::Done, descriptors: Vec::new() }
    }

    fn error(kind: &str, message: String) -> Answer {
        Answer { reply: Reply::Error { kind: kind.into(), message }, descriptors: Vec::new() }
    }
}

/// Why a request was not done: a kind and a message.
struct Refusal(&'static str, String);

impl From<PlugError> for Refusal {
    fn from(error: PlugError) -> Refusal {
        let kind = match error {
            PlugError::Exists(_) => "exists",
            PlugError::NotFound(..) | PlugError::Unknown(_) => "not_found",
            PlugError::Full | PlugError::NotRemote(_) => "invalid",
            PlugError::GuestRefused(..) => "guest_refused",
            PlugError::Host(..) | PlugError::Busy(_) => "io",
        };
        Refusal(kind, error.to_string())
    }
}

impl From<ResourceError> for Refusal {
    fn from(error: ResourceError) -> Refusal {
        Refusal("invalid", error.to_string())
    }
}

fn answer(guest: &Guest, request: Request, descriptors: Vec<OwnedFd>) -> Answer {
    let result = match request {
        Request::Status => {
            return Answer { reply: Reply::Status(status(guest)), descriptors: Vec::new() };
        }
        Request::AddDisk(disk) => add_disk(guest, &disk, descriptors),
        Request::ReplaceDisk { id, epoch } => replace_disk(guest, &id, epoch, descriptors),
        Request::AddNet(network) => add_net(guest, &network, descriptors),
        Request::RemoveDisk { id } => remove(guest, &id, DeviceKind::Disk),
        Request::RemoveNet { id } => remove(guest, &id, DeviceKind::Net),
        Request::NetRing { id } => match guest.bus.ring(&id) {
            Ok(ring) => return Answer { reply: Reply::Done, descriptors: ring.into() },
            Err(error) => Err(error.into()),
        },
        Request::SetDiskLimits { id, limits } => {
            set_limits(guest, &id, DeviceKind::Disk, &[("limits", limits)])
        }
        Request::SetNetLimits { id, from_guest, to_guest } => {
            let limits = [("from_guest", from_guest), ("to_guest", to_guest)];
            set_limits(guest, &id, DeviceKind::Net, &limits)
        }
        Request::SetBalloon { target_mib } => set_balloon(guest, target_mib),
        Request::Balloon => match balloon(guest) {
            Ok(status) => {
                return Answer { reply: Reply::Balloon(status), descriptors: Vec::new() };
            }
            Err(refusal) => Err(refusal),
        },
        Request::ForceRemove { id } => guest.bus.force_remove(&id).map_err(Refusal::from),
        Request::Pause => pause(guest),
        Request::Resume => {
            let _one_at_a_time = guest.pausing.lock();
            resume(guest);
            Ok(())
        }
        Request::Metrics => {
            return Answer { reply: Reply::Metrics(metrics(guest)), descriptors: Vec::new() };
        }
        Request::Kill => Err(Refusal("invalid", "kill is the connection's matter".into())),
    };
    result.map_or_else(|Refusal(kind, message)| Answer::error(kind, message), |()| Answer::done())
}

/// Stops the vCPUs, which are who starts and resets devices, then the devices.
fn pause(guest: &Guest) -> Result<(), Refusal> {
    let _one_at_a_time = guest.pausing.lock();
    let stopped = if guest.gate.pause() {
        guest.bus.hold(PAUSE_TIMEOUT).map_err(Refusal::from)
    } else {
        Err(Refusal("io", "a vCPU did not stop; the guest runs on".into()))
    };
    stopped.inspect_err(|_| resume(guest))
}

fn resume(guest: &Guest) {
    guest.bus.go_on();
    guest.gate.resume();
}

fn metrics(guest: &Guest) -> Metrics {
    let state = if guest.gate.is_paused() { RunState::Paused } else { RunState::Running };
    Metrics {
        id: guest.id.clone(),
        state,
        memory_mib: guest.memory_mib,
        vcpus: guest.gate.vcpus(),
        cpu_ns: cpu_ns(),
        timings: guest.clock.timings(),
        devices: guest.bus.metrics(),
    }
}

fn unplugging((id, since): (String, SystemTime)) -> Unplugging {
    let since = since.duration_since(UNIX_EPOCH).unwrap_or_default();
    Unplugging { id, since_unix_ms: since.as_millis() as u64 }
}

fn status(guest: &Guest) -> Status {
    let plugged = guest.bus.plugged();
    Status {
        id: guest.id.clone(),
        nonce: guest.nonce.clone(),
        pid: std::process::id(),
        state: if guest.gate.is_paused() { RunState::Paused } else { RunState::Running },
        disks: plugged.disks,
        disks_leaving: plugged.disks_leaving,
        disks_disconnected: plugged.disks_disconnected,
        unplugging: plugged.unplugging.into_iter().map(unplugging).collect(),
        writes: guest.writes(),
        nets: plugged.nets,
        timings: guest.clock.timings(),
    }
}

fn add_disk(guest: &Guest, disk: &DiskConfig, descriptors: Vec<OwnedFd>) -> Result<(), Refusal> {
    if let Some(problem) = disk.problem() {
        return Err(Refusal("invalid", problem));
    }
    add(guest, blk::open_inside(disk, &mut Supply::descriptors(descriptors), guest.lease.clone())?)
}

fn replace_disk(
    guest: &Guest,
    id: &str,
    epoch: u64,
    descriptors: Vec<OwnedFd>,
) -> Result<(), Refusal> {
    let link = guest.bus.disk_link(id)?;
    let what = format!("disk {id:?}");
    let socket = Supply::descriptors(descriptors).stream(&Resource::Descriptor(0), &what)?;
    link.replace(socket, epoch).map_err(|error| Refusal("io", format!("{what}: {error}")))
}

fn add_net(guest: &Guest, network: &NetConfig, descriptors: Vec<OwnedFd>) -> Result<(), Refusal> {
    if let Some(problem) = network.problem() {
        return Err(Refusal("invalid", problem));
    }
    add(guest, net::open(network, &mut Supply::descriptors(descriptors))?)
}

fn set_limits(
    guest: &Guest,
    id: &str,
    kind: DeviceKind,
    named: &[(&str, RateLimits)],
) -> Result<(), Refusal> {
    for (key, limits) in named {
        if let Some(problem) = limits.problem() {
            return Err(Refusal("invalid", format!("{kind} {id:?}: {key}.{problem}")));
        }
    }
    let limits: Vec<_> = named.iter().map(|(_, limits)| *limits).collect();
    Ok(guest.bus.set_rates(id, kind, &limits)?)
}

fn set_balloon(guest: &Guest, target_mib: u32) -> Result<(), Refusal> {
    match balloon_target_problem(target_mib, guest.memory_mib) {
        Some(problem) => Err(Refusal("invalid", format!("target_mib: {problem}"))),
        None => Ok(guest.bus.set_balloon(target_mib)?),
    }
}

fn balloon(guest: &Guest) -> Result<BalloonStatus, Refusal> {
    let link = guest.bus.balloon()?;
    let statistics = link.statistics(STATISTICS_TIMEOUT);
    Ok(BalloonStatus {
        target_mib: link.target_mib(),
        size_mib: link.size_mib(),
        given_back_bytes: link.given_back_bytes(),
        refusals: link.refusals(),
        statistics,
    })
}

fn add(guest: &Guest, device: Device) -> Result<(), Refusal> {
    Ok(guest.bus.add(device)?)
}

fn remove(guest: &Guest, id: &str, kind: DeviceKind) -> Result<(), Refusal> {
    Ok(guest.bus.remove(id, kind, REMOVAL_TIMEOUT)?)
}

//! The answering side: one thread accepts, one thread serves each connection.

use super::{BalloonStatus, CONTROL_VERSION, Envelope, Reply, Request, RunState, Status};
use crate::config::{DiskConfig, NetConfig, RateLimits, Resource, balloon_target_problem};
use crate::devices::{Device, DeviceKind, blk, net};
use crate::pci::PlugError;
use crate::process::ending::Cause;
use crate::process::guest::Guest;
use crate::process::resources::{ResourceError, Supply};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// Most connections served at once; more are closed at once.
const CONNECTIONS_MAX: usize = 16;
/// How long a removal waits for the guest.
const REMOVAL_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a guest has to say how its memory is.
const STATISTICS_TIMEOUT: Duration = Duration::from_secs(2);
/// Stack of its threads.
pub(crate) const STACK_BYTES: usize = 256 << 10;

/// Serves `listener` on threads of its own.
pub fn start(listener: UnixListener, guest: Arc<Guest>) -> std::io::Result<()> {
    std::thread::Builder::new().stack_size(STACK_BYTES).spawn(move || accept(&listener, &guest))?;
    Ok(())
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
            serve(&socket, &guest);
            count.fetch_sub(1, Ordering::AcqRel);
        };
        if std::thread::Builder::new().stack_size(STACK_BYTES).spawn(serve).is_err() {
            open.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

fn serve(socket: &UnixStream, guest: &Guest) {
    while let Ok(Some((message, descriptors))) = abi::control::receive(socket) {
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
            PlugError::NotFound(..) => "not_found",
            PlugError::Full | PlugError::NotRemote(_) => "invalid",
            PlugError::GuestRefused(..) => "guest_refused",
            PlugError::Host(..) => "io",
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
        Request::Pause if guest.gate.pause() => Ok(()),
        Request::Pause => {
            guest.gate.resume();
            Err(Refusal("io", "a vCPU did not stop; the guest runs on".into()))
        }
        Request::Resume => {
            guest.gate.resume();
            Ok(())
        }
        Request::Kill => Err(Refusal("invalid", "kill is the connection's matter".into())),
    };
    result.map_or_else(|Refusal(kind, message)| Answer::error(kind, message), |()| Answer::done())
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

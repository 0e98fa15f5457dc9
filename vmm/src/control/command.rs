//! `trine-vmm control SOCKET COMMAND`: a running guest's control socket, for people and scripts.
//!
//! A device to plug is given as in a configuration, with a path: it is opened here, with the rights
//! of whoever asks, and the guest's closed process gets the open descriptor.

use super::{Client, ControlError, Request};
use crate::config::{DiskConfig, DiskSource, NetBackend, NetConfig, RateLimits, Resource};
use crate::devices::net;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

/// What [`run`] takes.
pub const USAGE: &str = "\
  trine-vmm control SOCKET status              who the guest is and how, as JSON
  trine-vmm control SOCKET metrics             numbers for Prometheus
  trine-vmm control SOCKET pause | resume      stop its vCPUs and devices; let them run
  trine-vmm control SOCKET kill                end it at once
  trine-vmm control SOCKET add-disk JSON       plug a disk, given as in a configuration
  trine-vmm control SOCKET remove-disk ID      ask the guest for a disk, at most 10 s
  trine-vmm control SOCKET add-net JSON        plug a network device
  trine-vmm control SOCKET remove-net ID       ask the guest for a network device
  trine-vmm control SOCKET force-remove ID     pull a device out, whatever the guest does
  trine-vmm control SOCKET replace-disk ID NBD another connection for a remote disk, to the socket NBD
  trine-vmm control SOCKET set-disk-limits ID JSON   all rate limits of a disk, as in a configuration
  trine-vmm control SOCKET set-net-limits ID JSON    as that, with \"from_guest\" and \"to_guest\"
  trine-vmm control SOCKET balloon [MIB]       how its balloon is; ask for MIB of memory back
";

/// Why a command was not done.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The VMM could not be asked, or refused.
    #[error("{socket}: {source}")]
    Control {
        /// The control socket.
        socket: String,
        /// Why.
        #[source]
        source: ControlError,
    },
    /// The command is not one.
    #[error("{0:?} is no control command; see trine-vmm --help")]
    Unknown(String),
    /// What a command is given is not what it takes.
    #[error("{0}")]
    Argument(String),
    /// What a device needs could not be opened.
    #[error("open {path}: {source}")]
    Open {
        /// Its path.
        path: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

/// Does one command on the guest whose control socket is `socket`; returns what is printed.
pub fn run(socket: &Path, command: &[&str]) -> Result<String, CommandError> {
    let act = parse(command)?;
    let failed = |source| CommandError::Control { socket: socket.display().to_string(), source };
    let client = Client::connect(socket).map_err(failed)?;
    act(&client).map_err(failed)
}

type Act = Box<dyn FnOnce(&Client) -> Result<String, ControlError>>;

/// A command, with everything opened that it needs.
fn parse(command: &[&str]) -> Result<Act, CommandError> {
    let simple = |request: Request| -> Act {
        Box::new(move |client| client.request(request, &[]).map(|_| String::new()))
    };
    Ok(match command {
        ["status"] => Box::new(|client| json(&client.status()?)),
        ["metrics"] => Box::new(|client| Ok(client.metrics()?.prometheus())),
        ["pause"] => simple(Request::Pause),
        ["resume"] => simple(Request::Resume),
        ["kill"] => simple(Request::Kill),
        ["balloon"] => Box::new(|client| json(&client.balloon()?)),
        ["balloon", mib] => {
            let target_mib = mib.parse().map_err(|_| {
                CommandError::Argument(format!("balloon: {mib:?} is not a number of MiB"))
            })?;
            simple(Request::SetBalloon { target_mib })
        }
        ["remove-disk", id] => simple(Request::RemoveDisk { id: (*id).into() }),
        ["remove-net", id] => simple(Request::RemoveNet { id: (*id).into() }),
        ["force-remove", id] => simple(Request::ForceRemove { id: (*id).into() }),
        ["set-disk-limits", id, json] => {
            let limits = parsed("limits", json)?;
            simple(Request::SetDiskLimits { id: (*id).into(), limits })
        }
        ["set-net-limits", id, json] => {
            let NetLimits { from_guest, to_guest } = parsed("limits", json)?;
            simple(Request::SetNetLimits { id: (*id).into(), from_guest, to_guest })
        }
        ["replace-disk", id, path] => {
            let connection = UnixStream::connect(path)
                .map_err(|source| CommandError::Open { path: (*path).into(), source })?;
            plug(Request::ReplaceDisk { id: (*id).into(), epoch: 0 }, connection.into())
        }
        ["add-disk", json] => {
            let (disk, descriptor) = open_disk(parsed("disk", json)?)?;
            plug(Request::AddDisk(disk), descriptor)
        }
        ["add-net", json] => {
            let (network, descriptor) = open_net(parsed("net", json)?)?;
            plug(Request::AddNet(network), descriptor)
        }
        _ => return Err(CommandError::Unknown(command.join(" "))),
    })
}

fn plug(request: Request, descriptor: OwnedFd) -> Act {
    Box::new(move |client| client.request(request, &[descriptor.as_fd()]).map(|_| String::new()))
}

fn json<T: serde::Serialize>(value: &T) -> Result<String, ControlError> {
    let text = serde_json::to_string_pretty(value).map_err(io::Error::other)?;
    Ok(text + "\n")
}

/// What is given of a network device's limits.
#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct NetLimits {
    #[serde(default)]
    from_guest: RateLimits,
    #[serde(default)]
    to_guest: RateLimits,
}

fn parsed<T: serde::de::DeserializeOwned>(what: &str, json: &str) -> Result<T, CommandError> {
    serde_json::from_str(json).map_err(|error| CommandError::Argument(format!("{what}: {error}")))
}

fn open_disk(mut disk: DiskConfig) -> Result<(DiskConfig, OwnedFd), CommandError> {
    let what = format!("disk {:?}", disk.id);
    let descriptor = match &mut disk.source {
        DiskSource::Raw(resource) => open(resource, &what, |path| {
            let file = OpenOptions::new().read(true).write(!disk.read_only).open(path);
            file.map(OwnedFd::from)
        })?,
        DiskSource::Nbd { socket, .. } => {
            open(socket, &what, |path| UnixStream::connect(path).map(OwnedFd::from))?
        }
    };
    Ok((disk, descriptor))
}

fn open_net(mut network: NetConfig) -> Result<(NetConfig, OwnedFd), CommandError> {
    let what = format!("net {:?}", network.id);
    match &mut network.backend {
        NetBackend::Tap(resource) => {
            let descriptor =
                open(resource, &what, |name| net::link::open_tap(name).map(OwnedFd::from))?;
            Ok((network, descriptor))
        }
        NetBackend::Ring(_) => Err(CommandError::Argument(format!(
            "{what}: a packet ring has no path; only a tap can be plugged from here"
        ))),
    }
}

/// Opens what a path names, and puts the descriptor's place in the request into its stead.
fn open(
    resource: &mut Resource,
    what: &str,
    by_path: impl FnOnce(&Path) -> io::Result<OwnedFd>,
) -> Result<OwnedFd, CommandError> {
    let Resource::Path(path) = resource else {
        return Err(CommandError::Argument(format!("{what}: only paths are taken here")));
    };
    let opened = by_path(path)
        .map_err(|source| CommandError::Open { path: path.display().to_string(), source })?;
    *resource = Resource::Descriptor(0);
    Ok(opened)
}

//! Requests to a running VMM, over its control socket (`abi::control` frames of JSON).

pub mod client;
pub mod command;
pub mod metrics;
pub mod server;

pub use client::{Client, ControlError};
pub use metrics::Metrics;

use crate::config::{DiskConfig, NetConfig, RateLimits, VmConfig};
use crate::devices::balloon::statistics::Statistics;
use serde::{Deserialize, Serialize};

/// Version of these requests, sent with each.
pub const CONTROL_VERSION: u32 = 1;

/// One request frame.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Envelope {
    /// [`CONTROL_VERSION`].
    pub version: u32,
    /// What is asked.
    pub request: Request,
}

/// What can be asked of a running guest's VMM.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Who is this and how is it: [`Reply::Status`].
    Status,
    /// Hot-plugs a disk; descriptors come with the frame. [`Reply::Done`] when the guest was told.
    AddDisk(DiskConfig),
    /// Asks the guest for a disk and waits (10 s at most) until it let go: [`Reply::Done`], or an
    /// error of kind `guest_refused` with the disk still in place.
    RemoveDisk {
        /// The disk's id.
        id: String,
    },
    /// Takes a disk or network device away whether the guest lets go of it or not, as if it had been
    /// pulled out: what the guest had asked of it is never answered. [`Reply::Done`] when its host
    /// side is closed.
    ForceRemove {
        /// The device's id.
        id: String,
    },
    /// Gives a remote disk another connection to the same bytes (one descriptor, as for
    /// [`crate::config::DiskSource::Nbd`]): what is unanswered is asked again there. The guest
    /// notices a pause at most; but where the server's epoch is another one and it holds writes
    /// that were answered and not flushed, the guest's flush fails, once, because they may be lost.
    ReplaceDisk {
        /// The disk's id.
        id: String,
        /// The server's epoch, as in [`crate::config::DiskSource::Nbd`].
        #[serde(default)]
        epoch: u64,
    },
    /// Hot-plugs a network device.
    AddNet(NetConfig),
    /// As `RemoveDisk`, for a network device.
    RemoveNet {
        /// The device's id.
        id: String,
    },
    /// The packet ring descriptors of a network device, with the reply: for a switch that restarted.
    NetRing {
        /// The device's id.
        id: String,
    },
    /// Asks the guest to give `target_mib` of its memory to the host in all; with less than before
    /// it takes memory back. [`Reply::Done`] when it was told; [`Request::Balloon`] shows what it does.
    SetBalloon {
        /// At most the guest's memory.
        target_mib: u32,
    },
    /// How the balloon is: [`Reply::Balloon`].
    Balloon,
    /// Changes a disk's rate limits; what waits goes on by the new ones.
    SetDiskLimits {
        /// The disk's id.
        id: String,
        /// All of its limits; what is absent is not limited any more.
        limits: RateLimits,
    },
    /// As `SetDiskLimits`, for a network device.
    SetNetLimits {
        /// The device's id.
        id: String,
        /// What the guest may send.
        #[serde(default)]
        from_guest: RateLimits,
        /// What it is given.
        #[serde(default)]
        to_guest: RateLimits,
    },
    /// Stops the vCPUs, then the devices: from the answer on nothing of the guest's memory or disks
    /// changes. What a device had in flight is finished first.
    Pause,
    /// Lets them run.
    Resume,
    /// Numbers about the guest: [`Reply::Metrics`].
    Metrics,
    /// Ends the guest at once; the exit record says `killed`.
    Kill,
}

impl Request {
    /// Whether descriptors go with it.
    pub fn takes_descriptors(&self) -> bool {
        matches!(self, Request::AddDisk(_) | Request::AddNet(_) | Request::ReplaceDisk { .. })
    }
}

/// The answer to a request.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Reply {
    /// It is done.
    Done,
    /// Answer to [`Request::Status`].
    Status(Status),
    /// Answer to [`Request::Balloon`].
    Balloon(BalloonStatus),
    /// Answer to [`Request::Metrics`].
    Metrics(Metrics),
    /// It was not done, and nothing changed.
    Error {
        /// `invalid`, `not_found`, `exists`, `guest_refused`, `io`.
        kind: String,
        /// What, which value, which rule.
        message: String,
    },
}

/// How a balloon is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonStatus {
    /// What the guest was asked to give to the host, MiB.
    pub target_mib: u32,
    /// What it says it has given, MiB.
    pub size_mib: u32,
    /// Bytes of pages that went back to the host since the start, reported free pages included.
    pub given_back_bytes: u64,
    /// What the guest named and does not have: pages outside of its memory, malformed requests.
    pub refusals: u64,
    /// What the guest says of its memory; absent where it does not answer.
    pub statistics: Option<Statistics>,
}

/// State of a guest's process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunState {
    /// vCPUs run.
    Running,
    /// vCPUs are stopped by request.
    Paused,
    /// The guest has ended; the process is about to.
    Ended,
}

/// Whether a guest may change its disks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Writes {
    /// It may: the lease runs, or there is none to keep.
    #[default]
    Allowed,
    /// The lease has ended; changes wait until it is renewed.
    Waiting,
}

/// Who a VMM is and how its guest is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    /// [`VmConfig::id`].
    pub id: String,
    /// [`VmConfig::nonce`].
    pub nonce: String,
    /// The VMM's process id.
    pub pid: u32,
    /// State.
    pub state: RunState,
    /// Ids of the plugged disks.
    pub disks: Vec<String>,
    /// Ids of disks whose removal the guest was asked for and has not acknowledged.
    pub disks_leaving: Vec<String>,
    /// Devices that the guest was asked for and has not let go of.
    #[serde(default)]
    pub unplugging: Vec<Unplugging>,
    /// Ids of remote disks whose connection is lost: the guest's requests wait for
    /// [`Request::ReplaceDisk`].
    #[serde(default)]
    pub disks_disconnected: Vec<String>,
    /// Whether the host's lease lets the guest change its disks now.
    #[serde(default)]
    pub writes: Writes,
    /// Ids of the plugged network devices.
    pub nets: Vec<String>,
    /// Launch times.
    pub timings: Timings,
}

/// A device that the guest was asked for and has not let go of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unplugging {
    /// Its id.
    pub id: String,
    /// When the guest was first asked, milliseconds since 1970.
    pub since_unix_ms: u64,
}

/// Steps of a launch: CLOCK_MONOTONIC, nanoseconds; 0 where not reached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timings {
    /// Before the spawner's clone.
    pub spawn_ns: u64,
    /// First statement in the guest's own process.
    pub process_ns: u64,
    /// Before the first KVM_RUN.
    pub run_ns: u64,
    /// First exit caused by the guest (its first instruction ran).
    pub first_exit_ns: u64,
    /// Boot-timer mark `MARK_MAIN`.
    pub main_ns: u64,
    /// Boot-timer mark `MARK_NETWORK`.
    pub network_ns: u64,
    /// First byte on the console.
    pub console_ns: u64,
    /// Exits to the VMM up to the mark `MARK_MAIN`, its own among them; so far, before it.
    #[serde(default)]
    pub exits_to_main: u32,
}

impl Timings {
    /// The steps that were reached, in their usual order, and when.
    pub fn steps(&self) -> Vec<(&'static str, u64)> {
        let all = [
            ("process", self.process_ns),
            ("run", self.run_ns),
            ("first_exit", self.first_exit_ns),
            ("main", self.main_ns),
            ("network", self.network_ns),
            ("console", self.console_ns),
        ];
        all.into_iter().filter(|(_, ns)| *ns > 0).collect()
    }
}

/// Why and how a guest ended; the VMM's last act.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ExitRecord {
    /// [`VmConfig::nonce`].
    pub nonce: String,
    /// `power_off`, `reset`, `killed`, `crash`, `error`.
    pub reason: String,
    /// The guest's exit code where it gave one.
    pub code: Option<u8>,
    /// One line for people: what happened.
    pub message: String,
    /// CPU time of the guest's process, nanoseconds.
    #[serde(default)]
    pub cpu_ns: u64,
    /// Launch times.
    pub timings: Timings,
}

/// A request to the spawner (`trine-vmm spawner`), with its descriptors.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SpawnRequest {
    /// [`CONTROL_VERSION`].
    pub version: u32,
    /// The guest; every resource by descriptor.
    pub config: VmConfig,
}

/// What can be asked of the spawner (`trine-vmm spawner`). Its last descriptor is the socket that
/// the answer goes to: the new process answers itself, so the spawner never waits for a guest.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum SpawnerRequest {
    /// Start a guest: [`SpawnReply`].
    Spawn(Box<SpawnRequest>),
    /// Start the smallest raw-KVM program, for launch benchmarks: [`FloorReply`]. Descriptors: its
    /// executable, the pipe it writes its first exit's time to, the reply socket.
    Floor {
        /// Guest memory, MiB.
        memory_mib: u32,
    },
}

/// The spawner's first frame, unasked.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum SpawnerHello {
    /// It takes requests; `sandbox` says in words how tightly guests are closed.
    Ready {
        /// The tier.
        sandbox: String,
    },
    /// It can't start guests, and has ended.
    Failed {
        /// Why, one line.
        message: String,
    },
}

/// The answer to [`SpawnerRequest::Floor`], with the process's pidfd.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FloorReply {
    /// Before the spawner's clone, CLOCK_MONOTONIC.
    pub spawn_ns: u64,
}

/// The new process's answer; the reply frame carries its pidfd.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum SpawnReply {
    /// The process runs: its vCPU is about to enter the guest.
    Spawned {
        /// Process id (the pidfd comes with the frame).
        pid: u32,
        /// Times up to `run_ns`.
        timings: Timings,
    },
    /// It could not start; nothing is left behind.
    Failed {
        /// The failed step and its reason, one line.
        message: String,
    },
}

//! Flavors, keypairs, server groups and servers.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use imbl::OrdMap;
use serde::{Deserialize, Serialize};

use crate::ids::{FlavorId, HostId, ImageId, PortId, ProjectId, ServerGroupId, ServerId, UserId};
use crate::seal::Sealed;

/// Compute.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Compute {
    /// Flavors.
    pub flavors: OrdMap<FlavorId, Flavor>,
    /// Keypairs by owner and name.
    pub keypairs: OrdMap<(UserId, String), Keypair>,
    /// Server groups.
    pub groups: OrdMap<ServerGroupId, ServerGroup>,
    /// Servers.
    pub servers: OrdMap<ServerId, Arc<Server>>,
    /// What is placed on each host; follows from `servers`.
    pub placed: OrdMap<HostId, Placed>,
}

/// What is placed on a host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placed {
    /// Which servers.
    pub servers: imbl::OrdSet<ServerId>,
    /// Their vCPUs.
    pub vcpus: u64,
    /// Their memory.
    pub ram_mib: u64,
    /// Their root, ephemeral and swap disks.
    pub disk_gib: u64,
}

/// A flavor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Flavor {
    /// Its id.
    pub id: FlavorId,
    /// Its name, unique.
    pub name: String,
    /// Free text.
    pub description: Option<String>,
    /// vCPUs.
    pub vcpus: u32,
    /// Memory in MiB.
    pub ram_mib: u64,
    /// Root disk in GiB; 0 means as large as the image.
    pub root_gib: u64,
    /// Ephemeral disk in GiB.
    pub ephemeral_gib: u64,
    /// Swap in MiB.
    pub swap_mib: u64,
    /// Nova's `rxtx_factor`.
    pub rxtx_factor: f64,
    /// Everybody sees it.
    pub is_public: bool,
    /// Not offered.
    pub disabled: bool,
    /// The projects that see it when it isn't public.
    pub projects: BTreeSet<ProjectId>,
    /// Extra specifications.
    pub extra_specs: BTreeMap<String, String>,
}

impl Flavor {
    /// The disk that a server of this flavor takes from a host, in GiB.
    pub fn disk_gib(&self) -> u64 {
        self.root_gib
            .saturating_add(self.ephemeral_gib)
            .saturating_add(self.swap_mib.div_ceil(1024))
    }
}

/// A keypair; the private half never comes here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Keypair {
    /// Its name, unique for its user.
    pub name: String,
    /// Its user.
    pub user_id: UserId,
    /// `ssh` or `x509`.
    pub kind: String,
    /// The public half.
    pub public_key: String,
    /// MD5 fingerprint in colon form.
    pub fingerprint: String,
    /// When it was made.
    pub created_ms: u64,
}

/// How the servers of a group are placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GroupPolicy {
    /// All on one host.
    Affinity,
    /// Each on another host.
    AntiAffinity,
    /// Together where possible.
    SoftAffinity,
    /// Apart where possible.
    SoftAntiAffinity,
}

impl GroupPolicy {
    /// Nova's word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Affinity => "affinity",
            Self::AntiAffinity => "anti-affinity",
            Self::SoftAffinity => "soft-affinity",
            Self::SoftAntiAffinity => "soft-anti-affinity",
        }
    }

    /// The policy that Nova's word means.
    pub fn parse(word: &str) -> Option<Self> {
        [Self::Affinity, Self::AntiAffinity, Self::SoftAffinity, Self::SoftAntiAffinity]
            .into_iter()
            .find(|policy| policy.as_str() == word)
    }
}

/// A server group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerGroup {
    /// Its id.
    pub id: ServerGroupId,
    /// Its name.
    pub name: String,
    /// Its project.
    pub project_id: ProjectId,
    /// Who made it.
    pub user_id: UserId,
    /// How its servers are placed.
    pub policy: GroupPolicy,
    /// For anti-affinity: how many of them one host may have.
    pub max_server_per_host: u32,
    /// Its servers.
    pub members: BTreeSet<ServerId>,
    /// When it was made.
    pub created_ms: u64,
}

/// What the user wants of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Desired {
    /// That it runs.
    Active,
    /// That it is there and doesn't run.
    Stopped,
    /// That it goes away.
    Deleted,
}

/// Nova's `vm_state`.
///
/// ```text
/// building ──► active ◄──► stopped
///    │           │            │
///    └──► error ◄┘            │      (any) ──► gone
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VmState {
    /// Being made.
    Building,
    /// Made and running.
    Active,
    /// Made and not running.
    Stopped,
    /// Failed; its fault says why.
    Error,
}

impl VmState {
    /// Nova's word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Building => "building",
            Self::Active => "active",
            Self::Stopped => "stopped",
            Self::Error => "error",
        }
    }
}

/// The replicated part of Nova's `task_state`. While a server is building, its agent
/// knows more: networking, block_device_mapping or spawning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TaskState {
    /// Placed; its host is making it.
    Scheduling,
    /// Going away.
    Deleting,
    /// Being stopped.
    PoweringOff,
    /// Being started.
    PoweringOn,
    /// Being restarted.
    Rebooting,
    /// Being made anew on another host.
    Rebuilding,
}

impl TaskState {
    /// Nova's word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Scheduling => "scheduling",
            Self::Deleting => "deleting",
            Self::PoweringOff => "powering-off",
            Self::PoweringOn => "powering-on",
            Self::Rebooting => "rebooting",
            Self::Rebuilding => "rebuilding",
        }
    }
}

/// Nova's `power_state`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PowerState {
    /// Not known: 0.
    NoState,
    /// Running: 1.
    Running,
    /// Shut down: 4.
    Shutdown,
    /// Crashed: 6.
    Crashed,
}

impl PowerState {
    /// Nova's number.
    pub fn number(self) -> u8 {
        match self {
            Self::NoState => 0,
            Self::Running => 1,
            Self::Shutdown => 4,
            Self::Crashed => 6,
        }
    }
}

/// Why a server is in ERROR.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// An HTTP code.
    pub code: u16,
    /// In one sentence.
    pub message: String,
    /// At length.
    pub details: String,
    /// When.
    pub created_ms: u64,
}

/// A server.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Server {
    /// Its id.
    pub id: ServerId,
    /// Its name.
    pub name: String,
    /// Its project.
    pub project_id: ProjectId,
    /// Who made it.
    pub user_id: UserId,
    /// Free text.
    pub description: Option<String>,
    /// The image it was made from.
    pub image_id: Option<ImageId>,
    /// The flavor as it was when the server was made.
    pub flavor: Flavor,
    /// The keypair's name.
    pub key_name: Option<String>,
    /// The keypair's public half as it was when the server was made.
    pub public_key: Option<String>,
    /// Metadata.
    pub metadata: BTreeMap<String, String>,
    /// Tags.
    pub tags: BTreeSet<String>,
    /// Gets a config drive.
    pub config_drive: bool,
    /// What the guest is to do, as given (base64 decoded), sealed.
    pub user_data: Option<Sealed>,
    /// The availability zone that was asked for.
    pub availability_zone: Option<String>,
    /// Where it is.
    pub host: Option<HostId>,
    /// Its server group.
    pub group_id: Option<ServerGroupId>,
    /// Its host name.
    pub hostname: String,
    /// The same for servers of one request.
    pub reservation_id: String,
    /// Its number in its request.
    pub launch_index: u32,
    /// What the user wants.
    pub desired: Desired,
    /// Nova's `vm_state`.
    pub vm_state: VmState,
    /// Nova's `task_state`.
    pub task_state: Option<TaskState>,
    /// Nova's `power_state`.
    pub power_state: PowerState,
    /// Why it is in ERROR.
    pub fault: Option<Fault>,
    /// Counts its incarnations: each start after a stop gets the next. A fact with an
    /// older generation is ignored.
    pub generation: u64,
    /// Its ports, in the order of its network devices.
    pub ports: Vec<ServerPort>,
    /// When it was made.
    pub created_ms: u64,
    /// When it last changed.
    pub updated_ms: u64,
    /// When it first ran.
    pub launched_ms: Option<u64>,
}

impl Server {
    /// True when the server counts on its host: it has one.
    pub fn is_placed_on(&self, host: HostId) -> bool {
        self.host == Some(host)
    }
}

/// A port of a server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerPort {
    /// The port.
    pub port_id: PortId,
    /// True when the port was made with the server and goes with it.
    pub owned: bool,
    /// The device tag.
    pub tag: Option<String>,
}

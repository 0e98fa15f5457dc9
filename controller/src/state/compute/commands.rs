//! Commands on compute. An update's `None` leaves the field as it is.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::{Flavor, GroupPolicy, PowerState};
use crate::ids::{
    FlavorId, HostId, ImageId, NetworkId, PortId, ProjectId, SecurityGroupId, ServerGroupId,
    ServerId, UserId,
};
use crate::seal::Sealed;

/// A command on compute.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum ComputeCommand {
    /// Makes a flavor.
    CreateFlavor(Box<Flavor>),
    /// Changes a flavor's description.
    UpdateFlavor {
        /// Which.
        id: FlavorId,
        /// New description.
        description: Option<String>,
    },
    /// Removes a flavor; servers keep their copy.
    DeleteFlavor(FlavorId),
    /// Sets and removes extra specifications.
    SetFlavorExtraSpecs {
        /// Which.
        id: FlavorId,
        /// To set.
        set: BTreeMap<String, String>,
        /// To remove.
        remove: BTreeSet<String>,
    },
    /// Gives or takes a project's access to a flavor that isn't public.
    SetFlavorAccess {
        /// Which.
        id: FlavorId,
        /// Whose.
        project_id: ProjectId,
        /// Gives or takes.
        allowed: bool,
    },
    /// Makes a keypair.
    CreateKeypair {
        /// Its name.
        name: String,
        /// Its user.
        user_id: UserId,
        /// `ssh` or `x509`.
        kind: String,
        /// The public half.
        public_key: String,
        /// MD5 fingerprint in colon form.
        fingerprint: String,
    },
    /// Removes a keypair.
    DeleteKeypair {
        /// Its user.
        user_id: UserId,
        /// Its name.
        name: String,
    },
    /// Makes a server group.
    CreateServerGroup {
        /// Its id.
        id: ServerGroupId,
        /// Its name.
        name: String,
        /// Its project.
        project_id: ProjectId,
        /// Who makes it.
        user_id: UserId,
        /// How its servers are placed.
        policy: GroupPolicy,
        /// For anti-affinity: how many of them one host may have (1 is usual).
        max_server_per_host: u32,
    },
    /// Removes a server group; its servers stay.
    DeleteServerGroup(ServerGroupId),
    /// Makes a server and its ports.
    CreateServer(Box<NewServer>),
    /// Changes what is said of a server.
    UpdateServer {
        /// Which.
        id: ServerId,
        /// New name.
        name: Option<String>,
        /// New description.
        description: Option<Option<String>>,
        /// New host name.
        hostname: Option<String>,
        /// New metadata, replacing all.
        metadata: Option<BTreeMap<String, String>>,
        /// New tags, replacing all.
        tags: Option<BTreeSet<String>>,
    },
    /// The user wants it gone.
    DeleteServer(ServerId),
    /// The user wants it stopped.
    StopServer(ServerId),
    /// The user wants it started.
    StartServer(ServerId),
    /// The user wants it restarted.
    RebootServer(ServerId),
    /// Observed: it runs.
    ServerStarted {
        /// Which.
        id: ServerId,
        /// Which incarnation.
        generation: u64,
    },
    /// Observed: it can't be made or run.
    ServerFailed {
        /// Which.
        id: ServerId,
        /// Which incarnation.
        generation: u64,
        /// An HTTP code, 500 as a rule.
        code: u16,
        /// In one sentence.
        message: String,
        /// At length.
        details: String,
    },
    /// Observed: it ended.
    ServerStopped {
        /// Which.
        id: ServerId,
        /// Which incarnation.
        generation: u64,
        /// `Shutdown` or `Crashed`.
        power_state: PowerState,
    },
    /// Observed: nothing of it is left on its host.
    ServerGone {
        /// Which.
        id: ServerId,
        /// Which incarnation.
        generation: u64,
    },
    /// Makes a server anew on another host. Refused unless its host is fenced or was forced down,
    /// and while something it needs is only there.
    EvacuateServer {
        /// Which.
        id: ServerId,
        /// The host asked for, by name.
        requested_host: Option<String>,
        /// It is to be stopped there, whatever it was.
        #[serde(default)]
        stop: bool,
        /// Where it goes; filled in by the leader (`plan::prepare`).
        placement: Option<Placement>,
    },
    /// A server of a host that is out waits for that host, because it can't be evacuated.
    ServerWaits {
        /// Which.
        id: ServerId,
        /// Which incarnation.
        generation: u64,
        /// What it waits for.
        message: String,
    },
    /// A server's user data, sealed with another key: the same content.
    ResealServer {
        /// Which.
        id: ServerId,
        /// The id of the key that it was sealed with.
        from: String,
        /// The user data, sealed.
        user_data: Sealed,
    },
}

/// A server to make.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NewServer {
    /// Its id.
    pub id: ServerId,
    /// Its name.
    pub name: String,
    /// Its project.
    pub project_id: ProjectId,
    /// Who makes it.
    pub user_id: UserId,
    /// Free text.
    pub description: Option<String>,
    /// The image.
    pub image_id: ImageId,
    /// The flavor.
    pub flavor_id: FlavorId,
    /// The user's keypair.
    pub key_name: Option<String>,
    /// Metadata.
    pub metadata: BTreeMap<String, String>,
    /// Tags.
    pub tags: BTreeSet<String>,
    /// Wants a config drive.
    pub config_drive: bool,
    /// What the guest is to do (base64 decoded), sealed.
    pub user_data: Option<Sealed>,
    /// The availability zone asked for.
    pub availability_zone: Option<String>,
    /// A host asked for by an administrator, by name.
    pub requested_host: Option<String>,
    /// Its server group.
    pub group_id: Option<ServerGroupId>,
    /// Its host name.
    pub hostname: String,
    /// The same for servers of one request.
    pub reservation_id: String,
    /// Its number in its request.
    pub launch_index: u32,
    /// Its network devices in order.
    pub networks: Vec<NewServerPort>,
    /// Security groups of the ports that are made; empty means the project's default.
    pub security_groups: Vec<SecurityGroupId>,
    /// Where it goes. The API leaves it out; the leader fills it in before the command
    /// enters the log (`plan::prepare`).
    pub placement: Option<Placement>,
}

/// A network device of a server to make.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NewServerPort {
    /// The port: an existing one, or the id (minted by the API) of the one to make.
    pub port_id: PortId,
    /// Where it comes from.
    pub source: PortSource,
    /// The device tag.
    pub tag: Option<String>,
}

/// Where a server's port comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PortSource {
    /// It exists.
    Existing,
    /// It is made with the server.
    New {
        /// In this network.
        network_id: NetworkId,
        /// With this address, or any.
        fixed_ip: Option<IpAddr>,
    },
}

/// What the scheduler decided.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Placement {
    /// This host.
    Host(HostId),
    /// None fits.
    NoValidHost {
        /// In one sentence.
        message: String,
        /// Which filter removed which host.
        details: String,
    },
}

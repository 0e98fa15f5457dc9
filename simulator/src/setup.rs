//! The cloud that every run begins with: a project with quotas small enough to be reached, hosts
//! small enough to be filled, an image, flavors, a network whose addresses run out.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use controller::ids::HostId;
use controller::state::cluster::{Capacity, ClusterCommand, HostAddresses, Init, NewHost};
use controller::state::compute::{ComputeCommand, Flavor};
use controller::state::identity::{IdentityCommand, NewProject};
use controller::state::image::{ImageCommand, ImageContent, NewImage, Visibility};
use controller::state::network::{Gateway, NetworkCommand, NewNetwork, NewSubnet};
use controller::state::{Command, FEATURE_LEVEL, QuotaCommand, QuotaResource};

/// The tenant.
pub(crate) const PROJECT: &str = "11111111111111111111111111111111";
/// Its user.
pub(crate) const USER: &str = "22222222222222222222222222222222";
/// The image that servers boot.
pub(crate) const IMAGE: &str = "image";
/// The network that servers are in.
pub(crate) const NETWORK: &str = "net";
/// Projects whose descriptions serve as registers.
pub(crate) const REGISTERS: [&str; 3] = ["register-a", "register-b", "register-c"];

/// The content of the image.
pub(crate) fn content() -> String {
    "ab".repeat(64)
}

/// The name in a host's certificate.
pub(crate) fn server_name(id: HostId) -> String {
    format!("node-{id}.sim.trine")
}

/// A host that wants in.
pub(crate) fn new_host(id: HostId) -> NewHost {
    let number = u8::try_from(id.0).unwrap_or(u8::MAX);
    let at = |port: u16| SocketAddr::from(([127, 0, 0, number], port));
    NewHost {
        name: format!("node{number}"),
        addresses: HostAddresses {
            api: at(8774),
            raft: at(8775),
            storage: at(8776),
            tunnel: at(4789),
            server_name: server_name(id),
        },
        capacity: Capacity { vcpus: 2, ram_mib: 5_120, disk_gib: 14 },
        feature_level: FEATURE_LEVEL,
    }
}

/// The hash of the join token of a host.
pub(crate) fn token(id: HostId) -> String {
    format!("token-{id}")
}

/// Makes the cluster.
pub(crate) fn init() -> Command {
    Command::Cluster(ClusterCommand::Init(Box::new(Init {
        cluster_id: "cccccccc-cccc-4ccc-8ccc-cccccccccccc".into(),
        name: "sim".into(),
        region: "RegionOne".into(),
        host: new_host(HostId(1)),
        admin_name: "admin".into(),
        admin_password_hash: "$argon2id$hash".into(),
        feature_level: FEATURE_LEVEL,
        floating_pool: ipnet::Ipv4Net::new_assert([127, 77, 1, 0].into(), 28),
    })))
}

/// Admits a host.
pub(crate) fn admit(id: HostId, replaces: Option<HostId>) -> [Command; 2] {
    let hash = token(id);
    [
        Command::Cluster(ClusterCommand::IssueJoinToken {
            hash: hash.clone(),
            expires_ms: u64::MAX,
            replaces,
        }),
        Command::Cluster(ClusterCommand::RegisterHost {
            token_hash: hash,
            host: Box::new(new_host(id)),
        }),
    ]
}

/// Everything else, once the hosts are in.
pub(crate) fn commands(hosts: u64) -> Vec<Command> {
    let project = |id: &str, name: &str| {
        Command::Identity(IdentityCommand::CreateProject(NewProject {
            id: id.into(),
            domain_id: "default".into(),
            parent_id: None,
            name: name.into(),
            description: String::new(),
            enabled: true,
            tags: BTreeSet::new(),
        }))
    };
    let mut all = vec![project(PROJECT, "demo")];
    all.extend(REGISTERS.map(|id| project(id, id)));
    all.push(Command::Quota(QuotaCommand::Set {
        project_id: PROJECT.into(),
        limits: vec![
            (QuotaResource::Instances, 9),
            (QuotaResource::Cores, 12),
            (QuotaResource::Volumes, 7),
            (QuotaResource::Gigabytes, 14),
        ],
    }));
    all.extend((1..=hosts).map(|host| {
        Command::Cluster(ClusterCommand::SetHostService {
            id: HostId(host),
            disabled: None,
            disabled_reason: None,
            forced_down: None,
            evacuate: Some(true),
        })
    }));
    all.extend([flavor("1", 1, 1024), flavor("2", 2, 2048)]);
    all.push(Command::Image(ImageCommand::Create(Box::new(new_image()))));
    all.push(Command::Image(ImageCommand::UploadStarted(IMAGE.into())));
    all.push(Command::Image(ImageCommand::Uploaded {
        id: IMAGE.into(),
        content: ImageContent {
            size_bytes: 20_000,
            virtual_size_bytes: 20_000,
            md5: "d41d8cd98f00b204e9800998ecf8427e".into(),
            sha512: content(),
            kind: "elf".into(),
        },
        host: HostId(1),
        upload: None,
    }));
    all.extend(
        (2..=hosts).map(|host| {
            Command::Image(ImageCommand::HeldBy { id: IMAGE.into(), host: HostId(host) })
        }),
    );
    all.push(Command::Network(NetworkCommand::CreateNetwork(Box::new(network()))));
    all.push(Command::Network(NetworkCommand::CreateSubnet(Box::new(subnet()))));
    all
}

fn flavor(id: &str, vcpus: u32, ram_mib: u64) -> Command {
    Command::Compute(ComputeCommand::CreateFlavor(Box::new(Flavor {
        id: id.into(),
        name: format!("flavor-{id}"),
        description: None,
        vcpus,
        ram_mib,
        root_gib: 1,
        ephemeral_gib: 0,
        swap_mib: 0,
        rxtx_factor: 1.0,
        is_public: true,
        disabled: false,
        projects: BTreeSet::new(),
        extra_specs: BTreeMap::new(),
    })))
}

fn new_image() -> NewImage {
    NewImage {
        id: IMAGE.into(),
        name: Some(IMAGE.into()),
        owner: Some(PROJECT.into()),
        disk_format: Some("raw".into()),
        container_format: Some("bare".into()),
        visibility: Visibility::Public,
        protected: false,
        hidden: false,
        min_disk: 0,
        min_ram: 0,
        tags: BTreeSet::new(),
        properties: BTreeMap::new(),
    }
}

fn network() -> NewNetwork {
    NewNetwork {
        id: NETWORK.into(),
        project_id: PROJECT.into(),
        name: NETWORK.into(),
        description: String::new(),
        admin_state_up: true,
        shared: false,
        external: false,
        port_security_enabled: true,
        mtu: None,
        tags: BTreeSet::new(),
    }
}

fn subnet() -> NewSubnet {
    let range = ipnet::Ipv4Net::new_assert([10, 0, 0, 0].into(), 28);
    NewSubnet {
        id: "subnet".into(),
        network_id: NETWORK.into(),
        project_id: PROJECT.into(),
        name: "subnet".into(),
        description: String::new(),
        cidr: range.into(),
        gateway: Gateway::First,
        enable_dhcp: true,
        dns_nameservers: Vec::new(),
        host_routes: Vec::new(),
        allocation_pools: Vec::new(),
        tags: BTreeSet::new(),
    }
}

//! A small cloud for tests: three hosts, a project, an image, a flavor, a network.

use std::collections::{BTreeMap, BTreeSet};

use super::cluster::{Capacity, ClusterCommand, HostAddresses, Init, NewHost};
use super::compute::{ComputeCommand, Flavor, NewServer, NewServerPort, Placement, PortSource};
use super::identity::{IdentityCommand, NewProject};
use super::image::{ImageCommand, ImageContent, NewImage, Visibility};
use super::network::{Gateway, NetworkCommand, NewNetwork, NewSubnet};
use super::volume::{NewVolume, VolumeCommand};
use super::{Command, FEATURE_LEVEL, Outcome, Rejection, RejectionKind, State};
use crate::ids::{HostId, ServerGroupId, ServerId, VolumeId};
use crate::plan::{InFlight, Liveness, prepare};

/// The tests' project, limited by the default quotas.
pub(crate) const PROJECT: &str = "11111111111111111111111111111111";
/// Its user's id; nobody needs more of it here.
pub(crate) const USER: &str = "22222222222222222222222222222222";

/// A state with a command counter, checked after every command.
#[derive(Clone)]
pub(crate) struct Sample {
    pub(crate) state: State,
    pub(crate) liveness: Liveness,
    index: u64,
}

pub(crate) fn new_host(number: u8) -> NewHost {
    let at = |port: u16| std::net::SocketAddr::from(([127, 0, 0, 10 + number], port));
    NewHost {
        name: format!("node{number}"),
        addresses: HostAddresses {
            api: at(8774),
            raft: at(8775),
            storage: at(8776),
            tunnel: at(4789),
            server_name: format!("node-{number}.test.trine"),
        },
        capacity: Capacity { vcpus: 4, ram_mib: 4096, disk_gib: 100 },
        feature_level: FEATURE_LEVEL,
    }
}

pub(crate) fn init() -> Command {
    Command::Cluster(ClusterCommand::Init(Box::new(Init {
        cluster_id: "cccccccc-cccc-4ccc-8ccc-cccccccccccc".into(),
        name: "test".into(),
        region: "RegionOne".into(),
        host: new_host(1),
        admin_name: "admin".into(),
        admin_password_hash: "$argon2id$hash".into(),
        floating_pool: "127.77.1.0/24".parse().expect("a range"),
        feature_level: FEATURE_LEVEL,
    })))
}

pub(crate) fn flavor(id: &str, vcpus: u32, ram_mib: u64) -> Flavor {
    Flavor {
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
    }
}

pub(crate) fn new_network(id: &str) -> NewNetwork {
    NewNetwork {
        id: id.into(),
        project_id: PROJECT.into(),
        name: id.into(),
        description: String::new(),
        admin_state_up: true,
        shared: false,
        external: false,
        port_security_enabled: true,
        mtu: None,
        tags: BTreeSet::new(),
    }
}

pub(crate) fn new_subnet(id: &str, network: &str, cidr: &str) -> NewSubnet {
    NewSubnet {
        id: id.into(),
        network_id: network.into(),
        project_id: PROJECT.into(),
        name: id.into(),
        description: String::new(),
        cidr: cidr.parse().expect("a range"),
        gateway: Gateway::First,
        enable_dhcp: true,
        dns_nameservers: Vec::new(),
        host_routes: Vec::new(),
        allocation_pools: Vec::new(),
        tags: BTreeSet::new(),
    }
}

pub(crate) fn new_image(id: &str) -> NewImage {
    NewImage {
        id: id.into(),
        name: Some(id.into()),
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

pub(crate) fn content() -> ImageContent {
    ImageContent {
        size_bytes: 20_000,
        virtual_size_bytes: 20_000,
        md5: "d41d8cd98f00b204e9800998ecf8427e".into(),
        sha512: "ab".repeat(64),
        kind: "elf".into(),
    }
}

pub(crate) fn new_server(id: &str, group: Option<&str>) -> NewServer {
    NewServer {
        id: id.into(),
        name: id.into(),
        project_id: PROJECT.into(),
        user_id: USER.into(),
        description: None,
        image_id: "image".into(),
        flavor_id: "1".into(),
        key_name: None,
        metadata: BTreeMap::new(),
        tags: BTreeSet::new(),
        config_drive: true,
        user_data: None,
        availability_zone: None,
        requested_host: None,
        group_id: group.map(ServerGroupId::from),
        hostname: id.into(),
        reservation_id: "r-1".into(),
        launch_index: 0,
        networks: vec![NewServerPort {
            port_id: format!("port-of-{id}").into(),
            source: PortSource::New { network_id: "net".into(), fixed_ip: None },
            tag: None,
        }],
        security_groups: Vec::new(),
        placement: None,
    }
}

pub(crate) fn new_volume(id: &str, size_gib: u64) -> NewVolume {
    NewVolume {
        id: id.into(),
        name: id.into(),
        description: None,
        project_id: PROJECT.into(),
        user_id: USER.into(),
        size_gib,
        metadata: BTreeMap::new(),
        availability_zone: None,
        placement: None,
    }
}

impl Sample {
    /// An initialised cluster of one host, and nothing else.
    pub(crate) fn bare() -> Self {
        let up = (1..=3).map(HostId).collect();
        let mut sample = Self { state: State::default(), liveness: Liveness { up }, index: 0 };
        sample.must(init());
        sample
    }

    /// The small cloud.
    pub(crate) fn new() -> Self {
        let mut sample = Self::bare();
        for number in [2, 3] {
            let hash = format!("hash{number}");
            let expires_ms = u64::MAX;
            sample.must(Command::Cluster(ClusterCommand::IssueJoinToken {
                hash: hash.clone(),
                expires_ms,
                replaces: None,
            }));
            let host = Box::new(new_host(number));
            sample.must(Command::Cluster(ClusterCommand::RegisterHost { token_hash: hash, host }));
        }
        sample.must(Command::Identity(IdentityCommand::CreateProject(NewProject {
            id: PROJECT.into(),
            domain_id: "default".into(),
            parent_id: None,
            name: "demo".into(),
            description: String::new(),
            enabled: true,
            tags: BTreeSet::new(),
        })));
        sample.must(Command::Compute(ComputeCommand::CreateFlavor(Box::new(flavor("1", 1, 1024)))));
        sample.must(Command::Image(ImageCommand::Create(Box::new(new_image("image")))));
        sample.must(Command::Image(ImageCommand::UploadStarted("image".into())));
        sample.must(Command::Image(ImageCommand::Uploaded {
            id: "image".into(),
            content: content(),
            host: HostId(1),
            upload: None,
        }));
        sample.must(Command::Network(NetworkCommand::CreateNetwork(Box::new(new_network("net")))));
        let subnet = new_subnet("subnet", "net", "10.0.0.0/29");
        sample.must(Command::Network(NetworkCommand::CreateSubnet(Box::new(subnet))));
        sample
    }

    /// Applies a command as the log would: prepared by the leader, under a new id.
    pub(crate) fn apply(&mut self, mut command: Command) -> Result<Outcome, Rejection> {
        let mut in_flight = InFlight::default();
        prepare(&self.state, &self.liveness, &mut in_flight, &mut command);
        self.apply_as_is(&command)
    }

    /// Applies a command that is already prepared; checks that the state holds together
    /// and that a rejection changed nothing.
    pub(crate) fn apply_as_is(&mut self, command: &Command) -> Result<Outcome, Rejection> {
        self.index += 1;
        let before = self.state.clone();
        let id = u128::from(self.index).to_be_bytes();
        let outcome = self.state.apply(self.index, 1_000 * self.index, id, command);
        if let Err(broken) = self.state.check_invariants() {
            panic!("after {command:?}: {broken}");
        }
        if outcome.is_err() {
            let mut after = self.state.clone();
            after.time_ms = before.time_ms;
            after.applied_index = before.applied_index;
            after.outcomes = before.outcomes.clone();
            assert!(after == before, "a rejection of {command:?} changed the state");
        }
        outcome
    }

    pub(crate) fn must(&mut self, command: Command) -> Outcome {
        let text = format!("{command:?}");
        self.apply(command).unwrap_or_else(|why| panic!("{text}: {why}"))
    }

    pub(crate) fn refused(&mut self, command: Command) -> Rejection {
        let text = format!("{command:?}");
        match self.apply(command) {
            Err(why) => why,
            Ok(outcome) => panic!("{text} was not refused: {outcome:?}"),
        }
    }

    pub(crate) fn refused_as(&mut self, command: Command, kind: RejectionKind) {
        let why = self.refused(command);
        assert_eq!(why.kind, kind, "{why:?}");
    }

    pub(crate) fn compute(&mut self, command: ComputeCommand) -> Outcome {
        self.must(Command::Compute(command))
    }

    pub(crate) fn volume(&mut self, command: VolumeCommand) -> Outcome {
        self.must(Command::Volume(command))
    }

    pub(crate) fn network(&mut self, command: NetworkCommand) -> Outcome {
        self.must(Command::Network(command))
    }

    /// Makes a server and lets it run.
    pub(crate) fn running(&mut self, id: &str, group: Option<&str>) -> HostId {
        self.compute(ComputeCommand::CreateServer(Box::new(new_server(id, group))));
        self.compute(ComputeCommand::ServerStarted { id: id.into(), generation: 1 });
        self.server(id).host.expect("it was placed")
    }

    /// Makes a volume that can be attached.
    pub(crate) fn available(&mut self, id: &str) {
        self.volume(VolumeCommand::Create(Box::new(new_volume(id, 1))));
        self.volume(VolumeCommand::Created(id.into()));
    }

    pub(crate) fn server(&self, id: &str) -> &super::compute::Server {
        self.state.compute.servers.get(&ServerId::from(id)).expect("the server is there")
    }

    pub(crate) fn volume_of(&self, id: &str) -> &super::volume::Volume {
        self.state.volume.volumes.get(&VolumeId::from(id)).expect("the volume is there")
    }
}

/// The same server without network devices.
pub(crate) fn without_ports(mut new: NewServer) -> NewServer {
    new.networks.clear();
    new
}

/// A command that makes a server on a host, as if the leader had chosen it.
pub(crate) fn placed(mut new: NewServer, host: u64) -> Command {
    new.placement = Some(Placement::Host(HostId(host)));
    Command::Compute(ComputeCommand::CreateServer(Box::new(new)))
}

//! One of each: commands, outcomes, and a cloud for the snapshot.

use std::collections::{BTreeMap, BTreeSet};

use crate::ids::HostId;
use crate::seal::Sealed;
use crate::state::cluster::{Capacity, ClusterCommand};
use crate::state::compute::{ComputeCommand, GroupPolicy, Placement, PowerState};
use crate::state::fixture::{
    PROJECT, Sample, USER, content, flavor, init, new_host, new_image, new_network, new_server,
    new_subnet, new_volume,
};
use crate::state::identity::{
    Actor, Assignment, Domain, IdentityCommand, NewProject, NewUser, Role, Target, UserUpdate,
};
use crate::state::image::{ImageCommand, ImageUpdate, Visibility};
use crate::state::network::{
    AddressPair, AllocationPool, Direction, Ethertype, FixedIpRequest, HostRoute, NetworkCommand,
    NewFloatingIp, NewPort, NewPortForwarding, NewRule, PortUpdate, SubnetUpdate,
};
use crate::state::volume::VolumeCommand;
use crate::state::{Command, Outcome, QuotaCommand, QuotaResource, Rejection, RejectionKind};

fn tags() -> BTreeSet<String> {
    BTreeSet::from(["tag".to_owned()])
}

fn map() -> BTreeMap<String, String> {
    BTreeMap::from([("key".to_owned(), "value".to_owned())])
}

fn some(text: &str) -> Option<String> {
    Some(text.to_owned())
}

pub(super) fn commands() -> Vec<Command> {
    let cluster = cluster().into_iter().map(Command::Cluster);
    let identity = identity().into_iter().map(Command::Identity);
    let image = image().into_iter().map(Command::Image);
    let compute = compute().into_iter().map(Command::Compute);
    let volume = volume().into_iter().map(Command::Volume);
    let network = network().into_iter().map(Command::Network);
    let quota = [
        QuotaCommand::Set { project_id: "p".into(), limits: vec![(QuotaResource::Ram, -1)] },
        QuotaCommand::Reset("p".into()),
    ];
    let quota = quota.into_iter().map(Command::Quota);
    cluster
        .chain(identity)
        .chain(image)
        .chain(compute)
        .chain(volume)
        .chain(network)
        .chain(quota)
        .collect()
}

fn sealed() -> Sealed {
    Sealed::from_stored("k:secret")
}

fn cluster() -> Vec<ClusterCommand> {
    let Command::Cluster(init) = init() else { panic!("the cluster is made by another service") };
    let host = new_host(2);
    vec![
        init,
        ClusterCommand::IssueJoinToken { hash: "aa".into(), expires_ms: 5, replaces: None },
        ClusterCommand::RegisterHost { token_hash: "aa".into(), host: Box::new(host.clone()) },
        ClusterCommand::UpdateHost {
            id: HostId(2),
            addresses: host.addresses,
            capacity: Capacity { vcpus: 8, ram_mib: 1 << 14, disk_gib: 500 },
            feature_level: 2,
        },
        ClusterCommand::SetHostService {
            id: HostId(2),
            disabled: Some(true),
            disabled_reason: some("repair"),
            forced_down: None,
            evacuate: Some(true),
        },
        ClusterCommand::FenceHost { id: HostId(2), epoch: 3 },
        ClusterCommand::HostReturned { id: HostId(2), epoch: 3 },
        ClusterCommand::RemoveHost { id: HostId(2), force: true },
        ClusterCommand::RaiseFeatureLevel { level: 2, next_host_id: 4 },
        ClusterCommand::RotateKey { from: "old".into(), to: "new".into() },
        ClusterCommand::RetireKey { id: "old".into() },
        ClusterCommand::RotateTokenKeys { rotations: 1, staged: sealed() },
        ClusterCommand::ResealTokenKeys { rotations: 1, keys: vec![sealed()] },
        ClusterCommand::Adopt { cluster_id: "new".into(), survivor: Some(HostId(1)), host: None },
    ]
}

fn assignment() -> Assignment {
    Assignment {
        actor: Actor::User("u".into()),
        target: Target::Project("p".into()),
        role_id: "r".into(),
    }
}

fn identity() -> Vec<IdentityCommand> {
    vec![
        IdentityCommand::CreateDomain(Domain {
            id: "d".into(),
            name: "domain".into(),
            description: "text".into(),
            enabled: true,
            tags: tags(),
        }),
        IdentityCommand::UpdateDomain {
            id: "d".into(),
            name: some("name"),
            description: None,
            enabled: Some(false),
        },
        IdentityCommand::DeleteDomain("d".into()),
        IdentityCommand::CreateProject(NewProject {
            id: "p".into(),
            domain_id: "d".into(),
            parent_id: some("d"),
            name: "project".into(),
            description: String::new(),
            enabled: true,
            tags: tags(),
        }),
        IdentityCommand::UpdateProject {
            id: "p".into(),
            name: None,
            description: some("text"),
            enabled: None,
            tags: Some(tags()),
        },
        IdentityCommand::DeleteProject("p".into()),
        IdentityCommand::CreateUser(NewUser {
            id: "u".into(),
            domain_id: "d".into(),
            name: "user".into(),
            password_hash: some("$argon2id$hash"),
            enabled: true,
            default_project_id: Some("p".into()),
            email: some("u@example.org"),
            description: None,
        }),
        IdentityCommand::UpdateUser(UserUpdate {
            id: "u".into(),
            name: some("user"),
            password_hash: None,
            enabled: Some(true),
            default_project_id: Some(None),
            email: Some(some("u@example.org")),
            description: None,
        }),
        IdentityCommand::DeleteUser("u".into()),
        IdentityCommand::CreateRole(Role {
            id: "r".into(),
            name: "role".into(),
            domain_id: None,
            description: some("text"),
        }),
        IdentityCommand::UpdateRole { id: "r".into(), name: some("role"), description: None },
        IdentityCommand::DeleteRole("r".into()),
        IdentityCommand::Assign(assignment()),
        IdentityCommand::Unassign(assignment()),
    ]
}

fn image() -> Vec<ImageCommand> {
    vec![
        ImageCommand::Create(Box::new(new_image("i"))),
        ImageCommand::Update(Box::new(ImageUpdate {
            name: Some(some("image")),
            disk_format: some("qcow2"),
            container_format: some("bare"),
            visibility: Some(Visibility::Shared),
            protected: Some(true),
            hidden: Some(false),
            min_disk: Some(1),
            min_ram: Some(64),
            tags: Some(tags()),
            properties: Some(map()),
            ..ImageUpdate::of("i".into())
        })),
        ImageCommand::Delete("i".into()),
        ImageCommand::UploadStarted("i".into()),
        ImageCommand::Uploaded {
            id: "i".into(),
            content: content(),
            host: HostId(1),
            upload: Some(2),
        },
        ImageCommand::UploadBegun { id: "i".into(), host: HostId(1) },
        ImageCommand::UploadEnded { id: "i".into(), upload: 2 },
        ImageCommand::UploadFailed("i".into()),
        ImageCommand::HeldBy { id: "i".into(), host: HostId(2) },
    ]
}

fn compute() -> Vec<ComputeCommand> {
    let mut server = new_server("s", Some("g"));
    server.placement = Some(Placement::NoValidHost { message: "none".into(), details: "x".into() });
    server.user_data = Some(sealed());
    vec![
        ComputeCommand::CreateFlavor(Box::new(flavor("f", 2, 2048))),
        ComputeCommand::UpdateFlavor { id: "f".into(), description: some("text") },
        ComputeCommand::DeleteFlavor("f".into()),
        ComputeCommand::SetFlavorExtraSpecs { id: "f".into(), set: map(), remove: tags() },
        ComputeCommand::SetFlavorAccess { id: "f".into(), project_id: "p".into(), allowed: true },
        ComputeCommand::CreateKeypair {
            name: "k".into(),
            user_id: "u".into(),
            kind: "ssh".into(),
            public_key: "ssh-ed25519 AAAA".into(),
            fingerprint: "00:11".into(),
        },
        ComputeCommand::DeleteKeypair { user_id: "u".into(), name: "k".into() },
        ComputeCommand::CreateServerGroup {
            id: "g".into(),
            name: "group".into(),
            project_id: "p".into(),
            user_id: "u".into(),
            policy: GroupPolicy::SoftAntiAffinity,
            max_server_per_host: 2,
        },
        ComputeCommand::DeleteServerGroup("g".into()),
        ComputeCommand::CreateServer(Box::new(server)),
        ComputeCommand::UpdateServer {
            id: "s".into(),
            name: some("server"),
            description: Some(None),
            hostname: some("host"),
            metadata: Some(map()),
            tags: Some(tags()),
        },
        ComputeCommand::DeleteServer("s".into()),
        ComputeCommand::StopServer("s".into()),
        ComputeCommand::StartServer("s".into()),
        ComputeCommand::RebootServer("s".into()),
        ComputeCommand::ServerStarted { id: "s".into(), generation: 3 },
        ComputeCommand::ServerFailed {
            id: "s".into(),
            generation: 3,
            code: 500,
            message: "failed".into(),
            details: "at length".into(),
        },
        ComputeCommand::ServerStopped {
            id: "s".into(),
            generation: 3,
            power_state: PowerState::Crashed,
        },
        ComputeCommand::ServerGone { id: "s".into(), generation: 3 },
        ComputeCommand::EvacuateServer {
            id: "s".into(),
            requested_host: some("node2"),
            stop: true,
            placement: Some(Placement::Host(HostId(2))),
        },
        ComputeCommand::ServerWaits { id: "s".into(), generation: 3, message: "waits".into() },
        ComputeCommand::ResealServer { id: "s".into(), from: "k".into(), user_data: sealed() },
    ]
}

fn volume() -> Vec<VolumeCommand> {
    let mut new = new_volume("v", 3);
    new.placement = Some(Placement::Host(HostId(2)));
    let (volume_id, server_id) = (|| "v".into(), || "s".into());
    vec![
        VolumeCommand::Create(Box::new(new)),
        VolumeCommand::Update {
            id: "v".into(),
            name: some("volume"),
            description: Some(None),
            metadata: Some(map()),
            bootable: Some(true),
        },
        VolumeCommand::Delete("v".into()),
        VolumeCommand::Attach {
            volume_id: volume_id(),
            server_id: server_id(),
            attachment_id: "a".into(),
            device: some("/dev/vdc"),
            tag: some("tag"),
            delete_on_termination: true,
        },
        VolumeCommand::Detach { volume_id: volume_id(), server_id: server_id() },
        VolumeCommand::Created("v".into()),
        VolumeCommand::Failed { id: "v".into(), reason: "full".into() },
        VolumeCommand::Gone("v".into()),
        VolumeCommand::Attached { volume_id: volume_id(), generation: 2 },
        VolumeCommand::AttachFailed { volume_id: volume_id(), generation: 2, reason: "no".into() },
        VolumeCommand::DetachExpired { volume_id: volume_id(), generation: 2, asked_ms: 5 },
        VolumeCommand::Detached { volume_id: volume_id(), generation: 2 },
    ]
}

fn new_port() -> NewPort {
    NewPort {
        id: "port".into(),
        network_id: "net".into(),
        project_id: PROJECT.into(),
        name: "port".into(),
        description: String::new(),
        admin_state_up: true,
        mac_address: some("fa:16:3e:00:00:01"),
        fixed_ips: Some(vec![FixedIpRequest {
            subnet_id: Some("subnet".into()),
            ip_address: Some([10, 0, 0, 5].into()),
        }]),
        port_security_enabled: Some(true),
        security_groups: None,
        allowed_address_pairs: vec![AddressPair {
            ip_address: "10.0.0.6/32".parse().expect("a range"),
            mac_address: None,
        }],
        device_id: String::new(),
        device_owner: String::new(),
        tags: tags(),
    }
}

fn new_rule() -> NewRule {
    NewRule {
        id: "rule".into(),
        security_group_id: "group".into(),
        description: String::new(),
        direction: Direction::Ingress,
        ethertype: Ethertype::IPv4,
        protocol: some("tcp"),
        port_range_min: Some(80),
        port_range_max: Some(81),
        remote_ip_prefix: Some("10.0.0.0/8".parse().expect("a range")),
        remote_group_id: None,
    }
}

fn network() -> Vec<NetworkCommand> {
    let mut subnet = new_subnet("subnet", "net", "10.0.0.0/24");
    subnet.host_routes = vec![HostRoute {
        destination: "10.9.0.0/16".parse().expect("a range"),
        nexthop: [10, 0, 0, 9].into(),
    }];
    subnet.allocation_pools =
        vec![AllocationPool { start: [10, 0, 0, 2].into(), end: [10, 0, 0, 8].into() }];
    let mut commands = vec![
        NetworkCommand::CreateNetwork(Box::new(new_network("net"))),
        NetworkCommand::UpdateNetwork {
            id: "net".into(),
            name: some("net"),
            description: None,
            admin_state_up: Some(true),
            shared: Some(false),
            port_security_enabled: None,
            mtu: Some(1400),
            tags: Some(tags()),
        },
        NetworkCommand::DeleteNetwork("net".into()),
        NetworkCommand::CreateSubnet(Box::new(subnet)),
        NetworkCommand::UpdateSubnet(Box::new(SubnetUpdate {
            id: "subnet".into(),
            name: some("subnet"),
            description: None,
            gateway_ip: Some(None),
            enable_dhcp: Some(false),
            dns_nameservers: Some(vec![[10, 0, 0, 3].into()]),
            host_routes: None,
            allocation_pools: None,
            tags: None,
        })),
        NetworkCommand::DeleteSubnet("subnet".into()),
        NetworkCommand::CreatePort(Box::new(new_port())),
        NetworkCommand::UpdatePort(Box::new(PortUpdate {
            id: "port".into(),
            name: some("port"),
            description: None,
            admin_state_up: None,
            fixed_ips: Some(Vec::new()),
            port_security_enabled: None,
            security_groups: Some(BTreeSet::from(["group".into()])),
            allowed_address_pairs: None,
            device_id: None,
            device_owner: None,
            tags: None,
        })),
        NetworkCommand::DeletePort("port".into()),
        NetworkCommand::EnsureDefaultGroup("p".into()),
        NetworkCommand::CreateSecurityGroup {
            id: "group".into(),
            project_id: "p".into(),
            name: "group".into(),
            description: String::new(),
            stateful: true,
            tags: tags(),
        },
        NetworkCommand::UpdateSecurityGroup {
            id: "group".into(),
            name: some("group"),
            description: None,
            tags: None,
        },
        NetworkCommand::DeleteSecurityGroup("group".into()),
        NetworkCommand::CreateSecurityGroupRule(Box::new(new_rule())),
        NetworkCommand::DeleteSecurityGroupRule("rule".into()),
    ];
    commands.extend(floating());
    commands
}

fn floating() -> Vec<NetworkCommand> {
    vec![
        NetworkCommand::CreateFloatingIp(Box::new(NewFloatingIp {
            id: "f".into(),
            project_id: "p".into(),
            floating_network_id: "public".into(),
            subnet_id: None,
            floating_ip_address: Some([127, 77, 1, 9].into()),
            port_id: Some("port".into()),
            fixed_ip_address: None,
            description: String::new(),
            tags: tags(),
        })),
        NetworkCommand::UpdateFloatingIp {
            id: "f".into(),
            port_id: Some(None),
            fixed_ip_address: None,
            description: some("text"),
            tags: None,
        },
        NetworkCommand::DeleteFloatingIp("f".into()),
        NetworkCommand::CreatePortForwarding(Box::new(NewPortForwarding {
            id: "w".into(),
            floating_ip_id: "f".into(),
            protocol: "tcp".into(),
            external_port: 8080,
            internal_port_id: "port".into(),
            internal_ip_address: None,
            internal_port: 80,
            description: String::new(),
        })),
        NetworkCommand::DeletePortForwarding { floating_ip_id: "f".into(), id: "w".into() },
    ]
}

/// A cloud with something of each service.
pub(super) fn cloud() -> Sample {
    let mut sample = Sample::new();
    sample.running("s1", None);
    sample.available("v1");
    sample.volume(VolumeCommand::Attach {
        volume_id: "v1".into(),
        server_id: "s1".into(),
        attachment_id: "a1".into(),
        device: None,
        tag: None,
        delete_on_termination: false,
    });
    sample.compute(ComputeCommand::CreateKeypair {
        name: "k".into(),
        user_id: USER.into(),
        kind: "ssh".into(),
        public_key: "ssh-ed25519 AAAA".into(),
        fingerprint: "00:11".into(),
    });
    sample.compute(ComputeCommand::CreateServerGroup {
        id: "g".into(),
        name: "group".into(),
        project_id: PROJECT.into(),
        user_id: USER.into(),
        policy: GroupPolicy::AntiAffinity,
        max_server_per_host: 1,
    });
    let mut rule = new_rule();
    rule.security_group_id = crate::state::State::default_group_id(&PROJECT.into());
    sample.network(NetworkCommand::CreateSecurityGroupRule(Box::new(rule)));
    let external = sample.state.network.networks.values().find(|network| network.external);
    let external = external.expect("it is made with the cluster").id.clone();
    for mut command in floating().into_iter().step_by(3) {
        match &mut command {
            NetworkCommand::CreateFloatingIp(new) => {
                new.floating_network_id = external.clone();
                new.project_id = PROJECT.into();
                new.port_id = None;
            }
            NetworkCommand::CreatePortForwarding(new) => {
                new.internal_port_id = "port-of-s1".into();
            }
            _ => panic!("floating IPs come in another order"),
        }
        sample.network(command);
    }
    sample.must(Command::Quota(QuotaCommand::Set {
        project_id: PROJECT.into(),
        limits: vec![(QuotaResource::Cores, 40)],
    }));
    sample
}

/// Every outcome, taken from the cloud, and every kind of rejection.
pub(super) fn results() -> Vec<Result<Outcome, Rejection>> {
    let state = cloud().state;
    let (identity, compute, network) = (&state.identity, &state.compute, &state.network);
    let present = "the cloud has one";
    let host = state.cluster.hosts.values().next().expect(present);
    let volume = state.volume.volumes.values().next().expect(present);
    let group = network.security_groups.values().find(|group| !group.rules.is_empty());
    let group = group.expect(present);
    let mut rules: Vec<_> = group.rules.values().collect();
    rules.sort_by_key(|rule| rule.id.clone());
    let floating = network.floating_ips.values().next().expect(present);
    let forwarding = floating.port_forwardings.values().next().expect(present);
    let image = state.image.images.values().next().expect(present);
    let port = network.ports.values().next().expect(present);
    let accepted = [
        Outcome::Done,
        Outcome::Ignored,
        Outcome::Host(Box::new(host.clone())),
        Outcome::Domain(Box::new(identity.domains.values().next().expect(present).clone())),
        Outcome::Project(Box::new(identity.projects.values().next().expect(present).clone())),
        Outcome::User(Box::new(identity.users.values().next().expect(present).clone())),
        Outcome::Role(Box::new(identity.roles.values().next().expect(present).clone())),
        Outcome::Image(Box::new(image.as_ref().clone())),
        Outcome::Flavor(Box::new(compute.flavors.values().next().expect(present).clone())),
        Outcome::Keypair(Box::new(compute.keypairs.values().next().expect(present).clone())),
        Outcome::ServerGroup(Box::new(compute.groups.values().next().expect(present).clone())),
        Outcome::Server("s1".into()),
        Outcome::Volume(Box::new(volume.as_ref().clone())),
        Outcome::Attachment(Box::new(volume.attachments.first().expect(present).clone())),
        Outcome::Network(Box::new(network.networks.values().next().expect(present).clone())),
        Outcome::Subnet(Box::new(network.subnets.values().next().expect(present).clone())),
        Outcome::Port(Box::new(port.as_ref().clone())),
        Outcome::SecurityGroup(Box::new(group.clone())),
        Outcome::SecurityGroupRule(Box::new(rules.first().expect(present).to_owned().clone())),
        Outcome::FloatingIp(Box::new(floating.clone())),
        Outcome::PortForwarding(Box::new(forwarding.clone())),
    ];
    let kinds = [
        RejectionKind::NotFound,
        RejectionKind::Conflict,
        RejectionKind::InvalidState,
        RejectionKind::QuotaExceeded,
        RejectionKind::Invalid,
        RejectionKind::Forbidden,
        RejectionKind::InUse,
        RejectionKind::AddressesExhausted,
        RejectionKind::PlacementStale,
        RejectionKind::TooMany,
    ];
    let refused = kinds.map(|kind| Rejection::new(kind, "server", "s1", "Not so."));
    accepted.into_iter().map(Ok).chain(refused.into_iter().map(Err)).collect()
}

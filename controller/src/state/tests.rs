//! Tests of the state: each by its behaviour, and random commands against the invariants.

use std::collections::BTreeSet;

use super::cluster::ClusterCommand;
use super::compute::{
    ComputeCommand, Desired, GroupPolicy, Placement, PortSource, PowerState, TaskState, VmState,
};
use super::fixture::{
    PROJECT, Sample, USER, init, new_host, new_image, new_server, new_subnet, new_volume, placed,
};
use super::identity::{IdentityCommand, NewUser, UserUpdate};
use super::image::ImageCommand;
use super::network::{
    Direction, Ethertype, NetworkCommand, NewFloatingIp, NewPort, NewPortForwarding, NewRule,
};
use super::volume::{AttachmentState, DETACH_MS_MAX, VolumeCommand, VolumeStatus};
use super::{
    Command, Outcome, QuotaCommand, QuotaResource, RejectionKind, State, decode_result,
    encode_result,
};
use crate::ids::{HostId, PortId};
use crate::plan::upkeep;

fn create_server(id: &str) -> Command {
    Command::Compute(ComputeCommand::CreateServer(Box::new(new_server(id, None))))
}

fn attach(volume: &str, server: &str) -> VolumeCommand {
    VolumeCommand::Attach {
        volume_id: volume.into(),
        server_id: server.into(),
        attachment_id: format!("{volume}-{server}").into(),
        device: None,
        tag: None,
        delete_on_termination: false,
    }
}

fn detach(volume: &str, server: &str) -> VolumeCommand {
    VolumeCommand::Detach { volume_id: volume.into(), server_id: server.into() }
}

fn new_port(id: &str) -> NewPort {
    NewPort {
        id: id.into(),
        network_id: "net".into(),
        project_id: PROJECT.into(),
        name: String::new(),
        description: String::new(),
        admin_state_up: true,
        mac_address: None,
        fixed_ips: None,
        port_security_enabled: None,
        security_groups: None,
        allowed_address_pairs: Vec::new(),
        device_id: String::new(),
        device_owner: String::new(),
        tags: BTreeSet::new(),
    }
}

fn create_port(id: &str) -> NetworkCommand {
    NetworkCommand::CreatePort(Box::new(new_port(id)))
}

fn address_of(sample: &Sample, port: &str) -> String {
    let port = sample.state.network.ports.get(&PortId::from(port)).expect("the port is there");
    port.fixed_ips[0].ip_address.to_string()
}

#[test]
fn nothing_is_applied_before_the_cluster_is_made_and_it_is_made_once() {
    let mut state = State::default();
    let early = state.apply(1, 1, [1; 16], &Command::Quota(QuotaCommand::Reset(PROJECT.into())));
    assert_eq!(early.map_err(|why| why.kind), Err(RejectionKind::InvalidState));
    let mut sample = Sample::bare();
    sample.refused_as(init(), RejectionKind::Conflict);
}

#[test]
fn a_repeated_command_comes_to_the_same_and_changes_nothing() {
    let mut sample = Sample::new();
    let command = Command::Network(create_port("p1"));
    let first = sample.state.apply(900, 900, [9; 16], &command);
    let state = sample.state.clone();
    let second = sample.state.apply(901, 901, [9; 16], &command);
    assert_eq!(first, second);
    assert!(first.is_ok() && sample.state.network == state.network);
}

#[test]
fn a_join_token_admits_one_host_and_ids_only_grow() {
    let mut sample = Sample::new();
    assert_eq!(sample.state.cluster.hosts.keys().map(|id| id.0).collect::<Vec<_>>(), [1, 2, 3]);
    let again =
        ClusterCommand::RegisterHost { token_hash: "hash2".into(), host: Box::new(new_host(4)) };
    sample.refused_as(Command::Cluster(again), RejectionKind::Forbidden);
    let unknown =
        ClusterCommand::RegisterHost { token_hash: "nope".into(), host: Box::new(new_host(4)) };
    sample.refused_as(Command::Cluster(unknown), RejectionKind::Forbidden);
    assert_eq!(sample.state.cluster.next_host_id, 4);
}

#[test]
fn a_server_goes_from_scheduling_to_active_to_gone_and_frees_everything() {
    let mut sample = Sample::new();
    let before = sample.state.clone();
    sample.must(create_server("s1"));
    let server = sample.server("s1");
    assert_eq!(server.vm_state, VmState::Building);
    assert_eq!(server.task_state, Some(TaskState::Scheduling));
    assert_eq!(address_of(&sample, "port-of-s1"), "10.0.0.2");
    sample.compute(ComputeCommand::ServerStarted { id: "s1".into(), generation: 1 });
    let server = sample.server("s1");
    assert_eq!((server.vm_state, server.task_state), (VmState::Active, None));
    assert_eq!(server.power_state, PowerState::Running);
    assert!(server.launched_ms.is_some());
    sample.compute(ComputeCommand::DeleteServer("s1".into()));
    assert_eq!(sample.server("s1").task_state, Some(TaskState::Deleting));
    sample.compute(ComputeCommand::ServerGone { id: "s1".into(), generation: 1 });
    assert_eq!(sample.state.compute, before.compute);
    assert_eq!(sample.state.network, before.network);
    assert_eq!(sample.state.quota, before.quota);
}

#[test]
fn facts_of_an_older_generation_are_ignored() {
    let mut sample = Sample::new();
    sample.running("s1", None);
    sample.compute(ComputeCommand::RebootServer("s1".into()));
    let stopped = ComputeCommand::ServerStopped {
        id: "s1".into(),
        generation: 1,
        power_state: PowerState::Shutdown,
    };
    assert_eq!(sample.compute(stopped), Outcome::Ignored);
    assert_eq!(sample.server("s1").task_state, Some(TaskState::Rebooting));
    let started = ComputeCommand::ServerStarted { id: "s1".into(), generation: 2 };
    assert_eq!(sample.compute(started), Outcome::Server("s1".into()));
    let gone = ComputeCommand::ServerGone { id: "s1".into(), generation: 2 };
    assert_eq!(sample.compute(gone), Outcome::Ignored, "nobody wanted it gone");
}

#[test]
fn a_guest_that_ends_by_itself_is_a_stopped_server_and_can_start_again() {
    let mut sample = Sample::new();
    sample.running("s1", None);
    sample.compute(ComputeCommand::ServerStopped {
        id: "s1".into(),
        generation: 1,
        power_state: PowerState::Shutdown,
    });
    let server = sample.server("s1");
    assert_eq!((server.desired, server.vm_state), (Desired::Stopped, VmState::Stopped));
    let stop = Command::Compute(ComputeCommand::StopServer("s1".into()));
    sample.refused_as(stop, RejectionKind::InvalidState);
    sample.compute(ComputeCommand::StartServer("s1".into()));
    let server = sample.server("s1");
    assert_eq!((server.desired, server.generation), (Desired::Active, 2));
}

#[test]
fn a_server_that_fits_nowhere_is_in_error_and_says_which_filter_removed_which_host() {
    let mut sample = Sample::new();
    sample.liveness.up.remove(&HostId(2));
    let large = super::fixture::flavor("big", 2, 1 << 20);
    sample.compute(ComputeCommand::CreateFlavor(Box::new(large)));
    sample.must(Command::Quota(QuotaCommand::Set {
        project_id: PROJECT.into(),
        limits: vec![(QuotaResource::Ram, -1)],
    }));
    let mut new = new_server("s1", None);
    new.flavor_id = "big".into();
    sample.compute(ComputeCommand::CreateServer(Box::new(new)));
    let server = sample.server("s1");
    assert_eq!((server.vm_state, server.host), (VmState::Error, None));
    let fault = server.fault.clone().expect("an ERROR has a fault");
    assert!(fault.message.starts_with("No valid host was found."), "{}", fault.message);
    let expected = "Of 3 hosts: ComputeFilter removed node2: is down (no heartbeat). \
                    ResourceFilter removed node1: 1048576 MEMORY_MB wanted, 4096 of 4096 free; \
                    node3: 1048576 MEMORY_MB wanted, 4096 of 4096 free.";
    assert_eq!(fault.details, expected);
    assert!(server.ports.is_empty());
    sample.compute(ComputeCommand::DeleteServer("s1".into()));
    assert!(sample.state.compute.servers.is_empty(), "without a host it is gone at once");
}

#[test]
fn groups_keep_servers_apart_or_together() {
    let mut sample = Sample::new();
    for (group, policy) in [("apart", GroupPolicy::AntiAffinity), ("one", GroupPolicy::Affinity)] {
        sample.compute(ComputeCommand::CreateServerGroup {
            id: group.into(),
            name: group.into(),
            project_id: PROJECT.into(),
            user_id: USER.into(),
            policy,
            max_server_per_host: 1,
        });
    }
    let apart: BTreeSet<HostId> =
        ["a1", "a2"].into_iter().map(|id| sample.running(id, Some("apart"))).collect();
    assert_eq!(apart.len(), 2);
    let together: BTreeSet<HostId> =
        ["b1", "b2"].into_iter().map(|id| sample.running(id, Some("one"))).collect();
    assert_eq!(together.len(), 1);
    let taken = *apart.first().expect("two of them");
    let stale = placed(new_server("a3", Some("apart")), taken.0);
    let outcome = sample.apply_as_is(&stale);
    assert_eq!(outcome.map_err(|why| why.kind), Err(RejectionKind::PlacementStale));
}

#[test]
fn two_races_for_the_last_room_of_a_host_cannot_both_win() {
    let mut sample = Sample::new();
    // 4096 MiB take four servers of 1024, whatever the leader believed.
    for n in 1..=4 {
        let outcome = sample.apply_as_is(&placed(new_server(&format!("s{n}"), None), 1));
        assert!(outcome.is_ok(), "{outcome:?}");
    }
    let id = [77; 16];
    let fifth = placed(new_server("s5", None), 1);
    let first = sample.state.apply(1000, 1, id, &fifth);
    assert_eq!(first.map_err(|why| why.kind), Err(RejectionKind::PlacementStale));
    let elsewhere = placed(new_server("s5", None), 2);
    assert!(sample.state.apply(1001, 1, id, &elsewhere).is_ok(), "the same command, placed anew");
}

#[test]
fn placements_spread_and_count_what_is_in_flight() {
    let sample = Sample::new();
    let mut in_flight = crate::plan::InFlight::default();
    let mut hosts = Vec::new();
    for n in 0..6 {
        let mut prepared = create_server(&format!("s{n}"));
        crate::plan::prepare(&sample.state, &sample.liveness, &mut in_flight, &mut prepared);
        let Command::Compute(ComputeCommand::CreateServer(new)) = prepared else {
            panic!("the command became another");
        };
        let Some(Placement::Host(host)) = new.placement else { panic!("it fits") };
        hosts.push(host.0);
    }
    assert_eq!(hosts, [1, 2, 3, 1, 2, 3]);
}

#[test]
fn a_volume_that_its_guest_does_not_let_go_of_stays_attached() {
    let mut sample = Sample::new();
    sample.running("s1", None);
    sample.available("v1");
    sample.volume(attach("v1", "s1"));
    sample.volume(VolumeCommand::Attached { volume_id: "v1".into(), generation: 1 });
    sample.volume(detach("v1", "s1"));
    let asked_ms = sample.state.time_ms;

    let due = |sample: &Sample, later_ms: u64| upkeep(&sample.state, asked_ms + later_ms);
    assert_eq!(due(&sample, DETACH_MS_MAX - 1), []);
    let [expired] = &due(&sample, DETACH_MS_MAX)[..] else { panic!("one is over") };
    // By the time that commands are stamped with, which nobody's wrong clock goes around.
    while sample.state.time_ms + 1_000 < asked_ms + DETACH_MS_MAX {
        sample.refused(expired.clone());
    }
    sample.must(expired.clone());
    let volume = sample.volume_of("v1");
    assert_eq!(volume.status, VolumeStatus::InUse);
    assert_eq!(volume.attachments[0].state, AttachmentState::Attached);
    assert!(volume.fault.as_ref().is_some_and(|fault| fault.contains("s1")), "{:?}", volume.fault);
    // What the host reports of the old try frees nothing, and it is not given up twice.
    let late = VolumeCommand::Detached { volume_id: "v1".into(), generation: 1 };
    assert_eq!(sample.volume(late.clone()), Outcome::Ignored);
    assert_eq!(sample.must(expired.clone()), Outcome::Ignored);

    sample.volume(detach("v1", "s1"));
    assert_eq!(sample.volume_of("v1").fault, None);
    sample.volume(late);
    assert_eq!(sample.volume_of("v1").status, VolumeStatus::Available);
}

#[test]
fn addresses_are_the_lowest_free_ones_and_run_out() {
    let mut sample = Sample::new();
    for n in 2..=6 {
        sample.network(create_port(&format!("p{n}")));
        assert_eq!(address_of(&sample, &format!("p{n}")), format!("10.0.0.{n}"));
    }
    let seventh = Command::Network(create_port("p7"));
    sample.refused_as(seventh, RejectionKind::AddressesExhausted);
    sample.refused_as(create_server("s1"), RejectionKind::AddressesExhausted);
    sample.network(NetworkCommand::DeletePort("p4".into()));
    sample.network(create_port("p8"));
    assert_eq!(address_of(&sample, "p8"), "10.0.0.4");
}

#[test]
fn a_port_that_existed_before_its_server_outlives_it() {
    let mut sample = Sample::new();
    sample.network(create_port("mine"));
    let mut new = new_server("s1", None);
    new.networks[0].port_id = "mine".into();
    new.networks[0].source = PortSource::Existing;
    sample.compute(ComputeCommand::CreateServer(Box::new(new.clone())));
    let delete = Command::Network(NetworkCommand::DeletePort("mine".into()));
    sample.refused_as(delete, RejectionKind::InUse);
    new.id = "s2".into();
    let again = Command::Compute(ComputeCommand::CreateServer(Box::new(new)));
    sample.refused_as(again, RejectionKind::InUse);
    sample.compute(ComputeCommand::DeleteServer("s1".into()));
    sample.compute(ComputeCommand::ServerGone { id: "s1".into(), generation: 1 });
    let port = &sample.state.network.ports[&PortId::from("mine")];
    assert_eq!((port.device_id.as_str(), port.host), ("", None));
}

#[test]
fn a_network_in_use_is_not_deleted() {
    let mut sample = Sample::new();
    sample.network(create_port("p1"));
    for busy in
        [NetworkCommand::DeleteNetwork("net".into()), NetworkCommand::DeleteSubnet("subnet".into())]
    {
        sample.refused_as(Command::Network(busy), RejectionKind::InUse);
    }
    sample.network(NetworkCommand::DeletePort("p1".into()));
    sample.network(NetworkCommand::DeleteNetwork("net".into()));
    assert!(!sample.state.network.subnets.contains_key("subnet"));
}

#[test]
fn subnets_of_a_network_do_not_overlap_and_keep_the_gateway_out_of_their_pools() {
    let mut sample = Sample::new();
    let overlapping = new_subnet("s2", "net", "10.0.0.0/16");
    let overlapping = Command::Network(NetworkCommand::CreateSubnet(Box::new(overlapping)));
    sample.refused_as(overlapping, RejectionKind::Invalid);
    let mut greedy = new_subnet("s3", "net", "10.1.0.0/24");
    greedy.allocation_pools = vec![super::network::AllocationPool {
        start: [10, 1, 0, 1].into(),
        end: [10, 1, 0, 9].into(),
    }];
    let greedy = Command::Network(NetworkCommand::CreateSubnet(Box::new(greedy)));
    sample.refused_as(greedy, RejectionKind::Conflict);
}

#[test]
fn a_volume_has_one_writer_and_each_attachment_a_newer_generation() {
    let mut sample = Sample::new();
    sample.running("s1", None);
    sample.running("s2", None);
    sample.available("v1");
    sample.volume(attach("v1", "s1"));
    assert_eq!(sample.volume_of("v1").status, VolumeStatus::Attaching);
    assert_eq!(sample.volume_of("v1").attachments[0].device, "/dev/vdb");
    let second = Command::Volume(attach("v1", "s2"));
    sample.refused_as(second, RejectionKind::InvalidState);
    sample.volume(VolumeCommand::Attached { volume_id: "v1".into(), generation: 1 });
    assert_eq!(sample.volume_of("v1").status, VolumeStatus::InUse);
    let busy = Command::Volume(VolumeCommand::Delete("v1".into()));
    sample.refused_as(busy, RejectionKind::InvalidState);
    sample.volume(detach("v1", "s1"));
    assert_eq!(sample.volume_of("v1").attachments[0].state, AttachmentState::Detaching);
    sample.volume(VolumeCommand::Detached { volume_id: "v1".into(), generation: 1 });
    assert_eq!(sample.volume_of("v1").status, VolumeStatus::Available);
    sample.volume(attach("v1", "s2"));
    assert_eq!(sample.volume_of("v1").generation, 2);
    let late = VolumeCommand::Detached { volume_id: "v1".into(), generation: 1 };
    assert_eq!(sample.volume(late), Outcome::Ignored);
    assert_eq!(sample.volume_of("v1").attachments.len(), 1);
}

#[test]
fn a_volume_is_freed_with_its_server_or_goes_with_it() {
    let mut sample = Sample::new();
    sample.running("s1", None);
    sample.available("stays");
    sample.available("goes");
    sample.volume(attach("stays", "s1"));
    let mut last = attach("goes", "s1");
    if let VolumeCommand::Attach { delete_on_termination, .. } = &mut last {
        *delete_on_termination = true;
    }
    sample.volume(last);
    sample.compute(ComputeCommand::DeleteServer("s1".into()));
    sample.compute(ComputeCommand::ServerGone { id: "s1".into(), generation: 1 });
    assert_eq!(sample.volume_of("stays").status, VolumeStatus::Available);
    assert_eq!(sample.volume_of("goes").status, VolumeStatus::Deleting);
    sample.volume(VolumeCommand::Gone("goes".into()));
    assert!(!sample.state.volume.volumes.contains_key("goes"));
}

#[test]
fn rejects_create_when_quota_is_full() {
    let mut sample = Sample::new();
    sample.must(Command::Quota(QuotaCommand::Set {
        project_id: PROJECT.into(),
        limits: vec![(QuotaResource::Instances, 1), (QuotaResource::Gigabytes, 5)],
    }));
    sample.must(create_server("s1"));
    let why = sample.refused(create_server("s2"));
    assert_eq!(why.kind, RejectionKind::QuotaExceeded);
    assert_eq!(
        why.message,
        "Quota exceeded for instances: Requested 1, but already used 1 of 1 instances"
    );
    let large = Command::Volume(VolumeCommand::Create(Box::new(new_volume("v1", 6))));
    sample.refused_as(large, RejectionKind::QuotaExceeded);
}

#[test]
fn every_project_has_a_default_group_that_admits_its_own_members() {
    let mut sample = Sample::new();
    sample.network(create_port("p1"));
    let id = State::default_group_id(&PROJECT.into());
    let group = &sample.state.network.security_groups[&id];
    let mut rules: Vec<_> = group
        .rules
        .values()
        .map(|rule| {
            (rule.direction.as_str(), rule.ethertype.as_str(), rule.remote_group_id.clone())
        })
        .collect();
    rules.sort();
    let own = Some(id.clone());
    assert_eq!(
        rules,
        [
            ("egress", "IPv4", None),
            ("egress", "IPv6", None),
            ("ingress", "IPv4", own.clone()),
            ("ingress", "IPv6", own)
        ]
    );
    let port = &sample.state.network.ports[&PortId::from("p1")];
    assert_eq!(port.security_groups, BTreeSet::from([id.clone()]));
    let delete = Command::Network(NetworkCommand::DeleteSecurityGroup(id));
    sample.refused_as(delete, RejectionKind::InUse);
}

fn rule(id: &str, protocol: Option<&str>, ports: Option<(u16, u16)>) -> Command {
    Command::Network(NetworkCommand::CreateSecurityGroupRule(Box::new(NewRule {
        id: id.into(),
        security_group_id: State::default_group_id(&PROJECT.into()),
        description: String::new(),
        direction: Direction::Ingress,
        ethertype: Ethertype::IPv4,
        protocol: protocol.map(str::to_owned),
        port_range_min: ports.map(|ports| ports.0),
        port_range_max: ports.map(|ports| ports.1),
        remote_ip_prefix: None,
        remote_group_id: None,
    })))
}

#[test]
fn rules_are_checked_and_not_made_twice() {
    let mut sample = Sample::new();
    sample.must(rule("r1", Some("tcp"), Some((80, 80))));
    sample.refused_as(rule("r2", Some("6"), Some((80, 80))), RejectionKind::Conflict);
    for wrong in [
        rule("r3", Some("nonsense"), None),
        rule("r4", None, Some((1, 2))),
        rule("r5", Some("tcp"), Some((9, 8))),
        rule("r6", Some("icmp"), Some((300, 0))),
        rule("r7", Some("vrrp"), Some((1, 2))),
    ] {
        sample.refused_as(wrong, RejectionKind::Invalid);
    }
}

#[test]
fn a_floating_ip_forwards_single_ports_until_the_port_behind_is_gone() {
    let mut sample = Sample::new();
    sample.network(create_port("p1"));
    let network = sample.state.network.networks.values().find(|network| network.external);
    let network = network.expect("Init makes it").id.clone();
    let outcome = sample.network(NetworkCommand::CreateFloatingIp(Box::new(NewFloatingIp {
        id: "f1".into(),
        project_id: PROJECT.into(),
        floating_network_id: network,
        subnet_id: None,
        floating_ip_address: None,
        port_id: None,
        fixed_ip_address: None,
        description: String::new(),
        tags: BTreeSet::new(),
    })));
    let Outcome::FloatingIp(floating) = outcome else { panic!("{outcome:?}") };
    assert_eq!(floating.floating_ip_address.to_string(), "127.77.1.2");
    let forwarding = |id: &str| {
        NetworkCommand::CreatePortForwarding(Box::new(NewPortForwarding {
            id: id.into(),
            floating_ip_id: "f1".into(),
            protocol: "tcp".into(),
            external_port: 8080,
            internal_port_id: "p1".into(),
            internal_ip_address: None,
            internal_port: 80,
            description: String::new(),
        }))
    };
    sample.network(forwarding("w1"));
    sample.refused_as(Command::Network(forwarding("w2")), RejectionKind::Conflict);
    sample.network(NetworkCommand::DeletePort("p1".into()));
    let floating = sample.state.network.floating_ips.values().next().expect("it stays");
    assert!(floating.port_forwardings.is_empty());
}

#[test]
fn an_image_is_used_only_when_its_content_is_there() {
    let mut sample = Sample::new();
    sample.must(Command::Image(ImageCommand::Create(Box::new(new_image("empty")))));
    let mut new = new_server("s1", None);
    new.image_id = "empty".into();
    let create = Command::Compute(ComputeCommand::CreateServer(Box::new(new)));
    sample.refused_as(create, RejectionKind::Invalid);
    sample.must(Command::Image(ImageCommand::UploadStarted("empty".into())));
    sample.must(Command::Image(ImageCommand::UploadFailed("empty".into())));
    let late = ImageCommand::UploadFailed("empty".into());
    assert_eq!(sample.must(Command::Image(late)), Outcome::Ignored);
    sample.must(create_server("s2"));
    let used = Command::Image(ImageCommand::Delete("image".into()));
    sample.refused_as(used, RejectionKind::InUse);
}

#[test]
fn a_new_password_ends_older_tokens() {
    let mut sample = Sample::new();
    sample.must(Command::Identity(IdentityCommand::CreateUser(NewUser {
        id: USER.into(),
        domain_id: "default".into(),
        name: "alice".into(),
        password_hash: Some("one".into()),
        enabled: true,
        default_project_id: None,
        email: None,
        description: None,
    })));
    let update =
        UserUpdate { id: USER.into(), password_hash: Some("two".into()), ..UserUpdate::default() };
    let outcome = sample.must(Command::Identity(IdentityCommand::UpdateUser(update)));
    let Outcome::User(user) = outcome else { panic!("{outcome:?}") };
    assert_eq!(user.auth_generation, 2);
    assert!(!format!("{user:?}").contains("two"));
}

#[test]
fn a_snapshot_restores_to_the_same_state() {
    let mut sample = Sample::new();
    sample.running("s1", None);
    sample.available("v1");
    sample.volume(attach("v1", "s1"));
    let restored = State::restore(&sample.state.snapshot()).expect("its own snapshot");
    assert!(restored == sample.state);
    assert!(State::restore(b"nonsense").is_err());
}

#[test]
fn damaged_commands_are_errors() {
    let bytes = init().encode();
    for length in 0..bytes.len() {
        assert!(Command::decode(&bytes[..length]).is_err());
    }
    let result = Ok(Outcome::Server("s".into()));
    assert_eq!(decode_result(&encode_result(&result)).ok(), Some(result));
}

/// A small generator of numbers (xorshift), so that a failure replays by its seed.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }

    fn name(&mut self, kind: &str) -> String {
        format!("{kind}{}", self.below(6))
    }
}

fn random_command(random: &mut Random) -> Command {
    let server = random.name("s");
    let volume = random.name("v");
    let port = random.name("p");
    let generation = random.below(4);
    let host = HostId(1 + random.below(3));
    let cluster = |command| Command::Cluster(command);
    match random.below(34) {
        0..=3 => create_server(&server),
        4 => Command::Compute(ComputeCommand::DeleteServer(server.into())),
        5 => Command::Compute(ComputeCommand::ServerGone { id: server.into(), generation }),
        6 | 7 => Command::Compute(ComputeCommand::ServerStarted { id: server.into(), generation }),
        8 => Command::Compute(ComputeCommand::StopServer(server.into())),
        9 => Command::Compute(ComputeCommand::StartServer(server.into())),
        10 => Command::Compute(ComputeCommand::RebootServer(server.into())),
        11 => Command::Compute(ComputeCommand::ServerStopped {
            id: server.into(),
            generation,
            power_state: PowerState::Shutdown,
        }),
        12 => Command::Compute(ComputeCommand::ServerFailed {
            id: server.into(),
            generation,
            code: 500,
            message: "failed".into(),
            details: String::new(),
        }),
        13 => Command::Volume(VolumeCommand::Create(Box::new(new_volume(&volume, 1)))),
        14 => Command::Volume(VolumeCommand::Created(volume.into())),
        15 => Command::Volume(VolumeCommand::Delete(volume.into())),
        16 => Command::Volume(VolumeCommand::Gone(volume.into())),
        17 => Command::Volume(attach(&volume, &server)),
        18 => Command::Volume(VolumeCommand::Attached { volume_id: volume.into(), generation }),
        19 => Command::Volume(detach(&volume, &server)),
        20 => Command::Volume(VolumeCommand::Detached { volume_id: volume.into(), generation }),
        21 => Command::Network(create_port(&port)),
        22 => Command::Network(NetworkCommand::DeletePort(port.into())),
        24 => cluster(ClusterCommand::FenceHost { id: host, epoch: 1 + random.below(4) }),
        25..=27 => cluster(ClusterCommand::HostReturned { id: host, epoch: 1 + random.below(4) }),
        28..=31 => Command::Compute(ComputeCommand::EvacuateServer {
            id: server.into(),
            requested_host: None,
            stop: random.below(4) == 0,
            placement: None,
        }),
        32 => cluster(ClusterCommand::SetHostService {
            id: host,
            disabled: None,
            disabled_reason: None,
            forced_down: Some(random.below(3) == 0),
            evacuate: None,
        }),
        33 if random.below(20) == 0 => {
            cluster(ClusterCommand::RemoveHost { id: host, force: true })
        }
        _ => Command::Network(NetworkCommand::DeleteNetwork("net".into())),
    }
}

#[test]
fn random_commands_keep_the_invariants_and_two_replicas_agree() {
    let mut evacuated = 0;
    for seed in 1..=8u64 {
        let (mut one, mut two) = (Sample::new(), Sample::new());
        for (sample, host) in [(&mut one, 2), (&mut two, 2)] {
            let held = ImageCommand::HeldBy { id: "image".into(), host: HostId(host) };
            sample.must(Command::Image(held));
        }
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let mut accepted = 0;
        for _ in 0..400 {
            let command = random_command(&mut random);
            let outcome = one.apply(command.clone());
            evacuated += u32::from(is_evacuation(&command) && outcome.is_ok());
            accepted += u32::from(outcome.is_ok());
            assert_eq!(outcome, two.apply(command), "seed {seed}");
        }
        assert!(one.state.snapshot() == two.state.snapshot(), "seed {seed}");
        assert_eq!(one.state.state_hash(), two.state.state_hash(), "seed {seed}");
        assert!(accepted > 50, "seed {seed}: only {accepted} commands were accepted");
    }
    assert!(evacuated > 0, "the seeds evacuate nothing");
}

fn is_evacuation(command: &Command) -> bool {
    matches!(command, Command::Compute(ComputeCommand::EvacuateServer { .. }))
}

#[test]
fn a_replaced_host_is_dead_and_its_name_and_address_are_free_for_the_new_one() {
    let mut sample = Sample::new();
    let issue = |hash: &str, replaces| {
        let (hash, expires_ms) = (hash.to_owned(), u64::MAX);
        Command::Cluster(ClusterCommand::IssueJoinToken { hash, expires_ms, replaces })
    };
    let register = |hash: &str, number| {
        let (token_hash, host) = (hash.to_owned(), Box::new(new_host(number)));
        Command::Cluster(ClusterCommand::RegisterHost { token_hash, host })
    };
    let kind = |result: Result<Outcome, super::Rejection>| result.unwrap_err().kind;
    assert_eq!(kind(sample.apply(issue("none", Some(HostId(9))))), RejectionKind::NotFound);
    sample.must(issue("plain", None));
    assert_eq!(kind(sample.apply(register("plain", 3))), RejectionKind::Conflict);
    sample.must(issue("a", Some(HostId(3))));
    sample.must(issue("b", Some(HostId(3))));
    // Another living host's name stays taken.
    assert_eq!(kind(sample.apply(register("a", 2))), RejectionKind::Conflict);
    let Outcome::Host(new) = sample.must(register("a", 3)) else { panic!("no host") };
    assert_eq!((new.id, new.name.as_str()), (HostId(4), "node3"));
    let old = &sample.state.cluster.hosts[&HostId(3)];
    assert_eq!((old.name.as_str(), old.replaced_by), ("node3-replaced-3", Some(HostId(4))));
    assert!(old.forced_down && old.disabled);
    // The second token is of no use any more, and the host can't be replaced again.
    assert_eq!(kind(sample.apply(register("b", 3))), RejectionKind::Conflict);
    assert_eq!(kind(sample.apply(issue("c", Some(HostId(3))))), RejectionKind::Conflict);
}

#[test]
fn an_adopted_state_has_another_cluster_id_and_one_living_host() {
    let adopt = |cluster_id: &str, survivor, number: Option<u8>| {
        let host = number.map(|number| Box::new(new_host(number)));
        let cluster_id = cluster_id.to_owned();
        Command::Cluster(ClusterCommand::Adopt { cluster_id, survivor, host })
    };
    let living = |sample: &Sample| -> Vec<u64> {
        let hosts = sample.state.cluster.hosts.values();
        hosts.filter(|host| !host.forced_down).map(|host| host.id.0).collect()
    };
    let before = Sample::new();
    let mut recovered = before.clone();
    recovered.must(adopt("new", Some(HostId(2)), None));
    assert_eq!((recovered.state.cluster.id.as_str(), living(&recovered)), ("new", vec![2]));

    let mut restored = before.clone();
    let Outcome::Host(me) = restored.must(adopt("new", None, Some(3))) else { panic!("no host") };
    assert_eq!((me.id, me.name.as_str()), (HostId(4), "node3-4"));
    assert_eq!(living(&restored), [4]);

    let mut refused = before.clone();
    let same = before.state.cluster.id.clone();
    assert!(refused.apply(adopt(&same, Some(HostId(2)), None)).is_err());
    assert!(refused.apply(adopt("new", Some(HostId(9)), None)).is_err());
    assert!(refused.apply(adopt("new", None, None)).is_err());
    assert_eq!(refused.state.cluster, before.state.cluster);
}

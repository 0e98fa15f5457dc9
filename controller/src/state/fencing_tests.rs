//! Fences, evacuation, removal of hosts and feature levels.

use super::cluster::ClusterCommand;
use super::compute::{
    ComputeCommand, Desired, GroupPolicy, Placement, PowerState, TaskState, VmState,
};
use super::fixture::{PROJECT, Sample, USER, new_host, new_server};
use super::image::{ImageCommand, ImageStatus};
use super::volume::{AttachmentState, VolumeCommand, VolumeStatus};
use super::{Command, FEATURE_LEVEL, Outcome, RejectionKind, State};
use crate::ids::{HostId, ImageId, PortId};
use crate::plan::raise_feature_level;

fn fence(id: u64, epoch: u64) -> Command {
    Command::Cluster(ClusterCommand::FenceHost { id: HostId(id), epoch })
}

fn returned(id: u64, epoch: u64) -> Command {
    Command::Cluster(ClusterCommand::HostReturned { id: HostId(id), epoch })
}

fn evacuate(id: &str) -> Command {
    let id = id.into();
    Command::Compute(ComputeCommand::EvacuateServer {
        id,
        requested_host: None,
        stop: false,
        placement: None,
    })
}

fn service(id: u64, forced_down: Option<bool>) -> Command {
    Command::Cluster(ClusterCommand::SetHostService {
        id: HostId(id),
        disabled: None,
        disabled_reason: None,
        forced_down,
        evacuate: None,
    })
}

fn remove(id: u64, force: bool) -> Command {
    Command::Cluster(ClusterCommand::RemoveHost { id: HostId(id), force })
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

impl Sample {
    /// A running server and a volume that is at home on another host, attached to it.
    fn with_remote_volume() -> (Self, HostId) {
        let mut sample = Self::new();
        sample.image_everywhere();
        let host = sample.running("s1", None);
        let others = || (1..=3).map(HostId).filter(|id| *id != host);
        sample.liveness.up = others().take(1).collect();
        sample.available("v1");
        sample.liveness.up = (1..=3).map(HostId).collect();
        sample.volume(attach("v1", "s1"));
        sample.volume(VolumeCommand::Attached { volume_id: "v1".into(), generation: 1 });
        (sample, host)
    }

    fn image_everywhere(&mut self) {
        for host in [2, 3].map(HostId) {
            self.must(Command::Image(ImageCommand::HeldBy { id: "image".into(), host }));
        }
    }

    fn fence_and_silence(&mut self, host: HostId, epoch: u64) {
        self.must(fence(host.0, epoch));
        self.liveness.up.remove(&host);
    }
}

#[test]
fn a_fence_has_an_epoch_and_ends_only_with_that_epochs_return() {
    let mut sample = Sample::new();
    sample.refused_as(fence(2, 2), RejectionKind::InvalidState);
    sample.refused_as(fence(9, 1), RejectionKind::NotFound);
    sample.must(fence(2, 1));
    sample.must(fence(2, 1));
    sample.refused_as(fence(2, 2), RejectionKind::InvalidState);
    assert_eq!(sample.must(returned(2, 0)), Outcome::Ignored);
    assert_eq!(sample.state.cluster.hosts[&HostId(2)].fenced, Some(1));
    sample.must(returned(2, 1));
    assert_eq!(sample.state.cluster.hosts[&HostId(2)].fenced, None);
    // A late command of the first fence can't begin another.
    sample.refused_as(fence(2, 1), RejectionKind::InvalidState);
    sample.must(fence(2, 2));
    assert_eq!(sample.must(returned(2, 1)), Outcome::Ignored);
}

#[test]
fn a_host_that_an_operator_forced_down_returns_only_when_that_is_lifted() {
    let mut sample = Sample::new();
    sample.must(fence(2, 1));
    sample.must(service(2, Some(true)));
    sample.refused_as(returned(2, 1), RejectionKind::InvalidState);
    sample.must(service(2, Some(false)));
    sample.must(returned(2, 1));
}

#[test]
fn nothing_is_placed_on_a_fenced_host() {
    let mut sample = Sample::new();
    sample.must(fence(1, 1));
    let hosts: Vec<u64> = ["a", "b"].into_iter().map(|id| sample.running(id, None).0).collect();
    assert_eq!(hosts, [2, 3]);
    let there = super::fixture::placed(new_server("c", None), 1);
    let why = sample.apply_as_is(&there).expect_err("the host is fenced");
    assert_eq!(
        (why.kind, why.message.as_str()),
        (RejectionKind::PlacementStale, "Host node1 is fenced.")
    );
    sample.available("v1");
    assert_ne!(sample.volume_of("v1").home, Some(HostId(1)));
}

#[test]
fn a_server_is_not_evacuated_while_its_host_is_in_service() {
    let mut sample = Sample::new();
    sample.image_everywhere();
    let host = sample.running("s1", None);
    let why = sample.refused(evacuate("s1"));
    assert_eq!(why.kind, RejectionKind::InvalidState);
    assert_eq!(why.message, format!("Compute service of node{host} is still in use."));
    sample.must(service(host.0, Some(true)));
    sample.must(evacuate("s1"));
}

#[test]
fn an_evacuated_server_is_another_incarnation_on_another_host_with_its_volumes() {
    let (mut sample, old) = Sample::with_remote_volume();
    sample.fence_and_silence(old, 1);
    sample.must(evacuate("s1"));
    let server = sample.server("s1").clone();
    let new = server.host.expect("it is placed");
    assert_ne!(new, old);
    assert_eq!((server.generation, server.desired), (2, Desired::Active));
    assert_eq!(
        (server.vm_state, server.task_state),
        (VmState::Active, Some(TaskState::Rebuilding))
    );
    assert!(!sample.state.compute.placed.contains_key(&old), "the old host's share is empty");
    let port = &sample.state.network.ports[&PortId::from("port-of-s1")];
    assert_eq!(port.host, Some(new));
    let volume = sample.volume_of("v1");
    let attachment = &volume.attachments[0];
    assert_eq!((volume.generation, attachment.generation), (2, 2));
    assert_eq!((attachment.host, attachment.state), (Some(new), AttachmentState::Attached));
    // What the old host still says is about an older incarnation.
    let stopped = ComputeCommand::ServerStopped {
        id: "s1".into(),
        generation: 1,
        power_state: PowerState::Shutdown,
    };
    assert_eq!(sample.compute(stopped), Outcome::Ignored);
    let detached = VolumeCommand::Detached { volume_id: "v1".into(), generation: 1 };
    assert_eq!(sample.volume(detached), Outcome::Ignored);
    sample.compute(ComputeCommand::ServerStarted { id: "s1".into(), generation: 2 });
    assert_eq!(sample.server("s1").task_state, None);
    sample.refused_as(evacuate("s1"), RejectionKind::InvalidState);
}

#[test]
fn a_stopped_server_is_evacuated_and_stays_stopped() {
    let mut sample = Sample::new();
    sample.image_everywhere();
    let host = sample.running("s1", None);
    sample.compute(ComputeCommand::StopServer("s1".into()));
    sample.compute(ComputeCommand::ServerStopped {
        id: "s1".into(),
        generation: 1,
        power_state: PowerState::Shutdown,
    });
    sample.fence_and_silence(host, 1);
    sample.must(evacuate("s1"));
    let server = sample.server("s1");
    assert_eq!((server.desired, server.vm_state), (Desired::Stopped, VmState::Stopped));
    sample.compute(ComputeCommand::ServerStopped {
        id: "s1".into(),
        generation: 2,
        power_state: PowerState::Shutdown,
    });
    assert_eq!(sample.server("s1").task_state, None);
}

#[test]
fn a_server_waits_for_the_host_that_has_its_volume_and_its_fault_says_so() {
    let mut sample = Sample::new();
    sample.image_everywhere();
    let host = sample.running("s1", None);
    sample.liveness.up = [host].into();
    sample.available("v1");
    sample.volume(attach("v1", "s1"));
    sample.volume(VolumeCommand::Attached { volume_id: "v1".into(), generation: 1 });
    sample.liveness.up = (1..=3).map(HostId).collect();
    sample.fence_and_silence(host, 1);
    let why = sample.refused(evacuate("s1"));
    let expected =
        format!("Instance s1 waits for host node{host}: its volume v1 is there and nowhere else.");
    assert_eq!((why.kind, &why.message), (RejectionKind::InvalidState, &expected));
    let waits =
        ComputeCommand::ServerWaits { id: "s1".into(), generation: 1, message: expected.clone() };
    sample.compute(waits.clone());
    assert_eq!(sample.server("s1").fault.as_ref().map(|f| f.message.clone()), Some(expected));
    assert_eq!(sample.server("s1").vm_state, VmState::Active);
    assert_eq!(sample.compute(waits.clone()), Outcome::Ignored, "it says so already");
    sample.must(returned(host.0, 1));
    assert_eq!(sample.server("s1").fault, None);
    assert_eq!(sample.compute(waits), Outcome::Ignored, "its host is in service");
}

#[test]
fn a_server_is_not_evacuated_without_its_image() {
    let mut sample = Sample::new();
    let host = sample.running("s1", None);
    assert_eq!(host, HostId(1), "which alone holds the image");
    sample.fence_and_silence(host, 1);
    let why = sample.refused(evacuate("s1"));
    assert!(why.message.contains("no host that is in service holds image image"), "{why}");
    let held = ImageCommand::HeldBy { id: "image".into(), host: HostId(2) };
    sample.must(Command::Image(held));
    sample.must(evacuate("s1"));
}

#[test]
fn a_server_that_never_ran_is_in_error_when_no_host_takes_it_and_others_stay_as_they_are() {
    let mut sample = Sample::new();
    sample.image_everywhere();
    let ran = sample.running("ran", None);
    sample.liveness.up = [ran].into();
    sample.compute(ComputeCommand::CreateServer(Box::new(new_server("new", None))));
    sample.fence_and_silence(ran, 1);
    let before = sample.server("ran").clone();
    let why = sample.refused(evacuate("ran"));
    assert!(why.message.starts_with("No valid host was found."), "{why}");
    assert_eq!(*sample.server("ran"), before);
    sample.must(evacuate("new"));
    let new = sample.server("new");
    assert_eq!((new.vm_state, new.task_state), (VmState::Error, None));
    assert!(new.fault.is_some());
}

#[test]
fn an_affinity_group_can_leave_a_fenced_host_together() {
    let mut sample = Sample::new();
    sample.image_everywhere();
    sample.compute(ComputeCommand::CreateServerGroup {
        id: "one".into(),
        name: "one".into(),
        project_id: PROJECT.into(),
        user_id: USER.into(),
        policy: GroupPolicy::Affinity,
        max_server_per_host: 1,
    });
    let host = sample.running("a", Some("one"));
    sample.running("b", Some("one"));
    sample.fence_and_silence(host, 1);
    sample.must(evacuate("a"));
    sample.must(evacuate("b"));
    assert_eq!(sample.server("a").host, sample.server("b").host);
    assert_ne!(sample.server("a").host, Some(host));
}

#[test]
fn a_server_on_a_host_that_is_out_is_deleted_at_once() {
    let (mut sample, host) = Sample::with_remote_volume();
    sample.compute(ComputeCommand::DeleteServer("s1".into()));
    assert_eq!(sample.server("s1").task_state, Some(TaskState::Deleting));
    sample.fence_and_silence(host, 1);
    // Asked again, by a user or by the leader: nobody has to report it gone.
    sample.compute(ComputeCommand::DeleteServer("s1".into()));
    assert!(sample.state.compute.servers.is_empty());
    assert_eq!(sample.volume_of("v1").status, VolumeStatus::Available);
}

#[test]
fn a_volume_is_detached_from_a_fenced_host_at_once_and_none_is_attached_there() {
    let (mut sample, host) = Sample::with_remote_volume();
    sample.volume(VolumeCommand::Detach { volume_id: "v1".into(), server_id: "s1".into() });
    assert_eq!(sample.volume_of("v1").status, VolumeStatus::Detaching);
    sample.fence_and_silence(host, 1);
    sample.volume(VolumeCommand::Detach { volume_id: "v1".into(), server_id: "s1".into() });
    assert_eq!(sample.volume_of("v1").status, VolumeStatus::Available);
    let again = Command::Volume(attach("v1", "s1"));
    sample.refused_as(again, RejectionKind::InvalidState);
}

#[test]
fn a_host_with_something_on_it_is_removed_only_by_force() {
    let (mut sample, host) = Sample::with_remote_volume();
    let home = sample.volume_of("v1").home.expect("it has one");
    let why = sample.refused(remove(host.0, false));
    assert_eq!(why.kind, RejectionKind::InUse);
    assert!(why.message.contains("still has 1 servers, 0 volumes"), "{why}");
    sample.refused_as(remove(home.0, false), RejectionKind::InUse);
    sample.must(remove(host.0, true));
    let server = sample.server("s1");
    assert_eq!((server.vm_state, server.host, server.generation), (VmState::Error, None, 2));
    assert!(server.fault.as_ref().is_some_and(|f| f.message.contains("was removed")));
    assert_eq!(sample.volume_of("v1").status, VolumeStatus::Available);
    sample.must(remove(home.0, true));
    let volume = sample.volume_of("v1");
    assert_eq!((volume.status, volume.home), (VolumeStatus::Error, None));
    let last = sample.state.cluster.hosts.keys().next().expect("one is left").0;
    sample.refused_as(remove(last, true), RejectionKind::Conflict);
    sample.compute(ComputeCommand::DeleteServer("s1".into()));
    sample.volume(VolumeCommand::Delete("v1".into()));
    assert!(sample.state.compute.servers.is_empty() && sample.state.volume.volumes.is_empty());
}

#[test]
fn an_image_whose_only_copy_left_waits_for_its_content_again() {
    let mut sample = Sample::new();
    sample.refused_as(remove(1, false), RejectionKind::InUse);
    sample.must(remove(1, true));
    let image = &sample.state.image.images[&ImageId::from("image")];
    assert_eq!((image.status, &image.content), (ImageStatus::Queued, &None));
}

#[test]
fn the_id_of_a_removed_host_is_never_given_again() {
    let mut sample = Sample::new();
    sample.must(remove(3, false));
    sample.must(Command::Cluster(ClusterCommand::IssueJoinToken {
        hash: "again".into(),
        expires_ms: u64::MAX,
        replaces: None,
    }));
    let outcome = sample.must(Command::Cluster(ClusterCommand::RegisterHost {
        token_hash: "again".into(),
        host: Box::new(new_host(3)),
    }));
    let Outcome::Host(host) = outcome else { panic!("{outcome:?}") };
    assert_eq!(host.id, HostId(4));
    let first =
        ClusterCommand::RegisterHost { token_hash: "hash3".into(), host: Box::new(new_host(5)) };
    sample.refused_as(Command::Cluster(first), RejectionKind::Forbidden);
}

/// The small cloud as a program of feature level 1 would have made it.
fn of_level_1() -> Sample {
    let mut sample = Sample::new();
    sample.state.cluster.feature_level = 1;
    for id in [1, 2, 3] {
        let host = sample.state.cluster.hosts.get_mut(&HostId(id));
        host.expect("three hosts").feature_level = 1;
    }
    sample
}

fn update(id: u64, feature_level: u32) -> Command {
    let host = new_host(u8::try_from(id).expect("few hosts"));
    Command::Cluster(ClusterCommand::UpdateHost {
        id: HostId(id),
        addresses: host.addresses,
        capacity: host.capacity,
        feature_level,
    })
}

#[test]
fn later_commands_are_refused_until_every_host_supports_them() {
    let mut sample = of_level_1();
    let why = sample.refused(fence(2, 1));
    assert_eq!(why.kind, RejectionKind::InvalidState);
    assert!(why.message.starts_with("This needs feature level 2 and the cluster is at 1"), "{why}");
    for host in [1, 2] {
        sample.must(update(host, FEATURE_LEVEL));
        assert_eq!(raise_feature_level(&sample.state), None);
    }
    sample.must(update(3, FEATURE_LEVEL));
    let raise = raise_feature_level(&sample.state).expect("every host supports it");
    // A replica that ran an older program has dropped what the hosts said; afterwards it knows.
    sample.state.cluster.hosts.get_mut(&HostId(2)).expect("it is there").feature_level = 1;
    sample.must(raise.clone());
    assert!(sample.state.cluster.hosts.values().all(|host| host.feature_level == 2));
    assert_eq!(raise_feature_level(&sample.state), None);
    assert_eq!(sample.must(raise), Outcome::Ignored);
    sample.must(fence(2, 1));
}

#[test]
fn the_level_does_not_rise_over_a_host_that_joined_meanwhile() {
    let mut sample = of_level_1();
    (1..=3).for_each(|host| drop(sample.must(update(host, FEATURE_LEVEL))));
    let raise = raise_feature_level(&sample.state).expect("every host supports it");
    sample.must(Command::Cluster(ClusterCommand::IssueJoinToken {
        hash: "new".into(),
        expires_ms: u64::MAX,
        replaces: None,
    }));
    let mut host = new_host(4);
    host.feature_level = 1;
    let host = Box::new(host);
    sample.must(Command::Cluster(ClusterCommand::RegisterHost { token_hash: "new".into(), host }));
    sample.refused_as(raise, RejectionKind::InvalidState);
    assert_eq!(raise_feature_level(&sample.state), None);
}

#[test]
fn a_deletion_of_level_1_waits_for_the_host_as_it_did_then() {
    for (level, left) in [(1, 1), (2, 0)] {
        let mut sample = Sample::new();
        let host = sample.running("s1", None);
        sample.must(service(host.0, Some(true)));
        sample.state.cluster.feature_level = level;
        sample.compute(ComputeCommand::DeleteServer("s1".into()));
        assert_eq!(sample.state.compute.servers.len(), left, "level {level}");
    }
}

#[test]
fn a_host_with_an_older_program_is_not_admitted_and_a_later_state_is_not_read() {
    let mut sample = Sample::new();
    sample.must(Command::Cluster(ClusterCommand::IssueJoinToken {
        hash: "old".into(),
        expires_ms: u64::MAX,
        replaces: None,
    }));
    let mut host = new_host(4);
    host.feature_level = FEATURE_LEVEL - 1;
    let register = ClusterCommand::RegisterHost { token_hash: "old".into(), host: Box::new(host) };
    sample.refused_as(Command::Cluster(register), RejectionKind::Conflict);
    sample.state.cluster.feature_level = FEATURE_LEVEL + 1;
    let why = State::restore(&sample.state.snapshot()).expect_err("a later state");
    assert!(why.to_string().contains("install a newer trine"), "{why}");
}

#[test]
fn equal_states_have_equal_hashes_and_every_change_shows() {
    let (mut one, mut two) = (Sample::new(), Sample::new());
    one.running("s1", None);
    assert_ne!(one.state.state_hash(), two.state.state_hash());
    two.running("s1", None);
    assert_eq!(one.state.state_hash(), two.state.state_hash());
    let restored = State::restore(&one.state.snapshot()).expect("its own");
    assert_eq!(restored.state_hash(), one.state.state_hash());
}

#[test]
fn a_placement_of_an_evacuation_that_is_full_is_stale() {
    let mut sample = Sample::new();
    sample.image_everywhere();
    let mut old = Vec::new();
    for n in 0..4 {
        let id = format!("f{n}");
        let created = sample.apply_as_is(&super::fixture::placed(
            super::fixture::without_ports(new_server(&id, None)),
            2,
        ));
        assert!(created.is_ok(), "{created:?}");
        old.push(id);
    }
    let moving = super::fixture::without_ports(new_server("m", None));
    assert!(sample.apply_as_is(&super::fixture::placed(moving, 1)).is_ok());
    sample.fence_and_silence(HostId(1), 1);
    let full = Command::Compute(ComputeCommand::EvacuateServer {
        id: "m".into(),
        requested_host: None,
        stop: false,
        placement: Some(Placement::Host(HostId(2))),
    });
    let why = sample.apply_as_is(&full).expect_err("the host is full");
    assert_eq!(why.kind, RejectionKind::PlacementStale);
    let back = Command::Compute(ComputeCommand::EvacuateServer {
        id: "m".into(),
        requested_host: None,
        stop: false,
        placement: Some(Placement::Host(HostId(1))),
    });
    let why = sample.apply_as_is(&back).expect_err("the host is fenced");
    assert_eq!(why.kind, RejectionKind::PlacementStale);
    sample.must(evacuate("m"));
    assert_eq!(sample.server("m").host, Some(HostId(3)));
}

#[test]
fn the_leader_counts_evacuations_that_are_under_way() {
    let mut sample = Sample::new();
    sample.image_everywhere();
    for n in 0..4 {
        let new = super::fixture::without_ports(new_server(&format!("e{n}"), None));
        assert!(sample.apply_as_is(&super::fixture::placed(new, 1)).is_ok());
    }
    sample.fence_and_silence(HostId(1), 1);
    let mut in_flight = crate::plan::InFlight::default();
    let mut hosts = Vec::new();
    for n in 0..4 {
        let mut prepared = evacuate(&format!("e{n}"));
        crate::plan::prepare(&sample.state, &sample.liveness, &mut in_flight, &mut prepared);
        let Command::Compute(ComputeCommand::EvacuateServer { placement, .. }) = prepared else {
            panic!("the command became another");
        };
        let Some(Placement::Host(host)) = placement else { panic!("it fits") };
        hosts.push(host.0);
    }
    assert_eq!(hosts, [2, 3, 2, 3]);
}

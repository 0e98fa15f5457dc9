//! The plan against the real state: what a host is told, and what it then does.

use std::collections::BTreeSet;

use super::observed::{Guest, GuestState, Observed, Volume};
use super::{Step, host_view, plan};
use crate::ids::HostId;
use crate::state::Command;
use crate::state::cluster::ClusterCommand;
use crate::state::compute::ComputeCommand;
use crate::state::fixture::{Sample, new_image};
use crate::state::image::ImageCommand;
use crate::state::volume::VolumeCommand;

fn calm() -> Observed {
    let mut observed = Observed::default();
    observed.switch.programmed = true;
    observed
}

fn guest(generation: u64, state: GuestState) -> Guest {
    Guest { generation, state, volumes: BTreeSet::new(), disconnected: BTreeSet::new() }
}

/// Checks what a host does next.
#[track_caller]
fn check(sample: &Sample, host: HostId, observed: &Observed, expected: &[Step]) {
    assert_eq!(plan(&host_view(&sample.state, host), observed), expected);
}

/// A running server, its host, and that host as it should be.
fn settled(sample: &mut Sample) -> (HostId, Observed) {
    let host = sample.running("s1", None);
    let mut observed = calm();
    observed.guests.insert("s1".into(), guest(1, GuestState::Running));
    observed.switch.attached.insert("port-of-s1".into(), 1);
    (host, observed)
}

#[test]
fn a_server_is_started_reported_and_then_left_alone() {
    let mut sample = Sample::new();
    let new = crate::state::fixture::new_server("s1", None);
    sample.compute(ComputeCommand::CreateServer(Box::new(new)));
    let host = sample.server("s1").host.expect("it fits");
    check(
        &sample,
        host,
        &Observed::default(),
        &[Step::ProgramSwitch, Step::StartGuest("s1".into())],
    );
    let mut observed = calm();
    observed.guests.insert("s1".into(), guest(1, GuestState::Running));
    observed.switch.attached.insert("port-of-s1".into(), 1);
    check(&sample, host, &observed, &[Step::ReportStarted("s1".into())]);
    sample.compute(ComputeCommand::ServerStarted { id: "s1".into(), generation: 1 });
    check(&sample, host, &observed, &[]);
    observed.switch.attached.clear();
    let attach = Step::AttachPort("s1".into(), "port-of-s1".into());
    check(&sample, host, &observed, &[attach]);
}

#[test]
fn after_a_reboot_of_the_host_its_guests_start_again_but_those_that_ended_stay_off() {
    let mut sample = Sample::new();
    let (host, mut observed) = settled(&mut sample);
    observed.switch.attached.clear();
    observed.guests.clear();
    check(&sample, host, &observed, &[Step::StartGuest("s1".into())]);
    observed.guests.insert("s1".into(), guest(1, GuestState::Ended("off".into())));
    check(&sample, host, &observed, &[Step::ReportStopped("s1".into(), "off".into())]);
}

#[test]
fn a_guest_that_reboots_itself_starts_again_and_stays_active() {
    let mut sample = Sample::new();
    let (host, mut observed) = settled(&mut sample);
    observed.guests.insert("s1".into(), guest(1, GuestState::Reset { rested: false }));
    check(&sample, host, &observed, &[]);
    observed.guests.insert("s1".into(), guest(1, GuestState::Reset { rested: true }));
    check(&sample, host, &observed, &[Step::StartGuest("s1".into())]);
    // Its start is reported once more, which changes nothing.
    let before = sample.server("s1").clone();
    sample.compute(ComputeCommand::ServerStarted { id: "s1".into(), generation: 1 });
    assert_eq!(sample.server("s1").vm_state, before.vm_state);
    assert_eq!(sample.server("s1").power_state, before.power_state);
    // Stopped meanwhile, it stays off; deleted, it goes, whatever it did last.
    sample.compute(ComputeCommand::StopServer("s1".into()));
    let stopped = [Step::ReportStopped("s1".into(), "stopped".into())];
    check(&sample, host, &observed, &stopped);
    sample.compute(ComputeCommand::DeleteServer("s1".into()));
    check(&sample, host, &observed, &[Step::RemoveGuest("s1".into())]);
}

#[test]
fn a_deleted_server_is_removed_and_then_reported_gone() {
    let mut sample = Sample::new();
    let (host, mut observed) = settled(&mut sample);
    sample.compute(ComputeCommand::DeleteServer("s1".into()));
    check(&sample, host, &observed, &[Step::RemoveGuest("s1".into())]);
    observed.guests.clear();
    observed.switch.attached.clear();
    check(&sample, host, &observed, &[Step::ReportGone("s1".into())]);
}

#[test]
fn disks_of_a_guest_that_never_started_go_with_its_server() {
    let mut sample = Sample::new();
    let new = crate::state::fixture::new_server("s1", None);
    sample.compute(ComputeCommand::CreateServer(Box::new(new)));
    let host = sample.server("s1").host.expect("it fits");
    let mut observed = calm();
    observed.roots.insert("s1".into());
    check(&sample, host, &observed, &[Step::StartGuest("s1".into())]);
    sample.compute(ComputeCommand::DeleteServer("s1".into()));
    check(&sample, host, &observed, &[Step::RemoveGuest("s1".into())]);
    observed.roots.clear();
    check(&sample, host, &observed, &[Step::ReportGone("s1".into())]);
    observed.roots.insert("moved away".into());
    let steps = [Step::ReportGone("s1".into()), Step::RemoveGuest("moved away".into())];
    check(&sample, host, &observed, &steps);
}

#[test]
fn a_guest_of_an_older_generation_is_ended_before_the_new_one_starts() {
    let mut sample = Sample::new();
    let (host, mut observed) = settled(&mut sample);
    sample.compute(ComputeCommand::RebootServer("s1".into()));
    check(&sample, host, &observed, &[Step::StopGuest("s1".into())]);
    observed.guests.insert("s1".into(), guest(1, GuestState::Ended("killed".into())));
    check(&sample, host, &observed, &[Step::StartGuest("s1".into())]);
}

#[test]
fn a_volume_elsewhere_is_exported_plugged_unplugged_and_released() {
    let mut sample = Sample::new();
    let (host, mut observed) = settled(&mut sample);
    sample.available("v1");
    // The volume went to the lowest of the hosts with the most room: not the server's.
    let home = sample.volume_of("v1").home.expect("it fits");
    assert_ne!(home, host);
    let mut at_home = calm();
    at_home.volumes.insert("v1".into(), Volume::default());
    check(&sample, home, &at_home, &[]);
    sample.volume(VolumeCommand::Attach {
        volume_id: "v1".into(),
        server_id: "s1".into(),
        attachment_id: "a1".into(),
        device: None,
        tag: None,
        delete_on_termination: false,
    });
    check(&sample, home, &at_home, &[Step::ExportVolume("v1".into())]);
    check(&sample, host, &observed, &[Step::PlugVolume("s1".into(), "a1".into())]);
    // A grant that names nobody, or another host, is none yet.
    let name = |at: HostId| sample.state.cluster.hosts.get(&at).expect("it is in the cluster");
    let [own, others] = [host, home].map(|at| Some(name(at).addresses.server_name.clone()));
    for granted_to in [None, others] {
        let volume = Volume { holder: Some(("s1".into(), 1)), host: granted_to };
        at_home.volumes.insert("v1".into(), volume);
        check(&sample, home, &at_home, &[Step::ExportVolume("v1".into())]);
    }
    at_home.volumes.insert("v1".into(), Volume { holder: Some(("s1".into(), 1)), host: own });
    check(&sample, home, &at_home, &[]);
    observed.guests.get_mut("s1").expect("it runs").volumes.insert("v1".into());
    check(&sample, host, &observed, &[Step::ReportPlugged("s1".into(), "a1".into())]);
    sample.volume(VolumeCommand::Attached { volume_id: "v1".into(), generation: 1 });
    check(&sample, host, &observed, &[]);
    sample.volume(VolumeCommand::Detach { volume_id: "v1".into(), server_id: "s1".into() });
    check(&sample, host, &observed, &[Step::UnplugVolume("s1".into(), "a1".into())]);
    sample.volume(VolumeCommand::Detached { volume_id: "v1".into(), generation: 1 });
    let release = Step::ReleaseVolume { volume: "v1".into(), server: "s1".into(), generation: 1 };
    check(&sample, home, &at_home, std::slice::from_ref(&release));
    // Deleted before it was released: the gate would keep it.
    sample.volume(VolumeCommand::Delete("v1".into()));
    check(&sample, home, &at_home, &[release]);
    at_home.volumes.insert("v1".into(), Volume::default());
    check(&sample, home, &at_home, &[Step::DeleteVolume("v1".into())]);
}

#[test]
fn what_belongs_to_nothing_is_removed_but_not_what_is_just_being_uploaded() {
    let mut sample = Sample::new();
    let mut observed = calm();
    observed.guests.insert("stray".into(), guest(1, GuestState::Running));
    observed.volumes.insert("lost".into(), Volume::default());
    observed.images.insert("cd".repeat(64));
    observed.images.insert(crate::state::fixture::content().sha512);
    let strays = [Step::RemoveGuest("stray".into()), Step::DeleteVolume("lost".into())];
    let with_image = [strays.as_slice(), &[Step::DeleteImage("cd".repeat(64))]].concat();
    check(&sample, HostId(1), &observed, &with_image);
    sample.must(Command::Image(ImageCommand::Create(Box::new(new_image("second")))));
    sample.must(Command::Image(ImageCommand::UploadStarted("second".into())));
    check(&sample, HostId(1), &observed, &strays);
}

/// A running server whose host was then fenced.
fn fenced() -> (Sample, HostId, Observed) {
    let mut sample = Sample::new();
    for host in [2, 3].map(HostId) {
        sample.must(Command::Image(ImageCommand::HeldBy { id: "image".into(), host }));
    }
    let (host, observed) = settled(&mut sample);
    sample.must(Command::Cluster(ClusterCommand::FenceHost { id: host, epoch: 1 }));
    sample.liveness.up.remove(&host);
    (sample, host, observed)
}

fn forced_down(id: HostId, forced: bool) -> Command {
    Command::Cluster(ClusterCommand::SetHostService {
        id,
        disabled: None,
        disabled_reason: None,
        forced_down: Some(forced),
        evacuate: None,
    })
}

#[test]
fn a_fenced_host_whose_guests_stayed_returns_with_them() {
    let (mut sample, host, mut observed) = fenced();
    observed.switch.programmed = false;
    check(&sample, host, &observed, &[Step::ReportReturned(1)]);
    sample.must(Command::Cluster(ClusterCommand::HostReturned { id: host, epoch: 1 }));
    check(&sample, host, &observed, &[Step::ProgramSwitch]);
}

#[test]
fn a_fenced_host_ends_the_guests_that_left_it_before_it_returns() {
    let (mut sample, host, mut observed) = fenced();
    sample.compute(ComputeCommand::EvacuateServer {
        id: "s1".into(),
        requested_host: None,
        stop: false,
        placement: None,
    });
    let target = sample.server("s1").host.expect("there is room");
    check(&sample, host, &observed, &[Step::RemoveGuest("s1".into())]);
    check(&sample, target, &calm(), &[Step::StartGuest("s1".into())]);
    observed.guests.clear();
    observed.switch.attached.clear();
    check(&sample, host, &observed, &[Step::ReportReturned(1)]);
}

#[test]
fn a_host_that_an_operator_forced_down_ends_what_left_it_and_waits() {
    let (mut sample, host, observed) = fenced();
    sample.must(forced_down(host, true));
    check(&sample, host, &observed, &[]);
    sample.must(forced_down(host, false));
    check(&sample, host, &observed, &[Step::ReportReturned(1)]);
}

#[test]
fn a_volume_that_the_state_took_from_a_guest_is_unplugged() {
    let mut sample = Sample::new();
    let (host, mut observed) = settled(&mut sample);
    observed.guests.get_mut("s1").expect("it runs").volumes.insert("v9".into());
    check(&sample, host, &observed, &[Step::UnplugLost("s1".into(), "v9".into())]);
}

#[test]
fn a_ring_that_the_switch_has_from_an_earlier_generation_is_given_again() {
    let mut sample = Sample::new();
    let (host, mut observed) = settled(&mut sample);
    observed.guests.insert("s1".into(), guest(2, GuestState::Running));
    check(&sample, host, &observed, &[Step::AttachPort("s1".into(), "port-of-s1".into())]);
}

#[test]
fn other_metadata_is_another_program() {
    let mut sample = Sample::new();
    let (host, _) = settled(&mut sample);
    let before = host_view(&sample.state, host).switch;
    let metadata = [("key".to_owned(), "value".to_owned())].into();
    let changed = crate::state::compute::Server { metadata, ..sample.server("s1").clone() };
    sample.state.compute.servers.insert("s1".into(), std::sync::Arc::new(changed));
    assert_ne!(host_view(&sample.state, host).switch, before);
}

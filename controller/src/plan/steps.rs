//! `plan`: from what is wanted and what is there to the steps between, and nothing else.
//!
//! Every step is idempotent. A step that fails is planned again as long as it is needed; the
//! executor spaces the tries.

use std::collections::BTreeSet;

use crate::ids::{AttachmentId, PortId, ServerId, VolumeId};

use super::observed::{Guest, GuestState, Observed};
use super::view::{AttachmentView, HostView, Nic, ServerView, Service, VolumeView, Wanted};

/// One thing to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Puts the wanted program into the switch.
    ProgramSwitch,
    /// Makes a volume's file, and reports it.
    CreateVolume(VolumeId),
    /// Reports a volume that is there.
    ReportVolume(VolumeId),
    /// Removes a volume's file where it is, and reports it.
    DeleteVolume(VolumeId),
    /// Lets a server on another host write to a volume, and nobody else.
    ExportVolume(VolumeId),
    /// Takes back the permission to write to a volume.
    ReleaseVolume {
        /// The volume.
        volume: VolumeId,
        /// Who holds it.
        server: ServerId,
        /// The generation it holds it with.
        generation: u64,
    },
    /// Removes the content of an image that is no longer in the catalog.
    DeleteImage(String),
    /// Starts a guest (networking, block_device_mapping, spawning) and reports it or its fault.
    StartGuest(ServerId),
    /// Reports that a guest runs.
    ReportStarted(ServerId),
    /// Ends a guest's process; its disks stay.
    StopGuest(ServerId),
    /// Reports that a guest does not run, and why.
    ReportStopped(ServerId, String),
    /// Removes all that is left of a guest.
    RemoveGuest(ServerId),
    /// Reports that nothing is left.
    ReportGone(ServerId),
    /// Connects a running guest's rings to a switch that lost them.
    AttachPort(ServerId, PortId),
    /// Lets go of the rings of a port that has no guest here.
    DetachPort(PortId, u64),
    /// Plugs a volume into a running guest, and reports it.
    PlugVolume(ServerId, AttachmentId),
    /// Reports a volume that is plugged.
    ReportPlugged(ServerId, AttachmentId),
    /// Asks the guest for a volume, gives it back to its home, and reports it.
    UnplugVolume(ServerId, AttachmentId),
    /// Reports a volume that is no longer plugged.
    ReportUnplugged(ServerId, AttachmentId),
    /// Gives a running guest a new connection to a volume elsewhere.
    ReconnectVolume(ServerId, AttachmentId),
    /// Takes a volume from a running guest that is no longer attached to it by the state.
    UnplugLost(ServerId, VolumeId),
    /// Reports that this host, which was fenced, has ended every guest that left it.
    ReportReturned(u64),
}

impl Step {
    /// The object that the step works on: steps for one object must not overlap.
    pub fn subject(&self) -> String {
        match self {
            Step::ProgramSwitch => "switch".into(),
            Step::CreateVolume(volume)
            | Step::ReportVolume(volume)
            | Step::DeleteVolume(volume)
            | Step::ExportVolume(volume)
            | Step::ReleaseVolume { volume, .. } => format!("volume {volume}"),
            Step::DeleteImage(content) => format!("image {content}"),
            Step::StartGuest(server)
            | Step::ReportStarted(server)
            | Step::StopGuest(server)
            | Step::ReportStopped(server, _)
            | Step::RemoveGuest(server)
            | Step::ReportGone(server)
            | Step::AttachPort(server, _)
            | Step::PlugVolume(server, _)
            | Step::ReportPlugged(server, _)
            | Step::UnplugVolume(server, _)
            | Step::ReportUnplugged(server, _)
            | Step::ReconnectVolume(server, _)
            | Step::UnplugLost(server, _) => format!("server {server}"),
            Step::DetachPort(port, _) => format!("port {port}"),
            Step::ReportReturned(_) => "host".into(),
        }
    }

    /// What kind of step it is.
    pub fn kind(&self) -> &'static str {
        match self {
            Step::ProgramSwitch => "ProgramSwitch",
            Step::CreateVolume(_) => "CreateVolume",
            Step::ReportVolume(_) => "ReportVolume",
            Step::DeleteVolume(_) => "DeleteVolume",
            Step::ExportVolume(_) => "ExportVolume",
            Step::ReleaseVolume { .. } => "ReleaseVolume",
            Step::DeleteImage(_) => "DeleteImage",
            Step::StartGuest(_) => "StartGuest",
            Step::ReportStarted(_) => "ReportStarted",
            Step::StopGuest(_) => "StopGuest",
            Step::ReportStopped(..) => "ReportStopped",
            Step::RemoveGuest(_) => "RemoveGuest",
            Step::ReportGone(_) => "ReportGone",
            Step::AttachPort(..) => "AttachPort",
            Step::DetachPort(..) => "DetachPort",
            Step::PlugVolume(..) => "PlugVolume",
            Step::ReportPlugged(..) => "ReportPlugged",
            Step::UnplugVolume(..) => "UnplugVolume",
            Step::ReportUnplugged(..) => "ReportUnplugged",
            Step::ReconnectVolume(..) => "ReconnectVolume",
            Step::UnplugLost(..) => "UnplugLost",
            Step::ReportReturned(_) => "ReportReturned",
        }
    }
}

/// The steps that lead from `observed` towards `view`, the most urgent first; at most one for
/// each server and volume, because the next depends on what comes of it.
pub fn plan(view: &HostView, observed: &Observed) -> Vec<Step> {
    let mut steps = Vec::new();
    if view.service != Service::In {
        return while_out_of_service(view, observed);
    }
    if !observed.switch.programmed {
        steps.push(Step::ProgramSwitch);
    }
    for (id, wanted) in &view.volumes {
        steps.extend(volume_step(id, wanted, observed));
    }
    for (id, wanted) in &view.servers {
        steps.extend(server_step(id, wanted, observed));
    }
    leftovers(view, observed, &mut steps);
    steps
}

/// Others may act in this host's place: it ends what left it and does nothing else until it is
/// back in service.
fn while_out_of_service(view: &HostView, observed: &Observed) -> Vec<Step> {
    let mut steps = strays(view, observed);
    if let (Service::Fenced(epoch), true) = (view.service, steps.is_empty()) {
        steps.push(Step::ReportReturned(epoch));
    }
    steps
}

/// Guests that are no longer placed here, and disks of such that never were started.
fn strays(view: &HostView, observed: &Observed) -> Vec<Step> {
    let here: BTreeSet<&ServerId> = observed.guests.keys().chain(&observed.roots).collect();
    let gone = here.into_iter().filter(|id| !view.servers.contains_key(*id));
    gone.map(|id| Step::RemoveGuest(id.clone())).collect()
}

fn volume_step(id: &VolumeId, wanted: &VolumeView, observed: &Observed) -> Option<Step> {
    let present = observed.volumes.get(id);
    let Some(present) = present else {
        return match (wanted.wanted, wanted.settled) {
            // The report of a deletion that was already made.
            (false, _) => Some(Step::DeleteVolume(id.clone())),
            (true, false) => Some(Step::CreateVolume(id.clone())),
            // It was there once: an empty file in its place would pass for its data.
            (true, true) => None,
        };
    };
    if !wanted.wanted {
        // The gate keeps what a guest holds; the release may not have come before the deletion.
        return Some(match &present.holder {
            Some((server, generation)) => release(id, server, *generation),
            None => Step::DeleteVolume(id.clone()),
        });
    }
    if !wanted.settled {
        return Some(Step::ReportVolume(id.clone()));
    }
    match (&wanted.holder, &present.holder) {
        (Some(holder), held) if holder.remote => {
            let held = held.as_ref() == Some(&(holder.server.clone(), holder.generation));
            let exported = held && present.host == holder.host;
            // To nobody before it is known to whom.
            (!exported && holder.host.is_some()).then(|| Step::ExportVolume(id.clone()))
        }
        // A guest on this host opens the gate itself when it is plugged.
        (Some(holder), Some((server, generation))) if *generation < holder.generation => {
            Some(release(id, server, *generation))
        }
        (None, Some((server, generation))) => Some(release(id, server, *generation)),
        _ => None,
    }
}

fn release(volume: &VolumeId, server: &ServerId, generation: u64) -> Step {
    Step::ReleaseVolume { volume: volume.clone(), server: server.clone(), generation }
}

fn server_step(id: &ServerId, view: &ServerView, observed: &Observed) -> Option<Step> {
    let guest = observed.guests.get(id);
    let running = guest.filter(|guest| guest.state == GuestState::Running);
    match view.wanted {
        Wanted::Gone => Some(match guest.is_some() || observed.roots.contains(id) {
            true => Step::RemoveGuest(id.clone()),
            false => Step::ReportGone(id.clone()),
        }),
        Wanted::Stopped => match running {
            Some(_) => Some(Step::StopGuest(id.clone())),
            None if !view.settled => Some(Step::ReportStopped(id.clone(), "stopped".into())),
            None => idle_attachment_step(id, view),
        },
        Wanted::Running => match (running, guest.map(|guest| &guest.state)) {
            (Some(guest), _) if guest.generation < view.generation => {
                Some(Step::StopGuest(id.clone()))
            }
            (Some(_), _) if !view.settled => Some(Step::ReportStarted(id.clone())),
            (Some(guest), _) => running_step(id, view, guest, observed),
            // A guest that was ACTIVE and ended by itself stays off, as in Nova.
            (None, Some(GuestState::Ended(why))) if view.settled => {
                Some(Step::ReportStopped(id.clone(), why.clone()))
            }
            // A guest's own reboot: it starts again with the same disks and ports, and stays ACTIVE.
            (None, Some(GuestState::Reset { rested: false })) => None,
            (None, _) => Some(Step::StartGuest(id.clone())),
        },
    }
}

fn running_step(
    id: &ServerId,
    view: &ServerView,
    guest: &Guest,
    observed: &Observed,
) -> Option<Step> {
    let attached = &observed.switch.attached;
    let older = |nic: &&Nic| attached.get(&nic.port).is_none_or(|g| *g < guest.generation);
    let lost = view.ports.iter().find(older);
    if let Some(nic) = lost {
        return Some(Step::AttachPort(id.clone(), nic.port.clone()));
    }
    let attached = |volume: &&VolumeId| view.attachments.iter().any(|a| a.volume == **volume);
    if let Some(volume) = guest.volumes.iter().find(|volume| !attached(volume)) {
        return Some(Step::UnplugLost(id.clone(), volume.clone()));
    }
    view.attachments.iter().find_map(|attachment| {
        let cut_off = attachment.home.is_some() && guest.disconnected.contains(&attachment.volume);
        let plugged = guest.volumes.contains(&attachment.volume);
        let named = |step: fn(ServerId, AttachmentId) -> Step| {
            Some(step(id.clone(), attachment.attachment.clone()))
        };
        match (attachment.wanted, plugged) {
            (true, false) => named(Step::PlugVolume),
            (true, true) if cut_off => named(Step::ReconnectVolume),
            (true, true) if !attachment.settled => named(Step::ReportPlugged),
            (false, true) => named(Step::UnplugVolume),
            (false, false) => named(Step::ReportUnplugged),
            _ => None,
        }
    })
}

/// Without a running guest, attaching and detaching are matters of record.
fn idle_attachment_step(id: &ServerId, view: &ServerView) -> Option<Step> {
    let open = |attachment: &&AttachmentView| !attachment.wanted || !attachment.settled;
    view.attachments.iter().find(open).map(|attachment| match attachment.wanted {
        true => Step::ReportPlugged(id.clone(), attachment.attachment.clone()),
        false => Step::ReportUnplugged(id.clone(), attachment.attachment.clone()),
    })
}

/// What is there and belongs to nothing that this host should have.
fn leftovers(view: &HostView, observed: &Observed, steps: &mut Vec<Step>) {
    steps.extend(strays(view, observed));
    for (id, present) in observed.volumes.iter().filter(|(id, _)| !view.volumes.contains_key(*id)) {
        steps.push(match &present.holder {
            Some((server, generation)) => release(id, server, *generation),
            None => Step::DeleteVolume(id.clone()),
        });
    }
    for content in observed.images.difference(&view.images).filter(|_| !view.uploading) {
        steps.push(Step::DeleteImage(content.clone()));
    }
    let guests =
        |port: &PortId| view.servers.values().any(|s| s.ports.iter().any(|n| n.port == *port));
    for (port, generation) in observed.switch.attached.iter().filter(|(port, _)| !guests(port)) {
        steps.push(Step::DetachPort(port.clone(), *generation));
    }
}

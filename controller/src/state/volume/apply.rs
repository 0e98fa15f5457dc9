//! Changes of volumes and their attachments.

use std::sync::Arc;

use super::{
    Attachment, AttachmentState, DETACH_MS_MAX, Homed, NewVolume, Volume, VolumeCommand,
    VolumeStatus, Volumes,
};
use crate::ids::{AttachmentId, HostId, ServerId, VolumeId};
use crate::state::cluster::DEFAULT_ZONE;
use crate::state::compute::{Desired, Placement, Server, VmState};
use crate::state::identity::set;
use crate::state::limits::{SERVER_VOLUMES_MAX, VOLUMES_MAX, room};
use crate::state::outcome::{Outcome, Rejection, RejectionKind};
use crate::state::{QuotaResource, State};

/// What an attachment is to be.
struct Request<'a> {
    volume_id: &'a VolumeId,
    server_id: &'a ServerId,
    attachment_id: &'a AttachmentId,
    device: Option<&'a str>,
    tag: Option<&'a String>,
    delete_on_termination: bool,
}

impl State {
    pub(in crate::state) fn apply_volume(
        &mut self,
        command: &VolumeCommand,
    ) -> Result<Outcome, Rejection> {
        match command {
            VolumeCommand::Create(new) => self.create_volume(new),
            VolumeCommand::Update { id, name, description, metadata, bootable } => {
                let now = self.time_ms;
                let volume = self.volume_mut(id)?;
                set(&mut volume.name, name);
                set(&mut volume.description, description);
                set(&mut volume.metadata, metadata);
                set(&mut volume.bootable, bootable);
                volume.updated_ms = now;
                Ok(Outcome::Volume(Box::new(volume.clone())))
            }
            VolumeCommand::Delete(id) => self.delete_volume(id),
            VolumeCommand::Attach {
                volume_id,
                server_id,
                attachment_id,
                device,
                tag,
                delete_on_termination,
            } => self.attach(&Request {
                volume_id,
                server_id,
                attachment_id,
                device: device.as_deref().filter(|device| !device.is_empty()),
                tag: tag.as_ref(),
                delete_on_termination: *delete_on_termination,
            }),
            VolumeCommand::Detach { volume_id, server_id } => self.detach(volume_id, server_id),
            VolumeCommand::Created(id) => {
                self.settle(id, VolumeStatus::Creating, VolumeStatus::Available)
            }
            VolumeCommand::Failed { id, reason } => self.volume_failed(id, reason),
            VolumeCommand::Gone(id) => {
                if self.status_of(id) != Some(VolumeStatus::Deleting) {
                    return Ok(Outcome::Ignored);
                }
                self.remove_volume(id);
                Ok(Outcome::Done)
            }
            VolumeCommand::Attached { volume_id, generation } => {
                self.attached(volume_id, *generation)
            }
            VolumeCommand::AttachFailed { volume_id, generation, reason: _ } => {
                if self.attachment_of(volume_id, *generation).is_none() {
                    return Ok(Outcome::Ignored);
                }
                self.free_volume(volume_id);
                Ok(Outcome::Done)
            }
            VolumeCommand::DetachExpired { volume_id, generation, asked_ms } => {
                self.detach_expired(volume_id, *generation, *asked_ms)
            }
            VolumeCommand::Detached { volume_id, generation } => {
                self.detached(volume_id, *generation)
            }
        }
    }

    fn volume_mut(&mut self, id: &VolumeId) -> Result<&mut Volume, Rejection> {
        let volume = self.volume.volumes.get_mut(id);
        volume.map(Arc::make_mut).ok_or_else(|| Rejection::not_found("volume", id))
    }

    fn status_of(&self, id: &VolumeId) -> Option<VolumeStatus> {
        self.volume.volumes.get(id).map(|volume| volume.status)
    }

    fn attachment_of(&self, id: &VolumeId, generation: u64) -> Option<&Attachment> {
        let attachments = &self.volume.volumes.get(id)?.attachments;
        attachments.iter().find(|attachment| attachment.generation == generation)
    }

    fn create_volume(&mut self, new: &NewVolume) -> Result<Outcome, Rejection> {
        room(self.volume.volumes.len(), VOLUMES_MAX, "volume")?;
        if self.volume.volumes.contains_key(&new.id) {
            let message = format!("Volume {} already exists.", new.id);
            return Err(Rejection::conflict("volume", &new.id, message));
        }
        // A guest addresses bytes with 64 bits and the gate with signed ones.
        if new.size_gib == 0 || new.size_gib > (i64::MAX as u64) >> 30 {
            let message = format!("Volume size {} GiB is not possible.", new.size_gib);
            return Err(Rejection::invalid("volume", &new.id, message));
        }
        self.quota.check(&new.project_id, QuotaResource::Volumes, 1)?;
        self.quota.check(&new.project_id, QuotaResource::Gigabytes, new.size_gib)?;
        let (home, fault) = match &new.placement {
            Some(Placement::Host(host)) => {
                self.check_home(*host, new.size_gib)?;
                (Some(*host), None)
            }
            Some(Placement::NoValidHost { message, details }) => {
                (None, Some(format!("{message} {details}")))
            }
            None => {
                return Err(Rejection::invalid("volume", &new.id, "The volume wasn't placed."));
            }
        };
        let volume = Volume {
            id: new.id.clone(),
            name: new.name.clone(),
            description: new.description.clone(),
            project_id: new.project_id.clone(),
            user_id: new.user_id.clone(),
            size_gib: new.size_gib,
            metadata: new.metadata.clone(),
            availability_zone: new.availability_zone.clone().unwrap_or(DEFAULT_ZONE.into()),
            bootable: false,
            status: if home.is_some() { VolumeStatus::Creating } else { VolumeStatus::Error },
            fault,
            home,
            generation: 0,
            attachments: Vec::new(),
            created_ms: self.time_ms,
            updated_ms: self.time_ms,
        };
        self.quota.charge(&volume.project_id, QuotaResource::Volumes, 1);
        self.quota.charge(&volume.project_id, QuotaResource::Gigabytes, volume.size_gib);
        if let Some(home) = home {
            let homed = self.volume.homed.entry(home).or_default();
            homed.volumes.insert(volume.id.clone());
            homed.size_gib += volume.size_gib;
        }
        self.volume.volumes.insert(volume.id.clone(), Arc::new(volume.clone()));
        Ok(Outcome::Volume(Box::new(volume)))
    }

    fn check_home(&self, host: HostId, size_gib: u64) -> Result<(), Rejection> {
        let stale = |why: String| Rejection::new(RejectionKind::PlacementStale, "host", host, why);
        let known = self.cluster.hosts.get(&host);
        let known = known.ok_or_else(|| stale(format!("Host {host} is gone.")))?;
        if let Some(why) = known.closed() {
            return Err(stale(format!("Host {} is {why}.", known.name)));
        }
        let free = self.free_disk_gib(known);
        if free < size_gib {
            return Err(stale(format!("Host {} has {free} GiB of disk free.", known.name)));
        }
        Ok(())
    }

    fn delete_volume(&mut self, id: &VolumeId) -> Result<Outcome, Rejection> {
        let now = self.time_ms;
        let volume = self.volume_mut(id)?;
        match volume.status {
            VolumeStatus::Deleting => {}
            VolumeStatus::Available | VolumeStatus::Error => {
                volume.status = VolumeStatus::Deleting;
                volume.updated_ms = now;
                if volume.home.is_none() {
                    self.remove_volume(id);
                }
            }
            other => {
                let message = format!(
                    "Invalid volume: Volume status must be available or error or error_restoring or error_extending or error_managing and must not be migrating, attached, belong to a group, have snapshots, awaiting a transfer, or be disassociated from snapshots after volume transfer. It is {}.",
                    other.as_str()
                );
                return Err(Rejection::state("volume", id, message));
            }
        }
        Ok(Outcome::Done)
    }

    fn attach(&mut self, request: &Request<'_>) -> Result<Outcome, Rejection> {
        let Request { volume_id, server_id, .. } = *request;
        let server = self.compute.servers.get(server_id).cloned();
        let server = server.ok_or_else(|| Rejection::not_found("server", server_id))?;
        let volume = self.volume.volumes.get(volume_id);
        let volume = volume.ok_or_else(|| Rejection::not_found("volume", volume_id))?;
        check_attachable(volume, &server)?;
        for host in [server.host, volume.home] {
            if self.is_fenced(host) {
                let message = format!(
                    "Volume {volume_id} can't be attached to {server_id} while the host of either is fenced."
                );
                return Err(Rejection::state("volume", volume_id, message));
            }
        }
        let device = self.free_device(&server, request.device)?;
        let stopped = server.vm_state == VmState::Stopped;
        let now = self.time_ms;
        let volume = self.volume_mut(volume_id)?;
        volume.generation += 1;
        volume.updated_ms = now;
        volume.status = if stopped { VolumeStatus::InUse } else { VolumeStatus::Attaching };
        let attachment = Attachment {
            id: request.attachment_id.clone(),
            server_id: server_id.clone(),
            device,
            host: server.host,
            generation: volume.generation,
            // A stopped server has no guest to plug it into: it gets it with its next start.
            state: if stopped { AttachmentState::Attached } else { AttachmentState::Attaching },
            delete_on_termination: request.delete_on_termination,
            tag: request.tag.cloned(),
            attached_ms: now,
            detaching_ms: None,
        };
        volume.attachments = vec![attachment.clone()];
        let attached = self.volume.by_server.entry(server_id.clone()).or_default();
        attached.insert(volume_id.clone());
        Ok(Outcome::Attachment(Box::new(attachment)))
    }

    /// The device's name that was asked for, or the first that is free.
    fn free_device(&self, server: &Server, wanted: Option<&str>) -> Result<String, Rejection> {
        let taken: Vec<&str> = self
            .attachments_of_server(&server.id)
            .map(|(_, attachment)| attachment.device.as_str())
            .collect();
        let mut names = (b'b'..=b'z').map(|letter| format!("/dev/vd{}", letter as char));
        if taken.len() >= SERVER_VOLUMES_MAX {
            let message = format!("A server can have {SERVER_VOLUMES_MAX} volumes at most.");
            return Err(Rejection::new(RejectionKind::TooMany, "server", &server.id, message));
        }
        match wanted {
            Some(device) if device == "/dev/vda" || taken.contains(&device) => {
                let message = format!("The supplied device path ({device}) is in use.");
                Err(Rejection::conflict("device", device, message))
            }
            Some(device) if is_device_name(device) => Ok(device.to_owned()),
            Some(device) => {
                let message = format!("The supplied device path ({device}) is invalid.");
                Err(Rejection::invalid("device", device, message))
            }
            None => names.find(|name| !taken.contains(&name.as_str())).ok_or_else(|| {
                let message = format!("Server {} has no free device name.", server.id);
                Rejection::new(RejectionKind::TooMany, "server", &server.id, message)
            }),
        }
    }

    /// A server's attachments, with their volumes.
    pub fn attachments_of_server(
        &self,
        server: &ServerId,
    ) -> impl Iterator<Item = (&Arc<Volume>, &Attachment)> {
        let ids = self.volume.by_server.get(server).into_iter().flatten();
        let volumes = ids.filter_map(|id| self.volume.volumes.get(id));
        volumes.filter_map(move |volume| {
            let attachment = volume.attachments.iter().find(|a| a.server_id == *server)?;
            Some((volume, attachment))
        })
    }

    fn detach(&mut self, id: &VolumeId, server_id: &ServerId) -> Result<Outcome, Rejection> {
        let now = self.time_ms;
        let guest_is_off = self.compute.servers.get(server_id).is_some_and(|server| {
            server.vm_state == VmState::Stopped && server.task_state.is_none()
        });
        // A host that is fenced can't let go; the volume's home admits it no more once it is free.
        let host = self.compute.servers.get(server_id).and_then(|server| server.host);
        let home = self.volume.volumes.get(id).and_then(|volume| volume.home);
        let cut_off = self.is_fenced(host) && !self.is_fenced(home);
        let expires = self.cluster.has(2);
        let volume = self.volume_mut(id)?;
        let Some(attachment) = volume.attachments.iter_mut().find(|a| a.server_id == *server_id)
        else {
            let message = format!("Instance {server_id} is not attached to volume {id}.");
            return Err(Rejection::new(RejectionKind::NotFound, "attachment", id, message));
        };
        match attachment.state {
            _ if cut_off => {
                self.free_volume(id);
                return Ok(Outcome::Done);
            }
            AttachmentState::Detaching => {}
            AttachmentState::Attached if guest_is_off => {
                self.free_volume(id);
                return Ok(Outcome::Done);
            }
            AttachmentState::Attached => {
                attachment.state = AttachmentState::Detaching;
                attachment.detaching_ms = expires.then_some(now);
                volume.fault = None;
                volume.status = VolumeStatus::Detaching;
                volume.updated_ms = now;
            }
            AttachmentState::Attaching => {
                let message = format!(
                    "Invalid volume: Invalid input received: Volume {id} must be attached in order to detach; it is attaching."
                );
                return Err(Rejection::state("volume", id, message));
            }
        }
        Ok(Outcome::Done)
    }

    fn attached(&mut self, id: &VolumeId, generation: u64) -> Result<Outcome, Rejection> {
        let waiting = self
            .attachment_of(id, generation)
            .is_some_and(|attachment| attachment.state == AttachmentState::Attaching);
        if !waiting {
            return Ok(Outcome::Ignored);
        }
        let now = self.time_ms;
        let volume = self.volume_mut(id)?;
        volume.status = VolumeStatus::InUse;
        volume.updated_ms = now;
        for attachment in &mut volume.attachments {
            attachment.state = AttachmentState::Attached;
        }
        Ok(Outcome::Done)
    }

    /// The guest has let go. A report that comes after the detachment was given up is of the past:
    /// the host plugs the volume in again.
    fn detached(&mut self, id: &VolumeId, generation: u64) -> Result<Outcome, Rejection> {
        let attachment = self.attachment_of(id, generation);
        let given_up = |a: &Attachment| a.state != AttachmentState::Detaching;
        if attachment.is_none_or(|a| self.cluster.has(2) && given_up(a)) {
            return Ok(Outcome::Ignored);
        }
        self.free_volume(id);
        Ok(Outcome::Done)
    }

    fn detach_expired(
        &mut self,
        id: &VolumeId,
        generation: u64,
        asked_ms: u64,
    ) -> Result<Outcome, Rejection> {
        let now = self.time_ms;
        let waiting = self.attachment_of(id, generation).is_some_and(|attachment| {
            attachment.state == AttachmentState::Detaching
                && attachment.detaching_ms == Some(asked_ms)
        });
        if !waiting {
            return Ok(Outcome::Ignored);
        }
        if now.saturating_sub(asked_ms) < DETACH_MS_MAX {
            let message = format!(
                "Volume {id} has been detaching since {asked_ms}; it is given up {DETACH_MS_MAX} ms later."
            );
            return Err(Rejection::state("volume", id, message));
        }
        let volume = self.volume_mut(id)?;
        volume.status = VolumeStatus::InUse;
        volume.updated_ms = now;
        for attachment in &mut volume.attachments {
            attachment.state = AttachmentState::Attached;
            attachment.detaching_ms = None;
            volume.fault = Some(format!(
                "Detaching {} failed: the guest of instance {} did not let go of the disk within {} s. It stays attached; detach it again, or stop the instance first.",
                attachment.device,
                attachment.server_id,
                DETACH_MS_MAX / 1000
            ));
        }
        Ok(Outcome::Done)
    }

    /// Ends a volume's attachment.
    pub(in crate::state) fn free_volume(&mut self, id: &VolumeId) {
        let now = self.time_ms;
        let Ok(volume) = self.volume_mut(id) else { return };
        let servers: Vec<ServerId> =
            volume.attachments.drain(..).map(|attachment| attachment.server_id).collect();
        volume.status = VolumeStatus::Available;
        volume.fault = None;
        volume.updated_ms = now;
        for server in servers {
            forget(&mut self.volume, &server, id);
        }
    }

    /// Moves a server's attachments with it, each under a newer generation: the volume's home
    /// cuts the older writer off before it admits the newer. What was being detached is free.
    pub(in crate::state) fn move_attachments(&mut self, server: &ServerId, host: HostId) {
        let now = self.time_ms;
        let attached: Vec<(VolumeId, AttachmentState)> = self
            .attachments_of_server(server)
            .map(|(volume, attachment)| (volume.id.clone(), attachment.state))
            .collect();
        for (id, state) in attached {
            if state == AttachmentState::Detaching {
                self.free_volume(&id);
                continue;
            }
            let Ok(volume) = self.volume_mut(&id) else { continue };
            volume.generation += 1;
            volume.updated_ms = now;
            for attachment in &mut volume.attachments {
                attachment.generation = volume.generation;
                attachment.host = Some(host);
            }
        }
    }

    /// A volume whose home is gone for good: its data is lost.
    pub(in crate::state) fn strand_volume(&mut self, id: &VolumeId, fault: String) {
        let deleted = self.status_of(id) == Some(VolumeStatus::Deleting);
        self.free_volume(id);
        self.leave_home(id);
        let Ok(volume) = self.volume_mut(id) else { return };
        volume.home = None;
        volume.status = VolumeStatus::Error;
        volume.fault = Some(fault);
        if deleted {
            self.remove_volume(id);
        }
    }

    /// Frees a server's volumes, and removes those that were to go with it.
    pub(in crate::state) fn free_volumes_of(&mut self, server: &ServerId) {
        let attached: Vec<(VolumeId, bool)> = self
            .attachments_of_server(server)
            .map(|(volume, attachment)| (volume.id.clone(), attachment.delete_on_termination))
            .collect();
        for (id, goes) in attached {
            self.free_volume(&id);
            if goes && let Ok(volume) = self.volume_mut(&id) {
                volume.status = VolumeStatus::Deleting;
            }
        }
    }

    fn settle(
        &mut self,
        id: &VolumeId,
        from: VolumeStatus,
        to: VolumeStatus,
    ) -> Result<Outcome, Rejection> {
        if self.status_of(id) != Some(from) {
            return Ok(Outcome::Ignored);
        }
        let now = self.time_ms;
        let volume = self.volume_mut(id)?;
        volume.status = to;
        volume.updated_ms = now;
        Ok(Outcome::Done)
    }

    fn volume_failed(&mut self, id: &VolumeId, reason: &str) -> Result<Outcome, Rejection> {
        let outcome = self.settle(id, VolumeStatus::Creating, VolumeStatus::Error)?;
        if outcome == Outcome::Done {
            self.volume_mut(id)?.fault = Some(reason.to_owned());
        }
        Ok(outcome)
    }

    fn remove_volume(&mut self, id: &VolumeId) {
        let Some(volume) = self.volume.volumes.remove(id) else { return };
        self.quota.release(&volume.project_id, QuotaResource::Volumes, 1);
        self.quota.release(&volume.project_id, QuotaResource::Gigabytes, volume.size_gib);
        self.forget_home(volume.home, id, volume.size_gib);
    }

    fn leave_home(&mut self, id: &VolumeId) {
        let known = self.volume.volumes.get(id).map(|volume| (volume.home, volume.size_gib));
        if let Some((home, size_gib)) = known {
            self.forget_home(home, id, size_gib);
        }
    }

    fn forget_home(&mut self, home: Option<HostId>, id: &VolumeId, size_gib: u64) {
        let Some(home) = home else { return };
        let Some(homed) = self.volume.homed.get_mut(&home) else { return };
        homed.volumes.remove(id);
        homed.size_gib = homed.size_gib.saturating_sub(size_gib);
        if *homed == Homed::default() {
            self.volume.homed.remove(&home);
        }
    }
}

fn forget(volumes: &mut Volumes, server: &ServerId, volume: &VolumeId) {
    if let Some(attached) = volumes.by_server.get_mut(server) {
        attached.remove(volume);
        if attached.is_empty() {
            volumes.by_server.remove(server);
        }
    }
}

fn is_device_name(device: &str) -> bool {
    device.strip_prefix("/dev/").is_some_and(|name| {
        (1..=16).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_alphanumeric())
    })
}

fn check_attachable(volume: &Volume, server: &Server) -> Result<(), Rejection> {
    let settled = server.task_state.is_none() && server.desired != Desired::Deleted;
    if !settled || !matches!(server.vm_state, VmState::Active | VmState::Stopped) {
        let task = server.task_state.map_or("none", |task| task.as_str());
        let message = format!(
            "Cannot 'attach_volume' instance {} while it is in vm_state {}, task_state {task}",
            server.id,
            server.vm_state.as_str()
        );
        return Err(Rejection::state("server", &server.id, message));
    }
    if volume.project_id != server.project_id {
        return Err(Rejection::not_found("volume", &volume.id));
    }
    if volume.status != VolumeStatus::Available {
        let message = format!(
            "Invalid volume: volume '{}' status must be 'available'. Currently in '{}'",
            volume.id,
            volume.status.as_str()
        );
        return Err(Rejection::state("volume", &volume.id, message));
    }
    Ok(())
}

//! Volumes of guests: through the gate of their home, and into and out of a running guest.

use anyhow::{Context as _, Result};
use controller::ids::{ServerId, VolumeId};
use controller::plan::view::{AttachmentView, HostView, ServerView};
use controller::plan::{Step, observed};
use controller::state::volume::VolumeCommand;
use rustix::fd::AsFd;
use storage::control::{Attachment, Peer};
use storage::{Client, ErrorKind};
use vmm::config::{DiskConfig, DiskSource, Resource};
use vmm::control::ControlError;

use super::Agent;
use super::directory::GuestDirectory;
use super::execute::volume;
use super::world::disk_id;

/// Failed tries after which a volume is given back instead.
const PLUG_TRIES: u32 = 10;
/// A guest sees this much of a volume's id as the disk's serial number, as in Nova.
const SERIAL_CHARACTERS: usize = 20;

impl Agent {
    pub(super) async fn export_volume(&self, id: &VolumeId, view: &HostView) -> Result<()> {
        let holder = view.volumes.get(id).and_then(|volume| volume.holder.clone());
        let holder = holder.context("the volume's attachment left the view")?;
        let host = holder.host.context("the server's host left the cluster")?;
        let id = id.clone();
        self.blocking(move |agent| {
            let attachment = Attachment {
                volume_id: id.to_string(),
                server_id: holder.server.to_string(),
                generation: holder.generation,
                read_only: false,
            };
            agent.storage()?.export_volume_to(attachment, &host)?;
            let holder = Some((holder.server, holder.generation));
            let exported = observed::Volume { holder, host: Some(host) };
            agent.with_world(|world| world.volume_is(&id, Some(exported)));
            Ok(())
        })
        .await
    }

    pub(super) async fn release_volume(
        &self,
        id: &VolumeId,
        server: &ServerId,
        generation: u64,
    ) -> Result<()> {
        let (id, server) = (id.clone(), server.clone());
        self.blocking(move |agent| {
            agent.storage()?.detach_volume(id.as_str(), server.as_str(), generation)?;
            let free = observed::Volume::default();
            agent.with_world(|world| world.volume_is(&id, Some(free)));
            Ok(())
        })
        .await
    }

    pub(super) async fn plug_volume(
        &self,
        step: &Step,
        view: &ServerView,
        attachment: &AttachmentView,
    ) -> Result<()> {
        let (server, wanted) = (view.server.id.clone(), attachment.clone());
        let plugged = self.blocking(move |agent| agent.plug(&server, &wanted)).await;
        match plugged {
            Ok(()) => self.report_plugged(attachment).await,
            Err(error) if self.failures(step) >= PLUG_TRIES => {
                self.report(volume(VolumeCommand::AttachFailed {
                    volume_id: attachment.volume.clone(),
                    generation: attachment.generation,
                    reason: format!("{error:#}"),
                }))
                .await
            }
            Err(error) => Err(error),
        }
    }

    pub(super) async fn report_plugged(&self, attachment: &AttachmentView) -> Result<()> {
        let AttachmentView { volume: id, generation, .. } = attachment;
        let (volume_id, generation) = (id.clone(), *generation);
        self.report(volume(VolumeCommand::Attached { volume_id, generation })).await
    }

    fn plug(&self, server: &ServerId, wanted: &AttachmentView) -> Result<()> {
        // Where an earlier try went through and its answer was lost, a second connection to the
        // volume would cut off the one that the guest uses.
        if self.vmm(server)?.status()?.disks.contains(&disk_id(&wanted.volume)) {
            self.refresh_guest(server);
            return Ok(());
        }
        let mut storage = self.storage()?;
        let attachment = Attachment {
            volume_id: wanted.volume.to_string(),
            server_id: server.to_string(),
            generation: wanted.generation,
            read_only: false,
        };
        let (disk, source) = match &wanted.home {
            None => {
                let disk = storage.attach_volume(attachment)?;
                self.opened_here(server, wanted);
                (disk, DiskSource::Raw(Resource::Descriptor(0)))
            }
            Some(home) => {
                let home = Peer { address: home.address, server_name: home.server_name.clone() };
                let disk = storage.connect_volume(attachment, wanted.size_bytes, home)?;
                let socket = Resource::Descriptor(0);
                let (size_bytes, epoch) = (disk.size_bytes, disk.epoch);
                let source = DiskSource::Nbd { socket, size_bytes, epoch };
                (disk, source)
            }
        };
        let serial: String = wanted.volume.as_str().chars().take(SERIAL_CHARACTERS).collect();
        let config = DiskConfig::new(&disk_id(&wanted.volume), source, &serial);
        let added = self.vmm(server)?.add_disk(config, &[disk.descriptor.as_fd()]);
        added.context("the VMM did not take the disk")?;
        self.refresh_guest(server);
        Ok(())
    }

    /// Another connection for a running guest whose own was lost: its requests wait for it.
    pub(super) async fn reconnect_volume(
        &self,
        server: &ServerId,
        attachment: &AttachmentView,
    ) -> Result<()> {
        let (server, lost) = (server.clone(), attachment.clone());
        self.blocking(move |agent| {
            let home = lost.home.as_ref().context("the volume came home")?;
            let home = Peer { address: home.address, server_name: home.server_name.clone() };
            let attachment = Attachment {
                volume_id: lost.volume.to_string(),
                server_id: server.to_string(),
                generation: lost.generation,
                read_only: false,
            };
            let disk = agent.storage()?.connect_volume(attachment, lost.size_bytes, home)?;
            let (id, socket) = (disk_id(&lost.volume), disk.descriptor.as_fd());
            let replaced = agent.vmm(&server)?.replace_disk(&id, socket, disk.epoch);
            replaced.context("the VMM did not take the connection")?;
            agent.refresh_guest(&server);
            Ok(())
        })
        .await
    }

    /// Takes a disk from a guest that the state no longer gives it; its gate has cut it off.
    pub(super) async fn unplug_lost(&self, server: &ServerId, volume: &VolumeId) -> Result<()> {
        let (server, volume) = (server.clone(), volume.clone());
        self.blocking(move |agent| {
            match agent.vmm(&server)?.remove_disk(&disk_id(&volume)) {
                Err(ControlError::Refused { kind, .. }) if kind == "not_found" => {}
                removed => removed.context("the guest keeps the disk")?,
            }
            match agent.storage()?.disconnect_volume(volume.as_str(), server.as_str()) {
                Err(error) if !matches!(error.kind, ErrorKind::NotFound | ErrorKind::Stale) => {
                    return Err(error.into());
                }
                _ => {}
            }
            agent.refresh_guest(&server);
            Ok(())
        })
        .await
    }

    fn opened_here(&self, server: &ServerId, wanted: &AttachmentView) {
        let holder = Some((server.clone(), wanted.generation));
        let opened = observed::Volume { holder, host: None };
        self.with_world(|world| world.volume_is(&wanted.volume, Some(opened)));
    }

    pub(super) async fn unplug_volume(
        &self,
        view: &ServerView,
        attachment: &AttachmentView,
    ) -> Result<()> {
        let (server, leaving) = (view.server.id.clone(), attachment.clone());
        self.blocking(move |agent| {
            match agent.vmm(&server)?.remove_disk(&disk_id(&leaving.volume)) {
                Err(ControlError::Refused { kind, .. }) if kind == "not_found" => {}
                removed => removed.context("the guest keeps the disk")?,
            }
            agent.give_back(&mut agent.storage()?, &server, &leaving)?;
            agent.refresh_guest(&server);
            Ok(())
        })
        .await?;
        self.report_unplugged(attachment).await
    }

    pub(super) async fn report_unplugged(&self, attachment: &AttachmentView) -> Result<()> {
        let AttachmentView { volume: id, generation, .. } = attachment;
        let (volume_id, generation) = (id.clone(), *generation);
        self.report(volume(VolumeCommand::Detached { volume_id, generation })).await
    }

    /// Lets go of a volume on this host: its connection to another home, or its gate here.
    pub(super) fn give_back(
        &self,
        storage: &mut Client,
        server: &ServerId,
        attachment: &AttachmentView,
    ) -> Result<()> {
        let (id, generation) = (&attachment.volume, attachment.generation);
        let given = match attachment.home {
            Some(_) => storage.disconnect_volume(id.as_str(), server.as_str()),
            None => storage.detach_volume(id.as_str(), server.as_str(), generation),
        };
        match given {
            Err(error) if !matches!(error.kind, ErrorKind::NotFound | ErrorKind::Stale) => {
                return Err(error.into());
            }
            _ => {}
        }
        if attachment.home.is_none() {
            let free = observed::Volume::default();
            self.with_world(|world| world.volume_is(id, Some(free)));
        }
        Ok(())
    }

    fn vmm(&self, server: &ServerId) -> Result<vmm::control::Client> {
        let directory = GuestDirectory::of(&self.context().guests, server.as_str());
        directory.connect().context("cannot reach the guest's VMM")
    }
}

//! Performing a step. Each can be performed again at any point.

use anyhow::{Context as _, Result};
use controller::ids::{AttachmentId, PortId, ServerId, VolumeId};
use controller::plan::view::{AttachmentView, HostView, ServerView};
use controller::plan::{Step, observed};
use controller::state::Command;
use controller::state::cluster::ClusterCommand;
use controller::state::compute::{ComputeCommand, PowerState};
use controller::state::volume::VolumeCommand;
use storage::ErrorKind;
use tracing::info;

use super::directory::GuestDirectory;
use super::world::Observation;
use super::{Agent, GIVE_UP_AFTER};

impl Agent {
    pub(super) async fn execute(&self, step: &Step, view: &HostView) -> Result<()> {
        match step {
            Step::ProgramSwitch => self.program_switch().await,
            Step::CreateVolume(id) => self.create_volume(step, id, view).await,
            Step::ReportVolume(id) => self.report(volume(VolumeCommand::Created(id.clone()))).await,
            Step::DeleteVolume(id) => self.delete_volume(id, view).await,
            Step::ExportVolume(id) => self.export_volume(id, view).await,
            Step::ReleaseVolume { volume, server, generation } => {
                self.release_volume(volume, server, *generation).await
            }
            Step::DeleteImage(content) => self.delete_image(content).await,
            Step::StartGuest(id) => self.start_guest(step, server(view, id)?, view).await,
            Step::ReportStarted(id) => self.report_started(server(view, id)?).await,
            Step::StopGuest(id) => self.stop_guest(id).await,
            Step::ReportStopped(id, why) => self.report_stopped(server(view, id)?, why).await,
            Step::RemoveGuest(id) => self.remove_guest(id, view).await,
            Step::ReportGone(id) => self.report_gone(server(view, id)?).await,
            Step::AttachPort(id, port) => self.attach_port(server(view, id)?, port).await,
            Step::DetachPort(port, generation) => self.detach_port(port, *generation).await,
            Step::PlugVolume(id, attachment) => {
                let view = server(view, id)?;
                self.plug_volume(step, view, attachment_of(view, attachment)?).await
            }
            Step::ReportPlugged(id, attachment) => {
                self.report_plugged(attachment_of(server(view, id)?, attachment)?).await
            }
            Step::UnplugVolume(id, attachment) => {
                let view = server(view, id)?;
                self.unplug_volume(view, attachment_of(view, attachment)?).await
            }
            Step::ReportUnplugged(id, attachment) => {
                self.report_unplugged(attachment_of(server(view, id)?, attachment)?).await
            }
            Step::ReconnectVolume(id, attachment) => {
                self.reconnect_volume(id, attachment_of(server(view, id)?, attachment)?).await
            }
            Step::UnplugLost(id, volume) => self.unplug_lost(id, volume).await,
            Step::ReportReturned(epoch) => self.report_returned(*epoch).await,
        }
    }

    pub(super) async fn report_started(&self, view: &ServerView) -> Result<()> {
        let (id, generation) = (view.server.id.clone(), view.generation);
        self.report(compute(ComputeCommand::ServerStarted { id, generation })).await
    }

    async fn report_returned(&self, epoch: u64) -> Result<()> {
        info!(epoch, "agent: this host was fenced; it returns");
        let id = self.context().host;
        self.report(Command::Cluster(ClusterCommand::HostReturned { id, epoch })).await
    }

    async fn report_stopped(&self, view: &ServerView, why: &str) -> Result<()> {
        info!(server_id = %view.server.id, why, "agent: guest is off");
        let crashed = why.starts_with("crash") || why.starts_with("error");
        self.report(compute(ComputeCommand::ServerStopped {
            id: view.server.id.clone(),
            generation: view.generation,
            power_state: if crashed { PowerState::Crashed } else { PowerState::Shutdown },
        }))
        .await
    }

    async fn report_gone(&self, view: &ServerView) -> Result<()> {
        let (id, generation) = (view.server.id.clone(), view.generation);
        self.report(compute(ComputeCommand::ServerGone { id, generation })).await
    }

    /// Ends a guest's process and waits until it is gone; its disks stay.
    async fn stop_guest(&self, id: &ServerId) -> Result<()> {
        let id = id.clone();
        self.blocking(move |agent| agent.end_process(&id)).await
    }

    pub(super) fn end_process(&self, id: &ServerId) -> Result<()> {
        let directory = GuestDirectory::of(&self.context().guests, id.as_str());
        if let Some(mut record) = directory.record() {
            record.stopped = true;
            directory.write(&record)?;
        }
        let pidfd = self.with_world(|world| match &world.guests.get(id)?.life {
            Observation::Running(held, _) => held.try_clone().ok(),
            _ => None,
        });
        let silent = self.with_world(|world| {
            world.guests.get(id).is_some_and(|guest| matches!(guest.life, Observation::Silent))
        });
        anyhow::ensure!(!silent, "the VMM of {id} does not say which process it is");
        if let Some(process) = pidfd {
            anyhow::ensure!(process.kill(), "the VMM of {id} does not end");
        }
        self.refresh_guest(id);
        Ok(())
    }

    /// Removes all that is left of a guest, and says so when its server waits for that.
    async fn remove_guest(&self, id: &ServerId, view: &HostView) -> Result<()> {
        let (server, known) = (id.clone(), view.servers.get(id).cloned());
        self.blocking(move |agent| agent.remove_traces(&server, known.as_ref())).await?;
        match view.servers.get(id) {
            Some(server) => self.report_gone(server).await,
            None => Ok(()),
        }
    }

    fn remove_traces(&self, id: &ServerId, view: Option<&ServerView>) -> Result<()> {
        self.end_process(id)?;
        let guest = self.with_world(|world| {
            let guest = world.guests.get(id)?;
            Some((guest.record.ports.clone(), guest.record.generation))
        });
        if let Some((ports, generation)) = guest {
            let mut switch = self.switch()?;
            for port in ports.into_iter().map(PortId::from) {
                switch.detach(port.as_str(), generation)?;
                self.with_world(|world| world.detached(&port));
            }
        }
        let mut storage = self.storage()?;
        for attachment in view.map_or(&[][..], |view| &view.attachments) {
            self.give_back(&mut storage, id, attachment)?;
        }
        storage.delete_root(id.as_str())?;
        self.with_world(|world| world.root_is(id, false));
        GuestDirectory::of(&self.context().guests, id.as_str()).remove()?;
        self.with_world(|world| world.guests.remove(id));
        Ok(())
    }

    async fn delete_image(&self, content: &str) -> Result<()> {
        let content = content.to_owned();
        self.blocking(move |agent| {
            agent.storage()?.delete_image(&content)?;
            agent.with_world(|world| world.image_removed(&content));
            Ok(())
        })
        .await
    }

    async fn create_volume(&self, step: &Step, id: &VolumeId, view: &HostView) -> Result<()> {
        let wanted = view.volumes.get(id).context("the volume left the view")?;
        let (volume_id, size_bytes) = (id.clone(), wanted.size_bytes);
        let made = self.blocking(move |agent| {
            let made = agent.storage()?.create_volume(volume_id.as_str(), size_bytes);
            if made.is_ok() {
                let empty = observed::Volume::default();
                agent.with_world(|world| world.volume_is(&volume_id, Some(empty)));
            }
            Ok(made)
        });
        match made.await? {
            Ok(()) => self.report(volume(VolumeCommand::Created(id.clone()))).await,
            Err(error)
                if matches!(error.kind, ErrorKind::NoSpace | ErrorKind::Invalid)
                    || self.failing_for(step) >= GIVE_UP_AFTER =>
            {
                let reason = error.message.clone();
                self.report(volume(VolumeCommand::Failed { id: id.clone(), reason })).await
            }
            Err(error) => Err(error.into()),
        }
    }

    async fn delete_volume(&self, id: &VolumeId, view: &HostView) -> Result<()> {
        let volume_id = id.clone();
        let generation = view.volumes.get(id).map(|volume| volume.generation);
        self.blocking(move |agent| {
            match agent.storage()?.delete_volume(volume_id.as_str(), generation) {
                Err(error) if error.kind == ErrorKind::NotFound => {}
                result => result?,
            }
            agent.with_world(|world| world.volume_is(&volume_id, None));
            Ok(())
        })
        .await?;
        match view.volumes.contains_key(id) {
            true => self.report(volume(VolumeCommand::Gone(id.clone()))).await,
            false => Ok(()),
        }
    }
}

fn server<'a>(view: &'a HostView, id: &ServerId) -> Result<&'a ServerView> {
    view.servers.get(id).with_context(|| format!("server {id} left the view"))
}

fn attachment_of<'a>(view: &'a ServerView, id: &AttachmentId) -> Result<&'a AttachmentView> {
    let found = view.attachments.iter().find(|attachment| attachment.attachment == *id);
    found.with_context(|| format!("attachment {id} left the view"))
}

pub(super) fn compute(command: ComputeCommand) -> Command {
    Command::Compute(command)
}

pub(super) fn volume(command: VolumeCommand) -> Command {
    Command::Volume(command)
}

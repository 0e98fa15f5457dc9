//! Performing a step on simulated parts. Each takes its time, may fail before or after it took
//! effect, may hang, and may be cut off at any await by the end of its node.

use controller::ids::{AttachmentId, HostId, PortId, ServerId, VolumeId};
use controller::plan::view::{AttachmentView, HostView, ServerView};
use controller::plan::{Step, host_view};
use controller::state::Command;
use controller::state::cluster::ClusterCommand;
use controller::state::compute::{ComputeCommand, PowerState};
use controller::state::volume::VolumeCommand;

use super::Agent;
use crate::hardware::Hardware;
use crate::hardware::guest::{Disk, Guest};
use crate::hardware::storage::Claim;
use crate::setup::server_name;

/// Failed tries after which a server goes to ERROR, as in the node.
const START_TRIES: u32 = 3;
/// Failed tries after which a volume is given back instead, as in the node.
const PLUG_TRIES: u32 = 10;

type Done = Result<(), String>;

impl Agent {
    pub(super) async fn execute(&self, step: &Step, view: &HostView) -> Done {
        self.hesitate().await?;
        self.act(step, view).await?;
        // The act took effect and its answer is lost.
        if self.fails() { Err("no answer".into()) } else { Ok(()) }
    }

    async fn act(&self, step: &Step, view: &HostView) -> Done {
        match step {
            Step::ProgramSwitch => self.program_switch(),
            Step::CreateVolume(id) => {
                self.storage(|storage| storage.create(id))?;
                self.report(volume(VolumeCommand::Created(id.clone()))).await
            }
            Step::ReportVolume(id) => self.report(volume(VolumeCommand::Created(id.clone()))).await,
            Step::DeleteVolume(id) => self.delete_volume(id, view).await,
            Step::ExportVolume(id) => self.export(id, view),
            Step::ReleaseVolume { volume, server, generation } => {
                self.storage(|storage| storage.detach(volume, server, *generation))
            }
            Step::DeleteImage(content) => self.storage(|storage| {
                storage.images.remove(content);
                Ok(())
            }),
            Step::StartGuest(id) => self.start_guest(step, server(view, id)?).await,
            Step::ReportStarted(id) => self.report_started(server(view, id)?).await,
            Step::StopGuest(id) => self.hardware(|hardware| stop(hardware, id)),
            Step::ReportStopped(id, why) => self.report_stopped(server(view, id)?, why).await,
            Step::RemoveGuest(id) => self.remove_guest(id, view).await,
            Step::ReportGone(id) => self.report_gone(server(view, id)?).await,
            Step::AttachPort(id, port) => self.attach_port(server(view, id)?, port),
            Step::ReportReturned(epoch) => {
                let (id, epoch) = (self.host, *epoch);
                self.report(Command::Cluster(ClusterCommand::HostReturned { id, epoch })).await
            }
            Step::UnplugLost(id, volume) => self.hardware(|hardware| {
                take_out(hardware, id, volume);
                Ok(())
            }),
            Step::ReconnectVolume(id, attachment) => {
                let view = server(view, id)?;
                self.reconnect(id, attachment_of(view, attachment)?)
            }
            Step::DetachPort(port, generation) => {
                self.hardware(|hardware| hardware.switch.detach(port, *generation))
            }
            Step::PlugVolume(id, attachment) => {
                let view = server(view, id)?;
                self.plug(step, view, attachment_of(view, attachment)?).await
            }
            Step::ReportPlugged(id, attachment) => {
                self.report_plugged(attachment_of(server(view, id)?, attachment)?).await
            }
            Step::UnplugVolume(id, attachment) => {
                let view = server(view, id)?;
                self.unplug(view, attachment_of(view, attachment)?).await
            }
            Step::ReportUnplugged(id, attachment) => {
                self.report_unplugged(attachment_of(server(view, id)?, attachment)?).await
            }
        }
    }

    fn fails(&self) -> bool {
        let percent = self.world.host(self.host, |hardware| hardware.failing).unwrap_or(0);
        self.world.chance(percent)
    }

    /// A step takes a moment, and sometimes forever.
    async fn hesitate(&self) -> Done {
        let percent = self.world.host(self.host, |hardware| hardware.hanging).unwrap_or(0);
        if self.world.chance(percent) {
            self.world.pause_ms(2_000, 15_000).await;
        } else {
            self.world.pause_ms(1, 30).await;
        }
        if self.fails() { Err("refused".into()) } else { Ok(()) }
    }

    fn hardware(&self, act: impl FnOnce(&mut Hardware) -> Done) -> Done {
        self.world.host(self.host, act).unwrap_or_else(|| Err("the host is gone".into()))
    }

    fn storage(&self, act: impl FnOnce(&mut crate::hardware::storage::Storage) -> Done) -> Done {
        self.hardware(|hardware| act(&mut hardware.storage))
    }

    /// What the state says now, at least as new as what the step was planned on.
    fn program_switch(&self) -> Done {
        let view = host_view(&self.raft.view(), self.host);
        self.hardware(|hardware| hardware.switch.program(&view.switch))
    }

    async fn delete_volume(&self, id: &VolumeId, view: &HostView) -> Done {
        let generation = view.volumes.get(id).map(|volume| volume.generation);
        self.storage(|storage| storage.delete(id, generation))?;
        match view.volumes.contains_key(id) {
            true => self.report(volume(VolumeCommand::Gone(id.clone()))).await,
            false => Ok(()),
        }
    }

    fn export(&self, id: &VolumeId, view: &HostView) -> Done {
        let holder = view.volumes.get(id).and_then(|volume| volume.holder.clone());
        let holder = holder.ok_or("the volume's attachment left the view")?;
        let claim =
            Claim { volume: id.clone(), server: holder.server, generation: holder.generation };
        let host = holder.host.ok_or("the server's host left the cluster")?;
        self.storage(|storage| storage.export(&claim, &host))
    }

    async fn start_guest(&self, step: &Step, view: &ServerView) -> Done {
        let started = self.launch(view).await;
        match started {
            Ok(()) => self.report_started(view).await,
            Err(why) if self.failures(step) + 1 >= START_TRIES => {
                self.report(compute(ComputeCommand::ServerFailed {
                    id: view.server.id.clone(),
                    generation: view.generation,
                    code: 500,
                    message: format!("Build of instance {} aborted: {why}", view.server.id),
                    details: String::new(),
                }))
                .await
            }
            Err(why) => Err(why),
        }
    }

    async fn launch(&self, view: &ServerView) -> Done {
        let id = &view.server.id;
        self.program_switch()?;
        self.hold_image(view).await?;
        self.storage(|storage| {
            storage.roots.insert(id.clone());
            Ok(())
        })?;
        self.world.pause_ms(1, 40).await;
        if self.fails() {
            return Err("the guest does not start".into());
        }
        self.spawn(view)
    }

    /// Fetches the image from a host that holds it, unless it is here.
    async fn hold_image(&self, view: &ServerView) -> Done {
        let Some(image) = &view.image else { return Ok(()) };
        let here = |hardware: &mut Hardware| hardware.storage.images.contains(&image.sha512);
        if self.world.host(self.host, here) == Some(true) {
            return Ok(());
        }
        self.world.pause_ms(5, 200).await;
        let source = image.sources.iter().find(|peer| {
            self.world.with(|shared| {
                let there = shared.hosts.get(&peer.host);
                shared.connected(self.host, peer.host)
                    && there.is_some_and(|there| {
                        there.storage.up && there.storage.images.contains(&image.sha512)
                    })
            })
        });
        source.ok_or("no other host answers that holds the image")?;
        self.storage(|storage| {
            storage.images.insert(image.sha512.clone());
            Ok(())
        })
    }

    fn spawn(&self, view: &ServerView) -> Done {
        let id = view.server.id.clone();
        let (host, generation) = (self.host, view.generation);
        let ports: Vec<PortId> = view.ports.iter().map(|nic| nic.port.clone()).collect();
        let started = self.world.with(|shared| {
            shared.starts += 1;
            let nonce = shared.starts;
            let hardware = shared.hosts.get_mut(&host).ok_or("the host is gone")?;
            if hardware.runs(&id) {
                return Err(format!("the directory of {id} is locked by a living guest"));
            }
            for port in &ports {
                hardware.switch.attach(port, generation)?;
            }
            hardware.guests.insert(id.clone(), Guest::started(generation, nonce, ports));
            shared.checks.one_guest.started(&id, host, nonce, generation);
            Ok(nonce)
        });
        let nonce = started?;
        self.world.note(format_args!("host {host} runs {id} generation {generation} as {nonce}"));
        Ok(())
    }

    async fn report_started(&self, view: &ServerView) -> Done {
        let (id, generation) = (view.server.id.clone(), view.generation);
        self.report(compute(ComputeCommand::ServerStarted { id, generation })).await
    }

    async fn report_stopped(&self, view: &ServerView, why: &str) -> Done {
        let crashed = why.starts_with("crash");
        self.report(compute(ComputeCommand::ServerStopped {
            id: view.server.id.clone(),
            generation: view.generation,
            power_state: if crashed { PowerState::Crashed } else { PowerState::Shutdown },
        }))
        .await
    }

    async fn report_gone(&self, view: &ServerView) -> Done {
        let (id, generation) = (view.server.id.clone(), view.generation);
        self.report(compute(ComputeCommand::ServerGone { id, generation })).await
    }

    async fn remove_guest(&self, id: &ServerId, view: &HostView) -> Done {
        self.hardware(|hardware| stop(hardware, id))?;
        self.world.pause_ms(1, 10).await;
        let known = view.servers.get(id);
        self.hardware(|hardware| {
            let guest = hardware.guests.get(id).cloned();
            for port in guest.iter().flat_map(|guest| &guest.ports) {
                let generation = guest.as_ref().map_or(0, |guest| guest.generation);
                hardware.switch.detach(port, generation)?;
            }
            for attachment in known.map_or(&[][..], |view| &view.attachments) {
                give_back(hardware, id, attachment)?;
            }
            if !hardware.storage.up {
                return Err("storage does not answer".into());
            }
            hardware.storage.roots.remove(id);
            hardware.guests.remove(id);
            Ok(())
        })?;
        match known {
            Some(server) => self.report_gone(server).await,
            None => Ok(()),
        }
    }

    fn attach_port(&self, view: &ServerView, port: &PortId) -> Done {
        self.hardware(|hardware| {
            if !hardware.runs(&view.server.id) {
                return Err("cannot reach the guest's VMM".into());
            }
            hardware.switch.attach(port, view.generation)
        })
    }

    async fn plug(&self, step: &Step, view: &ServerView, attachment: &AttachmentView) -> Done {
        let plugged = self.plug_in(&view.server.id, attachment).await;
        match plugged {
            Ok(()) => self.report_plugged(attachment).await,
            Err(reason) if self.failures(step) >= PLUG_TRIES => {
                self.report(volume(VolumeCommand::AttachFailed {
                    volume_id: attachment.volume.clone(),
                    generation: attachment.generation,
                    reason,
                }))
                .await
            }
            Err(why) => Err(why),
        }
    }

    async fn plug_in(&self, id: &ServerId, wanted: &AttachmentView) -> Done {
        let plugged = |hardware: &mut Hardware| hardware.has_disk(id, &wanted.volume);
        if self.world.host(self.host, plugged) == Some(true) {
            return Ok(());
        }
        let claim = Claim {
            volume: wanted.volume.clone(),
            server: id.clone(),
            generation: wanted.generation,
        };
        let generation = wanted.generation;
        let disk = match &wanted.home {
            None => {
                self.storage(|storage| storage.attach(&claim))?;
                Disk::Local { generation }
            }
            Some(home) => {
                let session = self.connect(home.host, &claim)?;
                let instance = self.world.host(self.host, |hardware| hardware.storage.instance);
                let instance = instance.unwrap_or_default();
                Disk::Remote { generation, home: home.host, session, instance }
            }
        };
        self.world.pause_ms(1, 10).await;
        self.hardware(|hardware| {
            let guest = hardware.guests.get_mut(id).and_then(|guest| guest.process.as_mut());
            let guest = guest.ok_or("cannot reach the guest's VMM")?;
            guest.disks.insert(claim.volume.clone(), disk);
            Ok(())
        })
        .inspect_err(|_| {
            // The descriptor that nobody took is closed.
            self.world.host(self.host, |hardware| {
                hardware.storage.descriptor_closed(&claim.volume, &claim.server);
            });
        })
    }

    /// Gives a guest a new connection in place of one that its storage lost.
    fn reconnect(&self, id: &ServerId, wanted: &AttachmentView) -> Done {
        let Some(home) = &wanted.home else { return Ok(()) };
        let (volume, server, generation) = (wanted.volume.clone(), id.clone(), wanted.generation);
        let session = self.connect(home.host, &Claim { volume, server, generation })?;
        self.hardware(|hardware| {
            let instance = hardware.storage.instance;
            let guest = hardware.guests.get_mut(id).and_then(|guest| guest.process.as_mut());
            let guest = guest.ok_or("cannot reach the guest's VMM")?;
            let disk = Disk::Remote { generation, home: home.host, session, instance };
            guest.disks.insert(wanted.volume.clone(), disk);
            Ok(())
        })
    }

    fn connect(&self, home: HostId, claim: &Claim) -> Result<u64, String> {
        self.world.with(|shared| {
            if !shared.connected(self.host, home) {
                return Err(format!("host {home} can't be reached"));
            }
            let there = shared.hosts.get_mut(&home).ok_or("its home is gone")?;
            there.storage.connect(claim, &server_name(self.host))
        })
    }

    async fn report_plugged(&self, attachment: &AttachmentView) -> Done {
        let (volume_id, generation) = (attachment.volume.clone(), attachment.generation);
        self.report(volume(VolumeCommand::Attached { volume_id, generation })).await
    }

    async fn unplug(&self, view: &ServerView, attachment: &AttachmentView) -> Done {
        let id = &view.server.id;
        self.hardware(|hardware| {
            if !hardware.runs(id) {
                return Err("cannot reach the guest's VMM".into());
            }
            take_out(hardware, id, &attachment.volume);
            Ok(())
        })?;
        self.world.pause_ms(1, 10).await;
        self.hardware(|hardware| give_back(hardware, id, attachment))?;
        self.report_unplugged(attachment).await
    }

    async fn report_unplugged(&self, attachment: &AttachmentView) -> Done {
        let (volume_id, generation) = (attachment.volume.clone(), attachment.generation);
        self.report(volume(VolumeCommand::Detached { volume_id, generation })).await
    }
}

/// A guest lets go of a volume.
fn take_out(hardware: &mut Hardware, id: &ServerId, volume: &VolumeId) {
    if let Some(process) = hardware.guests.get_mut(id).and_then(|guest| guest.process.as_mut()) {
        process.disks.remove(volume);
    }
    hardware.storage.descriptor_closed(volume, id);
}

fn stop(hardware: &mut Hardware, id: &ServerId) -> Done {
    if let Some(guest) = hardware.guests.get_mut(id) {
        guest.stopped = true;
    }
    hardware.end_guest(id, "killed");
    Ok(())
}

/// Lets go of a volume on this host: its gate here, or the connection to its home.
fn give_back(hardware: &mut Hardware, id: &ServerId, attachment: &AttachmentView) -> Done {
    match attachment.home {
        Some(_) => Ok(()),
        None => hardware.storage.detach(&attachment.volume, id, attachment.generation),
    }
}

fn server<'a>(view: &'a HostView, id: &ServerId) -> Result<&'a ServerView, String> {
    view.servers.get(id).ok_or_else(|| format!("server {id} left the view"))
}

fn attachment_of<'a>(
    view: &'a ServerView,
    id: &AttachmentId,
) -> Result<&'a AttachmentView, String> {
    let found = view.attachments.iter().find(|attachment| attachment.attachment == *id);
    found.ok_or_else(|| format!("attachment {id} left the view"))
}

fn compute(command: ComputeCommand) -> Command {
    Command::Compute(command)
}

fn volume(command: VolumeCommand) -> Command {
    Command::Volume(command)
}

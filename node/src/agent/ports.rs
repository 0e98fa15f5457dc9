//! The switch: its program and the rings of the guests' ports.

use std::os::fd::AsFd;

use anyhow::{Context as _, Result};
use controller::ids::{PortId, ServerId};
use controller::plan::view::{HostView, ServerView, SwitchView};
use tracing::warn;

use super::Agent;
use super::directory::GuestDirectory;
use super::program::{Metadata, compile};

impl Agent {
    pub(super) async fn program_switch(&self, view: &HostView) -> Result<()> {
        let documents = self.metadata_of_ports(view);
        let wanted = view.switch.clone();
        self.blocking(move |agent| agent.put_program(&wanted, &documents)).await
    }

    /// Instance data of every server, as the metadata service shows it.
    fn metadata_of_ports(&self, view: &HostView) -> std::collections::BTreeMap<ServerId, Metadata> {
        let mut all = std::collections::BTreeMap::new();
        for (id, server) in &view.servers {
            let documents = self.instance_documents(server, view);
            let text = |body: &Vec<u8>| String::from_utf8_lossy(body).into_owned();
            let documents = documents.iter().map(|(path, body)| (path.clone(), text(body)));
            all.insert(id.clone(), documents.collect());
        }
        all
    }

    fn put_program(
        &self,
        view: &SwitchView,
        documents: &std::collections::BTreeMap<ServerId, Metadata>,
    ) -> Result<()> {
        let revision = self.with_world(|world| {
            if world.is_programmed(view) {
                return None;
            }
            world.revision += 1;
            Some(world.revision)
        });
        let Some(revision) = revision else { return Ok(()) };
        let program = compile(view, revision, |port| {
            documents.get(&port.server).cloned().unwrap_or_default()
        });
        for failure in self.switch()?.program(&program)? {
            warn!(forward = failure.id, reason = failure.message, "switch: a forward is closed");
        }
        self.with_world(|world| world.programmed(view.clone()));
        Ok(())
    }

    /// Gives the rings of a running guest to a switch that does not have them.
    pub(super) async fn attach_port(&self, view: &ServerView, port: &PortId) -> Result<()> {
        let (server, port, generation) = (view.server.id.clone(), port.clone(), view.generation);
        self.blocking(move |agent| {
            let directory = GuestDirectory::of(&agent.context().guests, server.as_str());
            let vmm = directory.connect().context("cannot reach the guest's VMM")?;
            let ring = vmm.net_ring(port.as_str())?;
            let [memory, from_guest, to_guest] = &ring;
            let ring = [memory.as_fd(), from_guest.as_fd(), to_guest.as_fd()];
            agent.switch()?.attach_descriptors(port.as_str(), generation, ring)?;
            agent.with_world(|world| world.attached(port, generation));
            Ok(())
        })
        .await
    }

    pub(super) async fn detach_port(&self, port: &PortId, generation: u64) -> Result<()> {
        let port = port.clone();
        self.blocking(move |agent| {
            agent.switch()?.detach(port.as_str(), generation)?;
            agent.with_world(|world| world.detached(&port));
            Ok(())
        })
        .await
    }
}

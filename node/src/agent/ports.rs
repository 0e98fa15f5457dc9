//! The switch: its program and the rings of the guests' ports.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::sync::PoisonError;

use anyhow::{Context as _, Result};
use controller::ids::{PortId, ServerId};
use controller::plan::host_view;
use controller::plan::view::{HostView, ServerView};
use tracing::warn;

use super::Agent;
use super::directory::GuestDirectory;
use super::program::{Metadata, compile};

impl Agent {
    /// Puts what the state says now into the switch, which is at least as new as what the step
    /// was planned on: a slower step never takes back what a faster one did.
    pub(super) async fn program_switch(&self) -> Result<()> {
        self.blocking(|agent| {
            let _one_at_a_time =
                agent.inner.programming.lock().unwrap_or_else(PoisonError::into_inner);
            let view = host_view(&agent.context().raft.view(), agent.context().host);
            agent.put_program(&view)
        })
        .await
    }

    /// Instance data of every server, as the metadata service shows it; none for those whose user
    /// data can't be opened.
    fn metadata_of_servers(&self, view: &HostView) -> BTreeMap<ServerId, Metadata> {
        let text = |body: &Vec<u8>| String::from_utf8_lossy(body).into_owned();
        let of_server = |server| -> Result<Metadata> {
            let documents = self.instance_documents(server, view)?;
            Ok(documents.iter().map(|(path, body)| (path.clone(), text(body))).collect())
        };
        let mut all = BTreeMap::new();
        for (id, server) in &view.servers {
            match of_server(server) {
                Ok(metadata) => drop(all.insert(id.clone(), metadata)),
                Err(error) => {
                    let error = format!("{error:#}");
                    warn!(server_id = %id, error, "agent: a guest gets no metadata");
                }
            }
        }
        all
    }

    fn put_program(&self, view: &HostView) -> Result<()> {
        let revision = self.with_world(|world| {
            if world.is_programmed(&view.switch) {
                return None;
            }
            world.revision += 1;
            Some(world.revision)
        });
        let Some(revision) = revision else { return Ok(()) };
        let documents = self.metadata_of_servers(view);
        let program = compile(&view.switch, revision, |port| {
            documents.get(&port.server).cloned().unwrap_or_default()
        });
        for failure in self.switch()?.program(&program)? {
            warn!(forward = failure.id, reason = failure.message, "switch: a forward is closed");
        }
        // What is incomplete is made anew at the next look.
        if documents.len() == view.servers.len() {
            self.with_world(|world| world.programmed(view.switch.clone()));
        }
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

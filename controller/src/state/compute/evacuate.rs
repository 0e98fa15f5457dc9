//! Servers whose host is out: made anew elsewhere, waiting for it, or lost with it.

use super::{Desired, Fault, Flavor, Placement, PowerState, Server, TaskState, VmState};
use crate::ids::{HostId, ServerGroupId, ServerId};
use crate::state::State;
use crate::state::cluster::Host;
use crate::state::network::PortStatus;
use crate::state::outcome::{Outcome, Rejection};

/// Where a server goes, and what moves with it.
struct Move {
    from: HostId,
    flavor: Flavor,
    group: Option<ServerGroupId>,
    /// It is to be stopped there.
    stop: bool,
}

impl State {
    /// Why a server can't be made anew on another host; `None` when it can. Whether there is room
    /// is the scheduler's question.
    pub fn evacuation_obstacle(&self, server: &Server) -> Option<Rejection> {
        let refused = |message: String| Some(Rejection::state("instance", &server.id, message));
        let Some(host) = server.host.and_then(|id| self.cluster.hosts.get(&id)) else {
            return refused(format!("Instance {} is on no host.", server.id));
        };
        if !host.is_out() {
            return refused(format!("Compute service of {} is still in use.", host.name));
        }
        if server.desired == Desired::Deleted {
            return None;
        }
        self.volume_obstacle(server).or_else(|| self.image_obstacle(server)).and_then(refused)
    }

    fn volume_obstacle(&self, server: &Server) -> Option<String> {
        self.attachments_of_server(&server.id).find_map(|(volume, _)| {
            let home = self.cluster.hosts.get(&volume.home?).filter(|home| home.is_out())?;
            Some(format!(
                "Instance {} waits for host {}: its volume {} is there and nowhere else.",
                server.id, home.name, volume.id
            ))
        })
    }

    fn image_obstacle(&self, server: &Server) -> Option<String> {
        let image = server.image_id.as_ref().and_then(|id| self.image.images.get(id));
        let Some(image) = image else {
            return Some(format!(
                "Instance {} can't be made anew: the image it was made from is gone.",
                server.id
            ));
        };
        let lives = |id: &HostId| self.cluster.hosts.get(id).is_some_and(|host| !host.is_out());
        (!image.hosts.iter().any(lives)).then(|| {
            format!(
                "Instance {} can't be made anew: no host that is in service holds image {}.",
                server.id, image.id
            )
        })
    }

    pub(super) fn evacuate_server(
        &mut self,
        id: &ServerId,
        stop: bool,
        placement: Option<&Placement>,
    ) -> Result<Outcome, Rejection> {
        let server = self.compute.servers.get(id).cloned();
        let server = server.ok_or_else(|| Rejection::not_found("instance", id))?;
        if let Some(obstacle) = self.evacuation_obstacle(&server) {
            return Err(obstacle);
        }
        if server.desired == Desired::Deleted {
            self.remove_server(id);
            return Ok(Outcome::Done);
        }
        let Some(from) = server.host else {
            return Err(Rejection::state("instance", id, "The instance is on no host."));
        };
        let (flavor, group) = (server.flavor.clone(), server.group_id.clone());
        let way = Move { from, flavor, group, stop };
        match placement {
            Some(Placement::Host(to)) => self.move_server(id, &way, *to),
            Some(Placement::NoValidHost { message, details }) => {
                self.stay(&server, message, details)
            }
            None => Err(Rejection::invalid("instance", id, "The server wasn't placed.")),
        }
    }

    fn move_server(&mut self, id: &ServerId, way: &Move, to: HostId) -> Result<Outcome, Rejection> {
        self.check_placement(to, &way.flavor, way.group.as_ref(), Some(id))?;
        self.unplace(Some(way.from), id, &way.flavor);
        self.place(Some(to), id, &way.flavor);
        let now = self.time_ms;
        let server = self.server_mut(id)?;
        server.host = Some(to);
        server.generation += 1;
        server.fault = None;
        server.power_state = PowerState::NoState;
        server.updated_ms = now;
        if way.stop && server.launched_ms.is_some() {
            server.desired = Desired::Stopped;
        }
        (server.vm_state, server.task_state) = match (server.vm_state, server.desired) {
            (VmState::Building, _) => (VmState::Building, Some(TaskState::Scheduling)),
            (VmState::Error, Desired::Active) if server.launched_ms.is_none() => {
                (VmState::Building, Some(TaskState::Scheduling))
            }
            (_, Desired::Stopped) => (VmState::Stopped, Some(TaskState::Rebuilding)),
            _ => (VmState::Active, Some(TaskState::Rebuilding)),
        };
        self.move_ports(id, Some(to), PortStatus::Build);
        self.move_attachments(id, to);
        Ok(Outcome::Server(id.clone()))
    }

    /// No host has room: what never ran has failed, everything else waits as it is.
    fn stay(
        &mut self,
        server: &Server,
        message: &str,
        details: &str,
    ) -> Result<Outcome, Rejection> {
        if server.vm_state != VmState::Building {
            return Err(Rejection::conflict("instance", &server.id, message));
        }
        let fault = Fault {
            code: 500,
            message: message.to_owned(),
            details: details.to_owned(),
            created_ms: self.time_ms,
        };
        let server = self.server_mut(&server.id)?;
        server.vm_state = VmState::Error;
        server.task_state = None;
        server.fault = Some(fault);
        Ok(Outcome::Server(server.id.clone()))
    }

    pub(super) fn server_waits(
        &mut self,
        id: &ServerId,
        generation: u64,
        message: &str,
    ) -> Result<Outcome, Rejection> {
        let now = self.time_ms;
        let host = self.compute.servers.get(id).and_then(|server| server.host);
        let out = host.and_then(|host| self.cluster.hosts.get(&host)).is_some_and(Host::is_out);
        let waits = self.compute.servers.get(id).is_some_and(|server| {
            server.generation == generation
                && server.desired != Desired::Deleted
                && server.vm_state != VmState::Error
                && server.fault.as_ref().is_none_or(|fault| fault.message != message)
        });
        if !(out && waits) {
            return Ok(Outcome::Ignored);
        }
        let server = self.server_mut(id)?;
        let message = message.to_owned();
        server.fault = Some(Fault { code: 503, message, details: String::new(), created_ms: now });
        Ok(Outcome::Server(id.clone()))
    }

    /// A server whose host is gone for good: it has none any more, and is in ERROR.
    pub(in crate::state) fn strand_server(&mut self, id: &ServerId, fault: Fault) {
        let Ok(server) = self.server_mut(id) else { return };
        let (host, flavor) = (server.host.take(), server.flavor.clone());
        server.generation += 1;
        server.vm_state = VmState::Error;
        server.task_state = None;
        server.power_state = PowerState::NoState;
        server.updated_ms = fault.created_ms;
        server.fault = Some(fault);
        self.unplace(host, id, &flavor);
        self.move_ports(id, None, PortStatus::Down);
        let attached: Vec<_> =
            self.attachments_of_server(id).map(|(volume, _)| volume.id.clone()).collect();
        for volume in attached {
            self.free_volume(&volume);
        }
    }
}

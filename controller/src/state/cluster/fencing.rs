//! Fences: a host that is cut off, so that others may act in its place, and its return.
//!
//! ```text
//! in service ──FenceHost(epoch + 1)──► fenced ──HostReturned(epoch)──► in service
//! ```
//!
//! The fence itself is the host's lease, which has run out when the leader proposes this
//! (`plan::leases`); the state only remembers it, so that every later leader knows.

use std::sync::Arc;

use crate::ids::{HostId, ServerId};
use crate::state::State;
use crate::state::compute::VmState;
use crate::state::outcome::{Outcome, Rejection};

impl State {
    pub(super) fn fence_host(&mut self, id: HostId, epoch: u64) -> Result<Outcome, Rejection> {
        let host = self.host_mut(id)?;
        let next = host.fence_epoch.saturating_add(1);
        if host.fenced == Some(epoch) {
            return Ok(Outcome::Host(Box::new(host.clone())));
        }
        if host.fenced.is_some() || epoch != next {
            let message = format!(
                "Host {} was fenced {} times; its next fence has epoch {next}, not {epoch}.",
                host.name, host.fence_epoch
            );
            return Err(Rejection::state("host", id, message));
        }
        host.fenced = Some(epoch);
        host.fence_epoch = epoch;
        Ok(Outcome::Host(Box::new(host.clone())))
    }

    pub(super) fn host_returned(&mut self, id: HostId, epoch: u64) -> Result<Outcome, Rejection> {
        let host = self.host_mut(id)?;
        if host.fenced != Some(epoch) {
            return Ok(Outcome::Ignored);
        }
        if host.forced_down {
            let message = format!(
                "An operator forced host {} down; it returns when that is lifted.",
                host.name
            );
            return Err(Rejection::state("host", id, message));
        }
        host.fenced = None;
        let host = host.clone();
        self.forget_waiting(id);
        Ok(Outcome::Host(Box::new(host)))
    }

    /// The servers of a host that is back no longer wait for it.
    fn forget_waiting(&mut self, host: HostId) {
        let Some(placed) = self.compute.placed.get(&host).cloned() else { return };
        let waits = |id: &&ServerId| {
            let server = self.compute.servers.get(*id);
            server.is_some_and(|s| s.fault.is_some() && s.vm_state != VmState::Error)
        };
        let waiting: Vec<ServerId> = placed.servers.iter().filter(waits).cloned().collect();
        for id in waiting {
            if let Some(server) = self.compute.servers.get_mut(&id) {
                Arc::make_mut(server).fault = None;
            }
        }
    }

    /// Trusts the leader's finding: what a host reports of its level is dropped by programs
    /// before level 2, so replicas that ran one may know less of it than others.
    pub(super) fn raise_feature_level(
        &mut self,
        level: u32,
        next_host_id: u64,
    ) -> Result<Outcome, Rejection> {
        if level <= self.cluster.feature_level {
            return Ok(Outcome::Ignored);
        }
        if next_host_id != self.cluster.next_host_id {
            let message = "A host joined meanwhile; whether it supports the level isn't known.";
            return Err(Rejection::state("feature level", level, message));
        }
        self.cluster.feature_level = level;
        let ids: Vec<HostId> = self.cluster.hosts.keys().copied().collect();
        for id in ids {
            let host = self.host_mut(id)?;
            host.feature_level = host.feature_level.max(level);
        }
        Ok(Outcome::Done)
    }

    /// True for a host that is fenced: nothing on it changes until it returns.
    pub(in crate::state) fn is_fenced(&self, host: Option<HostId>) -> bool {
        let host = host.and_then(|id| self.cluster.hosts.get(&id));
        host.is_some_and(|host| host.fenced.is_some())
    }
}

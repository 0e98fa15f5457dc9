//! Hosts that take another's place: one that is dead for good, or all that a restored or recovered
//! cluster left behind.

use super::{Host, NewHost};
use crate::ids::HostId;
use crate::state::State;
use crate::state::outcome::{Outcome, Rejection};

impl State {
    /// Refuses a token for the replacement of what is not there or is replaced already.
    pub(super) fn check_replaced(&self, replaces: Option<HostId>) -> Result<(), Rejection> {
        let Some(id) = replaces else { return Ok(()) };
        let host = self.cluster.hosts.get(&id).ok_or_else(|| Rejection::not_found("host", id))?;
        match host.replaced_by {
            None => Ok(()),
            Some(by) => {
                let message = format!("Host {} ({id}) was replaced by host {by}.", host.name);
                Err(Rejection::conflict("host", id, message))
            }
        }
    }

    /// The host that `new` replaces is dead from now on; its name is free for the new one.
    pub(super) fn replace_host(&mut self, old: HostId, new: &Host) {
        if let Some(old) = self.cluster.hosts.get_mut(&old) {
            if old.name == new.name {
                old.name = format!("{}-replaced-{}", old.name, old.id);
            }
            old.replaced_by = Some(new.id);
            old.evacuate = true;
            declare_dead(old, &format!("replaced by host {}", new.id));
        }
    }

    /// The state goes on in another cluster: from a backup on a new host, or on one that survived
    /// the loss of a quorum. Every other host is dead to it.
    pub(super) fn adopt(
        &mut self,
        cluster_id: &str,
        survivor: Option<HostId>,
        host: Option<&NewHost>,
    ) -> Result<Outcome, Rejection> {
        if cluster_id.is_empty() || self.cluster.id.is_empty() {
            return Err(Rejection::invalid("cluster", cluster_id, "A cluster needs an id."));
        }
        if self.cluster.id == cluster_id {
            let message = format!("The cluster has the id {cluster_id} already.");
            return Err(Rejection::conflict("cluster", cluster_id, message));
        }
        let known = |id: &HostId| self.cluster.hosts.contains_key(id);
        if let Some(unknown) = survivor.filter(|id| !known(id)) {
            return Err(Rejection::not_found("host", unknown));
        }
        if survivor.is_some() == host.is_some() {
            let rule = "A cluster is adopted either by a survivor or by a new host.";
            return Err(Rejection::invalid("cluster", cluster_id, rule));
        }
        self.cluster.id = cluster_id.to_owned();
        self.cluster.join_tokens.clear();
        let others: Vec<HostId> =
            self.cluster.hosts.keys().copied().filter(|id| Some(*id) != survivor).collect();
        for id in others {
            if let Some(host) = self.cluster.hosts.get_mut(&id) {
                declare_dead(host, "left behind when the cluster was recovered");
                if host.fenced.is_none() {
                    host.fence_epoch = host.fence_epoch.saturating_add(1);
                    host.fenced = Some(host.fence_epoch);
                }
            }
        }
        let me = match (survivor.and_then(|id| self.cluster.hosts.get(&id)), host) {
            (Some(survivor), _) => survivor.clone(),
            (None, Some(new)) => {
                let mut new = new.clone();
                if self.cluster.hosts.values().any(|known| known.name == new.name) {
                    new.name = format!("{}-{}", new.name, self.cluster.next_host_id);
                }
                self.admit(&new)
            }
            (None, None) => return Err(Rejection::not_found("host", "")),
        };
        Ok(Outcome::Host(Box::new(me)))
    }
}

fn declare_dead(host: &mut Host, reason: &str) {
    host.forced_down = true;
    host.disabled = true;
    host.disabled_reason = Some(reason.to_owned());
}

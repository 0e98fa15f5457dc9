//! Which hosts are heard from, who leads, and until when this host may change disks: the pure part
//! is [`controller::plan::leases`], and this is where a node keeps it.

use super::Node;
use abi::lease::{self, LeasePage};
use anyhow::{Context, Result};
use controller::ids::HostId;
use controller::plan::Liveness;
use controller::plan::leases::{HostLease, LEASE, LeaderLeases, Until};
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// What a lease page's name begins with; the boot's id follows.
const FILE_PREFIX: &str = "lease-";

/// Heartbeats and leases as one node knows them.
pub(crate) struct Heartbeats {
    leases: Mutex<LeaderLeases>,
    own: Mutex<Own>,
    page: Arc<LeasePage>,
}

#[derive(Default)]
struct Own {
    lease: HostLease,
    written: Option<Duration>,
}

impl Heartbeats {
    /// With this boot's lease page in the data directory; pages of earlier boots go.
    pub(super) fn open(directory: &Path) -> Result<Heartbeats> {
        let name = format!("{FILE_PREFIX}{}", hex(&crate::process::boot_id()));
        for entry in std::fs::read_dir(directory).context("cannot list the data directory")? {
            let entry = entry?;
            let found = entry.file_name();
            if found.as_encoded_bytes().starts_with(FILE_PREFIX.as_bytes()) && *found != *name {
                std::fs::remove_file(entry.path())
                    .with_context(|| format!("cannot remove {}", entry.path().display()))?;
            }
        }
        let page = Arc::new(LeasePage::open(&directory.join(name))?);
        Ok(Heartbeats { leases: Mutex::default(), own: Mutex::default(), page })
    }

    /// The page that guests' processes go by.
    pub(super) fn page(&self) -> Arc<LeasePage> {
        Arc::clone(&self.page)
    }

    /// The table of who leads.
    pub(super) fn leases(&self) -> MutexGuard<'_, LeaderLeases> {
        self.leases.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the leader answered to a heartbeat.
    pub(super) fn told(&self, up: BTreeSet<HostId>) {
        self.leases().told(up);
    }

    /// The leader answered with a lease to what was asked at `asked`.
    pub(super) fn granted(&self, asked: Duration, index: u64, lease_ms: u64) {
        let lease = Duration::from_millis(lease_ms).min(LEASE);
        self.own().lease.granted(asked, lease, index);
    }

    /// The hosts that are up, of `hosts`.
    pub(super) fn liveness(&self, hosts: impl Iterator<Item = HostId>) -> Liveness {
        self.leases().liveness(hosts, lease::now())
    }

    fn own(&self) -> MutexGuard<'_, Own> {
        self.own.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes into the page what this host may do by its own state.
    pub(super) fn renew_page(&self, node: &Node) -> Result<()> {
        let (raft, agent) = (node.raft()?, node.agent()?);
        // The index first: the state is as new or newer.
        let applied = *raft.applied().borrow();
        let state = raft.view();
        let mut own = self.own();
        let guests = agent.live_guests();
        let until = match own.lease.writes_until(node.host(), applied, &state, &guests) {
            Until::Unknown => return Ok(()),
            Until::At(until) => until,
            Until::Never => Duration::ZERO,
        };
        if own.written != Some(until) {
            self.page.renew(until)?;
            own.written = Some(until);
        }
        Ok(())
    }
}

impl Node {
    /// Brings the table up to date with who leads, and answers whether this node does.
    pub(super) fn note_leadership(&self) -> bool {
        let Ok(raft) = self.raft() else { return false };
        let status = raft.status();
        let term = (status.leader == Some(self.config.node_id)).then_some(status.term);
        self.heartbeats.leases().lead(term, lease::now());
        term.is_some()
    }

    /// A heartbeat of a host has come: who is up, and a lease where this node proves that it leads.
    pub(super) async fn hear(&self, host: HostId) -> Result<(Liveness, Option<u64>)> {
        self.note_leadership();
        let raft = self.raft()?;
        let forced_down = raft.view().cluster.hosts.get(&host).is_none_or(|h| h.forced_down);
        let leasable = self.heartbeats.leases().hear(host, forced_down, lease::now());
        let proved = match leasable {
            true => raft.lead_index().await,
            false => None,
        };
        let granted = proved.filter(|_| self.heartbeats.leases().may_grant(host));
        Ok((self.liveness()?, granted))
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_of_an_earlier_boot_goes_and_this_boots_stays() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("lease-of-another-boot"), b"old").unwrap();
        let first = Heartbeats::open(directory.path()).unwrap();
        let until = lease::now() + LEASE;
        first.page().renew(until).unwrap();
        let again = Heartbeats::open(directory.path()).unwrap();
        assert_eq!(again.page().writes_until(), until);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}

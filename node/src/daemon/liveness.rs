//! Which hosts are heard from. Volatile: heartbeats reach the leader, and what it makes of them
//! goes back with each answer, so that every node can show it.

use controller::ids::HostId;
use controller::plan::Liveness;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// How often a host is heard.
pub(crate) const HEARTBEAT_EVERY: Duration = Duration::from_secs(1);
/// A host that was silent for this long is down; a new leader waits as long before it says so.
pub(crate) const SILENT_AFTER: Duration = Duration::from_secs(3);

/// Heartbeats as one node knows them.
#[derive(Default)]
pub(crate) struct Heartbeats {
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    /// As leader: when each host was last heard.
    heard: BTreeMap<HostId, Instant>,
    /// Since when this node leads.
    leading_since: Option<Instant>,
    /// As follower: what the leader said.
    told: BTreeSet<HostId>,
}

impl Heartbeats {
    /// A host is alive.
    pub(crate) fn hear(&self, host: HostId, now: Instant) {
        self.lock().heard.insert(host, now);
    }

    /// Whether this node leads; to be told at each heartbeat.
    pub(crate) fn set_leading(&self, leading: bool, now: Instant) {
        let mut known = self.lock();
        match (leading, known.leading_since) {
            (true, None) => known.leading_since = Some(now),
            (false, Some(_)) => {
                known.leading_since = None;
                known.heard.clear();
            }
            _ => {}
        }
    }

    /// What the leader answered to a heartbeat.
    pub(crate) fn told(&self, up: BTreeSet<HostId>) {
        self.lock().told = up;
    }

    /// The hosts that are up, of `hosts`.
    pub(crate) fn liveness(&self, hosts: impl Iterator<Item = HostId>, now: Instant) -> Liveness {
        let known = self.lock();
        let up = |host: &HostId| match known.leading_since {
            Some(since) if now.duration_since(since) < SILENT_AFTER => true,
            Some(_) => {
                known.heard.get(host).is_some_and(|at| now.duration_since(*at) < SILENT_AFTER)
            }
            None => known.told.contains(host),
        };
        Liveness { up: hosts.filter(up).collect() }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: HostId = HostId(1);
    const B: HostId = HostId(2);

    fn up(heartbeats: &Heartbeats, now: Instant) -> Vec<HostId> {
        heartbeats.liveness([A, B].into_iter(), now).up.into_iter().collect()
    }

    #[test]
    fn a_new_leader_calls_no_host_down_before_a_full_period() {
        let heartbeats = Heartbeats::default();
        let start = Instant::now();
        heartbeats.set_leading(true, start);
        heartbeats.hear(A, start + Duration::from_secs(2));
        assert_eq!(up(&heartbeats, start + Duration::from_millis(2900)), [A, B]);
        assert_eq!(up(&heartbeats, start + Duration::from_millis(3100)), [A]);
        heartbeats.set_leading(true, start + Duration::from_secs(4));
        assert_eq!(up(&heartbeats, start + Duration::from_secs(6)), []);
    }

    #[test]
    fn a_follower_repeats_what_the_leader_said() {
        let heartbeats = Heartbeats::default();
        let now = Instant::now();
        assert_eq!(up(&heartbeats, now), []);
        heartbeats.told([B].into());
        assert_eq!(up(&heartbeats, now), [B]);
        heartbeats.set_leading(true, now);
        heartbeats.set_leading(false, now);
        assert_eq!(up(&heartbeats, now), [B]);
    }
}

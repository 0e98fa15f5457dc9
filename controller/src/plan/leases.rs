//! Leases: until when a host may change disks, and when others may act in its place.
//!
//! ```text
//! host                                leader
//! asked ──── heartbeat ─────────────► heard: not when it is just being fenced
//!                                     proves by ReadIndex that it still leads
//! until asked + LEASE ◄── index ───── and that it is still not fencing the host
//! ```
//!
//! The lease counts on the host once its own state has reached `index` and doesn't call it out of
//! service. The leader fences a host when it gave no lease for `LEASE + MARGIN` and has led as
//! long: an earlier leader proved its leadership after it heard the host, so before this one was
//! elected. While a fence is under way the host is marked and gets no lease; afterwards the state
//! says so, and every index that a later leader answers with includes it.
//!
//! All times are `Duration`s since any one moment on the own clock of who measures them.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::schedule::Liveness;
use crate::ids::{HostId, ServerId};
use crate::state::cluster::{ClusterCommand, Host};
use crate::state::{Command, State};

/// How often a host is heard.
pub const HEARTBEAT_EVERY: Duration = Duration::from_secs(1);
/// A host that was silent for this long is down; a new leader waits as long before it says so of
/// one that the leader before it called up.
pub const SILENT_AFTER: Duration = Duration::from_secs(3);
/// How long a host may change disks after it asked.
pub const LEASE: Duration = Duration::from_secs(8);
/// What the leader waits beyond that: clocks may run differently fast, by a fifth.
pub const MARGIN: Duration = Duration::from_secs(2);
/// Answers that a host remembers before its state has reached their index.
const GRANTS_MAX: usize = 8;

/// What one node knows of heartbeats: as leader who was heard, else what the leader said.
#[derive(Clone, Debug, Default)]
pub struct LeaderLeases {
    leading: Option<Leadership>,
    heard: BTreeMap<HostId, Duration>,
    /// Whose request was heard that may have brought a lease.
    leased: BTreeMap<HostId, Duration>,
    fencing: BTreeMap<HostId, Mark>,
    told: BTreeSet<HostId>,
}

#[derive(Clone, Copy, Debug)]
struct Leadership {
    term: u64,
    since: Duration,
}

/// A fence under way.
#[derive(Clone, Copy, Debug)]
struct Mark {
    epoch: u64,
    term: u64,
    /// Whether its proposal may still be appended.
    proposed: bool,
}

impl LeaderLeases {
    /// The term in which this node leads now, if it does; to be told often.
    pub fn lead(&mut self, term: Option<u64>, now: Duration) {
        if self.leading.map(|leading| leading.term) == term {
            return;
        }
        if let Some(before) = self.leading
            && !is_fresh(before.since, now)
        {
            self.told = self
                .heard
                .iter()
                .filter(|(_, at)| is_fresh(**at, now))
                .map(|(id, _)| *id)
                .collect();
        }
        self.leading = term.map(|term| Leadership { term, since: now });
        self.heard.clear();
        self.leased.clear();
        // A proposal that has ended is in the log before this term began, or nowhere.
        self.fencing.retain(|_, mark| mark.proposed);
    }

    /// Whether this node leads, as far as it was told.
    pub fn leads(&self) -> bool {
        self.leading.is_some()
    }

    /// A heartbeat has come. True: it may bring a lease, if the leader proves from here on that it
    /// still leads and [`Self::may_grant`] agrees afterwards.
    pub fn hear(&mut self, host: HostId, forced_down: bool, now: Duration) -> bool {
        self.heard.insert(host, now);
        let leasable = !forced_down && self.may_grant(host);
        if leasable {
            self.leased.insert(host, now);
        }
        leasable
    }

    /// Whether no fence of the host is under way.
    pub fn may_grant(&self, host: HostId) -> bool {
        self.leading.is_some() && !self.fencing.contains_key(&host)
    }

    /// Marks a host whose lease has surely run out, and answers the epoch of its fence: to be
    /// proposed now, and [`Self::fence_ended`] told of the outcome.
    pub fn fence(&mut self, host: &Host, now: Duration) -> Option<u64> {
        let leading = self.leading?;
        let old = |at: &Duration| now.saturating_sub(*at) >= LEASE + MARGIN;
        let silent = host.forced_down || self.heard.get(&host.id).is_none_or(old);
        let lapsed = self.leased.get(&host.id).is_none_or(old);
        if !(old(&leading.since) && silent && lapsed && host.fenced.is_none()) {
            return None;
        }
        let epoch = host.fence_epoch.saturating_add(1);
        let mark = self.fencing.get(&host.id);
        if mark.is_some_and(|mark| mark.proposed) {
            return None;
        }
        self.fencing.insert(host.id, Mark { epoch, term: leading.term, proposed: true });
        Some(epoch)
    }

    /// Whether this leader, in this term, marked the host for this fence: no other may append it.
    pub fn admits_fence(&self, id: HostId, epoch: u64) -> bool {
        let term = self.leading.map(|leading| leading.term);
        self.fencing.get(&id).is_some_and(|mark| mark.epoch == epoch && Some(mark.term) == term)
    }

    /// To be asked for every command before it is appended: a fence that this leader did not
    /// decide on (it was forwarded, or comes from an earlier term) becomes one that is refused.
    /// `false`: the command is as it was.
    pub fn prepare_fence(&self, command: &mut Command) -> bool {
        match command {
            Command::Cluster(ClusterCommand::FenceHost { id, epoch })
                if !self.admits_fence(*id, *epoch) =>
            {
                *epoch = 0;
                true
            }
            _ => false,
        }
    }

    #[cfg(test)]
    pub(crate) fn prepared(&self, mut command: Command) -> Command {
        self.prepare_fence(&mut command);
        command
    }

    /// The proposal has ended. While its outcome is unknown the host gets no lease of this term.
    pub fn fence_ended(&mut self, id: HostId, outcome_known: bool) {
        let term = self.leading.map(|leading| leading.term);
        let Some(mark) = self.fencing.get_mut(&id) else { return };
        mark.proposed = false;
        if outcome_known || Some(mark.term) != term {
            self.fencing.remove(&id);
        }
    }

    /// What the leader said: who is up.
    pub fn told(&mut self, up: BTreeSet<HostId>) {
        self.told = up;
    }

    /// The hosts that are up, of `hosts`.
    pub fn liveness(&self, hosts: impl Iterator<Item = HostId>, now: Duration) -> Liveness {
        let heard = |host: &HostId| self.heard.get(host).is_some_and(|at| is_fresh(*at, now));
        // Nobody is up by what nobody ever said: that is a cluster's first leader.
        let not_told_down = |host: &HostId| self.told.is_empty() || self.told.contains(host);
        let up = |host: &HostId| match self.leading {
            Some(leading) if is_fresh(leading.since, now) => heard(host) || not_told_down(host),
            Some(_) => heard(host),
            None => self.told.contains(host),
        };
        Liveness { up: hosts.filter(up).collect() }
    }
}

fn is_fresh(at: Duration, now: Duration) -> bool {
    now.saturating_sub(at) < SILENT_AFTER
}

/// A host's own lease.
#[derive(Clone, Debug, Default)]
pub struct HostLease {
    /// Index and end of each.
    grants: Vec<(u64, Duration)>,
}

/// Until when a host may change disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    /// Nothing was answered since the node's start that counts yet: what was said before stands.
    Unknown,
    /// Until then, on the host's clock.
    At(Duration),
    /// Its own state calls it out of service, or a guest still runs that was placed elsewhere.
    Never,
}

impl HostLease {
    /// The leader answered what was asked at `asked`.
    pub fn granted(&mut self, asked: Duration, lease: Duration, index: u64) {
        if self.grants.len() == GRANTS_MAX {
            self.grants.remove(0);
        }
        self.grants.push((index, asked.saturating_add(lease)));
    }

    /// Until when the host may change disks, by a state at `applied`; `guests` are those that run
    /// here or are being started. A host that has returned gets no permission before the last
    /// guest that left it has ended: its placement may have changed while its return was proposed,
    /// and its server may since have been deleted where it went.
    pub fn writes_until<'a>(
        &mut self,
        host: HostId,
        applied: u64,
        state: &State,
        guests: impl IntoIterator<Item = &'a ServerId>,
    ) -> Until {
        if state.cluster.hosts.get(&host).is_none_or(Host::is_out) {
            self.grants.clear();
            return Until::Never;
        }
        let elsewhere = |id: &ServerId| {
            let server = state.compute.servers.get(id);
            server.is_none_or(|server| server.host != Some(host))
        };
        if guests.into_iter().any(elsewhere) {
            return Until::Never;
        }
        let counts = self.grants.iter().filter(|(index, _)| *index <= applied);
        let Some(last) = counts.map(|(_, until)| *until).max() else { return Until::Unknown };
        self.grants.retain(|(index, until)| *index > applied || *until == last);
        Until::At(last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::fixture::Sample;

    const A: HostId = HostId(1);
    const B: HostId = HostId(2);

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn up(leases: &LeaderLeases, now: Duration) -> Vec<HostId> {
        leases.liveness([A, B].into_iter(), now).up.into_iter().collect()
    }

    fn leader() -> (LeaderLeases, Host) {
        let mut leases = LeaderLeases::default();
        leases.lead(Some(1), at(0));
        (leases, Sample::new().state.cluster.hosts[&B].clone())
    }

    fn fence(epoch: u64) -> Command {
        Command::Cluster(ClusterCommand::FenceHost { id: B, epoch })
    }

    #[test]
    fn a_new_leader_calls_no_host_down_before_a_full_period() {
        let mut leases = LeaderLeases::default();
        leases.lead(Some(1), at(0));
        leases.hear(A, false, at(2));
        assert_eq!(up(&leases, Duration::from_millis(2900)), [A, B]);
        assert_eq!(up(&leases, Duration::from_millis(3100)), [A]);
        leases.lead(Some(1), at(4));
        assert_eq!(up(&leases, at(6)), []);
    }

    #[test]
    fn a_host_that_was_down_does_not_come_up_because_the_leader_changed() {
        let mut leases = LeaderLeases::default();
        leases.told([A].into());
        leases.lead(Some(2), at(10));
        assert_eq!(up(&leases, at(10)), [A]);
        leases.hear(B, false, at(11));
        assert_eq!(up(&leases, at(12)), [A, B]);
        assert_eq!(up(&leases, at(13)), [B]);
        // It leads again in another term: what it knew itself stands.
        leases.lead(Some(4), at(13));
        assert_eq!(up(&leases, at(13)), [B]);
        // Two changes within a period: nobody is forgotten who had no time to be heard.
        leases.lead(None, at(14));
        assert_eq!(up(&leases, at(14)), [B]);
    }

    #[test]
    fn a_follower_repeats_what_the_leader_said() {
        let mut leases = LeaderLeases::default();
        assert_eq!(up(&leases, at(0)), []);
        leases.told([B].into());
        assert_eq!(up(&leases, at(0)), [B]);
        leases.lead(Some(1), at(1));
        leases.lead(None, at(1));
        assert_eq!(up(&leases, at(9)), [B]);
    }

    #[test]
    fn a_host_is_fenced_only_after_its_lease_and_a_whole_leadership_have_passed() {
        let (mut leases, host) = leader();
        assert_eq!(leases.fence(&host, at(9)), None);
        assert!(leases.hear(B, false, at(5)));
        assert_eq!(leases.fence(&host, at(14)), None);
        assert_eq!(leases.fence(&host, at(15)), Some(1));
        // The same leader in another term begins anew.
        let (mut leases, host) = leader();
        leases.lead(Some(3), at(9));
        assert_eq!(leases.fence(&host, at(18)), None);
        assert_eq!(leases.fence(&host, at(19)), Some(1));
    }

    #[test]
    fn a_marked_host_gets_no_lease_until_the_fence_is_refused() {
        let (mut leases, host) = leader();
        assert_eq!(leases.fence(&host, at(10)), Some(1));
        assert!(!leases.hear(B, false, at(11)) && !leases.may_grant(B));
        leases.fence_ended(B, true);
        assert!(leases.hear(B, false, at(12)) && leases.may_grant(B));
    }

    #[test]
    fn a_host_that_an_operator_forced_down_is_fenced_once_its_last_lease_has_run_out() {
        let (mut leases, mut host) = leader();
        assert!(leases.hear(B, false, at(20)));
        host.forced_down = true;
        assert!(!leases.hear(B, true, at(21)));
        assert_eq!(leases.fence(&host, at(29)), None);
        assert!(!leases.hear(B, true, at(30)));
        assert_eq!(leases.fence(&host, at(30)), Some(1));
    }

    #[test]
    fn only_the_leader_that_marked_a_host_may_append_its_fence() {
        let (mut leases, host) = leader();
        assert_eq!(leases.prepared(fence(1)), fence(0));
        leases.fence(&host, at(10));
        assert_eq!(leases.prepared(fence(1)), fence(1));
        assert_eq!(leases.prepared(fence(2)), fence(0));
        // Deposed and elected again while the proposal goes round: another may have given a lease.
        leases.lead(None, at(11));
        assert_eq!(leases.prepared(fence(1)), fence(0));
        leases.lead(Some(3), at(12));
        assert_eq!(leases.prepared(fence(1)), fence(0));
        assert!(!leases.may_grant(B), "its outcome is not known");
        leases.fence_ended(B, false);
        assert!(leases.may_grant(B));
    }

    #[test]
    fn a_fence_of_unknown_outcome_is_proposed_again_and_keeps_leases_back() {
        let (mut leases, host) = leader();
        assert_eq!(leases.fence(&host, at(10)), Some(1));
        assert_eq!(leases.fence(&host, at(11)), None, "one proposal at a time");
        leases.fence_ended(B, false);
        assert!(!leases.may_grant(B));
        assert_eq!(leases.fence(&host, at(12)), Some(1));
        leases.fence_ended(B, false);
        leases.lead(Some(2), at(13));
        assert!(leases.may_grant(B));
    }

    #[test]
    fn a_lease_counts_once_the_state_has_got_as_far_and_never_for_a_host_that_is_out() {
        let mut sample = Sample::new();
        let mut lease = HostLease::default();
        assert_eq!(lease.writes_until(B, 5, &sample.state, []), Until::Unknown);
        lease.granted(at(1), LEASE, 5);
        lease.granted(at(2), LEASE, 7);
        let elsewhere = sample.running("s1", None);
        assert_ne!(elsewhere, B);
        assert_eq!(lease.writes_until(B, 6, &sample.state, [&"s1".into()]), Until::Never);
        assert_eq!(lease.writes_until(B, 6, &sample.state, [&"deleted".into()]), Until::Never);
        assert_eq!(lease.writes_until(B, 4, &sample.state, []), Until::Unknown);
        assert_eq!(lease.writes_until(B, 6, &sample.state, []), Until::At(at(9)));
        assert_eq!(lease.writes_until(B, 7, &sample.state, []), Until::At(at(10)));
        sample.must(fence(1));
        assert_eq!(lease.writes_until(B, 8, &sample.state, []), Until::Never);
        sample.must(Command::Cluster(ClusterCommand::HostReturned { id: B, epoch: 1 }));
        assert_eq!(lease.writes_until(B, 9, &sample.state, []), Until::Unknown);
    }
}

//! What the leader sees to by itself: fences of silent hosts, evacuation, the feature level, what
//! nobody reports on any more. Level-triggered, as the agents are: what is due follows from the state alone, and is proposed until the state shows
//! it.

use std::collections::BTreeSet;
use std::time::Duration;

use super::evacuation::evacuation;
use super::leases::LeaderLeases;
use super::level::raise_feature_level;
use super::retries::Retries;
use super::upkeep::upkeep;
use crate::ids::HostId;
use crate::state::cluster::ClusterCommand;
use crate::state::image::ImageCommand;
use crate::state::volume::VolumeCommand;
use crate::state::{Command, State};

/// Proposals of the leader's own that are under way at a time.
pub const CHORES_MAX: usize = 16;

/// One command that the leader proposes by itself.
#[derive(Clone, Debug, PartialEq)]
pub struct Chore {
    /// What it is about: one at a time for each.
    pub subject: String,
    /// The command.
    pub command: Command,
}

/// How the proposal of a chore ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// It was applied.
    Applied,
    /// The state refused it.
    Refused,
    /// It may still be applied, or not.
    Unknown,
}

/// The leader's chores that are under way.
#[derive(Clone, Debug, Default)]
pub struct Leading {
    retries: Retries,
}

impl Leading {
    /// What to propose now; [`Self::ended`] must be told how each ended. `now_ms` is the time of
    /// day.
    pub fn due(
        &mut self,
        state: &State,
        leases: &mut LeaderLeases,
        now: Duration,
        now_ms: u64,
    ) -> Vec<Chore> {
        if !leases.leads() {
            return Vec::new();
        }
        let mut chores = self.fences(state, leases, now);
        let others = level(state).into_iter().chain(evacuation(state));
        let others: Vec<Chore> = others.chain(given_up(state, now_ms)).collect();
        let mut wanted: BTreeSet<String> = others.iter().map(|c| c.subject.clone()).collect();
        wanted.extend(state.cluster.hosts.keys().map(|id| fence_of(*id)));
        self.retries.keep_only(&wanted);
        for chore in others {
            if self.retries.busy() >= CHORES_MAX {
                break;
            }
            let admitted = state.cluster.admits(&chore.command).is_ok();
            if admitted && self.retries.take(&chore.subject, now) {
                chores.push(chore);
            }
        }
        chores
    }

    /// A chore's proposal has ended.
    pub fn ended(
        &mut self,
        chore: &Chore,
        leases: &mut LeaderLeases,
        ending: Ending,
        now: Duration,
    ) {
        match ending {
            Ending::Applied => self.retries.succeeded(&chore.subject),
            _ => self.retries.failed(&chore.subject, "propose", now),
        }
        if let Command::Cluster(ClusterCommand::FenceHost { id, .. }) = chore.command {
            leases.fence_ended(id, ending != Ending::Unknown);
        }
    }

    fn fences(&mut self, state: &State, leases: &mut LeaderLeases, now: Duration) -> Vec<Chore> {
        let mut fences = Vec::new();
        for host in state.cluster.hosts.values().filter(|host| host.fenced.is_none()) {
            let subject = fence_of(host.id);
            if !self.retries.is_free(&subject, now) {
                continue;
            }
            let next = ClusterCommand::FenceHost { id: host.id, epoch: 0 };
            if state.cluster.admits(&Command::Cluster(next)).is_err() {
                continue;
            }
            let Some(epoch) = leases.fence(host, now) else { continue };
            self.retries.take(&subject, now);
            let command = Command::Cluster(ClusterCommand::FenceHost { id: host.id, epoch });
            fences.push(Chore { subject, command });
        }
        fences
    }
}

fn fence_of(host: HostId) -> String {
    format!("fence of host {host}")
}

fn level(state: &State) -> Option<Chore> {
    let command = raise_feature_level(state)?;
    Some(Chore { subject: "feature level".into(), command })
}

/// Uploads and volumes that nobody reports on any more.
fn given_up(state: &State, now_ms: u64) -> impl Iterator<Item = Chore> {
    upkeep(state, now_ms).into_iter().filter_map(|command| {
        let subject = match &command {
            Command::Image(
                ImageCommand::UploadEnded { id, .. } | ImageCommand::UploadFailed(id),
            ) => {
                format!("image {id}")
            }
            Command::Volume(
                VolumeCommand::Failed { id, .. }
                | VolumeCommand::DetachExpired { volume_id: id, .. },
            ) => format!("volume {id}"),
            _ => return None,
        };
        Some(Chore { subject, command })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::compute::ComputeCommand;
    use crate::state::fixture::{Sample, new_server};

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    /// A leader that has just heard of all hosts but one.
    fn heard(but: HostId) -> LeaderLeases {
        let mut leases = LeaderLeases::default();
        leases.lead(Some(1), at(0));
        for other in (1..=3).map(HostId).filter(|id| *id != but) {
            leases.hear(other, false, at(9));
        }
        leases
    }

    fn service(id: HostId, evacuate: bool) -> Command {
        Command::Cluster(ClusterCommand::SetHostService {
            id,
            disabled: None,
            disabled_reason: None,
            forced_down: None,
            evacuate: Some(evacuate),
        })
    }

    /// What the leader does, in words, with every chore applied at once.
    fn run(sample: &mut Sample, leases: &mut LeaderLeases, now: Duration) -> Vec<String> {
        let mut leading = Leading::default();
        let mut said = Vec::new();
        for _ in 0..10 {
            let chores = leading.due(&sample.state, leases, now, 0);
            if chores.is_empty() {
                return said;
            }
            for chore in chores {
                said.push(chore.subject.clone());
                let applied = sample.apply(leases.prepared(chore.command.clone()));
                let ending = if applied.is_ok() { Ending::Applied } else { Ending::Refused };
                leading.ended(&chore, leases, ending, now);
            }
        }
        panic!("the leader never comes to rest: {said:?}");
    }

    #[test]
    fn a_silent_host_that_is_marked_so_is_evacuated() {
        let mut sample = Sample::new();
        for host in [2, 3].map(HostId) {
            sample.must(Command::Image(ImageCommand::HeldBy { id: "image".into(), host }));
        }
        let host = sample.running("s1", None);
        let mut leases = heard(host);
        sample.must(service(host, true));
        sample.liveness.up.remove(&host);
        assert_eq!(run(&mut sample, &mut leases, at(9)), Vec::<String>::new());
        let expected = [format!("fence of host {host}"), "server s1".to_owned()];
        assert_eq!(run(&mut sample, &mut leases, at(10)), expected);
        let server = sample.server("s1");
        assert_ne!(server.host, Some(host));
        assert_eq!(server.generation, 2);
    }

    #[test]
    fn a_host_that_nobody_marked_is_fenced_but_its_servers_wait_for_it() {
        let mut sample = Sample::new();
        let host = sample.running("s1", None);
        let mut leases = heard(host);
        let expected = [format!("fence of host {host}")];
        assert_eq!(run(&mut sample, &mut leases, at(10)), expected);
        assert_eq!(sample.server("s1").host, Some(host));
    }

    #[test]
    fn what_waits_between_two_states_is_freed_from_a_dead_host_though_nobody_marked_it() {
        let mut sample = Sample::new();
        for host in [2, 3].map(HostId) {
            sample.must(Command::Image(ImageCommand::HeldBy { id: "image".into(), host }));
        }
        let host = sample.running("old", None);
        sample.compute(ComputeCommand::DeleteServer("old".into()));
        sample.liveness.up = [host].into();
        sample.compute(ComputeCommand::CreateServer(Box::new(new_server("new", None))));
        assert_eq!(sample.server("new").host, Some(host));
        sample.liveness.up = (1..=3).map(HostId).filter(|id| *id != host).collect();
        let said = run(&mut sample, &mut heard(host), at(10));
        let expected = [format!("fence of host {host}"), "server new".into(), "server old".into()];
        assert_eq!(said, expected);
        assert!(!sample.state.compute.servers.contains_key("old"));
        assert_ne!(sample.server("new").host, Some(host));
    }

    #[test]
    fn a_server_without_room_elsewhere_is_tried_again_later() {
        let mut sample = Sample::new();
        let host = sample.running("s1", None);
        sample.must(service(host, true));
        for other in [2, 3].map(HostId) {
            sample.must(Command::Image(ImageCommand::HeldBy { id: "image".into(), host: other }));
        }
        sample.liveness.up.clear();
        let (mut leading, mut leases) = (Leading::default(), heard(host));
        let fence = leading.due(&sample.state, &mut leases, at(10), 0).remove(0);
        sample.must(leases.prepared(fence.command.clone()));
        leading.ended(&fence, &mut leases, Ending::Applied, at(10));
        let chore = leading.due(&sample.state, &mut leases, at(11), 0).remove(0);
        sample.refused(chore.command.clone());
        assert_eq!(leading.due(&sample.state, &mut leases, at(11), 0), [], "it is under way");
        leading.ended(&chore, &mut leases, Ending::Refused, at(11));
        assert_eq!(leading.due(&sample.state, &mut leases, at(11), 0), [], "a pause comes first");
        assert_eq!(leading.due(&sample.state, &mut leases, at(12), 0), [chore]);
    }
}

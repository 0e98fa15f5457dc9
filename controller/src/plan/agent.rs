//! What a host's agent decides, without doing it: when the state may be acted on, which steps are
//! under way, when a failed one is tried again, and what is shown of all that.
//!
//! ```text
//!          contact(true), read_ended(ok)
//!  shut ───────────────────────────────────► open: steps
//!   ▲                                          │
//!   └────────── contact(false) ────────────────┘
//! ```
//!
//! The gate opens by a linearizable read that began after the agent's start and after each time it
//! lost the leader: a log that is being replayed must not start guests that were deleted long ago.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::observed::Observed;
use super::retries::Retries;
use super::steps::{Step, plan};
use super::view::HostView;
use crate::ids::HostId;

/// Subjects whose last run is remembered.
pub const RUNS_MAX: usize = 512;
/// Longest error that is kept of a run.
const ERROR_CHARACTERS_MAX: usize = 300;

/// A linearizable read that the agent asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct Read(u64);

/// The decisions of one host's agent.
#[derive(Clone, Debug)]
pub struct AgentCore {
    host: HostId,
    gate: Gate,
    /// Counts losses of contact: a read that began before one opens nothing.
    contacts: u64,
    retries: Retries,
    began: BTreeMap<String, Duration>,
    subjects: BTreeMap<String, Run>,
    kinds: BTreeMap<&'static str, Run>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Gate {
    NoLeader,
    Shut,
    Reading,
    Open,
}

/// What became of the last step of a kind or on a subject.
#[derive(Clone, Debug)]
struct Run {
    step: &'static str,
    ended: Duration,
    took: Duration,
    error: Option<String>,
    runs: u64,
    failures: u64,
}

/// A reconciler's last run, to be shown.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunReport {
    /// The kind of step, or the subject that it works on.
    pub name: String,
    /// The last step's kind.
    pub step: String,
    /// How long ago it ended.
    pub ago_ms: u64,
    /// What it took.
    pub took_ms: f64,
    /// `done` or `failed`.
    pub result: String,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Runs since the agent's start.
    pub runs: u64,
    /// Failed ones among them.
    pub failures: u64,
    /// Until the next try, where it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_in_ms: Option<u64>,
}

/// Everything that is shown of an agent's work.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Reconcilers {
    /// Whether it acts: it has seen a current state since it last lost the leader.
    pub open: bool,
    /// Subjects that are being worked on.
    pub under_way: usize,
    /// The last run of each kind of step.
    pub kinds: Vec<RunReport>,
    /// The last run on each subject, at most [`RUNS_MAX`].
    pub subjects: Vec<RunReport>,
}

impl AgentCore {
    /// An agent that has seen nothing yet.
    pub fn new(host: HostId) -> AgentCore {
        AgentCore {
            host,
            gate: Gate::NoLeader,
            contacts: 0,
            retries: Retries::default(),
            began: BTreeMap::new(),
            subjects: BTreeMap::new(),
            kinds: BTreeMap::new(),
        }
    }

    /// Its host.
    pub fn host(&self) -> HostId {
        self.host
    }

    /// Whether a leader is known now.
    pub fn contact(&mut self, leader_known: bool) {
        match (leader_known, self.gate) {
            (true, Gate::NoLeader) => self.gate = Gate::Shut,
            (false, gate) if gate != Gate::NoLeader => {
                self.gate = Gate::NoLeader;
                self.contacts += 1;
            }
            _ => {}
        }
    }

    /// The linearizable read that is needed before anything is done, if it has to begin now.
    pub fn wants_read(&mut self) -> Option<Read> {
        if self.gate != Gate::Shut {
            return None;
        }
        self.gate = Gate::Reading;
        Some(Read(self.contacts))
    }

    /// The read has ended, and the state has got as far.
    pub fn read_ended(&mut self, read: Read, ok: bool) {
        if self.gate == Gate::Reading && read.0 == self.contacts {
            self.gate = if ok { Gate::Open } else { Gate::Shut };
        }
    }

    /// Whether the state may be acted on.
    pub fn is_open(&self) -> bool {
        self.gate == Gate::Open
    }

    /// The steps to begin now: planned, nothing under way on their subject, no retry pending.
    /// [`Self::done`] must be told how each ended.
    pub fn steps(&mut self, view: &HostView, observed: &Observed, now: Duration) -> Vec<Step> {
        if !self.is_open() {
            return Vec::new();
        }
        let planned = plan(view, observed);
        let subjects: BTreeSet<String> = planned.iter().map(Step::subject).collect();
        self.retries.keep_only(&subjects);
        planned.into_iter().filter(|step| self.take(step, now)).collect()
    }

    fn take(&mut self, step: &Step, now: Duration) -> bool {
        let subject = step.subject();
        let taken = self.retries.take(&subject, now);
        if taken {
            self.began.insert(subject, now);
        }
        taken
    }

    /// A step has ended.
    pub fn done(&mut self, step: &Step, result: Result<(), String>, now: Duration) {
        let (subject, kind) = (step.subject(), step.kind());
        let began = self.began.remove(&subject).unwrap_or(now);
        match &result {
            Ok(()) => self.retries.succeeded(&subject),
            Err(_) => self.retries.failed(&subject, kind, now),
        }
        let error = result.err().map(|error| error.chars().take(ERROR_CHARACTERS_MAX).collect());
        let run = |before: Option<&Run>, error: Option<String>| Run {
            step: kind,
            ended: now,
            took: now.saturating_sub(began),
            runs: before.map_or(0, |run| run.runs) + 1,
            failures: before.map_or(0, |run| run.failures) + u64::from(error.is_some()),
            error,
        };
        self.kinds.insert(kind, run(self.kinds.get(kind), error.clone()));
        let last = run(self.subjects.get(&subject), error);
        if self.subjects.len() >= RUNS_MAX && !self.subjects.contains_key(&subject) {
            self.forget_oldest();
        }
        self.subjects.insert(subject, last);
    }

    fn forget_oldest(&mut self) {
        let oldest = self.subjects.iter().min_by_key(|(_, run)| run.ended);
        if let Some(subject) = oldest.map(|(subject, _)| subject.clone()) {
            self.subjects.remove(&subject);
        }
    }

    /// How often steps of this kind on this subject have failed in a row.
    pub fn failures(&self, step: &Step) -> u32 {
        self.retries.failures(&step.subject(), step.kind()).0
    }

    /// For how long they have.
    pub fn failing_for(&self, step: &Step, now: Duration) -> Duration {
        let since = self.retries.failures(&step.subject(), step.kind()).1;
        since.map_or(Duration::ZERO, |since| now.saturating_sub(since))
    }

    /// Until the next retry is due.
    pub fn next_retry(&self, now: Duration) -> Option<Duration> {
        self.retries.next(now)
    }

    /// What each reconciler did last.
    pub fn reconcilers(&self, now: Duration) -> Reconcilers {
        let kinds = self.kinds.iter().map(|(kind, run)| run.report(kind, None, now));
        let subjects = self.subjects.iter().map(|(subject, run)| {
            let again = self.retries.again(subject);
            run.report(subject, again, now)
        });
        Reconcilers {
            open: self.is_open(),
            under_way: self.retries.busy(),
            kinds: kinds.collect(),
            subjects: subjects.collect(),
        }
    }
}

impl Run {
    fn report(&self, name: &str, again: Option<Duration>, now: Duration) -> RunReport {
        let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        RunReport {
            name: name.to_owned(),
            step: self.step.to_owned(),
            ago_ms: ms(now.saturating_sub(self.ended)),
            took_ms: self.took.as_secs_f64() * 1e3,
            result: if self.error.is_some() { "failed" } else { "done" }.to_owned(),
            error: self.error.clone(),
            runs: self.runs,
            failures: self.failures,
            retry_in_ms: again.map(|again| ms(again.saturating_sub(now))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::host_view;
    use crate::state::State;

    const HOST: HostId = HostId(1);

    fn at(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn open() -> AgentCore {
        let mut core = AgentCore::new(HOST);
        core.contact(true);
        let read = core.wants_read().expect("the gate is shut");
        core.read_ended(read, true);
        core
    }

    /// A host whose switch has no program: one step, for ever.
    fn steps(core: &mut AgentCore, now: Duration) -> Vec<Step> {
        core.steps(&host_view(&State::default(), HOST), &Observed::default(), now)
    }

    #[test]
    fn nothing_is_done_before_a_read_that_began_after_the_last_loss_of_contact() {
        let mut core = AgentCore::new(HOST);
        assert_eq!(core.wants_read(), None);
        core.contact(true);
        let early = core.wants_read().expect("the gate is shut");
        assert_eq!(core.wants_read(), None, "one read at a time");
        core.contact(false);
        core.contact(true);
        core.read_ended(early, true);
        assert_eq!(steps(&mut core, at(0)), []);
        let read = core.wants_read().expect("the gate is shut");
        core.read_ended(early, true);
        assert!(!core.is_open(), "the answer is to another question");
        core.read_ended(read, true);
        assert_eq!(steps(&mut core, at(0)), [Step::ProgramSwitch]);
        core.contact(false);
        assert!(!core.is_open());
    }

    #[test]
    fn a_failed_read_is_asked_for_again() {
        let mut core = AgentCore::new(HOST);
        core.contact(true);
        let read = core.wants_read().expect("the gate is shut");
        core.read_ended(read, false);
        assert!(!core.is_open() && core.wants_read().is_some());
    }

    #[test]
    fn a_step_is_not_begun_twice_and_waits_longer_after_each_failure() {
        let mut core = open();
        assert_eq!(steps(&mut core, at(0)), [Step::ProgramSwitch]);
        assert_eq!(steps(&mut core, at(0)), []);
        core.done(&Step::ProgramSwitch, Err("no switch".into()), at(10));
        assert_eq!(core.next_retry(at(10)), Some(at(20)));
        assert_eq!(steps(&mut core, at(29)), []);
        assert_eq!(steps(&mut core, at(30)), [Step::ProgramSwitch]);
        core.done(&Step::ProgramSwitch, Err("no switch".into()), at(40));
        assert_eq!(core.next_retry(at(40)), Some(at(40)));
        assert_eq!(core.failures(&Step::ProgramSwitch), 2);
        assert_eq!(core.failing_for(&Step::ProgramSwitch, at(50)), at(40));
        assert_eq!(steps(&mut core, at(80)), [Step::ProgramSwitch]);
        core.done(&Step::ProgramSwitch, Ok(()), at(90));
        assert_eq!((core.failures(&Step::ProgramSwitch), core.next_retry(at(90))), (0, None));
    }

    #[test]
    fn the_last_run_of_each_reconciler_is_shown_and_the_oldest_is_forgotten() {
        let mut core = open();
        steps(&mut core, at(0));
        core.done(&Step::ProgramSwitch, Err("no switch".into()), at(5));
        let shown = core.reconcilers(at(15));
        let run = RunReport {
            name: "ProgramSwitch".into(),
            step: "ProgramSwitch".into(),
            ago_ms: 10,
            took_ms: 5.0,
            result: "failed".into(),
            error: Some("no switch".into()),
            runs: 1,
            failures: 1,
            retry_in_ms: None,
        };
        assert_eq!(shown.kinds, std::slice::from_ref(&run));
        let on_switch = RunReport { name: "switch".into(), retry_in_ms: Some(10), ..run };
        assert_eq!(shown.subjects, [on_switch]);
        for index in 0..RUNS_MAX as u64 {
            let step = Step::CreateVolume(format!("v{index:04}").as_str().into());
            core.done(&step, Ok(()), at(20 + index));
        }
        let subjects = core.reconcilers(at(9999)).subjects;
        assert_eq!(subjects.len(), RUNS_MAX);
        assert!(!subjects.iter().any(|run| run.name == "switch"));
    }
}

//! A leader whose wall clock is wrong hands over.
//!
//! The leader's clock stamps every command, and stamps never go back: a leader that is an hour
//! ahead would end tokens early and leave the time standing still for an hour after it. So a leader
//! asks the voters for their clocks when it begins to lead and again each [`PERIOD`]; once most
//! voters say twice in a row that it is ahead, or behind, by more than [`CLOCK_OFF_MAX`], it
//! transfers its leadership to the best of them. A voter that can't be asked counts as agreeing,
//! so a minority's clocks never move a leader.

use std::{sync::Arc, time::Duration};

use futures::{StreamExt, stream::FuturesOrdered};
use openraft::async_runtime::watch::WatchReceiver;

use crate::{
    NodeId, StateMachine,
    codec::{Decoder, Encoder},
    node::Core,
    runtime::{now, sleep, unix_ms},
    transport::{Kind, client::Lane},
};

/// How far a leader's clock may be from most voters' clocks.
pub const CLOCK_OFF_MAX: Duration = Duration::from_secs(5);
/// How often a leader compares.
const PERIOD: Duration = Duration::from_secs(2);
/// A slower answer says too little about the clock.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);
/// So many comparisons in a row must say the same.
const ROUNDS: u32 = 2;

/// One voter's clock as the leader sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Reading {
    voter: NodeId,
    /// Its clock minus ours, in milliseconds.
    ahead_ms: i64,
    /// Whether the leadership could go to it.
    may_lead: bool,
}

/// The voters that agree with each other that this clock is wrong, when they are more than half of
/// all `voters`.
fn accusers(voters: usize, readings: &[Reading]) -> Option<Vec<Reading>> {
    let limit_ms = i64::try_from(CLOCK_OFF_MAX.as_millis()).unwrap_or(i64::MAX);
    let ahead = |reading: &&Reading| reading.ahead_ms > limit_ms;
    let behind = |reading: &&Reading| reading.ahead_ms < -limit_ms;
    let ahead: Vec<_> = readings.iter().filter(ahead).copied().collect();
    let behind: Vec<_> = readings.iter().filter(behind).copied().collect();
    [ahead, behind].into_iter().find(|side| side.len() * 2 > voters)
}

/// Of the accusers that could lead, the one whose clock is in the middle.
fn median(mut accusers: Vec<Reading>) -> Option<Reading> {
    accusers.retain(|reading| reading.may_lead);
    accusers.sort_unstable_by_key(|reading| (reading.ahead_ms, reading.voter));
    accusers.get(accusers.len() / 2).copied()
}

/// Compares clocks while this node leads, until it is stopped.
pub(crate) async fn watch_clocks<S: StateMachine>(core: Arc<Core<S>>) {
    let mut metrics = core.raft.metrics();
    let mut accused = 0;
    while core.stopped().is_none() {
        let leads = metrics.borrow_watched().current_leader == Some(core.config.node_id);
        if !leads {
            accused = 0;
            if metrics.changed().await.is_err() {
                return;
            }
            continue;
        }
        match core.compare_clocks().await {
            None => accused = 0,
            Some(middle) if accused + 1 < ROUNDS => {
                accused += 1;
                tracing::warn!(
                    ahead_ms = middle.ahead_ms,
                    "most voters' clocks are ahead of this leader's by this much"
                );
            }
            Some(middle) => core.hand_over_for_clock(middle).await,
        }
        sleep(PERIOD).await;
    }
}

impl<S: StateMachine> Core<S> {
    /// The middle one of the voters that say this clock is wrong, if they are most.
    async fn compare_clocks(&self) -> Option<Reading> {
        let voters: Vec<NodeId> = {
            let metrics = self.raft.metrics();
            let metrics = metrics.borrow_watched();
            metrics.membership_config.voter_ids().collect()
        };
        let others = voters.iter().filter(|voter| **voter != self.config.node_id);
        let asked: FuturesOrdered<_> = others.map(|voter| self.read_clock(*voter)).collect();
        let readings: Vec<_> = asked.collect::<Vec<_>>().await.into_iter().flatten().collect();
        accusers(voters.len(), &readings).and_then(median)
    }

    /// Asks one voter what its clock shows, and compares it with ours halfway between question and
    /// answer.
    async fn read_clock(&self, voter: NodeId) -> Option<Reading> {
        let (asked, asked_ms) = (now(), unix_ms());
        let deadline = asked + ANSWER_TIMEOUT;
        let answer =
            self.ask(voter, Lane::Forward, Kind::Clock, Vec::new(), deadline).await.ok()?;
        let mut body = Decoder(&answer);
        let (theirs_ms, may_lead) = (body.u64().ok()?, body.bool().ok()?);
        body.end().ok()?;
        let halfway_ms = u64::try_from(((now() - asked) / 2).as_millis()).unwrap_or(0);
        let ours_ms = asked_ms.saturating_add(halfway_ms);
        let ahead_ms = difference(theirs_ms, ours_ms);
        Some(Reading { voter, ahead_ms, may_lead })
    }

    /// What a voter answers.
    pub(crate) fn handle_clock(&self) -> Vec<u8> {
        let mut body = Encoder::default();
        body.u64(unix_ms());
        body.u8(u8::from(self.healing.borrow().is_none()));
        body.0
    }

    async fn hand_over_for_clock(&self, to: Reading) {
        tracing::error!(
            to = to.voter,
            ahead_ms = to.ahead_ms,
            "this leader's clock is wrong, so it hands over; correct its time service"
        );
        if let Err(error) = self.raft.trigger().transfer_leader(to.voter).await {
            tracing::warn!(%error, "can't hand over the leadership");
        }
    }
}

/// `left - right`, as far as a number goes.
fn difference(left: u64, right: u64) -> i64 {
    let size = i64::try_from(left.abs_diff(right)).unwrap_or(i64::MAX);
    if left < right { -size } else { size }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(voters: usize, ahead_ms: &[i64], expected: Option<i64>) {
        let readings: Vec<_> = (2..)
            .zip(ahead_ms)
            .map(|(voter, ahead_ms)| Reading { voter, ahead_ms: *ahead_ms, may_lead: true })
            .collect();
        let middle = accusers(voters, &readings).and_then(median);
        assert_eq!(middle.map(|reading| reading.ahead_ms), expected, "{voters} {ahead_ms:?}");
    }

    #[test]
    fn only_most_voters_on_one_side_move_a_leader() {
        check(3, &[6_000, 7_000], Some(7_000));
        check(3, &[-6_000, -7_000], Some(-6_000));
        check(3, &[5_000, 7_000], None);
        check(3, &[60_000], None);
        check(3, &[60_000, -60_000], None);
        check(5, &[9_000, 8_000, 0, 7_000], Some(8_000));
        check(5, &[9_000, 8_000, 0, 0], None);
        check(2, &[60_000], None);
        check(1, &[], None);
        assert_eq!(difference(0, u64::MAX), -i64::MAX);
    }

    #[test]
    fn the_leadership_goes_to_nobody_who_heals() {
        let reading = |voter, may_lead| Reading { voter, ahead_ms: 6_000, may_lead };
        let both = accusers(3, &[reading(2, false), reading(3, true)]).expect("two of three");
        assert_eq!(median(both).map(|reading| reading.voter), Some(3));
    }
}

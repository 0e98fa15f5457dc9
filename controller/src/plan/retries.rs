//! What is under way and what waits for another try, by subject.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// First pause after a failure; doubled with each.
const RETRY_FIRST: Duration = Duration::from_millis(20);
/// Longest pause after a failure.
const RETRY_LAST: Duration = Duration::from_secs(5);

/// One thing at a time for each subject, and a growing pause after each failure.
#[derive(Clone, Debug, Default)]
pub(super) struct Retries {
    busy: BTreeSet<String>,
    failed: BTreeMap<String, Failure>,
}

/// Failures in a row.
#[derive(Clone, Debug)]
struct Failure {
    kind: &'static str,
    count: u32,
    since: Duration,
    again: Duration,
}

impl Retries {
    /// Whether something may be begun on this subject now.
    pub(super) fn is_free(&self, subject: &str, now: Duration) -> bool {
        !self.busy.contains(subject) && self.failed.get(subject).is_none_or(|f| f.again <= now)
    }

    /// Begins something on this subject, if it may.
    pub(super) fn take(&mut self, subject: &str, now: Duration) -> bool {
        self.is_free(subject, now) && self.busy.insert(subject.to_owned())
    }

    /// How much is under way.
    pub(super) fn busy(&self) -> usize {
        self.busy.len()
    }

    /// It ended well.
    pub(super) fn succeeded(&mut self, subject: &str) {
        self.busy.remove(subject);
        self.failed.remove(subject);
    }

    /// It ended badly; another kind of work on the same subject is counted anew.
    pub(super) fn failed(&mut self, subject: &str, kind: &'static str, now: Duration) {
        self.busy.remove(subject);
        let (count, since) = match self.failed.get(subject) {
            Some(before) if before.kind == kind => (before.count, before.since),
            _ => (0, now),
        };
        let pause = RETRY_FIRST.saturating_mul(1 << count.min(10)).min(RETRY_LAST);
        let failure = Failure { kind, count: count.saturating_add(1), since, again: now + pause };
        self.failed.insert(subject.to_owned(), failure);
    }

    /// How often this kind of work failed in a row on the subject, and since when.
    pub(super) fn failures(&self, subject: &str, kind: &str) -> (u32, Option<Duration>) {
        match self.failed.get(subject).filter(|failure| failure.kind == kind) {
            Some(failure) => (failure.count, Some(failure.since)),
            None => (0, None),
        }
    }

    /// Forgets failures on subjects that nobody wants anything of any more.
    pub(super) fn keep_only(&mut self, wanted: &BTreeSet<String>) {
        self.failed.retain(|subject, _| wanted.contains(subject));
    }

    /// When this subject may be tried again, where it has failed.
    pub(super) fn again(&self, subject: &str) -> Option<Duration> {
        self.failed.get(subject).map(|failure| failure.again)
    }

    /// Until the next retry is due.
    pub(super) fn next(&self, now: Duration) -> Option<Duration> {
        let due = self.failed.values().map(|f| f.again).filter(|again| *again > now).min();
        due.map(|again| again - now)
    }
}

//! What the clients did and were told, all of it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use serde_json::{Value, json};

use super::api::Reply;
use super::objects::Book;
use crate::linearizability::{History, Operation, Outcome, Register, Slot};

/// Registers are named by what they are.
pub(super) type Registers = Register<&'static str, String>;
/// Slots are keypairs, named.
pub(super) type Slots = Slot<String>;

/// What all clients share.
pub(super) struct Journal {
    start: Instant,
    stopping: AtomicBool,
    entries: Mutex<Entries>,
}

/// What is written down.
#[derive(Default)]
pub(super) struct Entries {
    pub(super) registers: History<Registers>,
    pub(super) slots: History<Slots>,
    pub(super) book: Book,
    /// What was answered that never should be.
    pub(super) findings: Vec<String>,
    counts: BTreeMap<(&'static str, &'static str), u64>,
    refusals: BTreeMap<String, u64>,
}

impl Journal {
    pub(super) fn new() -> Journal {
        let entries = Mutex::new(Entries::default());
        Journal { start: Instant::now(), stopping: AtomicBool::new(false), entries }
    }

    /// Nanoseconds since the start.
    pub(super) fn now(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    pub(super) fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    pub(super) fn entries(&self) -> MutexGuard<'_, Entries> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An operation whose outcome is `answer`, or unknown, now.
    pub(super) fn operation<C, A>(
        &self,
        client: usize,
        call: C,
        called: u64,
        answer: Option<A>,
    ) -> Operation<C, A> {
        let outcome = match answer {
            Some(answer) => Outcome::Answered { answer, at: self.now() },
            None => Outcome::Unknown,
        };
        Operation { client, call, called, outcome }
    }

    /// Counts the end of a request of kind `what`.
    pub(super) fn count(&self, what: &'static str, reply: &Reply) {
        let mut entries = self.entries();
        let outcome = match reply {
            Reply::Answer(status, _) if *status < 300 => "done",
            Reply::Answer(status, body) => {
                let refusal = format!("{what}: {status} {}", message(body));
                *entries.refusals.entry(refusal).or_default() += 1;
                "refused"
            }
            Reply::NotSent(_) => "not sent",
            Reply::Lost(_) => "unknown",
        };
        *entries.counts.entry((what, outcome)).or_default() += 1;
    }
}

impl Entries {
    /// Requests by kind and outcome.
    pub(super) fn counts(&self) -> Value {
        let mut table = serde_json::Map::new();
        for ((what, outcome), count) in &self.counts {
            let row = table.entry(*what).or_insert_with(|| json!({}));
            row[*outcome] = json!(count);
        }
        Value::Object(table)
    }

    /// The refusals and how often each came.
    pub(super) fn refusals(&self) -> Value {
        json!(self.refusals)
    }
}

/// An error's message without the ids in it, so that like goes to like.
fn message(body: &Value) -> String {
    let inner = body.as_object().and_then(|object| object.values().next());
    let text = inner.and_then(|inner| inner["message"].as_str()).unwrap_or_default();
    let words = text
        .split(' ')
        .filter(|word| word.len() < 32 && !word.contains(|c: char| c.is_ascii_digit()));
    words.collect::<Vec<_>>().join(" ").chars().take(100).collect()
}

//! What must hold whatever happens: one checker a file.

mod acknowledged;
mod addresses;
mod agreement;
mod capacity;
mod converged;
mod hosts;
mod leaks;
mod one_guest;
mod one_writer;
mod quota;
mod reads;

use std::collections::BTreeMap;

use controller::ids::HostId;
use controller::state::State;

pub(crate) use acknowledged::Acknowledged;
pub(crate) use agreement::{Agreement, digest};
pub(crate) use converged::unsettled;
pub(crate) use leaks::leaked;
pub(crate) use one_guest::OneGuest;
pub(crate) use one_writer::{OneWriter, Write};
pub(crate) use reads::{Reads, Span};

/// The checkers of one run, and what they found.
#[derive(Default)]
pub(crate) struct Checks {
    /// Equal state at equal index.
    pub(crate) agreement: Agreement,
    /// What was acknowledged is kept.
    pub(crate) acknowledged: Acknowledged,
    /// Reads are linearizable.
    pub(crate) reads: Reads,
    /// No guest writes from two hosts.
    pub(crate) one_guest: OneGuest,
    /// One writer per volume.
    pub(crate) one_writer: OneWriter,
    /// What was found, each with the checker's name in front.
    pub(crate) found: Vec<String>,
    /// The state after each command, as the first node that applied it had it.
    states: BTreeMap<u64, State>,
}

/// Most findings that are kept: the first ones matter.
const FOUND_MAX: usize = 20;

impl Checks {
    /// Notes a violation.
    pub(crate) fn find(&mut self, checker: &str, what: impl std::fmt::Display) {
        if self.found.len() < FOUND_MAX {
            self.found.push(format!("{checker}: {what}"));
        }
    }

    /// Notes a violation, if there is one.
    pub(crate) fn check(&mut self, checker: &str, result: Result<(), String>) {
        if let Err(what) = result {
            self.find(checker, what);
        }
    }

    /// A node applied a command.
    pub(crate) fn applied(&mut self, node: u64, entry: &Applied<'_>) {
        let Applied { index, command_id, outcome, state } = *entry;
        let agreed = self.agreement.applied(node, index, command_id, outcome, state);
        self.check("agreement", agreed);
        if self.states.contains_key(&index) {
            return;
        }
        let before = self.states.range(..index).next_back().map(|(_, state)| state.clone());
        self.states.insert(index, state.clone());
        let before = before.unwrap_or_default();
        self.check("invariants", state.check_invariants());
        self.check("capacity", capacity::within(&before, state));
        self.check("quota", quota::within(&before, state));
        self.check("addresses", addresses::unique(state));
        self.check("hosts", hosts::never_reused(&before, state));
    }

    /// A node took over a snapshot.
    pub(crate) fn restored(&mut self, state: &State) {
        let known = self.states.get(&state.applied_index);
        if let Some(known) = known
            && digest(&known.snapshot()) != digest(&state.snapshot())
        {
            let index = state.applied_index;
            self.find("agreement", format!("the snapshot at {index} isn't the state at {index}"));
        }
    }

    /// The newest state that any node has applied.
    pub(crate) fn newest(&self) -> State {
        self.states.last_key_value().map(|(_, state)| state.clone()).unwrap_or_default()
    }

    /// The end: what can only be judged now. `states` are the nodes' own.
    pub(crate) fn finish(&mut self, states: &[(HostId, State)]) {
        let newest = self.newest();
        for (host, state) in states {
            if digest(&state.snapshot()) != digest(&newest.snapshot()) {
                self.find("agreement", format!("node {host} ends with another state"));
            }
        }
        let kept = self.acknowledged.kept(&self.agreement, &newest);
        self.check("acknowledged", kept);
        for finding in self.reads.findings() {
            self.find("reads", finding);
        }
    }
}

/// A command as a node applied it.
#[derive(Clone, Copy)]
pub(crate) struct Applied<'a> {
    /// Its place in the log.
    pub(crate) index: u64,
    /// Its id.
    pub(crate) command_id: [u8; 16],
    /// What it came to, in bytes.
    pub(crate) outcome: &'a [u8],
    /// The state after it.
    pub(crate) state: &'a State,
}

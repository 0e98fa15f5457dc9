//! Whether a history of concurrent calls could have come from one object that answers one call at
//! a time: the method of Wing and Gong with Lowe's memory of configurations already seen, as in
//! porcupine. Histories are checked key by key, because objects that don't touch each other are
//! linearizable together exactly when each of them is.
//!
//! Time is what the caller wrote down, in any unit, all from one clock. A call whose outcome nobody
//! knows (a time-out, a lost connection) may have taken effect at any time after it was made, or
//! never.

mod registers;

use std::collections::{BTreeMap, HashSet};
use std::fmt::{self, Debug, Display};
use std::hash::Hash;

pub use registers::{Register, RegisterAnswer, RegisterCall, Slot, SlotAnswer, SlotCall};

/// What one object does, one call at a time.
pub trait Model {
    /// Which object a call is for. Objects of different keys must not affect each other.
    type Key: Clone + Ord + Debug;
    /// What the object holds.
    type State: Clone + Eq + Hash + Debug;
    /// What is asked of it.
    type Call: Clone + Debug;
    /// What it said.
    type Answer: Clone + Debug;

    /// The object's state before the first call.
    fn initial(&self, key: &Self::Key) -> Self::State;

    /// The state after `call` on `state`; `None` where the object could not have given this answer.
    /// Without an answer the outcome is unknown, and the call takes effect here as it would.
    fn step(
        &self,
        state: &Self::State,
        call: &Self::Call,
        answer: Option<&Self::Answer>,
    ) -> Option<Self::State>;

    /// Whether a call of unknown outcome may be left out, because `others` (all operations on the
    /// same object, itself among them) are linearizable with it only where they are without it. Each one
    /// left out halves the work.
    fn needless(&self, call: &Self::Call, others: &[Operation<Self::Call, Self::Answer>]) -> bool {
        let _ = (call, others);
        false
    }
}

/// What became of a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome<A> {
    /// It was answered.
    Answered {
        /// What was answered.
        answer: A,
        /// When the caller had it.
        at: u64,
    },
    /// Nobody knows: it may have taken effect since, may yet, or never will.
    Unknown,
}

/// One call of one client.
#[derive(Clone, Debug)]
pub struct Operation<C, A> {
    /// Who called; for the report only.
    pub client: usize,
    /// What was called.
    pub call: C,
    /// When it was called.
    pub called: u64,
    /// What became of it.
    pub outcome: Outcome<A>,
}

/// Operations on one object.
type OnOne<M> = Vec<Operation<<M as Model>::Call, <M as Model>::Answer>>;

/// What clients did, as they saw it.
#[derive(Clone, Debug)]
pub struct History<M: Model> {
    operations: BTreeMap<M::Key, OnOne<M>>,
    count: usize,
}

impl<M: Model> Default for History<M> {
    fn default() -> Self {
        History { operations: BTreeMap::new(), count: 0 }
    }
}

impl<M: Model> History<M> {
    /// Adds an operation on the object `key`, in any order. A call that was certainly refused
    /// without effect is not added, unless the model knows the refusal as an answer.
    pub fn add(&mut self, key: M::Key, operation: Operation<M::Call, M::Answer>) {
        self.operations.entry(key).or_default().push(operation);
        self.count += 1;
    }

    /// Number of operations.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The operations on each object.
    pub fn by_key(&self) -> &BTreeMap<M::Key, OnOne<M>> {
        &self.operations
    }

    /// Checks each object's operations, with at most `steps_max` steps of the model for each (a
    /// million take about a second): a limit that doesn't depend on the machine.
    pub fn check(&self, model: &M, steps_max: u64) -> Vec<Finding<M::Key>> {
        let keys = self.operations.iter();
        let found = keys.filter_map(|(key, operations)| {
            let verdict = check_one(model, &model.initial(key), operations, steps_max);
            (verdict != Verdict::Linearizable).then(|| Finding { key: key.clone(), verdict })
        });
        found.collect()
    }
}

/// An object whose history is not known to be linearizable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding<K> {
    /// Which object.
    pub key: K,
    /// Never [`Verdict::Linearizable`].
    pub verdict: Verdict,
}

impl<K: Debug> Display for Finding<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.key, self.verdict)
    }
}

/// What the check of one object's operations says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// An order exists.
    Linearizable,
    /// None exists.
    Violation(String),
    /// The limit on steps was reached first.
    Undecided,
}

impl Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Verdict::Linearizable => f.write_str("linearizable"),
            Verdict::Violation(why) => write!(f, "not linearizable: {why}"),
            Verdict::Undecided => f.write_str("undecided within the limit of steps"),
        }
    }
}

/// Checks the operations on one object, which begins as `initial`.
pub fn check_one<M: Model>(
    model: &M,
    initial: &M::State,
    operations: &[Operation<M::Call, M::Answer>],
    steps_max: u64,
) -> Verdict {
    let mut search = Search::<M>::new(operations, |operation| {
        operation.outcome == End::Unknown
            && model.needless(&operations[operation.index].call, operations)
    });
    search.run(model, initial, steps_max)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    At(u64),
    Unknown,
}

/// An operation's place in time.
#[derive(Clone, Copy)]
struct Span {
    index: usize,
    called: u64,
    outcome: End,
}

/// One choice on the way to an order: the state before it, and what can come next.
struct Choice<S> {
    state: S,
    /// Positions in `spans`, the next to try last.
    candidates: Vec<usize>,
    /// The one that was taken.
    taken: Option<usize>,
}

struct Search<'a, M: Model> {
    operations: &'a [Operation<M::Call, M::Answer>],
    /// By time of the call.
    spans: Vec<Span>,
    placed: Placed,
    /// The longest order found, as positions in `spans`.
    longest: Vec<usize>,
}

impl<'a, M: Model> Search<'a, M> {
    fn new(
        operations: &'a [Operation<M::Call, M::Answer>],
        left_out: impl Fn(&Span) -> bool,
    ) -> Self {
        let spans = operations.iter().enumerate().map(|(index, operation)| {
            let outcome = match operation.outcome {
                Outcome::Answered { at, .. } => End::At(at),
                Outcome::Unknown => End::Unknown,
            };
            Span { index, called: operation.called, outcome }
        });
        let mut spans: Vec<Span> = spans.filter(|span| !left_out(span)).collect();
        spans.sort_by_key(|span| span.called);
        let placed = Placed(vec![0; spans.len().div_ceil(64)]);
        Search { operations, spans, placed, longest: Vec::new() }
    }

    fn run(&mut self, model: &M, initial: &M::State, steps_max: u64) -> Verdict {
        let mut seen: HashSet<(Placed, M::State)> = HashSet::new();
        let mut steps = 0;
        let Some(first) = self.choice(initial.clone()) else { return Verdict::Linearizable };
        let mut path = vec![first];
        while let Some(choice) = path.last_mut() {
            if let Some(taken) = choice.taken.take() {
                self.placed.remove(taken);
            }
            let Some(next) = choice.candidates.pop() else {
                path.pop();
                continue;
            };
            if steps == steps_max {
                return Verdict::Undecided;
            }
            steps += 1;
            let Some(state) = self.step(model, &choice.state, next) else { continue };
            self.placed.insert(next);
            if !seen.insert((self.placed.clone(), state.clone())) {
                self.placed.remove(next);
                continue;
            }
            choice.taken = Some(next);
            self.remember(&path);
            match self.choice(state) {
                Some(choice) => path.push(choice),
                None => return Verdict::Linearizable,
            }
        }
        Verdict::Violation(self.explain())
    }

    fn step(&self, model: &M, state: &M::State, position: usize) -> Option<M::State> {
        let operation = &self.operations[self.spans[position].index];
        let answer = match &operation.outcome {
            Outcome::Answered { answer, .. } => Some(answer),
            Outcome::Unknown => None,
        };
        model.step(state, &operation.call, answer)
    }

    /// What can come next: whatever was called before every operation that is not placed was
    /// answered. `None` where every answered operation is placed. Operations that end first are
    /// tried first and those of unknown outcome last: so most histories need no way back.
    fn choice(&self, state: M::State) -> Option<Choice<M::State>> {
        let mut limit = u64::MAX;
        let mut answered = Vec::new();
        let mut unknown = Vec::new();
        for (position, span) in self.spans.iter().enumerate() {
            // A call at the very moment of an answer counts as concurrent with it.
            if span.called > limit {
                break;
            }
            match span.outcome {
                _ if self.placed.contains(position) => {}
                End::At(at) => {
                    limit = limit.min(at);
                    answered.push((at, position));
                }
                End::Unknown => unknown.push(position),
            }
        }
        if answered.is_empty() {
            return None;
        }
        answered.sort_unstable_by(|a, b| b.cmp(a));
        unknown.extend(answered.into_iter().map(|(_, position)| position));
        unknown.retain(|position| self.spans[*position].called <= limit);
        Some(Choice { state, candidates: unknown, taken: None })
    }

    fn remember(&mut self, path: &[Choice<M::State>]) {
        if path.len() > self.longest.len() {
            self.longest = path.iter().filter_map(|choice| choice.taken).collect();
        }
    }

    /// The end of the longest order, and what could not follow it.
    fn explain(&self) -> String {
        const SHOWN: usize = 6;
        let mut text = format!(
            "at most {} of {} operations fit in an order; it ends with",
            self.longest.len(),
            self.spans.len()
        );
        for position in &self.longest[self.longest.len().saturating_sub(SHOWN)..] {
            text.push_str(&self.line(*position));
        }
        text.push_str("\n  and none of these can follow:");
        let rest = (0..self.spans.len()).filter(|position| !self.longest.contains(position));
        for position in rest.take(SHOWN) {
            text.push_str(&self.line(position));
        }
        text
    }

    fn line(&self, position: usize) -> String {
        let Operation { client, call, called, outcome } =
            &self.operations[self.spans[position].index];
        match outcome {
            Outcome::Answered { answer, at } => {
                format!("\n    [{called}, {at}] client {client}: {call:?} -> {answer:?}")
            }
            Outcome::Unknown => format!("\n    [{called}, ?] client {client}: {call:?} -> unknown"),
        }
    }
}

/// A set of positions.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Placed(Vec<u64>);

impl Placed {
    fn insert(&mut self, position: usize) {
        self.0[position / 64] |= 1 << (position % 64);
    }

    fn remove(&mut self, position: usize) {
        self.0[position / 64] &= !(1 << (position % 64));
    }

    fn contains(&self, position: usize) -> bool {
        self.0[position / 64] & (1 << (position % 64)) != 0
    }
}

#[cfg(test)]
mod tests;

//! The objects most histories are about: a register that is overwritten, and a named slot that
//! holds something or nothing.

use std::fmt::Debug;
use std::hash::Hash;
use std::marker::PhantomData;

use super::{Model, Operation, Outcome};

/// A register for each key: reads answer what was written last. Where no two writes write the same
/// value, a lost or stale read can't hide.
#[derive(Clone, Debug)]
pub struct Register<K, V> {
    initial: V,
    keys: PhantomData<K>,
}

impl<K, V> Register<K, V> {
    /// Registers that hold `initial` at first.
    pub fn new(initial: V) -> Self {
        Register { initial, keys: PhantomData }
    }
}

/// What is asked of a register.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RegisterCall<V> {
    /// What do you hold?
    Read,
    /// Hold this.
    Write(V),
}

/// What a register says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RegisterAnswer<V> {
    /// It holds this.
    Holds(V),
    /// It has taken what was written.
    Written,
}

impl<K, V> Model for Register<K, V>
where
    K: Clone + Ord + Debug,
    V: Clone + Eq + Hash + Debug,
{
    type Key = K;
    type State = V;
    type Call = RegisterCall<V>;
    type Answer = RegisterAnswer<V>;

    fn initial(&self, _: &K) -> V {
        self.initial.clone()
    }

    fn step(&self, held: &V, call: &Self::Call, answer: Option<&Self::Answer>) -> Option<V> {
        match (call, answer) {
            (RegisterCall::Read, None) => Some(held.clone()),
            (RegisterCall::Read, Some(RegisterAnswer::Holds(read))) => {
                (read == held).then(|| held.clone())
            }
            (RegisterCall::Write(value), None | Some(RegisterAnswer::Written)) => {
                Some(value.clone())
            }
            _ => None,
        }
    }

    /// Reads tell nothing without an answer, and a value that nobody read explains no read.
    fn needless(&self, call: &Self::Call, others: &[Operation<Self::Call, Self::Answer>]) -> bool {
        let RegisterCall::Write(value) = call else { return true };
        !others.iter().any(|other| {
            matches!(&other.outcome,
                Outcome::Answered { answer: RegisterAnswer::Holds(read), .. } if read == value)
        })
    }
}

/// A slot for each key, empty at first, that is taken and freed: an object with a name of which
/// there can be one.
#[derive(Clone, Debug, Default)]
pub struct Slot<K>(PhantomData<K>);

/// What is asked of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotCall {
    /// Make the object.
    Take,
    /// Remove it.
    Free,
    /// Is it there?
    Look,
}

/// What a slot says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotAnswer {
    /// The object was made or removed.
    Done,
    /// There is one already, or one was found.
    There,
    /// There is none.
    Missing,
}

impl<K: Clone + Ord + Debug> Model for Slot<K> {
    type Key = K;
    type State = bool;
    type Call = SlotCall;
    type Answer = SlotAnswer;

    fn initial(&self, _: &K) -> bool {
        false
    }

    fn step(&self, taken: &bool, call: &SlotCall, answer: Option<&SlotAnswer>) -> Option<bool> {
        let (is, then) = match call {
            SlotCall::Take if *taken => (SlotAnswer::There, true),
            SlotCall::Take => (SlotAnswer::Done, true),
            SlotCall::Free if *taken => (SlotAnswer::Done, false),
            SlotCall::Free => (SlotAnswer::Missing, false),
            SlotCall::Look if *taken => (SlotAnswer::There, true),
            SlotCall::Look => (SlotAnswer::Missing, false),
        };
        answer.is_none_or(|answer| *answer == is).then_some(then)
    }

    fn needless(&self, call: &SlotCall, _: &[Operation<SlotCall, SlotAnswer>]) -> bool {
        *call == SlotCall::Look
    }
}

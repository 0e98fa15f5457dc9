//! Reads and writes through every node are linearizable, key by key.

use tests::linearizability::{
    History, Operation, Outcome, Register, RegisterAnswer, RegisterCall, Slot, SlotAnswer, SlotCall,
};

/// Steps of the search for each key.
const STEPS_MAX: u64 = 200_000;

/// What clients asked and were told.
#[derive(Default)]
pub(crate) struct Reads {
    registers: History<Register<String, String>>,
    slots: History<Slot<String>>,
}

/// When a client called, and when it had its answer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    /// Nanoseconds of the simulation.
    pub(crate) called: u64,
    /// When it had its answer.
    pub(crate) answered: u64,
}

impl Reads {
    /// A register was read or written.
    pub(crate) fn register(
        &mut self,
        key: &str,
        client: usize,
        call: RegisterCall<String>,
        span: Span,
        answer: Option<RegisterAnswer<String>>,
    ) {
        let operation =
            Operation { client, call, called: span.called, outcome: outcome(span, answer) };
        self.registers.add(key.to_owned(), operation);
    }

    /// A slot was taken, freed or looked at.
    pub(crate) fn slot(
        &mut self,
        key: &str,
        client: usize,
        call: SlotCall,
        span: Span,
        answer: Option<SlotAnswer>,
    ) {
        let operation =
            Operation { client, call, called: span.called, outcome: outcome(span, answer) };
        self.slots.add(key.to_owned(), operation);
    }

    /// How many operations are in the history.
    pub(crate) fn len(&self) -> usize {
        self.registers.len() + self.slots.len()
    }

    /// What can't be explained by any order.
    pub(crate) fn findings(&self) -> Vec<String> {
        let registers = self.registers.check(&Register::new(String::new()), STEPS_MAX);
        let slots = self.slots.check(&Slot::default(), STEPS_MAX);
        let registers = registers.iter().map(ToString::to_string);
        registers.chain(slots.iter().map(ToString::to_string)).collect()
    }
}

fn outcome<A>(span: Span, answer: Option<A>) -> Outcome<A> {
    match answer {
        Some(answer) => Outcome::Answered { answer, at: span.answered },
        None => Outcome::Unknown,
    }
}

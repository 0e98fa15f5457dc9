use super::*;
use crate::random::Random;

type Registers = Register<u8, u64>;
type RegisterOperation = Operation<RegisterCall<u64>, RegisterAnswer<u64>>;

const STEPS: u64 = 1_000_000;

fn write(called: u64, at: u64, value: u64) -> RegisterOperation {
    let outcome = Outcome::Answered { answer: RegisterAnswer::Written, at };
    Operation { client: 0, call: RegisterCall::Write(value), called, outcome }
}

fn read(called: u64, at: u64, value: u64) -> RegisterOperation {
    let outcome = Outcome::Answered { answer: RegisterAnswer::Holds(value), at };
    Operation { client: 1, call: RegisterCall::Read, called, outcome }
}

fn lost_write(called: u64, value: u64) -> RegisterOperation {
    Operation { client: 2, call: RegisterCall::Write(value), called, outcome: Outcome::Unknown }
}

fn verdict(operations: &[RegisterOperation]) -> Verdict {
    check_one(&Registers::new(0), &0, operations, STEPS)
}

fn good(operations: &[RegisterOperation]) {
    assert_eq!(verdict(operations), Verdict::Linearizable, "{operations:?}");
}

fn bad(operations: &[RegisterOperation]) {
    assert!(matches!(verdict(operations), Verdict::Violation(_)), "{operations:?}");
}

#[test]
fn one_after_another_must_read_what_was_written_last() {
    good(&[]);
    good(&[read(0, 1, 0), write(2, 3, 5), read(4, 5, 5), write(6, 7, 6), read(8, 9, 6)]);
    bad(&[write(0, 1, 5), read(2, 3, 0)]);
    bad(&[write(0, 1, 5), write(2, 3, 6), read(4, 5, 5)]);
    bad(&[read(0, 1, 7)]);
}

#[test]
fn a_read_beside_a_write_sees_it_or_not_but_never_goes_back() {
    good(&[write(0, 10, 5), read(1, 2, 0), read(3, 4, 5)]);
    good(&[write(0, 10, 5), read(1, 2, 5), read(3, 4, 5)]);
    bad(&[write(0, 10, 5), read(1, 2, 5), read(3, 4, 0)]);
    // An answer and a call at one moment are concurrent.
    good(&[write(0, 10, 5), read(10, 11, 0)]);
    bad(&[write(0, 10, 5), read(11, 12, 0)]);
}

#[test]
fn a_lost_write_may_show_late_or_never_but_not_before_its_call() {
    good(&[lost_write(0, 5), read(1, 2, 0)]);
    good(&[lost_write(0, 5), read(1, 2, 0), read(100, 101, 5)]);
    bad(&[read(0, 1, 5), lost_write(2, 5)]);
    bad(&[lost_write(0, 5), read(1, 2, 5), read(3, 4, 0)]);
    // Once overwritten it doesn't come back.
    bad(&[lost_write(0, 5), read(1, 2, 5), write(3, 4, 6), read(5, 6, 6), read(7, 8, 5)]);
}

#[test]
fn a_violation_is_explained_by_the_operations_around_it() {
    let Verdict::Violation(why) = verdict(&[write(0, 1, 41), read(2, 3, 41), read(4, 5, 42)])
    else {
        panic!("accepted");
    };
    assert!(why.contains("at most 2 of 3"), "{why}");
    assert!(why.contains("[4, 5] client 1: Read -> Holds(42)"), "{why}");
}

#[test]
fn a_slot_is_taken_once() {
    let slot = |called, at, call, answer| Operation {
        client: 0,
        call,
        called,
        outcome: Outcome::Answered { answer, at },
    };
    let check = |operations: &[Operation<SlotCall, SlotAnswer>]| {
        check_one(&Slot::<u8>::default(), &false, operations, STEPS) == Verdict::Linearizable
    };
    use SlotAnswer::{Done, Missing, There};
    use SlotCall::{Free, Look, Take};
    assert!(check(&[slot(0, 9, Take, Done), slot(1, 8, Take, There), slot(10, 11, Look, There)]));
    assert!(!check(&[slot(0, 9, Take, Done), slot(1, 8, Take, Done)]));
    assert!(check(&[slot(0, 9, Take, Done), slot(1, 8, Free, Done), slot(2, 9, Take, Done)]));
    assert!(!check(&[slot(0, 1, Take, Done), slot(2, 3, Free, Missing)]));
}

#[test]
fn keys_are_checked_apart_and_named() {
    let mut history = History::<Registers>::default();
    history.add(1, write(0, 1, 5));
    history.add(2, read(2, 3, 0));
    history.add(3, write(0, 1, 7));
    history.add(3, read(2, 3, 0));
    let found = history.check(&Registers::new(0), STEPS);
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!(found[0].key, 3);
    assert_eq!(history.len(), 4);
}

#[test]
fn the_limit_of_steps_ends_the_search_without_a_verdict() {
    // Forty lost writes that were all read, in an order that can't be, make a large search.
    let mut operations: Vec<_> = (1..=40).map(|value| lost_write(0, value)).collect();
    operations.extend((1..=40).map(|value| read(10, 1000, value)));
    operations.push(read(2000, 2001, 99));
    assert_eq!(check_one(&Registers::new(0), &0, &operations, 1000), Verdict::Undecided);
}

#[test]
fn a_thousand_operations_of_eight_clients_take_few_steps() {
    let mut random = Random::new(7);
    let operations = simulated(&mut random, 8, 1000, 0);
    assert_eq!(check_one(&Registers::new(0), &0, &operations, 100_000), Verdict::Linearizable);
}

#[test]
fn histories_of_a_real_register_are_accepted_whatever_their_order() {
    for seed in 0..300 {
        let mut random = Random::new(seed);
        let operations = simulated(&mut random, 4, 40, 10);
        good(&operations);
    }
}

#[test]
fn agrees_with_trying_every_order() {
    let (mut accepted, mut refused) = (0, 0);
    for seed in 0..3000 {
        let mut random = Random::new(seed);
        let mut operations = simulated(&mut random, 3, 6, 15);
        // Most corruptions break the history, some do not: the slow search knows.
        for _ in 0..random.below(3) {
            let victim = random.below(6) as usize;
            if let Outcome::Answered { answer: RegisterAnswer::Holds(value), .. } =
                &mut operations[victim].outcome
            {
                *value = random.below(5);
            }
        }
        let expected = every_order(&mut Vec::new(), &operations);
        let found = verdict(&operations) == Verdict::Linearizable;
        assert_eq!(found, expected, "seed {seed}: {operations:#?}");
        *(if found { &mut accepted } else { &mut refused }) += 1;
    }
    assert!(accepted > 300 && refused > 300, "{accepted} accepted, {refused} refused");
}

/// The definition: some order of all answered and some lost operations in which nothing comes
/// before what had ended when it was called, and each read gets what was written last.
fn every_order(order: &mut Vec<usize>, operations: &[RegisterOperation]) -> bool {
    let answered = |operation: &RegisterOperation| operation.outcome != Outcome::Unknown;
    let placed_all = (0..operations.len()).all(|n| !answered(&operations[n]) || order.contains(&n));
    if placed_all && is_legal(order, operations) {
        return true;
    }
    (0..operations.len()).any(|next| {
        if order.contains(&next) {
            return false;
        }
        order.push(next);
        let found = every_order(order, operations);
        order.pop();
        found
    })
}

fn is_legal(order: &[usize], operations: &[RegisterOperation]) -> bool {
    let mut held = 0;
    for (n, &index) in order.iter().enumerate() {
        let operation = &operations[index];
        let overtaken = order[n + 1..].iter().any(|later| {
            matches!(operations[*later].outcome, Outcome::Answered { at, .. } if at < operation.called)
        });
        if overtaken {
            return false;
        }
        match (&operation.call, &operation.outcome) {
            (RegisterCall::Write(value), _) => held = *value,
            (_, Outcome::Answered { answer: RegisterAnswer::Holds(read), .. }) if *read != held => {
                return false;
            }
            _ => {}
        }
    }
    true
}

/// Clients that call a real register, which takes effect at a random moment of each call;
/// `lost_percent` of the calls lose their answer, and half of those their effect.
fn simulated(
    random: &mut Random,
    clients: u64,
    count: u64,
    lost_percent: u64,
) -> Vec<RegisterOperation> {
    let mut free_at: Vec<u64> = vec![0; clients as usize];
    // Client, call, when it is made, when it takes effect, when it is answered.
    let mut calls = Vec::new();
    for n in 0..count {
        let client = random.below(clients) as usize;
        let called = free_at[client] + random.below(20);
        let effect = called + random.below(30);
        let at = effect + random.below(30);
        free_at[client] = at + 1;
        let call =
            if random.below(2) == 0 { RegisterCall::Read } else { RegisterCall::Write(n + 1) };
        calls.push((effect, client, call, called, at));
    }
    calls.sort_by_key(|call| call.0);
    let mut held = 0;
    let mut operations = Vec::new();
    for (_, client, call, called, at) in calls {
        let lost = random.below(100) < lost_percent;
        let effective = !lost || random.below(2) == 0;
        let answer = match call {
            RegisterCall::Read => RegisterAnswer::Holds(held),
            RegisterCall::Write(value) => {
                held = if effective { value } else { held };
                RegisterAnswer::Written
            }
        };
        let outcome = if lost { Outcome::Unknown } else { Outcome::Answered { answer, at } };
        operations.push(Operation { client, call, called, outcome });
    }
    operations
}

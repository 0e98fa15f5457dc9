//! Fuzzing: what every parser of foreign bytes is put through, by tests of the crate it is in.
//!
//! A [`Target`] is a plain function that takes bytes ([`Source`]) and must neither panic nor hang
//! nor break what it asserts. [`check`] feeds it inputs that a seed decides: random ones, and
//! samples (valid inputs) with damage. The tests run some thousands; `cargo xtask fuzz` runs as
//! many as it is told to, with the variables of [`Plan`].
//!
//! To add a target: write the function in the crate's `tests/fuzz`, and a test there that checks it.
//!
//! It is a dependency of tests only, and knows nothing of what it tests.

mod inputs;
mod source;

pub use source::Source;

use inputs::Inputs;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

/// How long one input may take before it counts as a hang: far more than any needs.
const HANG: Duration = Duration::from_secs(60);
/// How often a long run says where it is.
const REPORT_EVERY: u64 = 250_000;

/// What is fuzzed.
pub struct Target<'a> {
    /// Its name, that of the test too.
    pub name: &'static str,
    /// Inputs of a short run.
    pub inputs: u64,
    /// Valid inputs, from which damaged ones are made; may be empty.
    pub samples: Vec<Vec<u8>>,
    /// Takes one input.
    pub run: &'a mut dyn FnMut(&mut Source<'_>),
}

/// Which inputs of a target are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// `TRINE_FUZZ_SEED`: decides all inputs.
    pub seed: u64,
    /// `TRINE_FUZZ_FIRST`: number of the first one.
    pub first: u64,
    /// `TRINE_FUZZ_INPUTS`: how many.
    pub inputs: u64,
}

impl Plan {
    /// What the environment says, and otherwise a short run of `inputs`.
    ///
    /// # Panics
    /// Where a variable is not a number.
    pub fn from_environment(inputs: u64) -> Plan {
        let number = |name: &str, default| match std::env::var(name) {
            Err(_) => default,
            Ok(text) => text.parse().unwrap_or_else(|_| panic!("{name}={text} is not a number")),
        };
        Plan {
            seed: number("TRINE_FUZZ_SEED", 1),
            first: number("TRINE_FUZZ_FIRST", 0),
            inputs: number("TRINE_FUZZ_INPUTS", inputs),
        }
    }
}

/// Runs a target as the environment says.
///
/// # Panics
/// Where the target does, after the command that repeats it was printed.
pub fn check(target: Target<'_>) {
    let plan = Plan::from_environment(target.inputs);
    let done = run(target, plan);
    println!("fuzz: {} inputs, seed {}", done, plan.seed);
}

/// Runs a target over the inputs of a plan; returns their number.
fn run(target: Target<'_>, plan: Plan) -> u64 {
    let inputs = Inputs::new(plan.seed, &target.samples);
    let watch = Watch::start(target.name, plan);
    for number in plan.first..plan.first + plan.inputs {
        watch.at.store(number, Ordering::Relaxed);
        let bytes = inputs.make(number);
        let body = AssertUnwindSafe(|| (target.run)(&mut Source::new(&bytes)));
        if let Err(panic) = catch_unwind(body) {
            eprintln!("fuzz: {}", replay(target.name, plan.seed, number));
            resume_unwind(panic);
        }
        let count = number - plan.first + 1;
        if count.is_multiple_of(REPORT_EVERY) {
            println!("fuzz: {}: {count} inputs", target.name);
        }
    }
    plan.inputs
}

fn replay(name: &str, seed: u64, number: u64) -> String {
    format!(
        "input {number} fails; to see it again: cargo xtask fuzz {name} --seed {seed} --first {number} --inputs 1"
    )
}

/// Ends the process where one input takes for ever, and says which.
struct Watch {
    at: Arc<AtomicU64>,
    over: Arc<(Mutex<bool>, Condvar)>,
}

impl Watch {
    fn start(name: &'static str, plan: Plan) -> Watch {
        let at = Arc::new(AtomicU64::new(plan.first));
        let over = Arc::new((Mutex::new(false), Condvar::new()));
        let (seen, end) = (Arc::clone(&at), Arc::clone(&over));
        std::thread::spawn(move || {
            let (lock, changed) = &*end;
            let mut is_over = lock.lock().unwrap_or_else(PoisonError::into_inner);
            while !*is_over {
                let before = seen.load(Ordering::Relaxed);
                let waited = changed.wait_timeout(is_over, HANG);
                let (guard, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
                is_over = guard;
                let same = seen.load(Ordering::Relaxed) == before;
                if !*is_over && timeout.timed_out() && same {
                    eprintln!("fuzz: a hang: {}", replay(name, plan.seed, before));
                    std::process::abort();
                }
            }
        });
        Watch { at, over }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        *self.over.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.over.1.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_planted_defect_is_found_and_its_number_repeats_it() {
        let samples = vec![b"trine-sample-of-a-format".to_vec()];
        let plan = Plan { seed: 7, first: 0, inputs: 20_000 };
        // One byte of a sample is changed to one value: what a random input never has.
        let defect = |source: &mut Source<'_>| {
            let bytes = source.rest();
            assert!(!(bytes.starts_with(b"trine-") && bytes.get(6) == Some(&0xFF)), "planted");
        };
        let find = |plan: Plan| {
            let found = std::cell::Cell::new(0);
            let mut counted = |source: &mut Source<'_>| {
                defect(source);
                found.set(found.get() + 1);
            };
            let target =
                Target { name: "planted", inputs: 1, samples: samples.clone(), run: &mut counted };
            let failed = catch_unwind(AssertUnwindSafe(|| run(target, plan))).is_err();
            (failed, found.get())
        };
        let (failed, before) = find(plan);
        assert!(failed, "20000 inputs found nothing");
        assert_eq!(find(Plan { first: before, inputs: 1, ..plan }), (true, 0));
    }
}

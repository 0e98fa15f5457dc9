//! The simulator: the product's own consensus, state machine, scheduler, planners and agents on
//! simulated machines, under faults that a seed decides. `cargo xtask sim` starts it.
//!
//! What it is: [`run::run`] takes a seed and answers what the checkers found. Consensus is openraft
//! with this project's log, recovery and encodings, on virtual time, disks and links (`raft::sim`);
//! the state machine, `prepare`, `host_view` and the plan of steps are the product's; storage gate,
//! switch and guests (`hardware`) are simulated, with the rules of the real ones.
//!
//! What it must never do: look at the real clock, draw a number that the seed didn't decide, iterate
//! over a hash map, start a thread inside a run.
//!
//! Where to start reading: `run.rs`, then `faults.rs` and `clients.rs`, then the checkers, one a file
//! in `checks`. A failure names its seed; `--seed N --trace` shows everything that happened.
#![forbid(unsafe_code)]

mod agent;
mod checks;
mod clients;
mod cluster;
mod consensus;
mod faults;
mod guests;
mod hardware;
mod heartbeat;
mod host;
mod leader;
mod machine;
mod options;
mod replacement;
mod run;
mod runtime;
mod setup;
mod trace;
mod workload;
mod world;

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use options::Options;
use run::{Report, run};

fn main() -> ExitCode {
    run::note_panics();
    let options = match Options::parse(std::env::args().skip(1)) {
        Ok(options) => options,
        Err(why) => {
            eprintln!("{why}");
            return ExitCode::from(2);
        }
    };
    let started = Instant::now();
    let next = AtomicU64::new(options.seed);
    let failed = AtomicBool::new(false);
    let done = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..options.jobs {
            scope.spawn(|| {
                while !failed.load(Ordering::Relaxed) {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if !options.wants(seed, started.elapsed()) {
                        break;
                    }
                    if !show(&run(seed, options.trace), &options) {
                        failed.store(true, Ordering::Relaxed);
                    }
                    let done = done.fetch_add(1, Ordering::Relaxed) + 1;
                    if done.is_multiple_of(1_000) {
                        progress(done, started.elapsed());
                    }
                }
            });
        }
    });
    progress(done.into_inner(), started.elapsed());
    if failed.into_inner() { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn progress(done: u64, took: Duration) {
    let each = done as f64 / took.as_secs_f64().max(f64::EPSILON);
    println!("{done} seeds in {:.1} s, {each:.1} a second", took.as_secs_f64());
}

/// Prints a report where there is something to say; whether nothing was found.
fn show(report: &Report, options: &Options) -> bool {
    let Report { seed, hash, events, found, .. } = report;
    if options.verbose || options.trace {
        println!(
            "seed {seed}: trace {hash:016x} of {events} events; {} acknowledged, {} reads, {} \
             starts, {} guest writes in {:.0} s",
            report.acknowledged,
            report.reads,
            report.starts,
            report.writes,
            report.lasted.as_secs_f64()
        );
    }
    for finding in found {
        println!("seed {seed} FOUND {finding}");
    }
    if !found.is_empty() {
        println!("again: cargo xtask sim --seed {seed} --trace");
    }
    found.is_empty()
}

#[cfg(test)]
mod tests {
    use super::run::{Report, run};

    /// Nothing was found, and something happened.
    fn check(report: &Report) {
        let again = format!("again: cargo xtask sim --seed {} --trace", report.seed);
        assert!(report.found.is_empty(), "{again}: {report:#?}");
        assert!(report.acknowledged > 20, "clients get nothing done; {again}: {report:#?}");
        assert!(report.writes > 0, "no guest wrote; {again}: {report:#?}");
    }

    /// Few and short ones: an unoptimised build takes seconds for each.
    #[test]
    fn nothing_is_found_and_a_seed_always_takes_the_same_course() {
        let first = run(2, false);
        check(&first);
        let again = run(2, false);
        assert_eq!((first.hash, first.events), (again.hash, again.events));
        let other = run(5, false);
        check(&other);
        assert_ne!(first.hash, other.hash);
    }
}

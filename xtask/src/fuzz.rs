//! `cargo xtask fuzz`: long runs of the fuzz targets, which the crates' tests run shortly.

use anyhow::{Result, bail};

use crate::shell;

/// Crates with targets, in a test program named `fuzz`.
const CRATES: &[&str] = &["vmm"];

/// What `fuzz` takes.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// One target (the name of its test); without it, all of them one after another.
    target: Option<String>,
    /// Inputs of each target.
    #[arg(long, default_value_t = 1_000_000)]
    inputs: u64,
    /// Decides all inputs.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Number of the first input.
    #[arg(long, default_value_t = 0)]
    first: u64,
}

/// Runs the targets; the first failure ends it, and says how to see it again.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let mut ran = 0;
    for package in CRATES {
        let test = ["test", "--locked", "-p", package, "--test", "fuzz", "--"];
        let list = shell::output(shell::cargo().args(test).args(["--list", "--format=terse"]))?;
        let tests = list.lines().filter_map(|line| line.strip_suffix(": test"));
        for test_name in tests {
            let name = test_name.rsplit("::").next().unwrap_or(test_name);
            if arguments.target.as_ref().is_some_and(|target| target != name) {
                continue;
            }
            println!("== {package}: {name}");
            shell::run(
                shell::cargo()
                    .args(test)
                    .args(["--exact", test_name, "--nocapture", "--quiet"])
                    .env("TRINE_FUZZ_INPUTS", arguments.inputs.to_string())
                    .env("TRINE_FUZZ_SEED", arguments.seed.to_string())
                    .env("TRINE_FUZZ_FIRST", arguments.first.to_string()),
            )?;
            ran += 1;
        }
    }
    match (&arguments.target, ran) {
        (Some(target), 0) => {
            bail!("no fuzz target {target}; the targets are the tests of {CRATES:?} named fuzz")
        }
        _ => Ok(()),
    }
}

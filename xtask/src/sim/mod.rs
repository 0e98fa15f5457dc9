//! `cargo xtask sim`: the simulator over many seeds, one seed with everything it did, or the
//! mutations that it has to catch.

mod mutations;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::shell;

/// What `sim` takes.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// The first seed.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// How many seeds (default: one, or as many as fit into `--minutes`).
    #[arg(long)]
    seeds: Option<u64>,
    /// For how long, minutes.
    #[arg(long)]
    minutes: Option<f64>,
    /// Runs at a time (default: one for each CPU).
    #[arg(long)]
    jobs: Option<u64>,
    /// Prints everything that happens.
    #[arg(long)]
    trace: bool,
    /// Prints a line for each seed.
    #[arg(long)]
    verbose: bool,
    /// Puts known bugs into a copy of this tree, one at a time, and fails unless each is caught.
    #[arg(long)]
    mutations: bool,
    /// With `--mutations`: only those whose name holds this.
    #[arg(long, requires = "mutations")]
    only: Option<String>,
}

/// Runs it.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    if arguments.mutations {
        return mutations::run(arguments.only.as_deref().unwrap_or(""), arguments.seeds);
    }
    let simulator = build(&shell::root(), &shell::target_directory())?;
    shell::run(Command::new(simulator).args(words(arguments)?))
}

/// The simulator's own arguments.
fn words(arguments: &Arguments) -> Result<Vec<String>> {
    let mut words = vec!["--seed".to_owned(), arguments.seed.to_string()];
    let mut add = |name: &str, value: Option<u64>| {
        words.extend(value.into_iter().flat_map(|value| [name.to_owned(), value.to_string()]));
    };
    add("--seeds", arguments.seeds);
    add("--jobs", arguments.jobs);
    if let Some(minutes) = arguments.minutes {
        ensure!(minutes > 0.0, "--minutes {minutes}: it must be above 0");
        add("--seconds", Some((minutes * 60.0).ceil() as u64));
    }
    words.extend(arguments.trace.then(|| "--trace".to_owned()));
    words.extend(arguments.verbose.then(|| "--verbose".to_owned()));
    Ok(words)
}

/// Builds the simulator of a tree, this one or a copy, and puts it aside, so that a long run keeps
/// its program. Trees must not share `target`: cargo can't tell a copy's crates from the original's.
/// Only functions that changed are compiled again, since mutations change one each.
fn build(root: &Path, target: &Path) -> Result<PathBuf> {
    let what = ["build", "--locked", "--profile", "sim", "--package", "simulator"];
    let mut build = shell::cargo();
    build.args(what).args(["--example", "sim"]).current_dir(root).env("CARGO_TARGET_DIR", target);
    build.env("CARGO_INCREMENTAL", "1");
    shell::run(&mut build).with_context(|| format!("in {}", root.display()))?;
    let simulator = target.join("simulator");
    fs::remove_file(&simulator).or_else(|error| match error.kind() {
        std::io::ErrorKind::NotFound => Ok(()),
        _ => Err(error),
    })?;
    fs::copy(target.join("sim/examples/sim"), &simulator)
        .with_context(|| format!("cannot write {}", simulator.display()))?;
    Ok(simulator)
}

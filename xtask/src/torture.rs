//! `cargo xtask torture`: three real nodes under random faults.

use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Result, bail, ensure};
use serde_json::json;
use tests::torture::{self, Options};

use crate::shell;

/// What `torture` takes.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// How long faults go on, minutes.
    #[arg(long, default_value_t = 2.0)]
    minutes: f64,
    /// Decides faults and what clients do (default: the time).
    #[arg(long)]
    seed: Option<u64>,
    /// Prints the result as one JSON object, last.
    #[arg(long)]
    json: bool,
    /// Leaves logs and disks even where nothing was found.
    #[arg(long)]
    keep: bool,
    /// An executable to torture (default: a build of this tree).
    #[arg(long)]
    trine: Option<PathBuf>,
}

/// Runs it.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    ensure!(arguments.minutes > 0.0, "--minutes {}: it must be above 0", arguments.minutes);
    if let Some(lack) = torture::lacks() {
        bail!("torture does not run here: {lack}");
    }
    if !torture::clocks_jump() {
        println!("clocks don't jump in this run: apt-get install libfaketime");
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
    let options = Options {
        trine: arguments.trine.clone().map_or_else(build, Ok)?,
        duration: Duration::from_secs_f64(arguments.minutes * 60.0),
        seed: arguments.seed.unwrap_or(now.as_secs() % 1_000_000),
        keep: arguments.keep,
    };
    let report = torture::run(&options)?;
    println!("{:#}", report.figures);
    for finding in &report.findings {
        println!("FOUND {finding}");
    }
    if arguments.json {
        println!("{}", json!({"figures": report.figures, "findings": report.findings}));
    }
    if !report.findings.is_empty() {
        bail!(
            "{} findings; logs, disks and schedule: {}\nthe same faults again: \
             cargo xtask torture --minutes {} --seed {}",
            report.findings.len(),
            report.directory.display(),
            arguments.minutes,
            options.seed
        );
    }
    println!("nothing found");
    Ok(())
}

fn build() -> Result<PathBuf> {
    shell::run(shell::cargo().args(["build", "--locked", "--package", "node"]))?;
    Ok(shell::target_directory().join("debug").join("trine"))
}

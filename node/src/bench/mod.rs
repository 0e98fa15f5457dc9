//! `trine bench`: figures that name their method, beside a floor measured in the same run.

mod figures;
mod launch;

use anyhow::Result;

pub(crate) use figures::{Figures, Series};
pub(crate) use launch::{Cloud, LaunchOptions, launch};

/// What `trine bench` takes.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    bench: Bench,
}

#[derive(clap::Subcommand)]
enum Bench {
    /// Time to launch a guest: the floor that KVM allows, the VMM, and through the API.
    #[command(
        after_help = "Examples:\n  trine bench launch\n  trine bench launch --count 200 --concurrency 4 --json"
    )]
    Launch {
        /// Launches of each series.
        #[arg(long, default_value_t = 50)]
        count: usize,
        /// Launches under way at once.
        #[arg(long, default_value_t = 1)]
        concurrency: usize,
        /// Prints one JSON object instead of a table.
        #[arg(long)]
        json: bool,
    },
}

/// Runs a benchmark and prints its figures.
pub(crate) fn run(args: Args) -> Result<()> {
    let Bench::Launch { count, concurrency, json } = args.bench;
    let runtime = tokio::runtime::Runtime::new()?;
    let options = LaunchOptions { count, concurrency };
    let figures = runtime.block_on(launch::in_own_cloud(&options))?;
    if json {
        println!("{}", serde_json::to_string(&figures)?);
    } else {
        println!("{}", figures.table());
    }
    Ok(())
}

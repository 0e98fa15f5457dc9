//! `cargo xtask conformance`: unmodified clients against a cloud of three nodes.

mod cli;
mod python;

use anyhow::Result;

/// What `conformance` takes.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    suite: Suite,
}

#[derive(clap::Subcommand)]
enum Suite {
    /// python-openstackclient: the commands of the main job, and what must be refused.
    Cli {
        /// Leaves the cloud's directory for a look afterwards.
        #[arg(long)]
        keep: bool,
        /// Runs the product's release build.
        #[arg(long)]
        release: bool,
    },
}

/// Runs a suite; the last line is `N passed, N failed`.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    match arguments.suite {
        Suite::Cli { keep, release } => cli::run(keep, release),
    }
}

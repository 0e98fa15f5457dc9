//! `trine bench`: figures that name their method, beside a floor or a peer measured in the same run.

mod block;
mod consensus;
mod density;
mod failover;
mod figures;
mod launch;
mod restart;

use std::path::PathBuf;
use std::time::Duration;

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
    #[command(flatten)]
    Measured(Measured),
    /// A member of the cluster that `raft` measures.
    #[command(hide = true)]
    ConsensusMember {
        /// Its file.
        file: PathBuf,
    },
}

#[derive(clap::Subcommand)]
enum Measured {
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
    /// A guest's disk beside io_uring on the same file.
    #[command(
        after_help = "Examples:\n  trine bench block\n  trine bench block --directory /var/lib/trine --rounds 10 --json"
    )]
    Block {
        /// Rounds of each series.
        #[arg(long, default_value_t = 5)]
        rounds: usize,
        /// Length of one run, milliseconds.
        #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u64).range(10..=600_000))]
        length_ms: u64,
        /// Size of the file, MiB.
        #[arg(long, default_value_t = 512)]
        file_mib: u64,
        /// Where the file is made; the system's directory for temporary files unless given.
        #[arg(long)]
        directory: Option<PathBuf>,
        /// Through the host's page cache, not around it.
        #[arg(long)]
        buffered: bool,
        /// Prints one JSON object instead of a table.
        #[arg(long)]
        json: bool,
    },
    /// Guests side by side: memory of each, and launches a second beside the floor's. As root.
    #[command(
        after_help = "Examples:\n  trine bench density\n  trine bench density --guests 1000 --json"
    )]
    Density {
        /// Guests at once; fewer where memory ends.
        #[arg(long, default_value_t = 100)]
        guests: usize,
        /// Rounds of launches.
        #[arg(long, default_value_t = 5)]
        rounds: usize,
        /// Launches of each kind in a round.
        #[arg(long, default_value_t = 100)]
        launches: usize,
        /// Prints one JSON object instead of a table.
        #[arg(long)]
        json: bool,
    },
    /// Time without writes after the leader was killed.
    #[command(
        after_help = "Examples:\n  trine bench failover\n  trine bench failover --kills 100 --json"
    )]
    Failover {
        /// How often the leader is killed.
        #[arg(long, default_value_t = 20)]
        kills: usize,
        /// Prints one JSON object instead of a table.
        #[arg(long)]
        json: bool,
    },
    /// Commits a second and their latency, beside etcd where it is installed.
    #[command(
        after_help = "Examples:\n  trine bench raft\n  trine bench raft --writers 1,64 --rounds 10 --json\n\nDebian's package for the comparison: etcd-server"
    )]
    Raft {
        /// Rounds of each series.
        #[arg(long, default_value_t = 5)]
        rounds: usize,
        /// Length of a round, seconds.
        #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=600))]
        seconds: u64,
        /// Numbers of writers.
        #[arg(long, value_delimiter = ',', default_values_t = [1, 16, 256])]
        writers: Vec<usize>,
        /// Leaves etcd out.
        #[arg(long)]
        alone: bool,
        /// Prints one JSON object instead of a table.
        #[arg(long)]
        json: bool,
    },
    /// Time from a node's start to its serving, with many objects.
    #[command(
        after_help = "Examples:\n  trine bench restart\n  trine bench restart --objects 100000 --restarts 10 --json"
    )]
    Restart {
        /// Objects in the replicated state.
        #[arg(long, default_value_t = 100_000)]
        objects: usize,
        /// How often the node is killed and started.
        #[arg(long, default_value_t = 5)]
        restarts: usize,
        /// Prints one JSON object instead of a table.
        #[arg(long)]
        json: bool,
    },
}

/// Runs a benchmark and prints its figures.
pub(crate) fn run(args: Args) -> Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    let (figures, json) = match args.bench {
        Bench::ConsensusMember { file } => return runtime.block_on(consensus::run_member(&file)),
        Bench::Measured(bench) => runtime.block_on(measure(bench))?,
    };
    if json {
        println!("{}", serde_json::to_string(&figures)?);
    } else {
        println!("{}", figures.table());
    }
    Ok(())
}

async fn measure(bench: Measured) -> Result<(Figures, bool)> {
    Ok(match bench {
        Measured::Launch { count, concurrency, json } => {
            (launch::in_own_cloud(&LaunchOptions { count, concurrency }).await?, json)
        }
        Measured::Block { rounds, length_ms, file_mib, directory, buffered, json } => {
            let length = Duration::from_millis(length_ms);
            let options = block::Options { rounds, length, file_mib, directory, buffered };
            (tokio::task::spawn_blocking(move || block::block(&options)).await??, json)
        }
        Measured::Density { guests, rounds, launches, json } => {
            let options = density::Options { guests, rounds, launches };
            (tokio::task::spawn_blocking(move || density::density(&options)).await??, json)
        }
        Measured::Failover { kills, json } => (failover::failover(kills).await?, json),
        Measured::Raft { rounds, seconds, writers, alone, json } => {
            let length = Duration::from_secs(seconds);
            let options = consensus::Options { rounds, length, writers, alone };
            (consensus::consensus(&options).await?, json)
        }
        Measured::Restart { objects, restarts, json } => {
            (restart::restart(objects, restarts).await?, json)
        }
    })
}

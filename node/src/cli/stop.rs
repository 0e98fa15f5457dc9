//! `trine stop`: ends what belongs to a data directory, by recorded process.

use crate::agent;
use crate::data_directory::DataDirectory;
use crate::process::ProcessRecord;
use crate::runtime_directory;
use anyhow::{Result, bail};
use std::path::PathBuf;
use std::time::Duration;

/// How long a process may take to end by itself.
const GRACE: Duration = Duration::from_secs(10);

/// What `trine stop` takes.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  trine stop --data-dir /var/lib/trine             # guests go on\n  trine stop --data-dir /var/lib/trine --guests    # nothing is left running"
)]
pub(crate) struct Args {
    /// The node's data directory.
    #[arg(long)]
    data_dir: PathBuf,
    /// Ends the host's guests too; those that shall be active start again with the node.
    #[arg(long)]
    guests: bool,
}

/// Stops node, guests where asked, storage and switch; what does not run is no error.
pub(crate) fn run(args: Args) -> Result<()> {
    let directory = DataDirectory::open(&args.data_dir)?;
    end_processes(&directory, &["node"])?;
    if args.guests {
        agent::stop_guests(&directory.guests())?;
    }
    end_processes(&directory, &["storage", "switch"])?;
    if args.guests {
        let _ = std::fs::remove_dir_all(runtime_directory::path(directory.root()));
    }
    Ok(())
}

/// Ends recorded processes; one that does not run is no error.
pub(super) fn end_processes(directory: &DataDirectory, names: &[&str]) -> Result<()> {
    let lives = |name: &&&str| {
        let record = ProcessRecord::read(&directory.process_record(name));
        let held = record.and_then(|record| record.hold());
        held.is_some_and(|process| !process.end(GRACE))
    };
    let left: Vec<&str> = names.iter().filter(lives).copied().collect();
    if !left.is_empty() {
        bail!("still running after a kill: {}", left.join(", "));
    }
    Ok(())
}

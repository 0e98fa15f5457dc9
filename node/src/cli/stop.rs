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
    let mut left = Vec::new();
    end(&directory, "node", &mut left);
    if args.guests {
        agent::stop_guests(&directory.guests())?;
    }
    end(&directory, "storage", &mut left);
    end(&directory, "switch", &mut left);
    if !left.is_empty() {
        bail!("still running after a kill: {}", left.join(", "));
    }
    if args.guests {
        let _ = std::fs::remove_dir_all(runtime_directory::path(directory.root()));
    }
    Ok(())
}

fn end(directory: &DataDirectory, name: &str, left: &mut Vec<String>) {
    let path = directory.process_record(name);
    let held = ProcessRecord::read(&path).and_then(|record| record.hold());
    if held.is_some_and(|process| !process.end(GRACE)) {
        left.push(name.to_owned());
    }
}

//! `trine node`: runs this host's node.

use anyhow::Result;
use std::path::PathBuf;

/// What `trine node` takes.
#[derive(clap::Args)]
#[command(
    after_help = "Example:\n  trine node --data-dir /var/lib/trine\n\nIt prints one line, `trine node ready …`, when it serves. SIGTERM stops it; guests, switch\nand storage go on, and a node started again finds them. TRINE_LOG=debug shows more."
)]
pub(crate) struct Args {
    /// The data directory, made by `trine init` or `trine join`.
    #[arg(long)]
    data_dir: PathBuf,
}

/// Runs until SIGTERM or Ctrl-C.
pub(crate) fn run(args: Args) -> Result<()> {
    allow_many_descriptors();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("trine-node")
        .enable_all()
        .build()?;
    let result = runtime.block_on(crate::daemon::run(&args.data_dir));
    // Blocking threads may sit in a request to a process that hangs.
    runtime.shutdown_timeout(std::time::Duration::from_secs(2));
    result
}

/// Each guest takes a handful of descriptors here and in storage and switch, which inherit this.
fn allow_many_descriptors() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!(%error, "the limit of open files stays low; fewer guests will fit");
    }
}

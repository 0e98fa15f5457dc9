//! `trine vmm`: one guest without a cloud. It becomes the embedded VMM.

use anyhow::{Context, Result};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

/// What `trine vmm` takes.
#[derive(clap::Args)]
#[command(
    after_help = "Example:\n  trine image export guest.img\n  cat > vm.json <<'END'\n  {\"version\": 1, \"id\": \"try\", \"memory_mib\": 128, \"boot\": {\"kernel\": {\"path\": \"guest.img\"}}}\n  END\n  trine vmm --config vm.json"
)]
pub(crate) struct Args {
    /// The guest's configuration, JSON.
    #[arg(long)]
    config: PathBuf,
}

/// Replaces this process by the VMM; returns only where that fails.
pub(crate) fn run(args: Args) -> Result<()> {
    let directory = cache_directory().join("bin");
    let executables = crate::embedded::install(&directory)
        .with_context(|| format!("cannot put the VMM into {}", directory.display()))?;
    let error = Command::new(&executables.vmm).arg("run").arg("--config").arg(&args.config).exec();
    Err(error).with_context(|| format!("cannot run {}", executables.vmm.display()))
}

fn cache_directory() -> PathBuf {
    let of_user = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")));
    of_user.unwrap_or_else(|| PathBuf::from("/var/cache")).join("trine")
}

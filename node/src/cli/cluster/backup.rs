//! `trine cluster backup`.

use super::Common;
use crate::daemon::administration::ClusterRequest;
use crate::daemon::local::{self, LocalRequest};
use crate::files::sync_parent;
use anyhow::{Context, Result};
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

/// What it takes.
#[derive(clap::Args)]
pub(super) struct Args {
    /// The file to make; it must not exist.
    file: PathBuf,
    #[command(flatten)]
    common: Common,
}

/// Makes the file, which the node fills.
pub(super) fn run(args: &Args) -> Result<()> {
    let path = &args.file;
    let file = File::options().write(true).create_new(true).mode(0o600).open(path);
    let file = file.with_context(|| format!("cannot make {}", path.display()))?;
    let request = LocalRequest::Cluster(ClusterRequest::Backup);
    let answer = local::ask_with(&args.common.data_dir, &request, &[file.as_fd()]);
    let answer = match answer {
        Ok(answer) => answer,
        Err(error) => {
            let _ = std::fs::remove_file(path);
            return Err(error);
        }
    };
    sync_parent(path)?;
    if args.common.json {
        println!("{answer}");
        return Ok(());
    }
    println!(
        "backed up {} bytes, the state at {}, into {}\n\
         A restore needs the cluster key too, which is not in it: keep a copy of {} elsewhere.",
        answer["size_bytes"],
        answer["index"],
        path.display(),
        answer["cluster_key_file"].as_str().unwrap_or("cluster.key")
    );
    Ok(())
}

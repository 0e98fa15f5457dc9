//! `trine cluster rotate-keys`.

use super::{Common, ask};
use crate::daemon::administration::ClusterRequest;
use anyhow::Result;

/// What it takes.
#[derive(clap::Args)]
pub(super) struct Args {
    /// A host that can't be reached and shall get the new key when it is back: name or id.
    #[arg(long, value_name = "HOST")]
    without: Vec<String>,
    #[command(flatten)]
    common: Common,
}

/// Rotates the keys.
pub(super) fn run(args: Args) -> Result<()> {
    let Args { without, common } = args;
    let answer = ask(&common.data_dir, ClusterRequest::RotateKeys { without })?;
    if common.json {
        println!("{answer}");
        return Ok(());
    }
    let key = answer["key"].as_str().unwrap_or_default();
    match answer["resumed"].as_bool() {
        Some(true) => println!("a rotation was under way; the cluster's key is {key}"),
        _ => println!("the cluster's key is now {key}"),
    }
    match answer["finished"].as_bool() {
        Some(true) => println!("every secret is sealed with it, and the old key is gone"),
        _ => println!(
            "{} secrets are still to be sealed with it; the cluster goes on by itself, and the same \
             command says when it has finished",
            answer["left_to_seal"]
        ),
    }
    println!(
        "Backups from now on need the new key: keep a copy of {} elsewhere.\n\
         Earlier backups need the old one.",
        answer["cluster_key_file"].as_str().unwrap_or("cluster.key")
    );
    Ok(())
}

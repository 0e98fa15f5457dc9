//! `trine storage`: the host's images and volumes as a process.

use super::switch::{leave_session, read};
use anyhow::Result;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::path::PathBuf;

/// What `trine storage` takes.
#[derive(clap::Args)]
#[command(
    after_help = "Example:\n  trine storage --config storage.toml\n\nstorage.toml:\n  control = \"/run/trine/storage.sock\"   # Unix socket to bind\n  directory = \"/var/lib/trine/storage\"\n  listen = \"10.0.0.11:8776\"             # for other hosts, over TLS\n  cluster_id = \"…\"\n  ca = \"ca.pem\"\n  certificate = \"node.pem\"\n  key = \"node-key.pem\""
)]
pub(crate) struct Args {
    /// The configuration file.
    #[arg(long)]
    config: PathBuf,
    /// Leaves the session it was started in.
    #[arg(long, hide = true)]
    detached: bool,
}

/// `storage.toml`.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct StorageFile {
    /// Unix socket to bind.
    pub(crate) control: PathBuf,
    /// Where images and volumes lie.
    pub(crate) directory: PathBuf,
    /// Where other hosts reach it.
    pub(crate) listen: SocketAddr,
    /// The cluster.
    pub(crate) cluster_id: String,
    /// The authority's certificate.
    pub(crate) ca: PathBuf,
    /// This node's certificate.
    pub(crate) certificate: PathBuf,
    /// This node's key.
    pub(crate) key: PathBuf,
}

/// Runs storage.
pub(crate) fn run(args: Args) -> Result<()> {
    if args.detached {
        leave_session();
    }
    let file: StorageFile = read(&args.config)?;
    let StorageFile { control, directory, listen, cluster_id, ca, certificate, key } = file;
    let tls = storage::Tls::from_files(&ca, &certificate, &key)?;
    storage::run(storage::StorageConfig { control, directory, listen, tls, cluster_id })?;
    Ok(())
}

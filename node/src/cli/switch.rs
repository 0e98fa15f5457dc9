//! `trine switch`: the host's data plane as a process.

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// What `trine switch` takes.
#[derive(clap::Args)]
#[command(
    after_help = "Example:\n  trine switch --config switch.toml\n\nswitch.toml:\n  control = \"/run/trine/switch.sock\"   # Unix socket to bind\n  vtep = \"10.0.0.11:4789\"              # this host's tunnel endpoint"
)]
pub(crate) struct Args {
    /// The configuration file.
    #[arg(long)]
    config: PathBuf,
    /// Leaves the session it was started in.
    #[arg(long, hide = true)]
    detached: bool,
}

/// `switch.toml`.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SwitchFile {
    /// Unix socket to bind.
    pub(crate) control: PathBuf,
    /// Tunnel endpoint.
    pub(crate) vtep: SocketAddr,
}

/// Runs the switch.
pub(crate) fn run(args: Args) -> Result<()> {
    if args.detached {
        leave_session();
    }
    let SwitchFile { control, vtep } = read(&args.config)?;
    netstack::run(netstack::SwitchConfig { control, vtep })?;
    Ok(())
}

/// Reads a process's TOML file.
pub(super) fn read<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read the configuration {}", path.display()))?;
    toml::from_str(&text).with_context(|| format!("{} is malformed", path.display()))
}

/// A process that shall outlive the node must not get the signals of its terminal.
pub(super) fn leave_session() {
    if let Err(error) = rustix::process::setsid() {
        tracing::warn!(%error, "cannot leave the session of the starting process");
    }
}

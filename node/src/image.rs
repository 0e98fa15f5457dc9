//! `trine image`: the built-in guest image as a file, to be uploaded like any other.

use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::embedded::GUEST_IMAGE;

/// What `trine image` takes.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(clap::Subcommand)]
enum Action {
    /// Writes the built-in guest image to a file.
    #[command(
        after_help = "Example:\n  trine image export guest.img\n  openstack image create --disk-format raw --container-format bare --file guest.img guest"
    )]
    Export {
        /// The file to write; it must not exist.
        file: PathBuf,
    },
}

/// Runs the subcommand.
pub(crate) fn run(args: Args) -> Result<()> {
    let Action::Export { file } = args.action;
    let mut out = std::fs::File::create_new(&file)
        .with_context(|| format!("cannot make {}", file.display()))?;
    std::io::Write::write_all(&mut out, GUEST_IMAGE)
        .with_context(|| format!("cannot write {}", file.display()))
}

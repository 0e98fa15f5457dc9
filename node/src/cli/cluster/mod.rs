//! `trine cluster`: the cluster as a whole. What needs a running node is asked over its local
//! socket; restore and recover work on a directory while nothing runs on it.

mod backup;
mod members;
mod recover;
mod restore;
mod rotate_keys;
mod status;

use crate::daemon::administration::ClusterRequest;
use crate::daemon::local::{self, LocalRequest};
use anyhow::Result;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// What `trine cluster` takes.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Shows members and hosts, and what is wrong with them.
    #[command(
        after_help = "Examples:\n  trine cluster status --data-dir /var/lib/trine\n  trine cluster status --data-dir /var/lib/trine --json | jq '.members[].lag'"
    )]
    Status(Common),
    /// Prints a token with which a new machine takes a dead host's place.
    #[command(
        after_help = "Example, for a node2 that is dead for good:\n  trine cluster replace node2 --data-dir /var/lib/trine > token      # on a host that lives\n  trine join --data-dir /var/lib/trine --address 10.0.0.14 --token-file token   # on the new one\n  trine node --data-dir /var/lib/trine\n\nThe new node gets an id of its own. Once it votes, the old one leaves the cluster; images get\ntheir second copy back, and servers of the dead host are made anew elsewhere."
    )]
    Replace(members::ReplaceArgs),
    /// Takes a host out of the cluster for good.
    #[command(
        after_help = "Examples:\n  trine cluster remove node3 --data-dir /var/lib/trine\n  trine cluster remove 3 --force --data-dir /var/lib/trine     # with all that it holds\n\nA host that joined and never started is removed in the same way. Its id is never given again."
    )]
    Remove(members::RemoveArgs),
    /// Lets another node lead.
    #[command(
        after_help = "Examples:\n  trine cluster transfer --data-dir /var/lib/trine             # to whoever has most of the log\n  trine cluster transfer node2 --data-dir /var/lib/trine"
    )]
    Transfer(members::TransferArgs),
    /// Whether a host's servers are made anew elsewhere by themselves when it fails.
    #[command(
        after_help = "Examples:\n  trine cluster evacuate-on-failure node2 on --data-dir /var/lib/trine\n  trine cluster evacuate-on-failure node2 off --data-dir /var/lib/trine"
    )]
    EvacuateOnFailure(members::EvacuateArgs),
    /// Makes a new key for the cluster's secrets, and new keys for tokens.
    #[command(
        after_help = "Examples:\n  trine cluster rotate-keys --data-dir /var/lib/trine\n  trine cluster rotate-keys --without node3 --data-dir /var/lib/trine     # node3 is down\n\nEvery member gets the new key, secrets are sealed anew, and the old key is forgotten. Tokens stay\nvalid until they expire or five rotations later. Rotate after a host was removed or a copy of cluster.key was lost. If the\ncommand is cut off, run it again."
    )]
    RotateKeys(rotate_keys::Args),
    /// Writes the whole state into a file.
    #[command(
        after_help = "Example:\n  trine cluster backup trine.backup --data-dir /var/lib/trine\n\nThe file (mode 0600) holds the replicated state, with its secrets sealed. To use them after a\nrestore the cluster key is needed: cluster.key in each node's data directory. Keep a copy of it\nin another place than the backups. Contents of images and volumes are not in it."
    )]
    Backup(backup::Args),
    /// Makes a data directory of a new cluster from a backup.
    #[command(
        after_help = "Example:\n  trine cluster restore trine.backup --cluster-key-file cluster.key --data-dir /var/lib/trine-new --address 10.0.0.11\n  trine node --data-dir /var/lib/trine-new\n\nThe cluster gets a new id and authority and one host, this one; others join it as usual. The\nhosts of the backup are dead to it."
    )]
    Restore(restore::Args),
    /// On the last node that lives: goes on alone after the loss of the quorum.
    #[command(
        after_help = "Examples:\n  trine cluster recover --data-dir /var/lib/trine            # says what may be lost\n  trine cluster recover --data-dir /var/lib/trine --yes      # does it\n\nOnly when the other nodes will never come back: they must not run any more. Guests on this host\ngo on. The cluster gets a new id and authority; other hosts join it with new data directories."
    )]
    Recover(recover::Args),
}

/// What most of them take.
#[derive(clap::Args)]
struct Common {
    /// The node's data directory.
    #[arg(long)]
    data_dir: PathBuf,
    /// Prints one JSON object.
    #[arg(long)]
    json: bool,
}

/// Does what was asked.
pub(crate) fn run(args: Args) -> Result<()> {
    match args.command {
        Command::Status(args) => status::run(&args),
        Command::Replace(args) => members::replace(args),
        Command::Remove(args) => members::remove(args),
        Command::Transfer(args) => members::transfer(args),
        Command::EvacuateOnFailure(args) => members::evacuate_on_failure(args),
        Command::RotateKeys(args) => rotate_keys::run(args),
        Command::Backup(args) => backup::run(&args),
        Command::Restore(args) => restore::run(&args),
        Command::Recover(args) => recover::run(&args),
    }
}

fn ask(data_directory: &Path, request: ClusterRequest) -> Result<Value> {
    local::ask(data_directory, &LocalRequest::Cluster(request))
}

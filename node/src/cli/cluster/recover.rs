//! `trine cluster recover`: a survivor goes on alone after the loss of the quorum.
//!
//! Everything new is made in `recovery.partial` first, which becomes `recovery` when it is whole.
//! Then each part is moved to its place; a run that was cut off is finished by the next one.

use crate::cli::stop;
use crate::config::{self, NodeConfig};
use crate::daemon::bootstrap::Adoption;
use crate::daemon::capacity::Capacity;
use crate::daemon::lock;
use crate::data_directory::{DataDirectory, RECOVERY};
use crate::files::{Access, sync_parent, write_new};
use crate::pki::{Authority, NodeIdentity, NodeKey};
use anyhow::{Context, Result, bail};
use controller::ids::HostId;
use std::fs;
use std::path::{Path, PathBuf};

const PARTIAL: &str = "recovery.partial";

/// What it takes.
#[derive(clap::Args)]
pub(super) struct Args {
    /// The survivor's data directory; its node must be stopped.
    #[arg(long)]
    data_dir: PathBuf,
    /// Does it. Without this, it only says what may be lost.
    #[arg(long)]
    yes: bool,
    /// Prints one JSON object.
    #[arg(long)]
    json: bool,
}

/// Says what may be lost, and does it where that was accepted.
pub(super) fn run(args: &Args) -> Result<()> {
    let directory = DataDirectory::open(&args.data_dir)?;
    let _lock = lock(&directory)?;
    if directory.join(RECOVERY).exists() {
        put_in_place(&directory)?;
        return done(args, &directory);
    }
    let log = raft::inspect(&directory.join("raft"))?;
    say_what_may_be_lost(args, &log);
    if !args.yes {
        bail!("nothing was changed; --yes does it");
    }
    // They know the old cluster's certificates. Guests do without them for a moment.
    stop::end_processes(&directory, &["storage", "switch"])?;
    prepare(&directory)?;
    put_in_place(&directory)?;
    done(args, &directory)
}

fn say_what_may_be_lost(args: &Args, log: &raft::Inspection) {
    if args.json {
        return;
    }
    let text = |index: Option<u64>| index.map_or("none".into(), |index| index.to_string());
    println!(
        "This node's log ends at entry {}; it knows entries up to {} to be committed.",
        text(log.last_log),
        text(log.committed)
    );
    println!(
        "May be lost: every change that other nodes acknowledged and this one never received. \
         Entries after the last one known to be committed become part of the state, acknowledged or \
         not."
    );
    for (id, address) in log.members.iter().filter(|(id, _)| *id != log.node_id) {
        println!("Must never run again: node {id} at {address}");
    }
    for damage in &log.damage {
        println!("Damage in this node's log: {damage}");
    }
}

fn prepare(directory: &DataDirectory) -> Result<()> {
    let partial = directory.join(PARTIAL);
    if partial.exists() {
        fs::remove_dir_all(&partial)
            .with_context(|| format!("cannot clear {}", partial.display()))?;
    }
    fs::create_dir(&partial).with_context(|| format!("cannot make {}", partial.display()))?;
    let old = NodeConfig::read(directory.root())?;
    let cluster_id = uuid::Uuid::new_v4().simple().to_string();
    let config = NodeConfig { cluster_id, ..old };
    let authority = Authority::create(&config.cluster_id)?;
    let key = NodeKey::create()?;
    let identity = NodeIdentity {
        cluster_id: config.cluster_id.clone(),
        node_id: config.node_id,
        address: config.address,
    };
    let capacity = Capacity::of_this_machine(&config, directory.root());
    let adoption = Adoption { survivor: Some(HostId(config.node_id)), capacity };
    let files = [
        (config::FILE_NAME, config.text(), Access::Public),
        ("ca.pem", authority.certificate_pem.clone(), Access::Public),
        ("ca-key.pem", authority.key_pem().to_owned(), Access::Secret),
        ("node.pem", authority.issue(&key.public_key, &identity)?, Access::Public),
        ("node-key.pem", key.key_pem.clone(), Access::Secret),
        (Adoption::FILE_NAME, serde_json::to_string(&adoption)?, Access::Public),
    ];
    for (name, content, access) in files {
        let path = partial.join(name);
        write_new(&path, content.as_bytes(), access)
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    raft::recover_alone(raft::RecoverAlone {
        from: &directory.join("raft"),
        into: &partial.join("raft"),
        cluster_id: config.cluster_bytes(),
        member: raft::Member { address: config.raft(), name: config.name.clone() },
    })?;
    rename(&partial, &directory.join(RECOVERY))
}

/// Moves what was prepared to its place. The old log stays, under another name.
fn put_in_place(directory: &DataDirectory) -> Result<()> {
    let recovery = directory.join(RECOVERY);
    if recovery.join(config::FILE_NAME).exists() {
        let (old, new) = (NodeConfig::read(directory.root())?, NodeConfig::read(&recovery)?);
        let storage = directory.join("storage");
        storage::hand_to_cluster(&storage, &old.cluster_id, &new.cluster_id)?;
    }
    let log = recovery.join("raft");
    if log.exists() {
        let place = directory.join("raft");
        if place.exists() {
            let kept = format!("raft-before-recovery-{}", uuid::Uuid::new_v4().simple());
            rename(&place, &directory.join(&kept))?;
        }
        rename(&log, &place)?;
    }
    for entry in fs::read_dir(&recovery)? {
        let entry = entry?;
        rename(&entry.path(), &directory.root().join(entry.file_name()))?;
    }
    fs::remove_dir(&recovery).and_then(|()| sync_parent(&recovery))?;
    Ok(())
}

fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to)
        .and_then(|()| sync_parent(to))
        .and_then(|()| sync_parent(from))
        .with_context(|| format!("cannot move {} to {}", from.display(), to.display()))
}

fn done(args: &Args, directory: &DataDirectory) -> Result<()> {
    let config = NodeConfig::read(directory.root())?;
    if args.json {
        println!(
            "{}",
            serde_json::json!({"cluster_id": config.cluster_id, "node_id": config.node_id})
        );
        return Ok(());
    }
    println!(
        "node {} goes on alone, as the cluster {}\nnext: trine node --data-dir {}\n\
         Other hosts join it anew: trine join-token here, trine join there.",
        config.node_id,
        config.cluster_id,
        directory.root().display()
    );
    Ok(())
}

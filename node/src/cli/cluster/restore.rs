//! `trine cluster restore`: a new cluster of one host from a backup.

use crate::cli::HostArgs;
use crate::cluster_keys::ClusterKeys;
use crate::config::NodeConfig;
use crate::daemon::Machine;
use crate::daemon::bootstrap::Adoption;
use crate::daemon::capacity::Capacity;
use crate::data_directory::{Contents, DataDirectory};
use crate::files::Access;
use crate::pki::{Authority, NodeIdentity, NodeKey};
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};

/// What it takes.
#[derive(clap::Args)]
pub(super) struct Args {
    /// The backup.
    file: PathBuf,
    /// The cluster's key at the time of the backup: `cluster.key` of a node's data directory.
    #[arg(long)]
    cluster_key_file: PathBuf,
    /// The directory to make; it must not exist or be empty.
    #[arg(long)]
    data_dir: PathBuf,
    #[command(flatten)]
    host: HostArgs,
    /// Prints one JSON object.
    #[arg(long)]
    json: bool,
}

/// Makes the data directory.
pub(super) fn run(args: &Args) -> Result<()> {
    DataDirectory::check_free(&args.data_dir)?;
    let file = args.file.display();
    let backup = std::fs::read(&args.file).with_context(|| format!("cannot read {file}"))?;
    let info = raft::read_backup(&backup).with_context(|| format!("{file} is no backup"))?;
    let cluster_keys = ClusterKeys::read(&args.cluster_key_file)?;
    let unreadable = |error| anyhow::anyhow!("{file} holds no state that can be read: {error}");
    let needed = Machine::key_ids(&info.state).map_err(unreadable)?;
    if let Some(lacking) = needed.iter().find(|id| !cluster_keys.holds(id)) {
        bail!(
            "{file} needs the cluster key {lacking}, and {} holds {}; take the cluster.key of the \
             time of the backup",
            args.cluster_key_file.display(),
            cluster_keys.ids().join(", ")
        );
    }
    let node_id = Machine::next_host_id(&info.state).map_err(unreadable)?;
    let config = config(&args.host, node_id);
    if let Some((key, value, rule)) = config.problem() {
        bail!("{key} is {value}; {rule}");
    }
    let authority = Authority::create(&config.cluster_id)?;
    let key = NodeKey::create()?;
    let identity =
        NodeIdentity { cluster_id: config.cluster_id.clone(), node_id, address: config.address };
    let capacity = Capacity::of_this_machine(&config, &args.data_dir);
    let adoption = serde_json::to_string(&Adoption { survivor: None, capacity })?;
    let log = |directory: &Path| restore_log(directory, &backup, &config);
    let contents = Contents {
        config: &config,
        authority: &authority,
        key_pem: &key.key_pem,
        certificate_pem: &authority.issue(&key.public_key, &identity)?,
        cluster_keys,
        more: vec![(Adoption::FILE_NAME, adoption, Access::Public)],
        log: Some(&log),
    };
    let made = DataDirectory::create(&args.data_dir, &contents)?;
    if args.json {
        let answer = serde_json::json!({
            "cluster_id": config.cluster_id, "node_id": node_id, "index": info.index,
        });
        println!("{answer}");
        return Ok(());
    }
    println!(
        "restored the state at {} as the cluster {}, of which this host is node {node_id}\n\
         next: trine node --data-dir {}\n\
         Users and passwords are those of the backup; the authority is new: {}.\n\
         The backup's other hosts are dead to this cluster: what lay on them alone is lost.",
        info.index,
        config.cluster_id,
        made.root().display(),
        made.join("ca.pem").display()
    );
    Ok(())
}

fn restore_log(directory: &Path, backup: &[u8], config: &NodeConfig) -> Result<()> {
    raft::restore(raft::Restore {
        directory,
        backup,
        cluster_id: config.cluster_bytes(),
        node_id: config.node_id,
        member: raft::Member { address: config.raft(), name: config.name.clone() },
    })?;
    Ok(())
}

fn config(host: &HostArgs, node_id: u64) -> NodeConfig {
    let cluster_id = uuid::Uuid::new_v4().simple().to_string();
    NodeConfig { node_id, cluster_id, ..host.config() }
}

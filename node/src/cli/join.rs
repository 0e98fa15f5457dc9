//! `trine join`: makes a data directory that belongs to an existing cluster.

use super::HostArgs;
use crate::config::NodeConfig;
use crate::data_directory::{Contents, DataDirectory};
use crate::files::Access;
use crate::join_token::JoinToken;
use crate::joining::{self, JoinRequest, PEERS_FILE_NAME};
use crate::pki::{Authority, NodeKey};
use anyhow::{Context, Result, bail};
use std::io::Read;
use std::path::PathBuf;

/// Longest token that is read.
const TOKEN_BYTES_MAX: u64 = 16 << 10;

/// What `trine join` takes.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  trine join-token --data-dir /var/lib/trine > token     # on a node of the cluster\n  trine join --data-dir /var/lib/trine --address 10.0.0.12 --token-file token\n  ssh first trine join-token --data-dir /var/lib/trine | trine join --data-dir /var/lib/trine --address 10.0.0.12 --token-file -"
)]
pub(crate) struct Args {
    /// The directory to make; it must not exist or be empty.
    #[arg(long)]
    data_dir: PathBuf,
    /// File with the token, `-` for standard input. (Not an argument: others on this host could
    /// read it there.)
    #[arg(long)]
    token_file: PathBuf,
    #[command(flatten)]
    host: HostArgs,
}

/// Asks the cluster and makes the data directory.
pub(crate) fn run(args: Args) -> Result<()> {
    DataDirectory::check_free(&args.data_dir)?;
    let token: JoinToken = read_token(&args)?.parse()?;
    let key = NodeKey::create()?;
    // The cluster says which node; until then any valid id will do.
    let mut config = NodeConfig { cluster_id: token.cluster_id.clone(), ..args.host.config() };
    if let Some((key, value, rule)) = config.problem() {
        bail!("{key} is {value}; {rule}");
    }
    let request = JoinRequest {
        secret: token.secret().to_owned(),
        public_key: key.public_key.clone(),
        name: config.name.clone(),
        address: config.address,
        api_port: config.api_port,
        raft_port: config.raft_port,
        storage_port: config.storage_port,
        vxlan_port: config.vxlan_port,
        capacity: crate::daemon::capacity::Capacity::of_this_machine(&config, &args.data_dir),
        feature_level: controller::state::FEATURE_LEVEL,
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let answer = runtime.block_on(joining::ask(&token, &request))?;

    config.node_id = answer.node_id;
    let cluster_keys = answer.cluster_keys();
    let authority =
        Authority::from_pem(&config.cluster_id, answer.authority_pem, answer.authority_key_pem);
    let peers = serde_json::to_string(&answer.peers)?;
    let contents = Contents {
        config: &config,
        authority: &authority,
        key_pem: &key.key_pem,
        certificate_pem: &answer.certificate_pem,
        cluster_keys,
        more: vec![(PEERS_FILE_NAME, peers, Access::Public)],
        log: None,
    };
    DataDirectory::create(&args.data_dir, &contents)?;
    let path = std::path::absolute(&args.data_dir)?;
    println!(
        "joined the cluster {} as node {}\nnext: trine node --data-dir {}",
        config.cluster_id,
        config.node_id,
        path.display()
    );
    Ok(())
}

fn read_token(args: &Args) -> Result<String> {
    let mut text = String::new();
    if args.token_file.as_os_str() == "-" {
        std::io::stdin()
            .take(TOKEN_BYTES_MAX)
            .read_to_string(&mut text)
            .context("cannot read the token from standard input")?;
    } else {
        let file = std::fs::File::open(&args.token_file);
        file.and_then(|file| file.take(TOKEN_BYTES_MAX).read_to_string(&mut text))
            .with_context(|| format!("cannot read the token file {}", args.token_file.display()))?;
    }
    Ok(text)
}

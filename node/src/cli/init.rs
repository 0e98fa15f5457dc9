//! `trine init`: makes a cluster, offline.

use super::HostArgs;
use crate::cluster_keys::ClusterKeys;
use crate::config::NodeConfig;
use crate::daemon::bootstrap::FirstStart;
use crate::data_directory::{Contents, DataDirectory};
use crate::files::Access;
use crate::pki::{Authority, NodeIdentity, NodeKey};
use anyhow::{Context, Result, bail};
use base64::Engine;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};

/// Random bytes in a generated password.
const PASSWORD_BYTES: usize = 18;
/// What the API accepts.
const PASSWORD_BYTES_MAX: usize = 128;

/// What `trine init` takes.
#[derive(clap::Args)]
#[command(
    after_help = "Example:\n  trine init --data-dir /var/lib/trine --address 10.0.0.11\n  trine node --data-dir /var/lib/trine\n  export OS_CLIENT_CONFIG_FILE=/var/lib/trine/clouds.yaml OS_CLOUD=trine\n  openstack token issue"
)]
pub(crate) struct Args {
    /// The directory to make; it must not exist or be empty.
    #[arg(long)]
    data_dir: PathBuf,
    #[command(flatten)]
    host: HostArgs,
    /// Loopback range from which floating addresses come (default: the /24 after the address's
    /// own where that is a loopback address, else 127.77.1.0/24).
    #[arg(long)]
    floating_pool: Option<String>,
    /// File whose first line is the administrator's password (default: a random one).
    #[arg(long)]
    admin_password_file: Option<PathBuf>,
}

/// Makes the data directory of the cluster's first node.
pub(crate) fn run(args: Args) -> Result<()> {
    DataDirectory::check_free(&args.data_dir)?;
    let path = std::path::absolute(&args.data_dir)?;
    let config = config(&args)?;
    let floating_pool = floating_pool(&args)?;
    let password = password(args.admin_password_file.as_deref())?;

    let authority = Authority::create(&config.cluster_id)?;
    let key = NodeKey::create()?;
    let identity = NodeIdentity {
        cluster_id: config.cluster_id.clone(),
        node_id: config.node_id,
        address: config.address,
    };
    let certificate_pem = authority.issue(&key.public_key, &identity)?;
    let first_start = FirstStart { admin_password: password.clone(), floating_pool };
    let sign_in = SignIn { config: &config, path: &path, password: &password };
    let contents = Contents {
        config: &config,
        authority: &authority,
        key_pem: &key.key_pem,
        certificate_pem: &certificate_pem,
        cluster_keys: ClusterKeys::random(),
        more: vec![
            (FirstStart::FILE_NAME, serde_json::to_string(&first_start)?, Access::Secret),
            ("clouds.yaml", sign_in.clouds_yaml(), Access::Secret),
            ("admin-openrc", sign_in.openrc(), Access::Secret),
            ("credentials.json", sign_in.credentials(), Access::Secret),
        ],
        log: None,
    };
    DataDirectory::create(&args.data_dir, &contents)?;
    println!(
        "made the cluster {} in {}\n\
         next: trine node --data-dir {}",
        config.cluster_id,
        path.display(),
        path.display()
    );
    Ok(())
}

fn config(args: &Args) -> Result<NodeConfig> {
    let cluster_id = uuid::Uuid::new_v4().simple().to_string();
    let config = NodeConfig { cluster_id, ..args.host.config() };
    match config.problem() {
        None => Ok(config),
        Some((key, value, rule)) => bail!("{key} is {value}; {rule}"),
    }
}

fn floating_pool(args: &Args) -> Result<String> {
    let pool = match &args.floating_pool {
        Some(pool) => pool.clone(),
        None => derived_pool(args.host.address),
    };
    let network: ipnet::Ipv4Net = pool
        .parse()
        .with_context(|| format!("--floating-pool {pool:?} is not of the form ADDRESS/PREFIX"))?;
    if network.trunc() != network || !(8..=29).contains(&network.prefix_len()) {
        bail!("--floating-pool {pool} must be a network's address with a prefix of 8 to 29");
    }
    if !network.network().is_loopback() {
        bail!(
            "--floating-pool {pool} is no loopback range; the user-mode uplink listens on \
             loopback addresses (127.0.0.0/8) only"
        );
    }
    if let IpAddr::V4(address) = args.host.address
        && network.contains(&address)
    {
        bail!("--floating-pool {pool} contains the host's own address {address}; choose another");
    }
    Ok(pool)
}

fn derived_pool(address: IpAddr) -> String {
    match address {
        IpAddr::V4(v4) if v4.is_loopback() => {
            let [_, b, c, _] = v4.octets();
            let next = Ipv4Addr::new(127, b, c.wrapping_add(1), 0);
            format!("{next}/24")
        }
        _ => "127.77.1.0/24".into(),
    }
}

fn password(file: Option<&Path>) -> Result<String> {
    let Some(file) = file else {
        let random: [u8; PASSWORD_BYTES] = rand::random();
        return Ok(base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(random));
    };
    let text = std::fs::read_to_string(file)
        .with_context(|| format!("cannot read the password file {}", file.display()))?;
    let password = text.lines().next().unwrap_or_default();
    if password.is_empty() || password.len() > PASSWORD_BYTES_MAX {
        bail!(
            "the first line of {} must have 1 to {PASSWORD_BYTES_MAX} bytes, it has {}",
            file.display(),
            password.len()
        );
    }
    Ok(password.to_owned())
}

/// How the administrator signs in, in the forms that clients read.
struct SignIn<'a> {
    config: &'a NodeConfig,
    path: &'a Path,
    password: &'a str,
}

impl SignIn<'_> {
    fn auth_url(&self) -> String {
        format!("{}/identity/v3", self.config.base_url())
    }

    fn cacert(&self) -> String {
        self.path.join("ca.pem").display().to_string()
    }

    fn clouds_yaml(&self) -> String {
        // JSON strings are YAML strings.
        let quoted = |text: &str| serde_json::Value::from(text).to_string();
        format!(
            "clouds:
  trine:
    auth:
      auth_url: {}
      username: admin
      password: {}
      project_name: admin
      user_domain_name: Default
      project_domain_name: Default
    region_name: RegionOne
    identity_api_version: 3
    cacert: {}
",
            quoted(&self.auth_url()),
            quoted(self.password),
            quoted(&self.cacert())
        )
    }

    fn openrc(&self) -> String {
        let quoted = |text: &str| format!("'{}'", text.replace('\'', r"'\''"));
        let variables = [
            ("OS_AUTH_URL", self.auth_url()),
            ("OS_USERNAME", "admin".into()),
            ("OS_PASSWORD", self.password.into()),
            ("OS_PROJECT_NAME", "admin".into()),
            ("OS_USER_DOMAIN_NAME", "Default".into()),
            ("OS_PROJECT_DOMAIN_NAME", "Default".into()),
            ("OS_REGION_NAME", "RegionOne".into()),
            ("OS_IDENTITY_API_VERSION", "3".into()),
            ("OS_CACERT", self.cacert()),
        ];
        variables.iter().map(|(name, value)| format!("export {name}={}\n", quoted(value))).collect()
    }

    fn credentials(&self) -> String {
        serde_json::json!({
            "auth_url": self.auth_url(),
            "username": "admin",
            "password": self.password,
            "project_name": "admin",
            "cacert": self.cacert(),
        })
        .to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(address: &str, pool: Option<&str>) -> Args {
        Args {
            data_dir: PathBuf::new(),
            host: HostArgs {
                address: address.parse().unwrap(),
                name: Some("node1".into()),
                api_port: 8774,
                raft_port: 8775,
                storage_port: 8776,
                vxlan_port: 4789,
            },
            floating_pool: pool.map(str::to_owned),
            admin_password_file: None,
        }
    }

    #[test]
    fn the_floating_pool_lies_beside_the_hosts_addresses() {
        let check = |address: &str, pool: Option<&str>, expected: Result<&str, &str>| {
            let found = floating_pool(&args(address, pool)).map_err(|error| format!("{error:#}"));
            match (found, expected) {
                (Ok(found), Ok(expected)) => assert_eq!(found, expected),
                (Err(found), Err(expected)) => assert!(found.contains(expected), "{found}"),
                (found, expected) => panic!("{found:?} instead of {expected:?}"),
            }
        };
        check("127.77.0.1", None, Ok("127.77.1.0/24"));
        check("10.0.0.11", None, Ok("127.77.1.0/24"));
        check("127.0.0.11", Some("127.9.0.0/16"), Ok("127.9.0.0/16"));
        check("127.0.0.11", Some("10.0.0.0/24"), Err("no loopback range"));
        check("127.0.0.11", Some("127.0.0.1/24"), Err("a network's address"));
        check("127.0.0.11", Some("127.0.0.0/24"), Err("own address"));
        check("127.0.0.11", Some("nonsense"), Err("ADDRESS/PREFIX"));
    }

    #[test]
    fn an_openrc_survives_any_password() {
        let config = crate::config::example();
        let sign_in = SignIn { config: &config, path: Path::new("/d"), password: "a'b $c" };
        assert!(sign_in.openrc().contains(r"export OS_PASSWORD='a'\''b $c'"));
        assert!(sign_in.clouds_yaml().contains("password: \"a'b $c\""));
    }
}

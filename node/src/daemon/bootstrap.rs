//! The first start of a cluster's first node: what `init` left for it, and the command that makes
//! the cluster.

use super::capacity::Capacity;
use crate::config::NodeConfig;
use crate::data_directory::DataDirectory;
use anyhow::{Context, Result};
use controller::api::{PasswordCost, hash_password};
use controller::ids::HostId;
use controller::state::cluster::{ClusterCommand, HostAddresses, Init, NewHost};
use controller::state::{Command, FEATURE_LEVEL};
use serde::{Deserialize, Serialize};

/// What the first start needs and nothing later does. It is removed once the cluster is made.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct FirstStart {
    /// The administrator's password; the log gets its hash.
    pub(crate) admin_password: String,
    /// Range of the external network.
    pub(crate) floating_pool: String,
}

impl FirstStart {
    /// Its file in a data directory.
    pub(crate) const FILE_NAME: &'static str = "first-start.json";

    /// Reads it; `None` once the cluster was made.
    pub(crate) fn read(directory: &DataDirectory) -> Result<Option<FirstStart>> {
        read(directory, Self::FILE_NAME)
    }

    /// Forgets it.
    pub(crate) fn remove(directory: &DataDirectory) -> Result<()> {
        remove(directory, Self::FILE_NAME)
    }

    /// The command that makes the cluster. Slow by design: it hashes a password.
    pub(crate) fn command(&self, config: &NodeConfig, capacity: Capacity) -> Result<Command> {
        let hash = hash_password(&self.admin_password, PasswordCost::default())?;
        Ok(Command::Cluster(ClusterCommand::Init(Box::new(Init {
            cluster_id: hyphenated(&config.cluster_id)?,
            name: "trine".into(),
            region: "RegionOne".into(),
            host: NewHost {
                name: config.name.clone(),
                addresses: addresses(config),
                capacity: capacity.into(),
                feature_level: FEATURE_LEVEL,
            },
            feature_level: FEATURE_LEVEL,
            admin_name: "admin".into(),
            admin_password_hash: hash,
            floating_pool: self.floating_pool.parse().context("the floating pool")?,
        }))))
    }
}

/// What the first start after a restore or a recovery needs.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Adoption {
    /// The host that survived; none where this one is new and the state comes from a backup.
    pub(crate) survivor: Option<HostId>,
    /// What this host has.
    pub(crate) capacity: Capacity,
}

impl Adoption {
    /// Its file in a data directory.
    pub(crate) const FILE_NAME: &'static str = "adoption.json";

    /// Reads it; `None` once the state was adopted, and where it need not be.
    pub(crate) fn read(directory: &DataDirectory) -> Result<Option<Adoption>> {
        read(directory, Self::FILE_NAME)
    }

    /// Forgets it.
    pub(crate) fn remove(directory: &DataDirectory) -> Result<()> {
        remove(directory, Self::FILE_NAME)
    }

    /// The command with which the state goes on under this node's cluster id.
    pub(crate) fn command(&self, config: &NodeConfig) -> Result<Command> {
        let new = NewHost {
            name: config.name.clone(),
            addresses: addresses(config),
            capacity: self.capacity.into(),
            feature_level: FEATURE_LEVEL,
        };
        Ok(Command::Cluster(ClusterCommand::Adopt {
            cluster_id: hyphenated(&config.cluster_id)?,
            survivor: self.survivor,
            host: self.survivor.is_none().then(|| Box::new(new)),
        }))
    }
}

fn read<T: serde::de::DeserializeOwned>(
    directory: &DataDirectory,
    name: &str,
) -> Result<Option<T>> {
    let path = directory.join(name);
    match std::fs::read(&path) {
        Ok(text) => serde_json::from_slice(&text)
            .map(Some)
            .with_context(|| format!("{} is malformed", path.display())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
}

fn remove(directory: &DataDirectory, name: &str) -> Result<()> {
    let path = directory.join(name);
    std::fs::remove_file(&path)
        .and_then(|()| crate::files::sync_parent(&path))
        .with_context(|| format!("cannot remove {}", path.display()))
}

fn hyphenated(hex: &str) -> Result<String> {
    Ok(uuid::Uuid::try_parse(hex)?.hyphenated().to_string())
}

/// Where this host is reached.
pub(crate) fn addresses(config: &NodeConfig) -> HostAddresses {
    HostAddresses {
        api: config.api(),
        raft: config.raft(),
        storage: config.storage(),
        tunnel: config.vtep(),
        server_name: crate::pki::server_name(config.node_id, &config.cluster_id),
    }
}

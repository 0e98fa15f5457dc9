//! `node.toml`: what one host's node is started with.

use serde::{Deserialize, Serialize};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

/// Name of the file in a data directory.
pub(crate) const FILE_NAME: &str = "node.toml";

/// The configuration of a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct NodeConfig {
    /// The node's id in the cluster, given by `init` or `join`.
    pub(crate) node_id: u64,
    /// The cluster's id, 32 hexadecimal digits.
    pub(crate) cluster_id: String,
    /// The host's name.
    pub(crate) name: String,
    /// The address everything binds to.
    pub(crate) address: IpAddr,
    /// TCP port of the API.
    #[serde(default = "api_port")]
    pub(crate) api_port: u16,
    /// TCP port of consensus traffic.
    #[serde(default = "raft_port")]
    pub(crate) raft_port: u16,
    /// TCP port of volumes and images for other hosts.
    #[serde(default = "storage_port")]
    pub(crate) storage_port: u16,
    /// UDP port of the VXLAN tunnels.
    #[serde(default = "vxlan_port")]
    pub(crate) vxlan_port: u16,
    /// What clients are told as the API's base, where it is not `https://ADDRESS:PORT`.
    #[serde(default)]
    pub(crate) public_url: Option<String>,
    /// vCPUs offered to the scheduler; 0: as many as the machine has.
    #[serde(default)]
    pub(crate) vcpus: u32,
    /// Memory offered to the scheduler, MiB; 0: the machine's less `reserved_ram_mib`.
    #[serde(default)]
    pub(crate) ram_mib: u64,
    /// Memory kept for the host itself where `ram_mib` is 0, MiB.
    #[serde(default = "reserved_ram_mib")]
    pub(crate) reserved_ram_mib: u64,
    /// Disk offered to the scheduler, GiB; 0: what the data directory's file system holds.
    #[serde(default)]
    pub(crate) disk_gib: u64,
}

fn api_port() -> u16 {
    8774
}

fn raft_port() -> u16 {
    8775
}

fn storage_port() -> u16 {
    8776
}

fn vxlan_port() -> u16 {
    4789
}

fn reserved_ram_mib() -> u64 {
    1024
}

/// Why a configuration can't be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The file is not readable.
    #[error("cannot read {path}: is this a data directory made by `trine init` or `trine join`?")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Not TOML, an unknown key or a value of the wrong type.
    #[error("{path} is malformed: {message}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Line, key and what would be right.
        message: String,
    },
    /// A value that can't work.
    #[error("{path}: {key} is {value}; {rule}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// The key.
        key: &'static str,
        /// Its value.
        value: String,
        /// What would be right.
        rule: &'static str,
    },
}

impl NodeConfig {
    /// Reads and checks `node.toml` of a data directory.
    pub(crate) fn read(data_directory: &Path) -> Result<NodeConfig, Error> {
        let path = data_directory.join(FILE_NAME);
        let text = std::fs::read_to_string(&path)
            .map_err(|source| Error::Read { path: path.clone(), source })?;
        Self::parse(&path, &text)
    }

    fn parse(path: &Path, text: &str) -> Result<NodeConfig, Error> {
        let config: NodeConfig = toml::from_str(text).map_err(|error| Error::Malformed {
            path: path.to_owned(),
            message: error.to_string().trim().to_owned(),
        })?;
        match config.problem() {
            None => Ok(config),
            Some((key, value, rule)) => {
                Err(Error::Invalid { path: path.to_owned(), key, value, rule })
            }
        }
    }

    /// The first thing that can't work: key, value, rule.
    pub(crate) fn problem(&self) -> Option<(&'static str, String, &'static str)> {
        let hex_digits = |text: &str| text.chars().all(|c| matches!(c, '0'..='9' | 'a'..='f'));
        if self.node_id == 0 {
            return Some(("node_id", "0".into(), "ids begin at 1"));
        }
        if self.cluster_id.len() != 32 || !hex_digits(&self.cluster_id) {
            let rule = "it must be 32 lower-case hexadecimal digits";
            return Some(("cluster_id", format!("{:?}", self.cluster_id), rule));
        }
        if self.name.is_empty() || self.name.len() > 255 || self.name.contains(char::is_whitespace)
        {
            let rule = "it must have 1 to 255 characters and no blanks";
            return Some(("name", format!("{:?}", self.name), rule));
        }
        if self.address.is_unspecified() || self.address.is_multicast() {
            let rule = "it must be one address of this host, never a wildcard";
            return Some(("address", self.address.to_string(), rule));
        }
        let ports = [
            ("api_port", self.api_port),
            ("raft_port", self.raft_port),
            ("storage_port", self.storage_port),
            ("vxlan_port", self.vxlan_port),
        ];
        if let Some((key, _)) = ports.iter().find(|(_, port)| *port == 0) {
            return Some((key, "0".into(), "others must know it: choose one from 1 to 65535"));
        }
        let same = ports[..3]
            .iter()
            .enumerate()
            .find(|(n, (_, port))| ports[..*n].iter().any(|(_, earlier)| earlier == port));
        if let Some((_, (key, port))) = same {
            return Some((key, port.to_string(), "api, raft and storage need a port each"));
        }
        if self.public_url.as_ref().is_some_and(|url| !url.starts_with("https://")) {
            return Some((
                "public_url",
                format!("{:?}", self.public_url),
                "it begins with https://",
            ));
        }
        None
    }

    /// Where the API listens.
    pub(crate) fn api(&self) -> SocketAddr {
        SocketAddr::new(self.address, self.api_port)
    }

    /// Where consensus traffic is taken.
    pub(crate) fn raft(&self) -> SocketAddr {
        SocketAddr::new(self.address, self.raft_port)
    }

    /// Where storage serves other hosts.
    pub(crate) fn storage(&self) -> SocketAddr {
        SocketAddr::new(self.address, self.storage_port)
    }

    /// The tunnel endpoint.
    pub(crate) fn vtep(&self) -> SocketAddr {
        SocketAddr::new(self.address, self.vxlan_port)
    }

    /// The API's base as clients are told it.
    pub(crate) fn base_url(&self) -> String {
        self.public_url.clone().unwrap_or_else(|| format!("https://{}", self.api()))
    }

    /// The cluster's id as bytes.
    pub(crate) fn cluster_bytes(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        hex::decode_to_slice(&self.cluster_id, &mut bytes).expect("checked when it was read");
        bytes
    }

    /// The file's text, each key with its meaning.
    pub(crate) fn text(&self) -> String {
        let NodeConfig { node_id, cluster_id, name, address, .. } = self;
        let NodeConfig { api_port, raft_port, storage_port, vxlan_port, .. } = self;
        let NodeConfig { vcpus, ram_mib, reserved_ram_mib, disk_gib, .. } = self;
        let public_url = match &self.public_url {
            Some(url) => format!("public_url = {}", quoted(url)),
            None => "# public_url = \"https://cloud.example.org\"".into(),
        };
        format!(
            "# Configuration of one trine node; read once at its start.

# The node's id and its cluster's, given by `trine init` or `trine join`. Never change them.
node_id = {node_id}
cluster_id = {}

# The host's name, as the API shows it.
name = {}

# The address everything of this host binds to and the other hosts reach it at. No default.
address = \"{address}\"

# TCP port of the API. Default: 8774
api_port = {api_port}
# TCP port for the other nodes' consensus traffic. Default: 8775
raft_port = {raft_port}
# TCP port on which other hosts reach this host's volumes and images. Default: 8776
storage_port = {storage_port}
# UDP port of the VXLAN tunnels. Default: 4789
vxlan_port = {vxlan_port}

# Base URL in the service catalog. Default: https://ADDRESS:API_PORT
{public_url}

# What the scheduler may place here. 0 (the default of each): what the machine has; of its
# memory less reserved_ram_mib (default: 1024).
vcpus = {vcpus}
ram_mib = {ram_mib}
reserved_ram_mib = {reserved_ram_mib}
disk_gib = {disk_gib}
",
            quoted(cluster_id),
            quoted(name),
        )
    }
}

fn quoted(text: &str) -> String {
    toml::Value::String(text.into()).to_string()
}

#[cfg(test)]
pub(crate) fn example() -> NodeConfig {
    NodeConfig {
        node_id: 1,
        cluster_id: "00112233445566778899aabbccddeeff".into(),
        name: "node1".into(),
        address: [127, 0, 0, 11].into(),
        api_port: 8774,
        raft_port: 8775,
        storage_port: 8776,
        vxlan_port: 4789,
        public_url: None,
        vcpus: 0,
        ram_mib: 0,
        reserved_ram_mib: 1024,
        disk_gib: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<NodeConfig, String> {
        NodeConfig::parse(Path::new("node.toml"), text).map_err(|error| error.to_string())
    }

    #[test]
    fn the_written_text_reads_back_as_the_same_configuration() {
        for public_url in [None, Some("https://cloud \"x\"".to_string())] {
            let config = NodeConfig { public_url, ..example() };
            assert_eq!(parse(&config.text()).unwrap(), config);
        }
    }

    #[test]
    fn only_identity_and_address_are_needed() {
        let text = "node_id = 1\ncluster_id = \"00112233445566778899aabbccddeeff\"\n\
                    name = \"node1\"\naddress = \"127.0.0.11\"\n";
        assert_eq!(parse(text).unwrap(), example());
    }

    #[test]
    fn an_error_names_file_key_and_rule() {
        let check = |from: &str, to: &str, expected: &[&str]| {
            let text = example().text().replace(from, to);
            let message = parse(&text).unwrap_err();
            for part in expected {
                assert!(message.contains(part), "{message:?} lacks {part:?}");
            }
        };
        check(
            "address = \"127.0.0.11\"",
            "address = \"0.0.0.0\"",
            &["node.toml", "address", "wildcard"],
        );
        check("api_port = 8774", "api_port = 0", &["api_port", "1 to 65535"]);
        check("raft_port = 8775", "raft_port = 8774", &["raft_port", "a port each"]);
        check("api_port = 8774", "apiport = 8774", &["apiport"]);
        check("node_id = 1", "node_id = 0", &["node_id", "begin at 1"]);
        check("00112233", "0011223z", &["cluster_id", "hexadecimal"]);
    }
}

//! How a host joins: it shows a one-time token to a node of the cluster, over TLS pinned to the
//! authority's fingerprint, and gets its id, certificate and the cluster's keys.

mod ask;

pub(crate) use ask::ask;

use crate::cluster_keys::{ClusterKey, ClusterKeys};
use crate::daemon::capacity::Capacity;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::{IpAddr, SocketAddr};

/// Path of the request on a node's API.
pub(crate) const PATH: &str = "/trine/v1/join";
/// File of a joined data directory: whom to ask for membership at the first start.
pub(crate) const PEERS_FILE_NAME: &str = "peers.json";

/// What a host asks.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct JoinRequest {
    /// The token's secret.
    pub(crate) secret: String,
    /// The host's public key: a point of P-256, hexadecimal.
    pub(crate) public_key: String,
    /// The host's name.
    pub(crate) name: String,
    /// Its address.
    pub(crate) address: IpAddr,
    /// Its ports.
    pub(crate) api_port: u16,
    /// Consensus.
    pub(crate) raft_port: u16,
    /// Volumes and images.
    pub(crate) storage_port: u16,
    /// Tunnels.
    pub(crate) vxlan_port: u16,
    /// What the scheduler may place on it.
    pub(crate) capacity: Capacity,
    /// The greatest feature level that its program supports.
    #[serde(default = "first_level")]
    pub(crate) feature_level: u32,
}

/// What a program supports that doesn't say.
fn first_level() -> u32 {
    1
}

/// What it gets.
#[derive(Serialize, Deserialize)]
pub(crate) struct JoinAnswer {
    /// Its id.
    pub(crate) node_id: u64,
    /// Its certificate, PEM.
    pub(crate) certificate_pem: String,
    /// The authority's certificate, PEM.
    pub(crate) authority_pem: String,
    /// The authority's key, PEM.
    pub(crate) authority_key_pem: String,
    /// The cluster's key in use.
    cluster_key: ClusterKey,
    /// Those that are being retired.
    #[serde(default)]
    retiring_keys: Vec<ClusterKey>,
    /// The nodes it may ask for membership.
    pub(crate) peers: Vec<Peer>,
}

/// A node of the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Peer {
    /// Its id.
    pub(crate) id: u64,
    /// Where it takes consensus traffic.
    pub(crate) address: SocketAddr,
}

impl JoinAnswer {
    /// An answer with the cluster's keys in it.
    pub(crate) fn new(
        node_id: u64,
        certificate_pem: String,
        authority: &crate::pki::Authority,
        keys: &ClusterKeys,
        peers: Vec<Peer>,
    ) -> JoinAnswer {
        JoinAnswer {
            node_id,
            certificate_pem,
            authority_pem: authority.certificate_pem.clone(),
            authority_key_pem: authority.key_pem().to_owned(),
            cluster_key: keys.first().clone(),
            retiring_keys: keys.in_use().skip(1).cloned().collect(),
            peers,
        }
    }

    /// The cluster's keys.
    pub(crate) fn cluster_keys(&self) -> ClusterKeys {
        ClusterKeys::of(&self.cluster_key, &self.retiring_keys)
    }
}

impl fmt::Debug for JoinRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinRequest").field("name", &self.name).finish_non_exhaustive()
    }
}

impl fmt::Debug for JoinAnswer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinAnswer").field("node_id", &self.node_id).finish_non_exhaustive()
    }
}

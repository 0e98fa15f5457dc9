//! Commands on the cluster itself.

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

use super::{Capacity, HostAddresses};
use crate::ids::HostId;

/// A command on the cluster.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum ClusterCommand {
    /// Makes the cluster: its first host, the default domain, roles, the admin and the
    /// external network. Only once.
    Init(Box<Init>),
    /// Permits one host to join.
    IssueJoinToken {
        /// Hex SHA-256 of the token's secret; the secret itself is never in the log.
        hash: String,
        /// Until when it is good.
        expires_ms: u64,
        /// The dead host whose place the new one takes.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        replaces: Option<HostId>,
    },
    /// Admits a host, using up a token. The outcome is the new host.
    RegisterHost {
        /// Hex SHA-256 of the token's secret.
        token_hash: String,
        /// The host.
        host: Box<NewHost>,
    },
    /// A host that started says where it is reached and what it has.
    UpdateHost {
        /// The host.
        id: HostId,
        /// Where it is reached now.
        addresses: HostAddresses,
        /// What it has now.
        capacity: Capacity,
    },
    /// Enables, disables or declares dead.
    SetHostService {
        /// The host.
        id: HostId,
        /// Nothing new is placed there.
        disabled: Option<bool>,
        /// Why.
        disabled_reason: Option<String>,
        /// An operator says that it is dead.
        forced_down: Option<bool>,
    },
    /// The state goes on under another cluster id: restored from a backup on a new host, or with
    /// the one host that survived. All other hosts are dead to it.
    Adopt {
        /// The new cluster's UUID.
        cluster_id: String,
        /// The host that survived …
        survivor: Option<HostId>,
        /// … or the new one. The outcome is this host.
        host: Option<Box<NewHost>>,
    },
}

/// What `Init` needs; the ids of domain, roles, users and networks follow from the
/// cluster's id.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Init {
    /// The cluster's UUID.
    pub cluster_id: String,
    /// Its name.
    pub name: String,
    /// The region its catalog shows, usually `RegionOne`.
    pub region: String,
    /// The first host; it gets id 1.
    pub host: NewHost,
    /// The administrator's name, usually `admin`.
    pub admin_name: String,
    /// The hash of the administrator's password (PHC string).
    pub admin_password_hash: String,
    /// The external network's range, on loopback for the user-mode uplink.
    pub floating_pool: Ipv4Net,
}

/// A host that wants in.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NewHost {
    /// Its name.
    pub name: String,
    /// Where it is reached.
    pub addresses: HostAddresses,
    /// What it has.
    pub capacity: Capacity,
}

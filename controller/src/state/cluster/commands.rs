//! Commands on the cluster itself.

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

use super::{Capacity, HostAddresses};
use crate::ids::HostId;
use crate::seal::Sealed;

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
        /// The greatest feature level that its program supports.
        #[serde(default = "super::state::first_level")]
        feature_level: u32,
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
        /// Whether the cloud evacuates its servers by itself when it fails.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        evacuate: Option<bool>,
    },
    /// Cuts a silent host off. Proposed by the leader alone, when the host's lease has surely run
    /// out and no other is granted while this is under way.
    FenceHost {
        /// The host.
        id: HostId,
        /// The fence's epoch: one more than the host's last.
        epoch: u64,
    },
    /// Observed by the host itself: it has ended every guest that is no longer placed on it.
    HostReturned {
        /// The host.
        id: HostId,
        /// The fence that it saw.
        epoch: u64,
    },
    /// Takes a host out of the cluster for good; its id is never given again.
    RemoveHost {
        /// The host.
        id: HostId,
        /// Also with servers, volumes or the only copy of an image: servers are in ERROR then,
        /// volumes in error, and such images wait for their content again.
        force: bool,
    },
    /// Raises the feature level, once the program of every host supports it: the leader's finding.
    RaiseFeatureLevel {
        /// The new level.
        level: u32,
        /// The id that the next host gets, as the leader saw it: refused when one joined since.
        next_host_id: u64,
    },
    /// Seals with another key from now on. Every node has it in its key file by then.
    RotateKey {
        /// The id of the key that sealed so far.
        from: String,
        /// The id of the new one.
        to: String,
    },
    /// A key that seals nothing any more is of no use from now on.
    RetireKey {
        /// Its id.
        id: String,
    },
    /// Rotates the keys of tokens.
    RotateTokenKeys {
        /// How often they were rotated before.
        rotations: u64,
        /// The new staged key.
        staged: Sealed,
    },
    /// The keys of tokens, sealed with the current key: the same keys in the same places.
    ResealTokenKeys {
        /// How often they were rotated.
        rotations: u64,
        /// The staged, the primary and the secondary keys.
        keys: Vec<Sealed>,
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
    /// The feature level that the cluster starts with.
    #[serde(default = "super::state::first_level")]
    pub feature_level: u32,
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
    /// The greatest feature level that its program supports.
    #[serde(default = "super::state::first_level")]
    pub feature_level: u32,
}

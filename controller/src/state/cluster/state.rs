//! What the cluster knows of itself: its hosts and the tokens that admit new ones.

use std::net::SocketAddr;

use imbl::OrdMap;
use serde::{Deserialize, Serialize};

use crate::ids::HostId;
use crate::seal::Sealed;

/// The cluster.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Cluster {
    /// The cluster's UUID; empty before `Init`.
    pub id: String,
    /// Its name.
    pub name: String,
    /// The region its catalog shows.
    pub region: String,
    /// The hosts, removed ones absent.
    pub hosts: OrdMap<HostId, Host>,
    /// Tokens for joining, by the hash of their secret.
    pub join_tokens: OrdMap<String, JoinToken>,
    /// The id the next host gets. Only grows: a host's id is never reused.
    pub next_host_id: u64,
    /// Which commands are understood and what they do (`state::level`). Raised only when the
    /// program of every host supports it.
    #[serde(default = "first_level")]
    pub feature_level: u32,
    /// Which keys seal secrets.
    #[serde(default)]
    pub keys: KeyRing,
    /// The keys that tokens are made with.
    #[serde(default)]
    pub token_keys: TokenKeyRing,
}

/// The ids of the cluster's keys; the keys themselves are in each node's key file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyRing {
    /// The one that seals; none before the first rotation, when there is one key.
    pub current: Option<String>,
    /// Keys that still seal something; the oldest first.
    pub retiring: Vec<String>,
    /// Keys that nothing uses any more, for the nodes to forget; the oldest first.
    pub retired: Vec<String>,
}

/// Fernet keys for tokens, as Keystone rotates them. Each rotation makes a new staged key, the
/// staged one primary and the primary one secondary.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenKeyRing {
    /// How often they were rotated.
    pub rotations: u64,
    /// Verifies already, and makes tokens after the next rotation.
    pub staged: Option<Sealed>,
    /// Makes tokens; before the second rotation a key derived from the cluster's key does.
    pub primary: Option<Sealed>,
    /// Verify still; the newest first.
    pub secondary: Vec<Sealed>,
    /// When they were rotated last, by the time that the leader stamped; 0 if nobody knows.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub rotated_ms: u64,
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// What programs before feature levels support.
pub(super) fn first_level() -> u32 {
    1
}

/// Where a host is reached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostAddresses {
    /// Its HTTPS API.
    pub api: SocketAddr,
    /// Raft between nodes.
    pub raft: SocketAddr,
    /// Its storage process, for other hosts (NBD over TLS).
    pub storage: SocketAddr,
    /// Its tunnel end point (VXLAN over UDP).
    pub tunnel: SocketAddr,
    /// The name in its certificate.
    pub server_name: String,
}

/// What a host has to give to guests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capacity {
    /// Logical CPUs.
    pub vcpus: u32,
    /// Memory in MiB.
    pub ram_mib: u64,
    /// Disk in GiB.
    pub disk_gib: u64,
}

/// A host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    /// Its id.
    pub id: HostId,
    /// Its name, unique in the cluster.
    pub name: String,
    /// Where it is reached.
    pub addresses: HostAddresses,
    /// What it has to give.
    pub capacity: Capacity,
    /// The availability zone it belongs to.
    pub availability_zone: String,
    /// True when nothing new is to be placed on it.
    pub disabled: bool,
    /// Why it is disabled.
    pub disabled_reason: Option<String>,
    /// True when an operator declared it dead.
    pub forced_down: bool,
    /// When it joined.
    pub registered_ms: u64,
    /// The host that takes its place: this one is dead for good.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replaced_by: Option<HostId>,
    /// Cut off: the epoch of the fence. Its lease has run out, so none of its guests changes a
    /// disk, and nothing is placed on it until it reports that it has returned.
    #[serde(default)]
    pub fenced: Option<u64>,
    /// Counts its fences.
    #[serde(default)]
    pub fence_epoch: u64,
    /// Its servers are evacuated by the cloud itself when it fails.
    #[serde(default)]
    pub evacuate: bool,
    /// The greatest feature level that its program supports.
    #[serde(default = "first_level")]
    pub feature_level: u32,
}

impl Host {
    /// True when others may act in its place: it is fenced, or an operator declared it dead.
    pub fn is_out(&self) -> bool {
        self.fenced.is_some() || self.forced_down
    }

    /// Why nothing may be placed on it, if so.
    pub(crate) fn closed(&self) -> Option<&'static str> {
        match self {
            Self { fenced: Some(_), .. } => Some("fenced"),
            Self { forced_down: true, .. } => Some("forced down"),
            Self { disabled: true, .. } => Some("disabled"),
            _ => None,
        }
    }
}

/// A one-time permission to join.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinToken {
    /// Until when it is good.
    pub expires_ms: u64,
    /// The host that used it.
    pub used_by: Option<HostId>,
    /// The host whose place the new one takes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replaces: Option<HostId>,
}

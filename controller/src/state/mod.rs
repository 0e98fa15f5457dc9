//! The replicated state: plain data, changed only by `State::apply`.
//!
//! Pure: no clock, no randomness, no I/O, no iteration over a hash map. Ids, times and
//! placements are in the commands. `apply` checks everything first and then changes, so
//! a rejection leaves the state as it was.

pub mod cluster;
pub mod compute;
pub mod identity;
pub mod image;
pub mod network;
pub mod volume;

mod command;
mod outcome;
mod quota;

use serde::{Deserialize, Serialize};

pub use command::{Command, DecodeError, ENCODING_VERSION, decode_result, encode_result};
pub use outcome::{OUTCOMES_MAX, Outcome, Outcomes, Rejection, RejectionKind};
pub use quota::{QuotaCommand, QuotaResource, Quotas, UNLIMITED};

/// Everything the cloud agrees on. Cloning is cheap: the collections are shared.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// The latest time that a command was stamped with; never goes back.
    pub time_ms: u64,
    /// The index of the last command that was applied.
    pub applied_index: u64,
    /// The cluster and its hosts.
    pub cluster: cluster::Cluster,
    /// Domains, projects, users, roles.
    pub identity: identity::Identity,
    /// The image catalog.
    pub image: image::Images,
    /// Flavors, keypairs, servers.
    pub compute: compute::Compute,
    /// Volumes.
    pub volume: volume::Volumes,
    /// Networks, ports, security groups, floating IPs.
    pub network: network::Networking,
    /// Limits and usage.
    pub quota: Quotas,
    /// What the last commands came to.
    pub outcomes: Outcomes,
}

impl State {
    /// The state as bytes, for a snapshot.
    pub fn snapshot(&self) -> Vec<u8> {
        command::encode(self)
    }

    /// The state that a snapshot holds.
    ///
    /// # Errors
    /// When the bytes are of a later version or damaged.
    pub fn restore(bytes: &[u8]) -> Result<Self, DecodeError> {
        command::decode(bytes)
    }
}

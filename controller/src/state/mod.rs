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
mod index;
mod invariants;
mod level;
pub mod limits;
mod outcome;
mod quota;
mod sizes;

#[cfg(test)]
mod fencing_tests;
#[cfg(test)]
pub(crate) mod fixture;
#[cfg(test)]
mod golden;
#[cfg(test)]
mod growth_tests;
#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

pub use command::{Command, DecodeError, ENCODING_VERSION, decode_result, encode_result};
pub use level::FEATURE_LEVEL;
pub use outcome::{OUTCOMES_MAX, Outcome, Outcomes, Rejection, RejectionKind};
pub use quota::{QuotaCommand, QuotaResource, Quotas, UNLIMITED};
pub use sizes::Size;

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
    /// Look-ups; follows from the rest.
    #[serde(skip)]
    pub(crate) index: index::Index,
}

impl State {
    /// Applies a command that the cluster agreed on. A command whose id was seen before is
    /// not applied again: it comes to what it came to the first time.
    ///
    /// # Errors
    /// When the command is refused; the state is then as it was.
    pub fn apply(
        &mut self,
        index: u64,
        time_ms: u64,
        command_id: [u8; 16],
        command: &Command,
    ) -> Result<Outcome, Rejection> {
        self.applied_index = self.applied_index.max(index);
        if let Some(outcome) = self.outcomes.get(&command_id) {
            return outcome.clone();
        }
        self.time_ms = self.time_ms.max(time_ms);
        let outcome = self.dispatch(command);
        // A stale placement is proposed again under the same id, placed anew.
        let stale = matches!(&outcome, Err(why) if why.kind == RejectionKind::PlacementStale);
        if !stale {
            self.outcomes.keep(index, command_id, &outcome);
        }
        outcome
    }

    /// Applies a command as its bytes stand in the log, and returns the bytes of what it came to.
    /// Bytes that can't be decoded are refused, the same on every node that runs this version; a
    /// newer node's command can't be in the log before all nodes know it.
    pub fn apply_encoded(
        &mut self,
        index: u64,
        time_ms: u64,
        command_id: [u8; 16],
        command: &[u8],
    ) -> Vec<u8> {
        let result = match Command::decode(command) {
            Ok(command) => self.apply(index, time_ms, command_id, &command),
            Err(error) => {
                Err(Rejection::new(RejectionKind::Invalid, "command", index, error.to_string()))
            }
        };
        encode_result(&result)
    }

    fn dispatch(&mut self, command: &Command) -> Result<Outcome, Rejection> {
        let starts = matches!(command, Command::Cluster(cluster::ClusterCommand::Init(_)));
        if self.cluster.id.is_empty() && !starts {
            return Err(Rejection::state("cluster", "", "The cluster isn't initialised yet."));
        }
        if !starts {
            self.cluster.admits(command)?;
        }
        match command {
            Command::Cluster(command) => self.apply_cluster(command),
            Command::Identity(command) => self.apply_identity(command),
            Command::Image(command) => self.apply_image(command),
            Command::Compute(command) => self.apply_compute(command),
            Command::Volume(command) => self.apply_volume(command),
            Command::Network(command) => self.apply_network(command),
            Command::Quota(command) => {
                let more = match command {
                    QuotaCommand::Set { limits, .. } => limits.len(),
                    QuotaCommand::Reset(_) => 0,
                };
                let wanted = self.quota.limits.len() + more;
                self.room_within(wanted, limits::QUOTA_LIMITS_MAX, "quota limit")?;
                self.quota.apply(command);
                Ok(Outcome::Done)
            }
        }
    }

    /// The state as bytes, for a snapshot.
    pub fn snapshot(&self) -> Vec<u8> {
        command::encode(self)
    }

    /// The state that a snapshot holds.
    ///
    /// # Errors
    /// When the bytes are of a later version or feature level, or damaged.
    pub fn restore(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut state: Self = command::decode(bytes)?;
        if state.cluster.feature_level > FEATURE_LEVEL {
            return Err(DecodeError::FeatureLevel(state.cluster.feature_level));
        }
        state.index = index::Index::of(&state);
        Ok(state)
    }

    /// A digest of everything: equal on every node that has applied the same commands.
    pub fn state_hash(&self) -> [u8; 32] {
        use sha2::{Digest, Sha256};
        Sha256::digest(self.snapshot()).into()
    }
}

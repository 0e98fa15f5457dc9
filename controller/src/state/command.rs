//! Commands as a whole, and their bytes in the log.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::cluster::ClusterCommand;
use super::compute::ComputeCommand;
use super::identity::IdentityCommand;
use super::image::ImageCommand;
use super::level::FEATURE_LEVEL;
use super::network::NetworkCommand;
use super::outcome::{Outcome, Rejection};
use super::quota::QuotaCommand;
use super::volume::VolumeCommand;

/// The version of a command's, an outcome's and a snapshot's bytes. It grows when they
/// change in a way that fields with defaults can't absorb.
pub const ENCODING_VERSION: u16 = 1;

/// What can be proposed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Command {
    /// On the cluster itself.
    Cluster(ClusterCommand),
    /// On identity.
    Identity(IdentityCommand),
    /// On images.
    Image(ImageCommand),
    /// On compute.
    Compute(ComputeCommand),
    /// On volumes.
    Volume(VolumeCommand),
    /// On networking.
    Network(NetworkCommand),
    /// On quotas.
    Quota(QuotaCommand),
}

/// Why bytes aren't what they should be.
#[derive(Debug, Error)]
pub enum DecodeError {
    /// Made by a later version.
    #[error("encoded with version {0}, this program reads up to {ENCODING_VERSION}")]
    Version(u16),
    /// A state that this program would change otherwise than the others.
    #[error(
        "the cluster is at feature level {0}, this program supports up to {FEATURE_LEVEL}: install a newer trine on this host"
    )]
    FeatureLevel(u32),
    /// Not understood.
    #[error("can't decode")]
    Malformed(#[source] rmp_serde::decode::Error),
}

#[derive(Serialize)]
struct Versioned<'a, T> {
    version: u16,
    body: &'a T,
}

#[derive(Deserialize)]
struct Version {
    version: u16,
}

#[derive(Deserialize)]
struct Body<T> {
    body: T,
}

/// Encodes with the version in front.
pub(crate) fn encode<T: Serialize>(body: &T) -> Vec<u8> {
    encode_as(ENCODING_VERSION, body)
}

pub(super) fn encode_as<T: Serialize>(version: u16, body: &T) -> Vec<u8> {
    rmp_serde::to_vec_named(&Versioned { version, body })
        .expect("plain data without a length of its own always encodes")
}

/// Decodes what `encode` made.
pub(crate) fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, DecodeError> {
    let Version { version } = rmp_serde::from_slice(bytes).map_err(DecodeError::Malformed)?;
    if version != ENCODING_VERSION {
        return Err(DecodeError::Version(version));
    }
    let Body { body } = rmp_serde::from_slice(bytes).map_err(DecodeError::Malformed)?;
    Ok(body)
}

impl Command {
    /// Its bytes in the log.
    pub fn encode(&self) -> Vec<u8> {
        encode(self)
    }

    /// The command that these bytes are.
    ///
    /// # Errors
    /// When they are of a later version or damaged.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        decode(bytes)
    }
}

/// The bytes of what a command came to.
pub fn encode_result(result: &Result<Outcome, Rejection>) -> Vec<u8> {
    encode(result)
}

/// What a command came to, from its bytes.
///
/// # Errors
/// When they are of a later version or damaged.
pub fn decode_result(bytes: &[u8]) -> Result<Result<Outcome, Rejection>, DecodeError> {
    decode(bytes)
}

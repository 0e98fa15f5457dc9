//! Commands as a whole, and their bytes in the log.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{DeserializeOwned, Error as _, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
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

/// What was read: the body only where its version is ours, because only then it can be understood.
struct Read<T> {
    version: u16,
    body: Option<T>,
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Read<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(ReadVisitor(PhantomData))
    }
}

/// One pass over the bytes: commands are read on every node, at every write.
struct ReadVisitor<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for ReadVisitor<T> {
    type Value = Read<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a version and a body")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Read<T>, A::Error> {
        let (mut version, mut body) = (None, None);
        while let Some(key) = map.next_key::<&str>()? {
            match key {
                "version" => version = Some(map.next_value()?),
                "body" if version == Some(ENCODING_VERSION) => body = Some(map.next_value()?),
                _ => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        let version = version.ok_or_else(|| A::Error::missing_field("version"))?;
        Ok(Read { version, body })
    }
}

/// Most commands and outcomes have fewer bytes: room for them is made once.
const USUAL_BYTES: usize = 1024;

/// Encodes with the version in front.
pub(crate) fn encode<T: Serialize>(body: &T) -> Vec<u8> {
    encode_as(ENCODING_VERSION, body)
}

pub(super) fn encode_as<T: Serialize>(version: u16, body: &T) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(USUAL_BYTES);
    Versioned { version, body }
        .serialize(&mut rmp_serde::Serializer::new(&mut bytes).with_struct_map())
        .expect("plain data without a length of its own always encodes");
    bytes
}

/// Decodes what `encode` made.
pub(crate) fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, DecodeError> {
    let Read { version, body } = rmp_serde::from_slice(bytes).map_err(DecodeError::Malformed)?;
    if version != ENCODING_VERSION {
        return Err(DecodeError::Version(version));
    }
    let missing = || DecodeError::Malformed(serde::de::Error::missing_field("body"));
    body.ok_or_else(missing)
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

//! Secrets at rest: what the log and its snapshots hold of them is ciphertext.
//!
//! The API seals before it proposes (the random IV must not come from `apply`), the agent
//! opens on the host that needs the secret. The key's id stands before the ciphertext, so
//! that a second key can be added and the first retired.

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// A secret under the cluster's key: `KEY_ID:FERNET_TOKEN`. Its `Debug` shows neither.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Sealed(String);

impl Sealed {
    /// A sealed secret as the state keeps it.
    #[cfg(test)]
    pub(crate) fn from_stored(text: &str) -> Self {
        Self(text.to_owned())
    }
}

impl fmt::Debug for Sealed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Sealed({} bytes)", self.0.len())
    }
}

/// Why a sealed secret can't be opened.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum OpenError {
    /// It was sealed with a key this node doesn't have.
    #[error("the secret was sealed with key {0}, which this node doesn't have")]
    UnknownKey(String),
    /// The ciphertext is damaged or was made with another key of the same id.
    #[error("the sealed secret is damaged")]
    Damaged,
}

/// Seals and opens with the cluster's key.
#[derive(Clone)]
pub struct Sealer {
    key_id: String,
    fernet: fernet::Fernet,
}

impl fmt::Debug for Sealer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sealer").field("key_id", &self.key_id).finish_non_exhaustive()
    }
}

impl Sealer {
    /// A sealer for the cluster key; the key's id is a digest of it.
    pub fn new(key: [u8; 32]) -> Self {
        use sha2::{Digest, Sha256};
        let digest = Sha256::digest([b"trine cluster key id".as_slice(), &key].concat());
        let fernet = fernet::Fernet::new(&URL_SAFE.encode(key))
            .expect("32 bytes in URL-safe base64 are a Fernet key");
        Self { key_id: hex::encode(&digest[..4]), fernet }
    }

    /// Seals `secret` with a fresh random IV.
    pub fn seal(&self, secret: &[u8]) -> Sealed {
        Sealed(format!("{}:{}", self.key_id, self.fernet.encrypt(secret)))
    }

    /// Opens what a sealer with the same key sealed.
    ///
    /// # Errors
    /// When the key is another one or the ciphertext is damaged.
    pub fn open(&self, sealed: &Sealed) -> Result<Vec<u8>, OpenError> {
        let (key_id, token) = sealed.0.split_once(':').ok_or(OpenError::Damaged)?;
        if key_id != self.key_id {
            return Err(OpenError::UnknownKey(key_id.to_owned()));
        }
        self.fernet.decrypt(token).map_err(|_| OpenError::Damaged)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn opens_what_it_sealed_and_never_seals_alike() {
        let sealer = Sealer::new([7; 32]);
        let (one, two) = (sealer.seal(b"secret"), sealer.seal(b"secret"));
        assert_ne!(one, two);
        assert_eq!(sealer.open(&one).as_deref(), Ok(b"secret".as_slice()));
        assert!(!format!("{one:?}").contains(&one.0));
    }

    #[test]
    fn refuses_another_key_and_damage() {
        let sealed = Sealer::new([7; 32]).seal(b"secret");
        assert!(matches!(Sealer::new([8; 32]).open(&sealed), Err(OpenError::UnknownKey(_))));
        let damaged = Sealed(sealed.0[..sealed.0.len() - 4].to_owned());
        assert_eq!(Sealer::new([7; 32]).open(&damaged), Err(OpenError::Damaged));
    }
}

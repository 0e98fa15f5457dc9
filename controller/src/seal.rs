//! Secrets at rest: what the log and its snapshots hold of them is ciphertext.
//!
//! The API seals before it proposes (the random IV must not come from `apply`), the agent
//! opens on the host that needs the secret. The key's id stands before the ciphertext, so
//! that a second key can be added and the first retired.

use std::fmt;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// A secret under the cluster's key: `KEY_ID:FERNET_TOKEN`. Its `Debug` shows neither.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Sealed(String);

impl Sealed {
    /// The id of the key that sealed it.
    pub fn key_id(&self) -> &str {
        self.0.split_once(':').map_or("", |(id, _)| id)
    }

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

/// The most keys that a sealer holds: the one that seals, and those that are being retired.
pub const SEAL_KEYS_MAX: usize = 8;

/// A time that is after every stamp of a Fernet token: what is sealed has no age.
const ANY_TIME: u64 = u64::MAX / 2;

/// A key with its id.
#[derive(Clone)]
struct Key {
    id: String,
    fernet: fernet::Fernet,
}

impl Key {
    fn new(key: &[u8; 32]) -> Self {
        let fernet = fernet::Fernet::new(&URL_SAFE.encode(key))
            .expect("32 bytes in URL-safe base64 are a Fernet key");
        Self { id: key_id(key), fernet }
    }
}

/// The id of a key: a digest of it, which tells nothing about it.
pub fn key_id(key: &[u8; 32]) -> String {
    use sha2::{Digest, Sha256};
    let digest = Sha256::digest([b"trine cluster key id".as_slice(), key].concat());
    hex::encode(&digest[..4])
}

/// Seals with one key and opens with any that it holds. Clones share their keys, so that a
/// rotation reaches everybody who seals.
#[derive(Clone)]
pub struct Sealer {
    keys: Arc<RwLock<Vec<Key>>>,
}

impl fmt::Debug for Sealer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sealer").field("key_ids", &self.key_ids()).finish_non_exhaustive()
    }
}

impl Sealer {
    /// A sealer with one key.
    pub fn new(key: [u8; 32]) -> Self {
        Self { keys: Arc::new(RwLock::new(vec![Key::new(&key)])) }
    }

    /// Holds these keys from now on, the first `SEAL_KEYS_MAX` of them. The one that seals is the
    /// one of the id `current` (`Cluster::keys`), the first where that is none of them.
    pub fn set_keys(&self, keys: &[[u8; 32]], current: Option<&str>) {
        let mut keys: Vec<Key> = keys.iter().take(SEAL_KEYS_MAX).map(Key::new).collect();
        if let Some(place) = keys.iter().position(|key| Some(key.id.as_str()) == current) {
            keys.swap(0, place);
        }
        if !keys.is_empty() {
            *self.keys.write().unwrap_or_else(PoisonError::into_inner) = keys;
        }
    }

    /// The ids of the keys that it holds; the first seals.
    pub fn key_ids(&self) -> Vec<String> {
        self.keys().iter().map(|key| key.id.clone()).collect()
    }

    fn keys(&self) -> RwLockReadGuard<'_, Vec<Key>> {
        self.keys.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Seals `secret` with a fresh random IV.
    pub fn seal(&self, secret: &[u8]) -> Sealed {
        let keys = self.keys();
        let key = keys.first().expect("a sealer is made with a key and never loses its last");
        Sealed(format!("{}:{}", key.id, key.fernet.encrypt(secret)))
    }

    /// Opens what a sealer with one of its keys sealed, however long ago.
    ///
    /// # Errors
    /// When it has no such key or the ciphertext is damaged.
    pub fn open(&self, sealed: &Sealed) -> Result<Vec<u8>, OpenError> {
        let (id, token) = sealed.0.split_once(':').ok_or(OpenError::Damaged)?;
        let keys = self.keys();
        let key = keys.iter().find(|key| key.id == id);
        let key = key.ok_or_else(|| OpenError::UnknownKey(id.to_owned()))?;
        key.fernet.decrypt_at_time(token, None, ANY_TIME).map_err(|_| OpenError::Damaged)
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

    #[test]
    fn opens_what_an_earlier_key_sealed_until_that_key_is_gone() {
        let sealer = Sealer::new([7; 32]);
        let old = sealer.seal(b"secret");
        let shared = sealer.clone();
        sealer.set_keys(&[[7; 32], [8; 32]], Some(&key_id(&[8; 32])));
        assert_eq!(shared.open(&old).as_deref(), Ok(b"secret".as_slice()));
        assert_eq!(shared.seal(b"x").key_id(), key_id(&[8; 32]));
        sealer.set_keys(&[[8; 32]], None);
        assert_eq!(shared.open(&old), Err(OpenError::UnknownKey(key_id(&[7; 32]))));
        sealer.set_keys(&[], None);
        assert_eq!(shared.key_ids(), [key_id(&[8; 32])], "the last key stays");
    }

    #[test]
    fn opening_does_not_look_at_the_clock() {
        let sealer = Sealer::new([7; 32]);
        let fernet = fernet::Fernet::new(&URL_SAFE.encode([7; 32])).expect("a key");
        let year_2100 = 4_102_444_800;
        let id = key_id(&[7; 32]);
        let ahead = Sealed(format!("{id}:{}", fernet.encrypt_at_time(b"secret", year_2100)));
        assert_eq!(sealer.open(&ahead).as_deref(), Ok(b"secret".as_slice()));
    }
}

//! Passwords: Argon2id, off the reactor's threads, a few at a time because each one takes
//! memory.

use std::sync::Arc;

use argon2::password_hash::phc::PasswordHash;
use argon2::password_hash::{PasswordHasher, PasswordVerifier};
use argon2::{Algorithm, Argon2, Params, Version};
use thiserror::Error;
use tokio::sync::Semaphore;

/// How many passwords are hashed at a time.
const PARALLEL_HASHES_MAX: usize = 2;

/// The longest password that is looked at, bytes.
pub(crate) const PASSWORD_BYTES_MAX: usize = 1024;

/// What one hash costs.
#[derive(Clone, Copy, Debug)]
pub struct PasswordCost {
    /// Memory in KiB.
    pub memory_kib: u32,
    /// Passes over it.
    pub passes: u32,
}

impl Default for PasswordCost {
    /// OWASP's first recommendation for Argon2id.
    fn default() -> Self {
        Self { memory_kib: 19 * 1024, passes: 2 }
    }
}

/// Why a password could not be hashed.
#[derive(Debug, Error)]
pub enum PasswordError {
    /// It is too long.
    #[error("a password may have at most {PASSWORD_BYTES_MAX} bytes")]
    TooLong,
    /// The cost is out of Argon2's range, or there is no memory or randomness.
    #[error("the password could not be hashed: {0}")]
    Hash(String),
}

/// The hash of `password` as a PHC string.
///
/// # Errors
/// When it is too long or the cost can't be met.
pub fn hash_password(password: &str, cost: PasswordCost) -> Result<String, PasswordError> {
    if password.len() > PASSWORD_BYTES_MAX {
        return Err(PasswordError::TooLong);
    }
    let params = Params::new(cost.memory_kib, cost.passes, 1, None)
        .map_err(|error| PasswordError::Hash(error.to_string()))?;
    Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
        .hash_password(password.as_bytes())
        .map(|hash| hash.to_string())
        .map_err(|error| PasswordError::Hash(error.to_string()))
}

fn matches(password: &str, phc: &str) -> bool {
    PasswordHash::new(phc).is_ok_and(|hash| {
        // The parameters are the hash's own.
        Argon2::default().verify_password(password.as_bytes(), &hash).is_ok()
    })
}

/// Hashes and verifies, a bounded number at a time.
#[derive(Debug)]
pub(crate) struct Passwords {
    cost: PasswordCost,
    slots: Arc<Semaphore>,
    /// Verified in place of a missing user's, so that its absence takes as long.
    decoy: std::sync::OnceLock<String>,
}

impl Passwords {
    pub(crate) fn new(cost: PasswordCost) -> Self {
        Self {
            cost,
            slots: Arc::new(Semaphore::new(PARALLEL_HASHES_MAX)),
            decoy: std::sync::OnceLock::new(),
        }
    }

    /// The hash of a password.
    pub(crate) async fn hash(&self, password: String) -> Result<String, PasswordError> {
        let cost = self.cost;
        self.blocking(move || hash_password(&password, cost))
            .await
            .unwrap_or_else(|| Err(PasswordError::Hash("the worker ended".to_owned())))
    }

    /// True when `password` is the one of `phc`; takes as long when there is no hash.
    pub(crate) async fn verify(&self, password: String, phc: Option<String>) -> bool {
        if password.len() > PASSWORD_BYTES_MAX {
            return false;
        }
        let exists = phc.is_some();
        let phc = phc.unwrap_or_else(|| self.decoy());
        self.blocking(move || matches(&password, &phc)).await.unwrap_or(false) && exists
    }

    fn decoy(&self) -> String {
        self.decoy.get_or_init(|| hash_password("nobody", self.cost).unwrap_or_default()).clone()
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Option<T> {
        let permit = Arc::clone(&self.slots).acquire_owned().await.ok()?;
        tokio::task::spawn_blocking(move || {
            let _permit = permit;
            work()
        })
        .await
        .ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHEAP: PasswordCost = PasswordCost { memory_kib: 64, passes: 1 };

    #[tokio::test]
    async fn verifies_the_password_and_no_other() {
        let passwords = Passwords::new(CHEAP);
        let hash = passwords.hash("secret".to_owned()).await.unwrap();
        assert!(hash.starts_with("$argon2id$v=19$m=64,t=1,p=1$"));
        assert!(passwords.verify("secret".to_owned(), Some(hash.clone())).await);
        assert!(!passwords.verify("Secret".to_owned(), Some(hash)).await);
        assert!(!passwords.verify("nobody".to_owned(), None).await);
        assert!(!passwords.verify("x".to_owned(), Some("damaged".to_owned())).await);
    }

    #[test]
    fn refuses_a_password_without_end() {
        assert!(matches!(
            hash_password(&"a".repeat(PASSWORD_BYTES_MAX + 1), CHEAP),
            Err(PasswordError::TooLong)
        ));
    }
}

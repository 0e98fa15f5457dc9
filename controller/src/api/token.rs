//! Tokens: Fernet over a small payload, verified on any node without asking another.
//!
//! A token says who and where; roles are looked up live. It carries the auth generations
//! of its user and project, so that a changed password or a disabled project ends every
//! token made before, on all nodes at once and without a list.

use base64::Engine;
use base64::engine::general_purpose::{URL_SAFE, URL_SAFE_NO_PAD};
use serde::{Deserialize, Serialize};

use super::cloud::TokenKeys;

/// The only payload form there is so far; the first byte of the plaintext.
const PAYLOAD_VERSION: u8 = 1;

/// The longest token that is looked at, bytes.
const TOKEN_BYTES_MAX: usize = 2048;

/// A time that is after every stamp of a Fernet token.
const ANY_TIME: u64 = u64::MAX / 2;

/// Where a token is good.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Scope {
    /// Nowhere: only to ask where it could be.
    Unscoped,
    /// In a project, with that project's auth generation.
    Project(String, u64),
    /// In a domain.
    Domain(String),
    /// On the whole system.
    System,
}

/// What a token says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Payload {
    pub(crate) user_id: String,
    /// The user's auth generation.
    pub(crate) generation: u64,
    pub(crate) scope: Scope,
    pub(crate) methods: Vec<String>,
    pub(crate) issued_ms: u64,
    pub(crate) expires_ms: u64,
    /// This token's audit id, then that of the first one of its chain.
    pub(crate) audit_ids: Vec<String>,
}

/// A fresh audit id: 16 random bytes.
pub(crate) fn audit_id() -> String {
    URL_SAFE_NO_PAD.encode(uuid::Uuid::new_v4().as_bytes())
}

fn fernet(key: &[u8; 32]) -> Option<fernet::Fernet> {
    fernet::Fernet::new(&URL_SAFE.encode(key))
}

/// The token that says `payload`; `None` when there is no key.
pub(crate) fn seal(keys: &TokenKeys, payload: &Payload) -> Option<String> {
    let mut plain = vec![PAYLOAD_VERSION];
    plain.extend(rmp_serde::to_vec(payload).ok()?);
    let token = fernet(keys.keys.first()?)?.encrypt(&plain);
    Some(token.trim_end_matches('=').to_owned())
}

/// What `token` says, if one of the keys made it and it has not expired at `now_ms`.
pub(crate) fn open(keys: &TokenKeys, token: &str, now_ms: u64) -> Option<Payload> {
    if token.len() > TOKEN_BYTES_MAX {
        return None;
    }
    let padded = format!("{token}{}", "=".repeat((4 - token.len() % 4) % 4));
    // How long it is good, the payload says; when Fernet's own stamp was made, the clock of the
    // node that made it, which may be off.
    let open = |key| fernet(key)?.decrypt_at_time(&padded, None, ANY_TIME).ok();
    let plain = keys.keys.iter().find_map(open)?;
    let (version, body) = plain.split_first()?;
    if *version != PAYLOAD_VERSION {
        return None;
    }
    let payload: Payload = rmp_serde::from_slice(body).ok()?;
    (payload.expires_ms > now_ms).then_some(payload)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn payload() -> Payload {
        Payload {
            user_id: "u".to_owned(),
            generation: 3,
            scope: Scope::Project("p".to_owned(), 1),
            methods: vec!["password".to_owned()],
            issued_ms: 1_000,
            expires_ms: 2_000,
            audit_ids: vec![audit_id()],
        }
    }

    #[test]
    fn opens_until_it_expires_and_with_an_older_key() {
        let old = TokenKeys { keys: vec![[1; 32]] };
        let token = seal(&old, &payload()).unwrap();
        let rotated = TokenKeys { keys: vec![[2; 32], [1; 32]] };
        assert_eq!(
            open(&rotated, &token, 1_999),
            Some(payload()).map(|mut p| {
                p.audit_ids = open(&old, &token, 0).unwrap().audit_ids;
                p
            })
        );
        assert_eq!(open(&rotated, &token, 2_000), None);
        assert_eq!(open(&TokenKeys { keys: vec![[2; 32]] }, &token, 1_500), None);
    }

    #[test]
    fn refuses_what_it_did_not_make() {
        let keys = TokenKeys { keys: vec![[1; 32]] };
        let token = seal(&keys, &payload()).unwrap();
        for bad in ["", "gAAAA", "é", &token[1..], &"a".repeat(TOKEN_BYTES_MAX + 1)] {
            assert_eq!(open(&keys, bad, 0), None);
        }
    }
}

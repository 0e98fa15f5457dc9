//! The one-time token with which a host joins: base64url of a small JSON document. It carries a
//! secret, so it is passed by standard input or a file, never as a process argument.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;

/// Longest token text that is looked at.
const TEXT_BYTES_MAX: usize = 4096;
const SECRET_BYTES: usize = 32;

/// What a host needs to join: whom to ask, how to know it, and the secret.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct JoinToken {
    /// Version of this layout: 1.
    version: u32,
    /// The API of the node that issued it.
    pub(crate) api: SocketAddr,
    /// The cluster.
    pub(crate) cluster_id: String,
    /// SHA-256 of the authority's certificate, hexadecimal.
    fingerprint: String,
    /// Random; the cluster knows its hash only.
    secret: String,
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinToken").field("api", &self.api).finish_non_exhaustive()
    }
}

/// Text that is no token.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Error {
    /// Not base64url of the document.
    #[error("this is no join token; `trine join-token` on a node of the cluster prints one")]
    Malformed,
    /// Of another version.
    #[error("the join token has version {0}, this trine knows version 1")]
    Version(u32),
}

impl JoinToken {
    /// A new token with a random secret.
    pub(crate) fn create(api: SocketAddr, cluster_id: &str, fingerprint: [u8; 32]) -> JoinToken {
        let secret: [u8; SECRET_BYTES] = rand::random();
        JoinToken {
            version: 1,
            api,
            cluster_id: cluster_id.into(),
            fingerprint: hex::encode(fingerprint),
            secret: hex::encode(secret),
        }
    }

    /// The secret, to be sent to the pinned node only.
    pub(crate) fn secret(&self) -> &str {
        &self.secret
    }

    /// What the cluster keeps of the secret.
    pub(crate) fn hash(secret: &str) -> String {
        hex::encode(Sha256::digest(secret.as_bytes()))
    }

    /// The authority's fingerprint.
    pub(crate) fn fingerprint(&self) -> Result<[u8; 32], Error> {
        let mut bytes = [0; 32];
        hex::decode_to_slice(&self.fingerprint, &mut bytes).map_err(|_| Error::Malformed)?;
        Ok(bytes)
    }

    /// The token's text.
    pub(crate) fn encode(&self) -> String {
        let json = serde_json::to_vec(self).expect("plain fields encode");
        URL_SAFE_NO_PAD.encode(json)
    }
}

impl FromStr for JoinToken {
    type Err = Error;

    fn from_str(text: &str) -> Result<JoinToken, Error> {
        let text = text.trim();
        if text.len() > TEXT_BYTES_MAX {
            return Err(Error::Malformed);
        }
        let json = URL_SAFE_NO_PAD.decode(text).map_err(|_| Error::Malformed)?;
        let token: JoinToken = serde_json::from_slice(&json).map_err(|_| Error::Malformed)?;
        if token.version != 1 {
            return Err(Error::Version(token.version));
        }
        token.fingerprint()?;
        Ok(token)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token() -> JoinToken {
        JoinToken::create("127.0.0.11:8774".parse().unwrap(), "c", [7; 32])
    }

    #[test]
    fn a_token_survives_its_text() {
        let token = token();
        let read: JoinToken = format!(" {}\n", token.encode()).parse().unwrap();
        assert!(read == token);
        assert_eq!(read.fingerprint(), Ok([7; 32]));
    }

    #[test]
    fn every_token_has_its_own_secret_and_debug_hides_it() {
        let (a, b) = (token(), token());
        assert_ne!(a.secret(), b.secret());
        assert_ne!(JoinToken::hash(a.secret()), a.secret());
        assert!(!format!("{a:?}").contains(a.secret()));
    }

    #[test]
    fn cut_or_foreign_text_is_refused() {
        let text = token().encode();
        for n in 0..text.len() {
            assert!(text[..n].parse::<JoinToken>().is_err(), "{n} characters");
        }
        assert_eq!("%%%".parse::<JoinToken>(), Err(Error::Malformed));
        let mut other = token();
        other.version = 2;
        assert_eq!(other.encode().parse::<JoinToken>(), Err(Error::Version(2)));
    }
}

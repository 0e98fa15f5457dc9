//! Rotation of the key that seals secrets, and of the keys that tokens are made with.
//!
//! ```text
//! (new) ──RotateKey──► current ──RotateKey──► retiring ──resealed──► RetireKey ──► retired
//! ```

use super::TokenKeyRing;
use crate::seal::Sealed;
use crate::state::State;
use crate::state::limits::{KEYS_RETIRED_MAX, KEYS_RETIRING_MAX, TOKEN_KEYS_SECONDARY_MAX};
use crate::state::outcome::{Outcome, Rejection};

impl TokenKeyRing {
    /// Every key in it: staged, primary, secondary.
    pub fn all(&self) -> impl Iterator<Item = &Sealed> {
        self.staged.iter().chain(&self.primary).chain(&self.secondary)
    }

    fn all_mut(&mut self) -> impl Iterator<Item = &mut Sealed> {
        self.staged.iter_mut().chain(&mut self.primary).chain(&mut self.secondary)
    }
}

impl State {
    /// Every secret that the state holds.
    pub fn sealed(&self) -> impl Iterator<Item = &Sealed> {
        let servers = self.compute.servers.values();
        self.cluster.token_keys.all().chain(servers.filter_map(|s| s.user_data.as_ref()))
    }

    /// Refuses a secret that was sealed with a key which is retired: no node could open it.
    pub(in crate::state) fn check_key(&self, sealed: Option<&Sealed>) -> Result<(), Rejection> {
        let Some(sealed) = sealed else { return Ok(()) };
        if !self.cluster.keys.retired.iter().any(|id| id == sealed.key_id()) {
            return Ok(());
        }
        let id = sealed.key_id();
        let message = format!("A secret was sealed with key {id}, which is retired; try again.");
        Err(Rejection::conflict("cluster key", id, message))
    }

    pub(super) fn rotate_key(&mut self, from: &str, to: &str) -> Result<Outcome, Rejection> {
        let keys = &self.cluster.keys;
        if keys.current.as_deref() == Some(to) {
            return Ok(Outcome::Ignored);
        }
        if let Some(current) = keys.current.as_deref().filter(|current| *current != from) {
            let message = format!("The current key is {current}, not {from}.");
            return Err(Rejection::conflict("cluster key", to, message));
        }
        let known = keys.retiring.iter().chain(&keys.retired).any(|id| id == to);
        if to.is_empty() || from.is_empty() || from == to || known {
            let message = format!("Key {to} was in use before; make a new one.");
            return Err(Rejection::invalid("cluster key", to, message));
        }
        if keys.retiring.len() >= KEYS_RETIRING_MAX {
            let message = format!(
                "{KEYS_RETIRING_MAX} keys are being retired already; wait until their secrets are sealed anew."
            );
            return Err(Rejection::state("cluster key", to, message));
        }
        let keys = &mut self.cluster.keys;
        keys.current = Some(to.to_owned());
        keys.retiring.push(from.to_owned());
        Ok(Outcome::Done)
    }

    pub(super) fn retire_key(&mut self, id: &str) -> Result<Outcome, Rejection> {
        let Some(place) = self.cluster.keys.retiring.iter().position(|known| known == id) else {
            return Ok(Outcome::Ignored);
        };
        if self.sealed().any(|sealed| sealed.key_id() == id) {
            let message = format!("Key {id} still seals something.");
            return Err(Rejection::in_use("cluster key", id, message));
        }
        let keys = &mut self.cluster.keys;
        let id = keys.retiring.remove(place);
        keys.retired.push(id);
        if keys.retired.len() > KEYS_RETIRED_MAX {
            keys.retired.remove(0);
        }
        Ok(Outcome::Done)
    }

    pub(super) fn rotate_token_keys(
        &mut self,
        rotations: u64,
        staged: &Sealed,
    ) -> Result<Outcome, Rejection> {
        self.check_key(Some(staged))?;
        let now = self.time_ms;
        let ring = &mut self.cluster.token_keys;
        if ring.rotations != rotations {
            let message = format!(
                "The keys of tokens were rotated {} times, not {rotations}.",
                ring.rotations
            );
            return Err(Rejection::conflict("token keys", rotations, message));
        }
        let next = ring.staged.replace(staged.clone());
        if let Some(next) = next
            && let Some(last) = ring.primary.replace(next)
        {
            ring.secondary.insert(0, last);
        }
        ring.secondary.truncate(TOKEN_KEYS_SECONDARY_MAX);
        ring.rotations += 1;
        ring.rotated_ms = now;
        Ok(Outcome::Done)
    }

    pub(super) fn reseal_token_keys(
        &mut self,
        rotations: u64,
        keys: &[Sealed],
    ) -> Result<Outcome, Rejection> {
        for sealed in keys {
            self.check_key(Some(sealed))?;
        }
        let ring = &mut self.cluster.token_keys;
        if ring.rotations != rotations || ring.all().count() != keys.len() {
            return Ok(Outcome::Ignored);
        }
        for (place, sealed) in ring.all_mut().zip(keys) {
            place.clone_from(sealed);
        }
        Ok(Outcome::Done)
    }
}

//! The cluster's keys as a node keeps them: `cluster.key`, mode 0600.
//!
//! ```text
//! trine cluster keys 1
//! key 64_HEXADECIMAL_DIGITS
//! offered 64_HEXADECIMAL_DIGITS AFTER_ID UNIX_MS
//! ```
//!
//! The first `key` is the one in use; further ones are being retired. An offered key was handed
//! out for a rotation that is not known to have happened: it may follow the key `AFTER_ID` and no
//! other. A file with nothing but 64 digits is one key, as earlier versions wrote it.

use crate::files;
use anyhow::{Context, Result, bail, ensure};
use controller::seal::{SEAL_KEYS_MAX, Sealer, key_id};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fmt;
use std::path::Path;

/// Its name in a data directory.
pub(crate) const FILE_NAME: &str = "cluster.key";

const HEADER: &str = "trine cluster keys 1";
/// Keys that may be on offer at once.
const OFFERED_MAX: usize = 3;
/// An offer this old makes room for another where there are too many: whoever made it has long
/// given up proposing it.
const OFFER_KEPT_MS: u64 = 10 * 60 * 1000;

/// A key of the cluster. Its `Debug` shows only the id.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct ClusterKey([u8; 32]);

impl ClusterKey {
    /// A new one.
    pub(crate) fn random() -> ClusterKey {
        ClusterKey(rand::random())
    }

    /// A key for one purpose, derived from this: none is ever used for two.
    pub(crate) fn derived(&self, purpose: &str) -> [u8; 32] {
        let mut hash = Sha256::new();
        hash.update(b"trine key for ");
        hash.update(purpose.as_bytes());
        hash.update([0]);
        hash.update(self.0);
        hash.finalize().into()
    }

    /// The key that seals secrets.
    pub(crate) fn sealing(&self) -> [u8; 32] {
        self.derived("secrets")
    }

    /// Its id in sealed secrets and in the replicated state.
    pub(crate) fn id(&self) -> String {
        key_id(&self.sealing())
    }

    fn hex(&self) -> String {
        hex::encode(self.0)
    }
}

impl fmt::Debug for ClusterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ClusterKey({})", self.id())
    }
}

impl From<ClusterKey> for String {
    fn from(key: ClusterKey) -> String {
        key.hex()
    }
}

/// What is no key.
#[derive(Debug, thiserror::Error)]
#[error("a cluster key has 64 hexadecimal digits")]
pub(crate) struct NoKey;

impl TryFrom<String> for ClusterKey {
    type Error = NoKey;

    fn try_from(text: String) -> Result<ClusterKey, NoKey> {
        let mut key = [0; 32];
        hex::decode_to_slice(text.trim(), &mut key).map_err(|_| NoKey)?;
        Ok(ClusterKey(key))
    }
}

/// What was said about a key that is on offer.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Offer {
    after: String,
    at_ms: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    key: ClusterKey,
    offer: Option<Offer>,
}

/// The keys of a file: at least one, `SEAL_KEYS_MAX` at most.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ClusterKeys {
    entries: Vec<Entry>,
}

impl ClusterKeys {
    /// The key in use and those that are being retired.
    pub(crate) fn of(first: &ClusterKey, retiring: &[ClusterKey]) -> ClusterKeys {
        let keys = std::iter::once(first).chain(retiring).take(SEAL_KEYS_MAX);
        let entries = keys.map(|key| Entry { key: key.clone(), offer: None }).collect();
        ClusterKeys { entries }
    }

    /// A new cluster's one key.
    pub(crate) fn random() -> ClusterKeys {
        Self::of(&ClusterKey::random(), &[])
    }

    /// Reads a file.
    pub(crate) fn read(path: &Path) -> Result<ClusterKeys> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read {}", path.display()))?;
        Self::parse(&text).with_context(|| {
            format!("{} holds no cluster keys; copy it from another node", path.display())
        })
    }

    /// Replaces a file, whole or not at all, mode 0600.
    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        files::replace(path, self.text().as_bytes())
            .with_context(|| format!("cannot write {}", path.display()))
    }

    fn parse(text: &str) -> Result<ClusterKeys> {
        let mut lines = text.lines();
        let first = lines.next().unwrap_or_default();
        if first != HEADER {
            return Ok(Self::of(&text.to_owned().try_into()?, &[]));
        }
        let entries = lines.zip(2..).map(|(line, number)| {
            Entry::parse(line).with_context(|| format!("line {number} is not understood"))
        });
        let entries: Vec<Entry> = entries.collect::<Result<_>>()?;
        ensure!(entries.iter().any(|entry| entry.offer.is_none()), "no key of it is in use");
        let held = entries.len();
        ensure!(held <= SEAL_KEYS_MAX, "it holds {held} keys; the most is {SEAL_KEYS_MAX}");
        Ok(ClusterKeys { entries })
    }

    /// The text of a file.
    pub(crate) fn text(&self) -> String {
        let lines: String = self.entries.iter().map(Entry::line).collect();
        format!("{HEADER}\n{lines}")
    }

    /// The key in use, as far as this file knows.
    pub(crate) fn first(&self) -> &ClusterKey {
        self.in_use().next().expect("parse, of and settle leave a key in use")
    }

    /// The keys that are not merely on offer, the one in use first.
    pub(crate) fn in_use(&self) -> impl Iterator<Item = &ClusterKey> {
        self.entries.iter().filter(|entry| entry.offer.is_none()).map(|entry| &entry.key)
    }

    /// The ids of all of them.
    pub(crate) fn ids(&self) -> Vec<String> {
        self.entries.iter().map(|entry| entry.key.id()).collect()
    }

    /// Whether one of them has the id.
    pub(crate) fn holds(&self, id: &str) -> bool {
        self.entries.iter().any(|entry| entry.key.id() == id)
    }

    /// Has the sealer hold all of them and seal with `current`, else with the first.
    pub(crate) fn equip(&self, sealer: &Sealer, current: Option<&str>) {
        let in_use = self.in_use();
        let offered = self.entries.iter().filter(|entry| entry.offer.is_some());
        let keys = in_use.chain(offered.map(|entry| &entry.key)).map(ClusterKey::sealing);
        sealer.set_keys(&keys.collect::<Vec<_>>(), current);
    }

    /// Holds a key that may follow `after` at the next rotation.
    pub(crate) fn offer(&mut self, key: ClusterKey, after: String, now_ms: u64) -> Result<()> {
        if self.entries.iter().any(|entry| entry.key == key) {
            return Ok(());
        }
        let offers = || self.entries.iter().filter_map(|entry| entry.offer.as_ref());
        if offers().count() >= OFFERED_MAX {
            let oldest = offers().map(|offer| offer.at_ms).min().unwrap_or_default();
            if now_ms.saturating_sub(oldest) < OFFER_KEPT_MS {
                bail!(
                    "{OFFERED_MAX} keys were handed out in the last minutes and none of them was \
                     taken into use; try again in ten minutes"
                );
            }
            self.entries
                .retain(|entry| entry.offer.as_ref().is_none_or(|offer| offer.at_ms != oldest));
        }
        self.add(Entry { key, offer: Some(Offer { after, at_ms: now_ms }) })
    }

    /// Holds a key that the cluster uses and this node lacked. It goes before any offer.
    pub(crate) fn learn(&mut self, key: ClusterKey) -> Result<()> {
        let offered = self.entries.iter().position(|entry| entry.offer.is_some());
        if let Some(offered) = offered.filter(|_| self.entries.len() >= SEAL_KEYS_MAX) {
            self.entries.remove(offered);
        }
        self.add(Entry { key, offer: None })
    }

    fn add(&mut self, entry: Entry) -> Result<()> {
        if self.entries.iter().any(|known| known.key == entry.key) {
            return Ok(());
        }
        if self.entries.len() >= SEAL_KEYS_MAX {
            bail!("{SEAL_KEYS_MAX} keys are held already; wait until the old ones are retired");
        }
        self.entries.push(entry);
        Ok(())
    }

    /// Follows the cluster: an offered key that it uses is in use, the current one stands first,
    /// and what is in `forget` goes, as goes every offer that can't be taken up any more.
    ///
    /// Only for a state that is not stale: an older one would have offers forgotten that the
    /// cluster has taken up since.
    pub(crate) fn settle(&mut self, current: &str, retiring: &[String], forget: &[String]) {
        if !self.holds(current) {
            // What it needs has to come first: see `learn`.
            return;
        }
        for entry in &mut self.entries {
            let id = entry.key.id();
            if id == current || retiring.contains(&id) {
                entry.offer = None;
            }
        }
        self.entries.retain(|entry| {
            let stale = entry.offer.as_ref().is_some_and(|offer| offer.after != current);
            !stale && !forget.contains(&entry.key.id())
        });
        self.entries.sort_by_key(|entry| (entry.key.id() != current, entry.offer.is_some()));
    }
}

impl Entry {
    fn line(&self) -> String {
        let key = self.key.hex();
        match &self.offer {
            None => format!("key {key}\n"),
            Some(offer) => format!("offered {key} {} {}\n", offer.after, offer.at_ms),
        }
    }

    fn parse(line: &str) -> Result<Entry> {
        let words: Vec<&str> = line.split(' ').collect();
        let (key, offer) = match words[..] {
            ["key", key] => (key, None),
            ["offered", key, after, at_ms] => {
                let at_ms = at_ms.parse().context("its time is no number")?;
                (key, Some(Offer { after: after.to_owned(), at_ms }))
            }
            // The line itself may be a secret.
            _ => bail!("it is neither \"key …\" nor \"offered …\""),
        };
        Ok(Entry { key: key.to_owned().try_into()?, offer })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: ClusterKey = ClusterKey([1; 32]);
    const B: ClusterKey = ClusterKey([2; 32]);
    const C: ClusterKey = ClusterKey([3; 32]);

    fn one() -> ClusterKeys {
        ClusterKeys::of(&A, &[])
    }

    #[test]
    fn what_is_written_reads_back_and_only_the_owner_reads_it() {
        use std::os::unix::fs::PermissionsExt;
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join(FILE_NAME);
        let mut keys = one();
        keys.learn(B).unwrap();
        keys.offer(C, A.id(), 7).unwrap();
        keys.write(&path).unwrap();
        assert_eq!(ClusterKeys::read(&path).unwrap(), keys);
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(scratch.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_file_of_an_earlier_version_is_one_key() {
        let old = "01".repeat(32) + "\n";
        assert_eq!(ClusterKeys::parse(&old).unwrap(), one());
    }

    #[test]
    fn what_is_no_key_file_is_refused_without_showing_it() {
        let secret = "ab".repeat(31);
        let line = format!("{HEADER}\nkey {secret}\n");
        let unknown = format!("{HEADER}\nsecret {}\n", "ab".repeat(32));
        let offered = format!("{HEADER}\noffered {} {} 1\n", "ab".repeat(32), A.id());
        let nine: String =
            (0..9).map(|n| format!("key {}\n", format!("0{n}").repeat(32))).collect();
        let many = format!("{HEADER}\n{nine}");
        for text in ["", "x", HEADER, &secret, &line, &unknown, &offered, &many] {
            let error = format!("{:#}", ClusterKeys::parse(text).expect_err(text));
            assert!(!error.contains(&secret), "{error}");
        }
    }

    #[test]
    fn keys_are_not_shown() {
        let shown = format!("{:?}", one());
        assert!(!shown.contains("01010101") && !shown.contains("1, 1"), "{shown}");
    }

    #[test]
    fn each_purpose_has_its_own_key() {
        assert_eq!(A.derived("tokens"), A.derived("tokens"));
        assert_ne!(A.derived("tokens"), A.derived("secrets"));
        assert_ne!(A.derived("tokens"), B.derived("tokens"));
    }

    #[test]
    fn an_offer_that_is_taken_up_stands_first_and_the_old_key_goes_when_it_is_retired() {
        let mut keys = one();
        keys.offer(B, A.id(), 1).unwrap();
        keys.offer(C, A.id(), 1).unwrap();
        assert_eq!(keys.in_use().collect::<Vec<_>>(), [&A]);
        keys.settle(&B.id(), &[A.id()], &[]);
        assert_eq!(keys, ClusterKeys::of(&B, &[A]), "C can't follow A any more");
        keys.settle(&B.id(), &[], &[A.id()]);
        assert_eq!(keys, ClusterKeys::of(&B, &[]));
    }

    #[test]
    fn an_offer_stays_while_the_key_that_it_follows_is_in_use() {
        let mut keys = one();
        keys.offer(B, A.id(), 1).unwrap();
        let before = keys.clone();
        keys.settle(&A.id(), &[], &[]);
        assert_eq!(keys, before);
    }

    #[test]
    fn a_node_without_the_current_key_forgets_nothing() {
        let mut keys = one();
        keys.settle(&B.id(), &[], &[A.id()]);
        assert_eq!(keys, one());
        keys.learn(B).unwrap();
        keys.settle(&B.id(), &[], &[A.id()]);
        assert_eq!(keys, ClusterKeys::of(&B, &[]));
    }

    #[test]
    fn only_old_offers_make_room_for_new_ones() {
        let mut keys = one();
        for (n, at_ms) in (10..).zip([0, 5, 6]) {
            keys.offer(ClusterKey([n; 32]), A.id(), at_ms).unwrap();
        }
        let full = keys.clone();
        keys.offer(B, A.id(), OFFER_KEPT_MS - 1).unwrap_err();
        assert_eq!(keys, full);
        keys.offer(B, A.id(), OFFER_KEPT_MS).unwrap();
        assert!(keys.holds(&B.id()) && !keys.holds(&ClusterKey([10; 32]).id()));
    }

    #[test]
    fn a_sealer_opens_with_each_key_and_seals_with_the_current_one() {
        let mut keys = one();
        let sealer = Sealer::new(A.sealing());
        let old = sealer.seal(b"secret");
        keys.offer(B, A.id(), 1).unwrap();
        keys.equip(&sealer, None);
        assert_eq!(sealer.key_ids(), [A.id(), B.id()]);
        keys.equip(&sealer, Some(&B.id()));
        assert_eq!(sealer.key_ids()[0], B.id());
        assert_eq!(sealer.open(&old).as_deref(), Ok(b"secret".as_slice()));
    }
}

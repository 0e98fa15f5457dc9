//! The cluster's keys in a running node: held in the key file and by the sealer, changed when the
//! replicated state says so. A node that lacks one (it was away during a rotation) asks the other
//! members for it; until it has it, it serves nothing.

use super::Node;
use super::calls::{PeerAnswer, PeerCall};
use super::cloud::now_ms;
use crate::cluster_keys::{ClusterKey, ClusterKeys, FILE_NAME};
use crate::data_directory::DataDirectory;
use anyhow::{Context, Result, bail};
use controller::ids::HostId;
use controller::plan::keys_to_forget;
use controller::plan::leases::HEARTBEAT_EVERY;
use controller::seal::Sealer;
use controller::state::State;
use controller::state::cluster::KeyRing;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How long a member may take to hand over its keys.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);

/// The keys that this node holds.
pub(super) struct HeldKeys {
    path: PathBuf,
    keys: Mutex<ClusterKeys>,
    sealer: Sealer,
}

/// What this node can't do without.
#[derive(Debug, thiserror::Error)]
#[error(
    "this node lacks the cluster key {0} since a rotation that it missed; it is asking the other \
     members for it, try again"
)]
pub(super) struct Lacking(String);

impl HeldKeys {
    /// The keys of a data directory.
    pub(super) fn new(directory: &DataDirectory, keys: ClusterKeys) -> HeldKeys {
        let sealer = Sealer::new(keys.first().sealing());
        keys.equip(&sealer, None);
        HeldKeys { path: directory.join(FILE_NAME), keys: Mutex::new(keys), sealer }
    }

    /// Seals and opens with them; its clones follow every change.
    pub(super) fn sealer(&self) -> &Sealer {
        &self.sealer
    }

    /// A key for one purpose, derived from the first.
    pub(super) fn derived(&self, purpose: &str) -> [u8; 32] {
        self.keys().first().derived(purpose)
    }

    /// All of them.
    pub(super) fn all(&self) -> ClusterKeys {
        self.keys().clone()
    }

    /// The ids of all of them.
    pub(super) fn ids(&self) -> Vec<String> {
        self.keys().ids()
    }

    /// The id of the first.
    pub(super) fn first_id(&self) -> String {
        self.keys().first().id()
    }

    fn keys(&self) -> MutexGuard<'_, ClusterKeys> {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Seals with the cluster's current key from now on.
    ///
    /// # Errors
    /// When one of the cluster's keys is missing here.
    pub(super) fn ready(&self, ring: &KeyRing) -> Result<(), Lacking> {
        let Some(current) = ring.current.as_deref() else { return Ok(()) };
        let held = self.sealer.key_ids();
        if let Some(lacking) = lacking(ring, &held).next() {
            return Err(Lacking(lacking.to_owned()));
        }
        if held.first().map(String::as_str) != Some(current) {
            self.keys().equip(&self.sealer, Some(current));
        }
        Ok(())
    }

    /// Changes the keys: in the file first, durably.
    fn change(
        &self,
        ring: &KeyRing,
        change: impl FnOnce(&mut ClusterKeys) -> Result<()>,
    ) -> Result<()> {
        let mut keys = self.keys();
        let mut changed = keys.clone();
        change(&mut changed)?;
        if changed != *keys {
            changed.write(&self.path)?;
            *keys = changed;
        }
        keys.equip(&self.sealer, ring.current.as_deref());
        Ok(())
    }

    /// Holds a key that may follow `after`.
    fn offer(&self, ring: &KeyRing, key: ClusterKey, after: String) -> Result<()> {
        self.change(ring, |keys| keys.offer(key, after, now_ms()))
    }

    /// Follows a state that is not stale.
    fn settle(&self, state: &State) -> Result<()> {
        let ring = &state.cluster.keys;
        let Some(current) = ring.current.as_deref() else { return Ok(()) };
        self.change(ring, |keys| {
            let forget = keys_to_forget(state, &keys.ids());
            keys.settle(current, &ring.retiring, &forget);
            Ok(())
        })
    }

    /// Whether following the state would change something.
    fn is_settled(&self, state: &State) -> bool {
        let ring = &state.cluster.keys;
        let Some(current) = ring.current.as_deref() else { return true };
        let keys = self.keys();
        let mut settled = keys.clone();
        settled.settle(current, &ring.retiring, &keys_to_forget(state, &keys.ids()));
        settled == *keys && self.sealer.key_ids().first().map(String::as_str) == Some(current)
    }
}

fn lacking<'a>(ring: &'a KeyRing, held: &'a [String]) -> impl Iterator<Item = &'a str> {
    let used = ring.current.iter().chain(&ring.retiring);
    used.filter(|id| !held.contains(id)).map(String::as_str)
}

/// Follows the cluster's keys until the node ends.
pub(super) async fn run(node: Arc<Node>) {
    loop {
        tokio::time::sleep(HEARTBEAT_EVERY).await;
        if let Err(error) = follow(&node).await {
            tracing::warn!(error = %format!("{error:#}"), "cluster keys: tried again soon");
        }
    }
}

/// Fetches the keys that this node lacks and forgets those that are retired.
pub(super) async fn follow(node: &Arc<Node>) -> Result<()> {
    let raft = node.raft()?;
    let state = raft.view();
    let held = node.keys.ids();
    if lacking(&state.cluster.keys, &held).next().is_some() {
        catch_up(node, &state.cluster.keys).await?;
    }
    if node.keys.is_settled(&raft.view()) {
        return Ok(());
    }
    // What is forgotten is gone: not by a state that may be stale.
    let state = raft.read().await?;
    let settling = Arc::clone(node);
    tokio::task::spawn_blocking(move || settling.keys.settle(&state)).await?
}

/// Asks the other members for what this node lacks.
async fn catch_up(node: &Arc<Node>, ring: &KeyRing) -> Result<()> {
    let me = node.config.node_id;
    let mut last = None;
    for member in node.raft()?.status().members.into_iter().filter(|member| member.id != me) {
        match ask(node, HostId(member.id)).await {
            Ok(keys) => learn(node, ring, keys).await?,
            Err(error) => last = Some(error),
        }
        if lacking(ring, &node.keys.ids()).next().is_none() {
            tracing::info!(from = member.id, "cluster keys: caught up with a rotation");
            return Ok(());
        }
    }
    let held = node.keys.ids();
    let names: Vec<&str> = lacking(ring, &held).collect();
    let reason = last.map_or("none has it".into(), |error| format!("{error:#}"));
    bail!("no member gave this node the cluster key {}: {reason}", names.join(", "))
}

async fn ask(node: &Node, member: HostId) -> Result<Vec<ClusterKey>> {
    match node.call(member, &PeerCall::Keys, ANSWER_WITHIN).await? {
        PeerAnswer::Keys(keys) => Ok(keys),
        other => bail!("host {member} answered {other:?}"),
    }
}

/// Takes of `keys` those that the cluster uses.
async fn learn(node: &Arc<Node>, ring: &KeyRing, keys: Vec<ClusterKey>) -> Result<()> {
    let (node, ring) = (Arc::clone(node), ring.clone());
    let learning = move || {
        let held = node.keys.ids();
        let lacking: Vec<&str> = lacking(&ring, &held).collect();
        let wanted = keys.into_iter().filter(|key| lacking.contains(&key.id().as_str()));
        let wanted: Vec<ClusterKey> = wanted.collect();
        node.keys.change(&ring, |held| wanted.into_iter().try_for_each(|key| held.learn(key)))
    };
    tokio::task::spawn_blocking(learning).await?
}

/// Answers a member that lacks keys: only a host of the cluster gets them. One that was removed
/// still has its certificate.
pub(super) async fn give(node: &Arc<Node>, peer: raft::NodeId) -> Result<PeerAnswer> {
    only_hosts(node, peer).await?;
    Ok(PeerAnswer::Keys(node.keys.all().in_use().cloned().collect()))
}

/// Answers a member that hands out a new key.
pub(super) async fn take(
    node: &Arc<Node>,
    peer: raft::NodeId,
    key: ClusterKey,
    after: String,
) -> Result<PeerAnswer> {
    let state = only_hosts(node, peer).await?;
    let node = Arc::clone(node);
    let taking = move || node.keys.offer(&state.cluster.keys, key, after);
    tokio::task::spawn_blocking(taking).await?.context("this host can't keep a new key")?;
    Ok(PeerAnswer::Done)
}

async fn only_hosts(node: &Node, peer: raft::NodeId) -> Result<State> {
    let state = node.raft()?.read().await?;
    match state.cluster.hosts.contains_key(&HostId(peer)) {
        true => Ok(state),
        false => bail!("{}", super::standing::refusal(peer)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(keys: ClusterKeys) -> (tempfile::TempDir, HeldKeys) {
        let scratch = tempfile::tempdir().unwrap();
        let directory = DataDirectory::open(scratch.path()).unwrap();
        keys.write(&directory.join(FILE_NAME)).unwrap();
        (scratch, HeldKeys::new(&directory, keys))
    }

    fn state(current: &str, retiring: &[&str], retired: &[&str]) -> State {
        let owned = |ids: &[&str]| ids.iter().map(|id| (*id).to_owned()).collect();
        let mut state = State::default();
        state.cluster.keys = KeyRing {
            current: Some(current.to_owned()),
            retiring: owned(retiring),
            retired: owned(retired),
        };
        state
    }

    #[test]
    fn a_key_is_in_the_file_before_it_is_used_and_gone_from_it_once_retired() {
        let (scratch, held) = held(ClusterKeys::random());
        let path = scratch.path().join(FILE_NAME);
        let old = held.first_id();
        let new = ClusterKey::random();
        held.offer(&KeyRing::default(), new.clone(), old.clone()).unwrap();
        assert!(ClusterKeys::read(&path).unwrap().holds(&new.id()));
        assert_eq!(held.sealer().key_ids()[0], old, "an offered key does not seal");

        let rotated = state(&new.id(), &[&old], &[]);
        held.ready(&rotated.cluster.keys).unwrap();
        assert_eq!(held.sealer().key_ids()[0], new.id());
        assert!(!held.is_settled(&rotated));
        held.settle(&rotated).unwrap();
        assert!(held.is_settled(&rotated));
        assert_eq!(ClusterKeys::read(&path).unwrap().ids(), [new.id(), old.clone()]);

        let retired = state(&new.id(), &[], &[&old]);
        assert!(!held.is_settled(&retired));
        held.settle(&retired).unwrap();
        assert_eq!(ClusterKeys::read(&path).unwrap().ids(), [new.id()]);
        assert_eq!(held.sealer().key_ids(), [new.id()]);
    }

    #[test]
    fn a_node_that_lacks_a_key_says_which_and_changes_nothing() {
        let (scratch, held) = held(ClusterKeys::random());
        let path = scratch.path().join(FILE_NAME);
        let before = std::fs::read(&path).unwrap();
        let old = held.first_id();
        let rotated = state("another", &[&old], &[]);
        let lacking = held.ready(&rotated.cluster.keys).unwrap_err().to_string();
        assert!(lacking.contains("another") && !lacking.contains(&old), "{lacking}");
        held.settle(&state("another", &[], &[&old])).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), before);
    }

    #[test]
    fn a_file_that_cannot_be_written_leaves_the_keys_as_they_were() {
        let (scratch, held) = held(ClusterKeys::random());
        drop(scratch);
        let before = held.ids();
        held.offer(&KeyRing::default(), ClusterKey::random(), before[0].clone()).unwrap_err();
        assert_eq!((held.ids(), held.sealer().key_ids()), (before.clone(), before));
    }
}

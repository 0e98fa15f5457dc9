//! A rotation of the cluster's keys. Every step can be the last: a key that was handed out and not
//! taken into use harms nothing, and what follows `RotateKey` the leader finishes by itself.

use super::super::Node;
use super::super::calls::{PeerAnswer, PeerCall};
use super::super::keys::follow;
use super::{find, propose};
use crate::cluster_keys::ClusterKey;
use anyhow::{Context, Result, bail};
use controller::ids::HostId;
use controller::plan::rotate_token_keys;
use controller::state::State;
use controller::state::cluster::ClusterCommand;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How often the keys of tokens are rotated anew where the leader came in between.
const ROTATE_TRIES: usize = 4;
/// How long a member may take to keep a new key.
const ANSWER_WITHIN: Duration = Duration::from_secs(3);
/// How long the command waits until everything is sealed anew and the old key is gone. After that
/// it goes on without it.
const FINISH_WITHIN: Duration = Duration::from_secs(12);
/// Pause between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Rotates them, or finishes the rotation that is under way. Hosts in `without` need not answer.
pub(super) async fn rotate(node: &Arc<Node>, without: &[String]) -> Result<Value> {
    let Ok(_one_at_a_time) = node.rotation.try_lock() else {
        bail!("a rotation is under way on this node; wait until it has ended");
    };
    let state = node.raft()?.read().await?;
    node.keys.ready(&state.cluster.keys)?;
    let without = without.iter().map(|host| Ok(find(&state, host)?.id));
    let without: BTreeSet<HostId> = without.collect::<Result<_>>()?;
    let members = members(node, &without).await?;
    let resumed = !state.cluster.keys.retiring.is_empty();
    if !resumed {
        start(node, &state, &members).await?;
    }
    // Also of a rotation that was cut off: nobody knows whether it came to this. Sealed with the
    // new key alone, so that who has the old one learns nothing of it from the log.
    rotate_tokens(node).await?;
    let finished = finish(node, &members).await?;
    let state = node.raft()?.view();
    let keys = &state.cluster.keys;
    let left = state.sealed().filter(|sealed| Some(sealed.key_id()) != keys.current.as_deref());
    Ok(json!({
        "key": keys.current,
        "resumed": resumed,
        "finished": finished,
        "left_to_seal": left.count(),
        "without": without,
        "cluster_key_file": node.directory.join(crate::cluster_keys::FILE_NAME),
    }))
}

/// The members that take part: all that `without` does not name, and each must answer.
async fn members(node: &Arc<Node>, without: &BTreeSet<HostId>) -> Result<Vec<HostId>> {
    let members = node.raft()?.status().members;
    let mut taking_part = Vec::new();
    for member in members.iter().filter(|member| !without.contains(&HostId(member.id))) {
        let id = HostId(member.id);
        key_ids(node, id).await.with_context(|| {
            format!(
                "host {} ({id}) can't take a new key, so nothing was changed; start it, remove it, \
                 or say --without {} and it asks for the key when it is back",
                member.name, member.name
            )
        })?;
        taking_part.push(id);
    }
    Ok(taking_part)
}

async fn key_ids(node: &Node, member: HostId) -> Result<Vec<String>> {
    match node.call(member, &PeerCall::KeyIds, ANSWER_WITHIN).await? {
        PeerAnswer::KeyIds(ids) => Ok(ids),
        other => bail!("host {member} answered {other:?}"),
    }
}

/// Hands out a new key and takes it into use.
async fn start(node: &Arc<Node>, state: &State, members: &[HostId]) -> Result<()> {
    // Before the first rotation tokens are made with a key that follows from the cluster's. It
    // must be among the sealed ones before the cluster's key goes.
    while node.raft()?.read().await?.cluster.token_keys.primary.is_none() {
        rotate_tokens(node).await?;
    }
    let from = state.cluster.keys.current.clone().unwrap_or_else(|| node.keys.first_id());
    let key = ClusterKey::random();
    for member in members {
        let call = PeerCall::HoldKey { key: key.clone(), after: from.clone() };
        node.call(*member, &call, ANSWER_WITHIN).await.with_context(|| {
            format!("host {member} did not take the new key, so the old one stays in use")
        })?;
    }
    let to = key.id();
    propose(node, ClusterCommand::RotateKey { from: from.clone(), to: to.clone() }).await?;
    tracing::warn!(from, to, "an operator rotated the cluster's key");
    follow(node).await
}

async fn rotate_tokens(node: &Arc<Node>) -> Result<()> {
    for _ in 0..ROTATE_TRIES {
        let state = node.raft()?.read().await?;
        node.keys.ready(&state.cluster.keys)?;
        let (derived, fresh) = (node.keys.derived("tokens"), rand::random());
        let ring = &state.cluster.token_keys;
        let rotated = propose(node, rotate_token_keys(ring, node.keys.sealer(), derived, fresh));
        let Err(error) = rotated.await else { return Ok(()) };
        // The leader rotated them in between; what it staged may be sealed with the old key.
        if node.raft()?.read().await?.cluster.token_keys.rotations == ring.rotations {
            return Err(error);
        }
    }
    bail!("the keys of tokens were rotated meanwhile, {ROTATE_TRIES} times; run the command again")
}

/// Waits until nothing needs the old key and no member holds it; whether that came in time.
async fn finish(node: &Arc<Node>, members: &[HostId]) -> Result<bool> {
    let started = Instant::now();
    while !is_finished(node, members).await? {
        if started.elapsed() > FINISH_WITHIN {
            return Ok(false);
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
    Ok(true)
}

async fn is_finished(node: &Arc<Node>, members: &[HostId]) -> Result<bool> {
    let keys = node.raft()?.view().cluster.keys.clone();
    if !keys.retiring.is_empty() {
        return Ok(false);
    }
    for member in members {
        // One that went away meanwhile forgets the old key when it is back.
        let Ok(held) = key_ids(node, *member).await else { return Ok(false) };
        if held.iter().any(|id| keys.retired.contains(id)) {
            return Ok(false);
        }
    }
    Ok(true)
}

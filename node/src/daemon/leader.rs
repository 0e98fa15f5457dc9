//! What this node sees to while it leads: fences, evacuation, the feature level, what nobody
//! reports on any more. The decisions are [`controller::plan::leading`]; here they are proposed.

use super::Node;
use super::cloud::now_ms;
use abi::lease;
use controller::plan::leading::{Chore, Ending, Leading};
use controller::plan::leases::HEARTBEAT_EVERY;
use controller::state::{Command, decode_result};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::Notify;

/// The most secrets that are sealed anew in one round.
const RESEAL_MAX: usize = 64;

/// Chores that are under way.
#[derive(Default)]
struct Chores {
    leading: Mutex<Leading>,
    ended: Notify,
}

/// Sees to it until the node ends.
pub(super) async fn run(node: Arc<Node>) {
    tokio::spawn(reseal(Arc::clone(&node)));
    let chores = Arc::new(Chores::default());
    loop {
        tokio::select! {
            () = tokio::time::sleep(HEARTBEAT_EVERY) => {}
            () = chores.ended.notified() => {}
        }
        for chore in chores.due(&node) {
            tokio::spawn(Arc::clone(&chores).perform(Arc::clone(&node), chore));
        }
    }
}

impl Chores {
    fn due(&self, node: &Node) -> Vec<Chore> {
        if !node.note_leadership() {
            return Vec::new();
        }
        let Ok(raft) = node.raft() else { return Vec::new() };
        let state = raft.view();
        let mut leases = node.heartbeats.leases();
        self.leading().due(&state, &mut leases, lease::now(), now_ms())
    }

    async fn perform(self: Arc<Self>, node: Arc<Node>, chore: Chore) {
        let ending = propose(&node, &chore).await;
        let mut leases = node.heartbeats.leases();
        self.leading().ended(&chore, &mut leases, ending, lease::now());
        drop(leases);
        if ending == Ending::Applied {
            self.ended.notify_one();
        }
    }

    fn leading(&self) -> std::sync::MutexGuard<'_, Leading> {
        self.leading.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn propose(node: &Node, chore: &Chore) -> Ending {
    let Ok(raft) = node.raft() else { return Ending::Unknown };
    let subject = &chore.subject;
    let id = *uuid::Uuid::new_v4().as_bytes();
    let proposed = match raft.propose(id, chore.command.encode()).await {
        Ok(proposed) => proposed,
        Err(error) => {
            tracing::warn!(subject, %error, "leader: no outcome");
            return Ending::Unknown;
        }
    };
    match decode_result(&proposed.outcome) {
        Ok(Ok(_)) => {
            tracing::info!(subject, "leader: done");
            Ending::Applied
        }
        Ok(Err(rejection)) => {
            tracing::info!(subject, %rejection, "leader: refused");
            Ending::Refused
        }
        Err(error) => {
            tracing::warn!(subject, %error, "leader: an outcome can't be read");
            Ending::Unknown
        }
    }
}

/// Rotates the keys of tokens in time. After a rotation of the cluster's: seals secrets with the new one, some at a time.
async fn reseal(node: Arc<Node>) {
    loop {
        if !reseal_some(&node).await {
            tokio::time::sleep(HEARTBEAT_EVERY).await;
        }
    }
}

/// Whether there was something to seal, and it was.
async fn reseal_some(node: &Node) -> bool {
    let Ok(raft) = node.raft() else { return false };
    if !raft.is_leader() {
        return false;
    }
    let state = raft.view();
    if let Err(lacking) = node.keys.ready(&state.cluster.keys) {
        tracing::debug!(%lacking, "leader: secrets are not sealed anew yet");
        return false;
    }
    if controller::plan::token_rotation_is_due(&state, now_ms()) {
        let (ring, derived) = (&state.cluster.token_keys, node.keys.derived("tokens"));
        let sealer = node.keys.sealer();
        let command = controller::plan::rotate_token_keys(ring, sealer, derived, rand::random());
        let chore = Chore { subject: "keys of tokens".into(), command: Command::Cluster(command) };
        // Refused where an operator has just rotated them: then it is not due any more.
        return propose(node, &chore).await == Ending::Applied;
    }
    let commands = controller::plan::reseal(&state, node.keys.sealer(), RESEAL_MAX);
    let some = !commands.is_empty();
    for command in commands {
        let chore = Chore { subject: "sealed secret".into(), command };
        if propose(node, &chore).await != Ending::Applied {
            return false;
        }
    }
    some
}

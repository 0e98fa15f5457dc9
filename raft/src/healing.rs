//! A node whose log lost something keeps what is valid, and abstains until its peers have given it
//! back what it had acknowledged.
//!
//! While it heals it grants no vote and no pre-vote, is no candidate, and takes no leadership. It
//! follows, answers heartbeats and acknowledges what it is given.
//!
//! # Why no committed entry is lost
//!
//! Let D be the healing node. What D lost are entries it had acknowledged; its vote it still knows
//! (three copies; without any it doesn't start). A committed entry e is on a quorum Q1.
//!
//! 1. *No leader without e is elected while D heals.* A candidate needs a quorum Q2. D grants
//!    nothing, so Q2 consists of other nodes; Q1 and Q2 are majorities, so they share a node, and it
//!    isn't D. That node holds e and refuses a candidate with a shorter log. This holds also when a
//!    leader counts an old acknowledgement of D after D lost the entry: Q2 still shares a node with Q1
//!    that isn't D. (With three nodes D's absence costs availability, not data: if the only other
//!    holder is down, nobody can lead until it returns.)
//! 2. *What D acknowledges while it heals may count.* Raft's consistency check makes D hold, durably,
//!    every entry up to what it acknowledges.
//! 3. *When D votes again it holds every e whose quorum counted D.* D asks the leader L for its last
//!    entry T, and L first proves by ReadIndex that no later leader was elected before D asked. D's
//!    part in that proof is sound, because its vote was not lost. L holds each entry that was
//!    committed by then. It also holds each that an earlier leader may yet commit by an old
//!    acknowledgement of D: if L was elected without D's vote, by (1); if with it, D voted before it
//!    lost anything and L's log was at least as long as D's. If L itself got the acknowledgement, the
//!    entry lies in L's log, at or before T. So once D holds T in its log (or a snapshot past it) and
//!    has flushed it, D holds all of these.
//! 4. If T is overwritten by a later leader before D gets it, D asks again.
//!
//! The note on disk goes last, so a crash in between only makes D heal once more.

use std::{sync::Arc, time::Duration};

use openraft::async_runtime::watch::WatchReceiver;

use crate::{
    StateMachine,
    codec::Encoder,
    node::Core,
    proposals::Attempt,
    runtime::{blocking, now, sleep, timeout},
    transport::{Kind, client::Lane, server::stopped},
    types::LogId,
};

/// Pause before the leader is asked again.
const PAUSE: Duration = Duration::from_millis(200);
/// How long one attempt waits for the leader's entries before it asks anew.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(10);

/// Runs until this node has all that it lost.
pub(crate) async fn heal<S: StateMachine>(core: Arc<Core<S>>) {
    let mut stop = core.stop.subscribe();
    loop {
        let attempt = timeout(ATTEMPT_TIMEOUT, core.heal_once());
        let healed = tokio::select! {
            biased;
            healed = attempt => healed,
            () = stopped(&mut stop) => return,
        };
        match healed {
            Ok(Ok(())) => break,
            Ok(Err(reason)) => tracing::debug!(%reason, "not healed yet"),
            Err(_) => tracing::debug!("not healed yet: the leader's entries didn't come in time"),
        }
        tokio::select! {
            biased;
            () = sleep(PAUSE) => {}
            () = stopped(&mut stop) => return,
        }
    }
    tracing::info!("the log is whole again: this node votes");
    core.healing.send_replace(None);
    core.raft.runtime_config().elect(true);
}

impl<S: StateMachine> Core<S> {
    async fn heal_once(&self) -> Result<(), String> {
        let Some(leader) = self.leader().filter(|leader| *leader != self.config.node_id) else {
            return Err("no leader is known".to_owned());
        };
        let deadline = now() + ATTEMPT_TIMEOUT;
        let answer = self
            .ask(leader, Lane::Forward, Kind::LastLog, Vec::new(), deadline)
            .await
            .map_err(|error| error.to_string())?;
        let target = match Attempt::decode(&answer, |body| body.log_id()) {
            Ok(Attempt::Done(target)) => target,
            Ok(other) => return Err(format!("the leader answered {other:?}")),
            Err(error) => return Err(error.to_string()),
        };
        self.holds(target).await?;
        self.log.flushed().await.map_err(|error| error.to_string())?;
        let note_healed = self.note_healed.clone();
        blocking(move || note_healed()).await.map_err(|error| error.to_string())
    }

    /// Waits until the log holds an entry, or a snapshot past it.
    async fn holds(&self, target: LogId) -> Result<(), String> {
        let mut metrics = self.raft.metrics();
        while !self.log.holds(target) {
            metrics.borrow_watched();
            metrics.changed().await.map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    /// As the leader: the last entry, once a quorum has confirmed that we still lead.
    pub(crate) async fn handle_last_log(&self) -> Vec<u8> {
        let attempt = match self.local_reads.join().await {
            Attempt::Done(_) => match self.log.last() {
                Some(last) => Attempt::Done(last),
                None => Attempt::Retry("the log is empty".to_owned()),
            },
            Attempt::NotLeader(leader) => Attempt::NotLeader(leader),
            Attempt::Retry(reason) => Attempt::Retry(reason),
            Attempt::Rejected(reason) => Attempt::Rejected(reason),
            Attempt::NoSpace(reason) => Attempt::NoSpace(reason),
        };
        attempt.encode(|body: &mut Encoder, last| body.log_id(&last))
    }
}

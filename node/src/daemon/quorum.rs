//! Reads that need a quorum, and how long one that is lost is waited for: an election takes less than
//! a second, so whoever asks then is kept waiting; whoever asks a node that was cut off long ago gets
//! its answer at once.

use super::Machine;
use controller::state::State;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Without a quorum for this long, requests are not kept waiting for one.
const LOST_AFTER: Duration = Duration::from_secs(3);
/// How long a request waits then: enough for a quorum that is back.
const WAIT_WHEN_LOST: Duration = Duration::from_millis(200);

/// Whether a quorum answered lately.
#[derive(Default)]
pub(super) struct Quorum {
    /// Since when no read has succeeded.
    lost_since: Mutex<Option<Instant>>,
}

impl Quorum {
    /// The state as of now, or a sentence for the client.
    pub(super) async fn read(&self, raft: &raft::Raft<Machine>) -> Result<State, String> {
        let lost_for = self.lost_for(Instant::now());
        if lost_for < LOST_AFTER {
            return self.note(raft.read().await.map_err(|error| error.to_string()));
        }
        let read = tokio::time::timeout(WAIT_WHEN_LOST, raft.read()).await;
        let lost = || {
            format!(
                "no quorum of the cluster's nodes has answered this one for {} s",
                lost_for.as_secs()
            )
        };
        self.note(read.map_err(|_| lost()).and_then(|read| read.map_err(|_| lost())))
    }

    /// Looks whether there is a quorum; for as long as a read may take.
    pub(super) async fn look(&self, raft: &raft::Raft<Machine>) -> bool {
        self.note(raft.read().await).is_ok()
    }

    fn lost_for(&self, now: Instant) -> Duration {
        let since = *self.lost_since.lock().unwrap_or_else(PoisonError::into_inner);
        since.map_or(Duration::ZERO, |since| now.duration_since(since))
    }

    fn note<T, E>(&self, read: Result<T, E>) -> Result<T, E> {
        let mut since = self.lost_since.lock().unwrap_or_else(PoisonError::into_inner);
        match read {
            Ok(_) => *since = None,
            Err(_) => {
                since.get_or_insert_with(Instant::now);
            }
        }
        read
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quorum_is_lost_from_the_first_failure_to_the_next_success() {
        let quorum = Quorum::default();
        let later = || Instant::now() + Duration::from_secs(10);
        assert_eq!(quorum.lost_for(later()), Duration::ZERO);
        let _ = quorum.note(Err::<(), _>(()));
        let _ = quorum.note(Err::<(), _>(()));
        assert!(quorum.lost_for(later()) >= Duration::from_secs(9));
        let _ = quorum.note(Ok::<_, ()>(()));
        assert_eq!(quorum.lost_for(later()), Duration::ZERO);
    }
}

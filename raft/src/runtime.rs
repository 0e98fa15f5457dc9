//! Tasks, clocks and blocking work, for this crate and for openraft alike: tokio's in the product;
//! with the feature `sim`, those of a simulated world for code that runs in one.

use std::{
    collections::BTreeMap,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures::future::{AbortHandle, Abortable};
use openraft::AsyncRuntime;
use tokio::sync::Notify;

#[cfg(not(feature = "sim"))]
pub(crate) use openraft_rt_tokio::TokioRuntime as Runtime;

#[cfg(feature = "sim")]
pub(crate) use crate::sim::Runtime;

/// A point on the clock that timers follow.
pub(crate) type Instant = <Runtime as AsyncRuntime>::Instant;
/// A spawned task.
pub(crate) type JoinHandle<T> = <Runtime as AsyncRuntime>::JoinHandle<T>;
/// A deadline passed.
pub(crate) type Elapsed = <Runtime as AsyncRuntime>::TimeoutError;

pub(crate) fn now() -> Instant {
    <Instant as openraft::Instant>::now()
}

pub(crate) fn spawn<F>(future: F) -> JoinHandle<F::Output>
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    Runtime::spawn(future)
}

pub(crate) fn sleep(duration: Duration) -> impl Future<Output = ()> + Send {
    Runtime::sleep(duration)
}

pub(crate) fn sleep_until(deadline: Instant) -> impl Future<Output = ()> + Send {
    Runtime::sleep_until(deadline)
}

pub(crate) fn timeout<F: Future + Send>(
    duration: Duration,
    future: F,
) -> impl Future<Output = Result<F::Output, Elapsed>> + Send {
    Runtime::timeout(duration, future)
}

pub(crate) fn timeout_at<F: Future + Send>(
    deadline: Instant,
    future: F,
) -> impl Future<Output = Result<F::Output, Elapsed>> + Send {
    Runtime::timeout_at(deadline, future)
}

/// The wall clock in milliseconds since the Unix epoch.
pub(crate) fn unix_ms() -> u64 {
    #[cfg(feature = "sim")]
    if let Some(simulated) = crate::sim::unix_ms() {
        return simulated;
    }
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    u64::try_from(now.unwrap_or_default().as_millis()).unwrap_or(u64::MAX)
}

/// Runs work that blocks beside the tasks.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    #[cfg(feature = "sim")]
    if crate::sim::is_running() {
        return work();
    }
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(io::Error::other(error)))
}

/// Tasks that end with their owner.
#[derive(Default)]
pub(crate) struct Tasks {
    shared: Arc<SharedTasks>,
    next: u64,
}

#[derive(Default)]
struct SharedTasks {
    running: Mutex<BTreeMap<u64, AbortHandle>>,
    ended: Notify,
}

impl SharedTasks {
    fn running(&self) -> MutexGuard<'_, BTreeMap<u64, AbortHandle>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Strikes a task off when it ends, however it ends.
struct Ended(Arc<SharedTasks>, u64);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.running().remove(&self.1);
        self.0.ended.notify_one();
    }
}

impl Tasks {
    pub(crate) fn spawn(&mut self, future: impl Future<Output = ()> + Send + 'static) {
        self.next += 1;
        let (handle, registration) = AbortHandle::new_pair();
        self.shared.running().insert(self.next, handle);
        let ended = Ended(self.shared.clone(), self.next);
        let task = async move {
            let _ended = ended;
            future.await;
        };
        drop(spawn(async move {
            let _ = Abortable::new(task, registration).await;
        }));
    }

    /// How many have not ended yet.
    pub(crate) fn len(&self) -> usize {
        self.shared.running().len()
    }

    /// Returns when one has ended, perhaps for an earlier one.
    pub(crate) async fn one_ended(&self) {
        self.shared.ended.notified().await;
    }

    /// Ends all of them and waits until they are gone.
    pub(crate) async fn shutdown(self) {
        self.abort();
        while self.len() > 0 {
            self.one_ended().await;
        }
    }

    fn abort(&self) {
        let running: Vec<_> = self.shared.running().values().cloned().collect();
        running.iter().for_each(AbortHandle::abort);
    }
}

impl Drop for Tasks {
    fn drop(&mut self) {
        self.abort();
    }
}

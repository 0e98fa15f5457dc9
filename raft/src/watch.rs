//! A value that many wait for. As tokio's watch channel, but waiters wake in the order in which
//! they came: tokio draws lots, and a simulated run must not.

use std::{
    collections::BTreeMap,
    fmt,
    ops::Deref,
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard},
    task::{Context, Poll, Waker},
};

/// The sender is gone, so nothing will change any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the watched value's owner is gone")]
pub struct Closed;

struct Shared<T> {
    value: RwLock<T>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    version: u64,
    closed: bool,
    /// By receiver, so that one waits once, however often it is polled, and leaves nothing behind.
    waiting: BTreeMap<u64, Waker>,
    receivers: u64,
}

impl<T> Shared<T> {
    fn read(&self) -> RwLockReadGuard<'_, T> {
        self.value.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.state();
        change(&mut state);
        let waiting = std::mem::take(&mut state.waiting);
        drop(state);
        waiting.into_values().for_each(Waker::wake);
    }
}

/// The owner of a watched value.
pub struct Sender<T> {
    shared: Arc<Shared<T>>,
}

impl<T> Sender<T> {
    /// A watched value.
    pub fn new(value: T) -> Self {
        let shared = Shared { value: RwLock::new(value), state: Mutex::default() };
        Self { shared: Arc::new(shared) }
    }

    /// Somebody who watches from now on.
    pub fn subscribe(&self) -> Receiver<T> {
        let seen = self.shared.state().version;
        Receiver { shared: self.shared.clone(), seen, ticket: None }
    }

    /// The value, locked while the answer lives.
    pub fn borrow(&self) -> Ref<'_, T> {
        Ref(self.shared.read())
    }

    /// Sets the value and wakes who waits; returns what it was.
    pub fn send_replace(&self, value: T) -> T {
        let mut current = self.shared.value.write().unwrap_or_else(PoisonError::into_inner);
        let previous = std::mem::replace(&mut *current, value);
        drop(current);
        self.shared.wake(|state| state.version += 1);
        previous
    }

    /// Changes the value in place; who waits is woken if `change` says that it did.
    pub fn send_if_modified(&self, change: impl FnOnce(&mut T) -> bool) -> bool {
        let mut current = self.shared.value.write().unwrap_or_else(PoisonError::into_inner);
        let changed = change(&mut current);
        drop(current);
        if changed {
            self.shared.wake(|state| state.version += 1);
        }
        changed
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        self.shared.wake(|state| state.closed = true);
    }
}

impl<T: fmt::Debug> fmt::Debug for Sender<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Sender").field(&*self.borrow()).finish()
    }
}

/// Somebody who watches.
pub struct Receiver<T> {
    shared: Arc<Shared<T>>,
    seen: u64,
    /// Its place among those who wait, since it first did.
    ticket: Option<u64>,
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket {
            self.shared.state().waiting.remove(&ticket);
        }
    }
}

impl<T> Clone for Receiver<T> {
    fn clone(&self) -> Self {
        Self { shared: self.shared.clone(), seen: self.seen, ticket: None }
    }
}

impl<T> Receiver<T> {
    /// The value, locked while the answer lives.
    pub fn borrow(&self) -> Ref<'_, T> {
        Ref(self.shared.read())
    }

    /// The value, which counts as seen.
    pub fn borrow_and_update(&mut self) -> Ref<'_, T> {
        let value = self.shared.read();
        self.seen = self.shared.state().version;
        Ref(value)
    }

    /// Waits for a change since the value was last seen.
    ///
    /// # Errors
    /// [`Closed`] when there can be none.
    pub async fn changed(&mut self) -> Result<(), Closed> {
        std::future::poll_fn(|context| self.poll_changed(context)).await
    }

    /// Waits until the value satisfies a condition.
    ///
    /// # Errors
    /// [`Closed`] when it can't any more.
    pub async fn wait_for(
        &mut self,
        mut condition: impl FnMut(&T) -> bool,
    ) -> Result<Ref<'_, T>, Closed> {
        while !condition(&self.borrow_and_update()) {
            self.changed().await?;
        }
        Ok(self.borrow())
    }

    fn poll_changed(&mut self, context: &Context<'_>) -> Poll<Result<(), Closed>> {
        let mut state = self.shared.state();
        if state.version != self.seen {
            self.seen = state.version;
            return Poll::Ready(Ok(()));
        }
        if state.closed {
            return Poll::Ready(Err(Closed));
        }
        let ticket = *self.ticket.get_or_insert_with(|| {
            state.receivers += 1;
            state.receivers
        });
        match state.waiting.get_mut(&ticket) {
            Some(waiting) => waiting.clone_from(context.waker()),
            None => {
                state.waiting.insert(ticket, context.waker().clone());
            }
        }
        Poll::Pending
    }
}

impl<T: fmt::Debug> fmt::Debug for Receiver<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Receiver").field(&*self.borrow()).finish()
    }
}

/// A watched value, locked.
pub struct Ref<'a, T>(RwLockReadGuard<'a, T>);

impl<T> Deref for Ref<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;

    #[test]
    fn who_watches_sees_each_change_once_and_the_end() {
        let sender = Sender::new(1);
        let mut receiver = sender.subscribe();
        assert!(receiver.changed().now_or_never().is_none());
        sender.send_replace(2);
        sender.send_replace(3);
        assert_eq!(receiver.changed().now_or_never(), Some(Ok(())));
        assert!(receiver.changed().now_or_never().is_none());
        assert_eq!(*receiver.borrow(), 3);
        assert!(!sender.send_if_modified(|_| false));
        assert!(receiver.changed().now_or_never().is_none());
        assert!(receiver.wait_for(|value| *value == 4).now_or_never().is_none());
        assert_eq!(
            receiver.wait_for(|value| *value == 3).now_or_never().map(|r| r.map(|v| *v)),
            Some(Ok(3))
        );
        drop(sender);
        assert_eq!(receiver.changed().now_or_never(), Some(Err(Closed)));
    }
}

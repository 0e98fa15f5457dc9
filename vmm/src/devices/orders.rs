//! What a device's thread is told while it serves its queues: to hold, to go on, to end.
//!
//! ```text
//!   serving ──hold()──▶ holding ──the thread is at rest──▶ held ──go_on()──▶ serving
//!      └────────────────────┴──────────stop()───────────────┴──▶ (the thread ends)
//! ```
//! A thread at rest has nothing in flight and touches neither guest memory nor what is behind the
//! device.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

const SERVE: u8 = 0;
const HOLD: u8 = 1;
const STOP: u8 = 2;

/// Orders to one thread.
#[derive(Debug)]
pub struct Orders {
    wake: EventFd,
    order: AtomicU8,
    rest: Mutex<Rest>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Rest {
    held: bool,
    ended: bool,
}

impl Orders {
    /// To a thread that serves.
    pub fn new() -> std::io::Result<Orders> {
        Ok(Orders {
            wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            order: AtomicU8::new(SERVE),
            rest: Mutex::default(),
            changed: Condvar::new(),
        })
    }

    fn rest(&self) -> MutexGuard<'_, Rest> {
        self.rest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn order(&self, order: u8) {
        let rest = self.rest();
        if self.order.load(Ordering::Acquire) == STOP {
            return;
        }
        self.order.store(order, Ordering::Release);
        // What is readable is a reason to look.
        let _ = if order == SERVE { self.wake.read().map(drop) } else { self.wake.write(1) };
        drop(rest);
        self.changed.notify_all();
    }

    /// The thread shall end.
    pub fn stop(&self) {
        self.order(STOP);
    }

    /// The thread shall come to rest.
    pub fn hold(&self) {
        self.order(HOLD);
    }

    /// The thread shall serve again.
    pub fn go_on(&self) {
        self.order(SERVE);
    }

    /// Waits until the thread is at rest or has ended; `false`: it is not by `deadline`.
    pub fn wait_until_held(&self, deadline: Instant) -> bool {
        let mut rest = self.rest();
        while !(rest.held || rest.ended) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let waited = self.changed.wait_timeout(rest, left);
            rest = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// The thread: readable when there is an order to look at.
    pub fn wake(&self) -> &EventFd {
        &self.wake
    }

    /// The thread: whether it shall do something else than serve.
    pub fn is_pending(&self) -> bool {
        self.order.load(Ordering::Acquire) != SERVE
    }

    /// The thread: whether it shall come to rest, once nothing is in flight any more.
    pub fn is_to_hold(&self) -> bool {
        self.order.load(Ordering::Acquire) == HOLD
    }

    /// The thread: rests while it shall; `true`: it shall end. Nothing may be in flight.
    pub fn obey(&self) -> bool {
        if !self.is_pending() {
            return false;
        }
        let mut rest = self.rest();
        rest.held = true;
        self.changed.notify_all();
        while self.is_to_hold() {
            rest = self.changed.wait(rest).unwrap_or_else(PoisonError::into_inner);
        }
        rest.held = false;
        self.order.load(Ordering::Acquire) == STOP
    }

    /// The thread ends by itself, or because it was told to.
    pub fn end(&self) {
        self.rest().ended = true;
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::AtomicU64;
    use std::time::Duration;

    fn worker(orders: &Arc<Orders>, done: &Arc<AtomicU64>) -> std::thread::JoinHandle<()> {
        let (orders, done) = (Arc::clone(orders), Arc::clone(done));
        std::thread::spawn(move || {
            while !orders.obey() {
                done.fetch_add(1, Ordering::SeqCst);
            }
            orders.end();
        })
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    #[test]
    fn a_held_thread_does_nothing_until_it_goes_on() {
        let (orders, done) = (Arc::new(Orders::new().unwrap()), Arc::new(AtomicU64::new(0)));
        let thread = worker(&orders, &done);
        for _ in 0..100 {
            orders.hold();
            assert!(orders.wait_until_held(soon()));
            let before = done.load(Ordering::SeqCst);
            std::thread::yield_now();
            assert_eq!(done.load(Ordering::SeqCst), before);
            orders.go_on();
            while done.load(Ordering::SeqCst) == before {
                std::thread::yield_now();
            }
        }
        orders.hold();
        assert!(orders.wait_until_held(soon()));
        orders.stop();
        thread.join().unwrap();
        // What has ended is at rest, and stays so whatever it is told.
        orders.go_on();
        assert!(orders.wait_until_held(soon()) && orders.is_pending());
    }
}

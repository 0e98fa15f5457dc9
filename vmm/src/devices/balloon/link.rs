//! The host's end of a balloon: control threads set its target and ask for figures; the device's
//! thread answers.

use super::statistics::Statistics;
use crate::devices::fields::Fields;
use crate::machine::memory::PAGE_BYTES;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

// `struct virtio_balloon_config`: the target is the host's to write, the size the guest's.
const TARGET: usize = 0;
const SIZE: usize = 4;
const CONFIG_BYTES: usize = 8;
const PAGES_PER_MIB: u32 = (1 << 20) / PAGE_BYTES as u32;

/// Shared by control threads and the device's thread.
#[derive(Debug)]
pub struct BalloonLink {
    fields: Fields,
    wake: EventFd,
    state: Mutex<State>,
    answered: Condvar,
    given_back_bytes: AtomicU64,
    refused: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    statistics: Option<Statistics>,
    /// Answers so far.
    answers: u64,
}

impl BalloonLink {
    /// A balloon that the guest is asked to inflate to `target_mib`.
    pub(super) fn new(target_mib: u32) -> io::Result<BalloonLink> {
        let link = BalloonLink {
            fields: Fields::new(vec![0; CONFIG_BYTES], SIZE..SIZE + 4),
            wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            state: Mutex::default(),
            answered: Condvar::new(),
            given_back_bytes: AtomicU64::new(0),
            refused: AtomicU64::new(0),
        };
        link.set_target(target_mib);
        Ok(link)
    }

    pub(super) fn fields(&self) -> Fields {
        self.fields.clone()
    }

    /// Sets the target; the guest must then be told that its configuration changed.
    pub fn set_target(&self, mib: u32) {
        self.fields.set_word(TARGET, mib.saturating_mul(PAGES_PER_MIB));
    }

    /// The size asked for, MiB.
    pub fn target_mib(&self) -> u32 {
        self.fields.word(TARGET) / PAGES_PER_MIB
    }

    /// The size the guest says it has, MiB.
    pub fn size_mib(&self) -> u32 {
        self.fields.word(SIZE) / PAGES_PER_MIB
    }

    /// Bytes of pages that went back to the host since the start, by balloon and by reports.
    pub fn given_back_bytes(&self) -> u64 {
        self.given_back_bytes.load(Ordering::Relaxed)
    }

    /// What the guest named and was not taken: pages outside of its memory, malformed requests.
    pub fn refusals(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks the guest for its figures and waits for them; a guest that does not answer in time
    /// leaves the ones it gave before, or none.
    pub fn statistics(&self, patience: Duration) -> Option<Statistics> {
        let state = self.lock();
        let before = state.answers;
        let _ = self.wake.write(1);
        let waited =
            self.answered.wait_timeout_while(state, patience, |state| state.answers == before);
        waited.unwrap_or_else(PoisonError::into_inner).0.statistics
    }

    /// What wakes the device's thread.
    pub(super) fn wake(&self) -> &EventFd {
        &self.wake
    }

    /// Whether a control thread asked since the last call.
    pub(super) fn is_asked(&self) -> bool {
        self.wake.read().is_ok()
    }

    pub(super) fn answer(&self, statistics: Statistics) {
        let mut state = self.lock();
        state.statistics = Some(statistics);
        state.answers += 1;
        self.answered.notify_all();
    }

    pub(super) fn given_back(&self, bytes: u64) {
        self.given_back_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn refused(&self, count: u64) {
        self.refused.fetch_add(count, Ordering::Relaxed);
    }

    /// The driver has gone, and with it what it had given and said.
    pub(super) fn forget(&self) {
        self.fields.set_word(SIZE, 0);
        self.lock().statistics = None;
    }
}

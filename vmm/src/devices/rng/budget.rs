//! How many bytes may be given away: a bucket that fills evenly and holds one second's worth.

use std::time::{Duration, Instant};

/// The bucket. Time is passed in.
#[derive(Debug)]
pub(super) struct Budget {
    per_second: u64,
    bytes: u64,
    filled: Instant,
}

impl Budget {
    /// A full bucket that gets `per_second` bytes a second.
    pub(super) fn new(per_second: u64, now: Instant) -> Budget {
        Budget { per_second, bytes: per_second, filled: now }
    }

    /// What may be taken now.
    pub(super) fn available(&mut self, now: Instant) -> u64 {
        let passed = now.saturating_duration_since(self.filled);
        if passed >= Duration::from_secs(1) {
            (self.bytes, self.filled) = (self.per_second, now);
            return self.bytes;
        }
        let more = (passed.as_nanos() * u128::from(self.per_second) / 1_000_000_000) as u64;
        self.bytes = self.bytes.saturating_add(more).min(self.per_second);
        // Only the time that became whole bytes is used up, so that no fraction is lost.
        let used = u128::from(more) * 1_000_000_000 / u128::from(self.per_second.max(1));
        self.filled += Duration::from_nanos(used as u64);
        self.bytes
    }

    /// Takes bytes out.
    pub(super) fn take(&mut self, bytes: u64) {
        self.bytes = self.bytes.saturating_sub(bytes);
    }

    /// How long until `bytes` (at most a second's worth) are there.
    pub(super) fn wait_for(&self, bytes: u64) -> Duration {
        let missing = bytes.min(self.per_second).saturating_sub(self.bytes);
        let ns = u128::from(missing) * 1_000_000_000;
        Duration::from_nanos(ns.div_ceil(u128::from(self.per_second.max(1))) as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_than_a_second_is_saved_and_nothing_is_lost_on_the_way() {
        let start = Instant::now();
        let mut budget = Budget::new(1000, start);
        assert_eq!(budget.available(start + Duration::from_secs(60)), 1000);
        budget.take(1000);
        let at = |micros| start + Duration::from_secs(60) + Duration::from_micros(micros);
        assert_eq!(budget.wait_for(10), Duration::from_millis(10));
        let mut given = 0;
        for step in 1..=10_000 {
            let bytes = budget.available(at(step * 300));
            budget.take(bytes);
            given += bytes;
        }
        assert!((2998..=3000).contains(&given), "{given} bytes in 3 s of 1000 a second");
    }

    #[test]
    fn what_never_fits_is_waited_for_no_longer_than_a_second() {
        let mut budget = Budget::new(10, Instant::now());
        budget.take(10);
        assert_eq!(budget.wait_for(1 << 40), Duration::from_secs(1));
    }
}

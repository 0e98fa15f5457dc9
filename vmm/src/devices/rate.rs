//! Rate limits by token buckets: so many operations and bytes a second, with room for bursts.
//!
//! A bucket is kept as the time at which it is full again, so that it needs no timer: who takes from
//! it moves that time on, and who finds it empty knows how long to wait. What asks for more than a
//! bucket holds passes when a whole token is left, and is paid off afterwards.

use crate::config::{RateLimits, TokenBucket};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Limits of a device, which control requests may change while its thread keeps them.
#[derive(Debug)]
pub struct RateLink {
    version: AtomicU64,
    limits: Mutex<RateLimits>,
}

impl RateLink {
    /// With the limits of a configuration.
    pub fn new(limits: RateLimits) -> RateLink {
        RateLink { version: AtomicU64::new(1), limits: Mutex::new(limits) }
    }

    /// Changes them; the device's thread must then be woken.
    pub fn set(&self, limits: RateLimits) {
        *self.limits.lock().unwrap_or_else(PoisonError::into_inner) = limits;
        self.version.fetch_add(1, Ordering::Release);
    }

    fn get(&self) -> RateLimits {
        *self.limits.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a device's thread keeps of its limits.
#[derive(Debug)]
pub struct Limiter {
    start: Instant,
    version: u64,
    operations: Option<Bucket>,
    bytes: Option<Bucket>,
    wait: Option<Duration>,
}

impl Default for Limiter {
    fn default() -> Limiter {
        Limiter { start: Instant::now(), version: 0, operations: None, bytes: None, wait: None }
    }
}

impl Limiter {
    /// Whether one more operation may pass now; if not, [`Limiter::wait`] says for how long.
    pub fn passes(&mut self, link: &RateLink) -> bool {
        self.follow(link);
        self.wait = None;
        if self.operations.is_none() && self.bytes.is_none() {
            return true;
        }
        let now = self.now();
        let buckets = [&self.operations, &self.bytes].into_iter().flatten();
        let wait = buckets.map(|bucket| bucket.wait(now)).max().unwrap_or_default();
        if !wait.is_zero() {
            self.wait = Some(wait);
        }
        wait.is_zero()
    }

    /// Takes an operation and its bytes.
    pub fn take(&mut self, bytes: u64) {
        if self.operations.is_none() && self.bytes.is_none() {
            return;
        }
        let now = self.now();
        if let Some(bucket) = &mut self.operations {
            bucket.take(1, now);
        }
        if let Some(bucket) = &mut self.bytes {
            bucket.take(bytes, now);
        }
    }

    /// How long what was held back last has to wait.
    pub fn wait(&self) -> Option<Duration> {
        self.wait
    }

    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    fn follow(&mut self, link: &RateLink) {
        let version = link.version.load(Ordering::Acquire);
        if version != self.version {
            let limits = link.get();
            self.version = version;
            self.operations = limits.operations.map(Bucket::new);
            self.bytes = limits.bytes.map(Bucket::new);
        }
    }
}

/// A token bucket.
#[derive(Debug)]
struct Bucket {
    limit: TokenBucket,
    /// How long it takes to fill but for the token that whoever passes finds in it.
    depth: Duration,
    /// When it is full again.
    full_at: Duration,
}

impl Bucket {
    fn new(limit: TokenBucket) -> Bucket {
        let burst = limit.burst.unwrap_or(limit.per_second);
        let depth = time_of(burst.saturating_sub(1), limit.per_second);
        Bucket { limit, depth, full_at: Duration::ZERO }
    }

    fn wait(&self, now: Duration) -> Duration {
        self.full_at.saturating_sub(now).saturating_sub(self.depth)
    }

    fn take(&mut self, tokens: u64, now: Duration) {
        let time = time_of(tokens, self.limit.per_second);
        self.full_at = self.full_at.max(now).saturating_add(time);
    }
}

/// How long a bucket takes to get so many tokens.
fn time_of(tokens: u64, per_second: u64) -> Duration {
    let nanos = u128::from(tokens) * 1_000_000_000 / u128::from(per_second.max(1));
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bucket(per_second: u64, burst: Option<u64>) -> Bucket {
        Bucket::new(TokenBucket { per_second, burst })
    }

    /// How many single tokens pass at `now`.
    fn passing(bucket: &mut Bucket, now: Duration) -> u64 {
        let mut passed = 0;
        while bucket.wait(now).is_zero() {
            bucket.take(1, now);
            passed += 1;
        }
        passed
    }

    #[test]
    fn a_burst_passes_and_then_the_rate_holds() {
        let mut bucket = bucket(100, Some(20));
        let at = Duration::from_millis;
        assert_eq!(passing(&mut bucket, at(0)), 20);
        let wait = bucket.wait(at(0));
        assert!(wait > Duration::ZERO && wait <= at(10), "{wait:?}");
        assert_eq!(passing(&mut bucket, wait), 1);
        let later: u64 = (1..=100).map(|step| passing(&mut bucket, at(step * 10) + wait)).sum();
        assert_eq!(later, 100);
        assert_eq!(passing(&mut bucket, at(3_600_000)), 20);
    }

    #[test]
    fn what_is_larger_than_the_bucket_passes_and_is_paid_off() {
        let mut bucket = bucket(1000, None);
        bucket.take(5000, Duration::ZERO);
        let wait = bucket.wait(Duration::ZERO);
        assert_eq!(wait, Duration::from_millis(4001));
        assert!(bucket.wait(wait).is_zero());
        bucket.take(u64::MAX, wait);
        bucket.take(u64::MAX, wait);
        assert!(bucket.wait(wait) > Duration::from_secs(1 << 20));
    }

    #[test]
    fn limits_are_changed_while_they_are_kept() {
        let few = TokenBucket { per_second: 1, burst: Some(1) };
        let link = RateLink::new(RateLimits { operations: Some(few), bytes: None });
        let mut limiter = Limiter::default();
        assert!(limiter.passes(&link));
        limiter.take(512);
        assert!(!limiter.passes(&link) && limiter.wait().is_some());
        link.set(RateLimits::default());
        assert!(limiter.passes(&link) && limiter.wait().is_none());
    }
}

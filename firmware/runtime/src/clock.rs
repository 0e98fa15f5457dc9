//! Time from the TSC: no exit, no interrupt.

use crate::{boot, cpu};

/// A point in time, in microseconds since the guest's CPU started counting.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Instant(u64);

impl Instant {
    /// Microseconds since the counter's start.
    #[must_use]
    pub const fn micros(self) -> u64 {
        self.0
    }

    /// From microseconds since the counter's start.
    #[must_use]
    pub const fn from_micros(micros: u64) -> Self {
        Instant(micros)
    }

    /// This much later.
    #[must_use]
    pub const fn after_micros(self, micros: u64) -> Self {
        Instant(self.0.saturating_add(micros))
    }

    /// Microseconds since an earlier point; 0 where it is later.
    #[must_use]
    pub const fn micros_since(self, earlier: Instant) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// Now.
#[must_use]
pub fn now() -> Instant {
    Instant(micros_of(cpu::tsc(), boot::parameters().tsc_hz))
}

/// Nanoseconds of a span of the TSC.
pub(crate) fn nanos_of(ticks: u64) -> u64 {
    let hz = u128::from(boot::parameters().tsc_hz.max(1));
    (u128::from(ticks) * 1_000_000_000 / hz) as u64
}

/// The TSC value at which `instant` is reached.
pub(crate) fn tsc_at(instant: Instant) -> u64 {
    tsc_of(instant.0, boot::parameters().tsc_hz)
}

fn micros_of(tsc: u64, hz: u64) -> u64 {
    (u128::from(tsc) * 1_000_000 / u128::from(hz.max(1))) as u64
}

/// Rounded up, so that at this count the microsecond has been reached; never 0, which disarms.
fn tsc_of(micros: u64, hz: u64) -> u64 {
    let ticks = (u128::from(micros) * u128::from(hz)).div_ceil(1_000_000);
    u64::try_from(ticks).unwrap_or(u64::MAX).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deadline_in_ticks_is_never_early() {
        for hz in [1_000_000, 2_499_999_999, 3_000_000_000, 999_999_937] {
            for micros in [0, 1, 7, 1_000_003, 86_400_000_000] {
                assert!(micros_of(tsc_of(micros, hz), hz) >= micros, "{micros} µs at {hz} Hz");
            }
        }
    }
}

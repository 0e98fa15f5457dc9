//! What happened, in order: hashed always, kept as lines where somebody wants to read it.

use std::fmt::Display;
use std::time::Duration;

use crate::checks::digest;

/// A run's events.
#[derive(Debug, Default)]
pub(crate) struct Trace {
    hash: u64,
    events: u64,
    print: bool,
}

impl Trace {
    /// An empty trace, printed as it grows or not.
    pub(crate) fn new(print: bool) -> Trace {
        Trace { print, ..Trace::default() }
    }

    /// Adds an event.
    pub(crate) fn add(&mut self, now: Duration, what: impl Display) {
        let line = format!("{:>10.6} {what}", now.as_secs_f64());
        if self.print {
            println!("{line}");
        }
        self.hash = self.hash.rotate_left(7) ^ digest(line.as_bytes());
        self.events += 1;
    }

    /// The hash of all events, and their number.
    pub(crate) fn hash(&self) -> (u64, u64) {
        (self.hash, self.events)
    }
}

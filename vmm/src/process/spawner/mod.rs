//! Starting guests: a small process that opened `/dev/kvm`, asked for the processor's features,
//! entered empty namespaces and compiled the filter once, and forks itself for each guest.
//!
//! It forks without exec: the executable is already mapped and relocated, and what all guests
//! share is already in memory. That takes about a tenth of a millisecond; starting the executable
//! anew would take half a one. The process is small and single-threaded, which is what makes the
//! fork cheap and safe. Guests outlive it: killing it leaves them running.

pub mod client;
pub mod server;

pub use client::{Client, FloorTimes, SpawnError, Spawned};

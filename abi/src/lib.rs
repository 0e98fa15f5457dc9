//! Layouts that two of trine's programs share in memory or on a socket:
//!
//! - [`boot`]: what the VMM leaves in a unikernel's memory before its first instruction;
//! - [`packet_ring`]: the shared memory between a guest's network device and the switch;
//! - [`lease`] (feature `std`): until when a host's guests may change their disks;
//! - [`control`] (feature `std`): framed messages with descriptors over a Unix socket.
//!
//! It depends on nothing of ours, knows no policy and holds no state. Everything here is
//! read by a program that does not trust the writer: see each module for what to check.
#![cfg_attr(not(feature = "std"), no_std)]

pub mod boot;
#[cfg(feature = "std")]
pub mod control;
#[cfg(feature = "std")]
pub mod lease;
pub mod packet_ring;

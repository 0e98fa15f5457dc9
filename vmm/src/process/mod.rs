//! The process around a guest: how it starts, what it may do, how it ends.

pub mod ending;
pub mod guest;
pub mod resources;
pub mod sandbox;
pub mod seccomp;
pub mod spawner;
pub mod standalone;
pub mod timings;

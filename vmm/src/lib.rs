//! The virtual machine monitor: one guest in one process.
//!
//! A guest is described by [`config::VmConfig`]. It is started by the spawner
//! ([`spawner::Client`], for the node) or alone (`trine-vmm run --config FILE`), and asked
//! things over its control socket ([`control::Client`]).
//!
//! It never knows OpenStack, Raft or the switch's rules; it never opens a path or connects a
//! socket once the sandbox has closed; and nothing a guest does may end it by a panic.
//!
//! Start reading at [`process::guest`] (the list of steps from a request to the first
//! instruction), then [`machine`] (KVM), [`pci`] (what the guest sees), [`devices`].

pub mod bench;
pub mod config;
pub mod control;
pub mod devices;
pub mod machine;
pub mod pci;
pub mod probe;
pub mod process;

pub use process::spawner;

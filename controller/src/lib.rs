//! The controller: the cloud's replicated state, the decisions made from it, and the
//! OpenStack REST APIs in front of it.
//!
//! It never touches KVM, a disk or a switch: it describes guests, ports and volumes in
//! its own words, and the agent in `node` makes them real. `state` and `plan` do no I/O
//! and know no clock.
//!
//! Start reading at [`state::State`], then [`state::Command`], then `plan`, then `api`.

#![forbid(unsafe_code)]

pub mod api;
pub mod ids;
pub mod instance_data;
pub mod plan;
pub mod seal;
pub mod state;

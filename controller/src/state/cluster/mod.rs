//! The cluster service's part of the replicated state.

mod apply;
mod commands;
mod fencing;
mod keys;
mod remove;
mod replace;
mod state;

pub use apply::{DEFAULT_DOMAIN, DEFAULT_ZONE, ROLES};
pub use commands::*;
pub use state::*;

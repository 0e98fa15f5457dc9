//! The identity service's part of the replicated state.

mod apply;
mod commands;
mod state;

pub(in crate::state) use apply::set;

pub use commands::*;
pub use state::*;

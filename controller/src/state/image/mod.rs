//! The image service's part of the replicated state.

mod apply;
mod commands;
mod state;

pub use commands::*;
pub use state::*;

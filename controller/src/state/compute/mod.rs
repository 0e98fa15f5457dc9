//! The compute service's part of the replicated state.

mod apply;
mod commands;
mod evacuate;
mod state;

pub use apply::{CPU_ALLOCATION_RATIO, DEVICE_OWNER};
pub use commands::*;
pub use state::*;

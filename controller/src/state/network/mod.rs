//! The network service's part of the replicated state.

mod addresses;
mod apply;
mod commands;
mod floating;
mod ports;
mod security;
mod state;

pub(in crate::state) use addresses::next as next_address;
pub use addresses::parse_mac;
pub use apply::{EXTERNAL_NETWORK, MTU_MIN, TENANT_MTU, VNI_FIRST, VNI_LAST};
pub use commands::*;
pub use security::DEFAULT_GROUP;
pub use state::*;

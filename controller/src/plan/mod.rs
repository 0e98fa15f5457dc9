//! Decisions, pure: where things go, and what a host has to do next.

pub mod agent;
pub mod host_view;
pub mod leading;
pub mod leases;
pub mod observed;
pub mod protocol;
pub mod steps;
pub mod view;

mod evacuation;
mod keys;
mod level;
mod prepare;
mod retries;
mod schedule;
#[cfg(test)]
mod tests;
mod upkeep;

pub use evacuation::evacuation;
pub use host_view::host_view;
pub use keys::{
    TOKEN_KEYS_ROTATE_MS, keys_to_forget, reseal, rotate_token_keys, token_keys,
    token_rotation_is_due,
};
pub use level::raise_feature_level;
pub use prepare::{Promise, SharedInFlight, prepare, prepare_held};
pub use schedule::{IN_FLIGHT_MAX, InFlight, Liveness, schedule};
pub use steps::{Step, plan};
pub use upkeep::{UPKEEP_COMMANDS_MAX, UPLOAD_MS_MAX, interrupted_uploads, upkeep};
pub use view::HostView;

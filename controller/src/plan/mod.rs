//! Decisions, pure: where things go, and what a host has to do next.

pub mod host_view;
pub mod observed;
pub mod protocol;
pub mod steps;
pub mod view;

mod level;
mod prepare;
mod schedule;
#[cfg(test)]
mod tests;

pub use host_view::host_view;
pub use level::feature_level_to_raise;
pub use prepare::prepare;
pub use schedule::{IN_FLIGHT_MAX, InFlight, Liveness, schedule};
pub use steps::{Step, plan};
pub use view::HostView;

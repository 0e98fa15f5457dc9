//! Decisions, pure: where things go, and what a host has to do next.

pub mod host_view;
pub mod observed;
pub mod protocol;
pub mod steps;
pub mod view;

mod schedule;

pub use host_view::host_view;
pub use schedule::Liveness;
pub use steps::{Step, plan};
pub use view::HostView;

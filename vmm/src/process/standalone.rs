//! `trine-vmm run --config FILE`: one guest, every resource by path.

use super::guest;
use super::resources::{Resources, Supply};
use super::timings::Clock;
use crate::config::VmConfig;
use crate::devices::console::Sink;
use crate::machine::Host;
use std::path::Path;

/// Runs the guest that `path` describes; returns only with what is wrong, one line each.
pub fn run(path: &Path) -> Vec<String> {
    let clock = Clock::default();
    clock.spawn.reach();
    clock.process.reach();
    let config = match VmConfig::read(path) {
        Ok(config) => config,
        Err(problems) => return problems,
    };
    let started = Host::open().map_err(|error| error.to_string()).and_then(|host| {
        let resources =
            Resources::open(&config, &mut Supply::Paths, Sink::Stdout).map_err(|error| error.to_string())?;
        guest::run(&host, &config, resources, clock, true).map_err(|error| error.to_string())
    });
    started.err().into_iter().collect()
}

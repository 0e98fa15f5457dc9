//! The userspace switch of one host: guests' frames come in over shared packet rings, pass
//! anti-spoofing, security groups and the services a network owes its guests (ARP, DHCP,
//! metadata, ping at the gateway), and leave to another ring, through VXLAN to another host, or
//! through a forwarded loopback port.
//!
//! It must never decide or remember: the node programs it with a whole [`program::Program`], a
//! restarted switch is empty until the node programs it again, and [`control::Status::instance`]
//! tells the node when that is due.
//!
//! Start reading at [`program`] (what it is told), then `pipeline` (what happens to a frame; pure),
//! then `io` (the thread that moves frames), then `service` (the TCP stack behind metadata and
//! forwards).
#![forbid(unsafe_code)]

pub mod client;
pub mod compile;
pub mod control;
mod io;
mod pipeline;
pub mod program;
mod service;
mod wire;

use std::net::SocketAddr;
use std::path::PathBuf;

/// What a switch process is started with.
#[derive(Clone, Debug)]
pub struct SwitchConfig {
    /// Unix socket to bind for control, mode 0600.
    pub control: PathBuf,
    /// Address and UDP port of this host's tunnel endpoint; never a wildcard.
    pub vtep: SocketAddr,
}

pub use client::Client;
pub use io::{Error, Switch};

/// Runs a switch; returns only with what ended it.
pub fn run(config: SwitchConfig) -> Result<(), Error> {
    Switch::bind(&config)?.run()
}

//! `trine`: one executable for an operator of three KVM hosts. Each subcommand is one file below
//! [`cli`] (or a module of its own), with `Args` and `run(args)`.
//!
//! It must never contain logic that a library owns: states and decisions are `controller`'s,
//! consensus is `raft`'s, frames are `netstack`'s, bytes on disk are `storage`'s, guests are
//! `vmm`'s. What is here joins them: start reading at [`daemon`] (a node's life), then
//! [`agent`] (how a host follows the replicated state).
#![forbid(unsafe_code)]

mod agent;
mod bench;
mod cli;
mod client;
mod cluster;
mod cluster_keys;
mod config;
mod daemon;
mod data_directory;
mod demo;
mod embedded;
mod files;
mod image;
mod join_token;
mod joining;
mod pki;
mod process;
mod process_end;
mod runtime_directory;
mod spawner;
mod up;

use clap::Parser;
use std::process::ExitCode;

/// An OpenStack-compatible cloud for KVM hosts, in one executable.
#[derive(clap::Parser)]
#[command(name = "trine", version, arg_required_else_help = true)]
#[command(
    after_help = "Examples:\n  trine demo\n  trine init --data-dir /var/lib/trine --address 10.0.0.11\n  trine node --data-dir /var/lib/trine"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Makes a new cluster's first node: its data directory with authority, keys and credentials.
    Init(cli::init::Args),
    /// Makes a data directory that belongs to an existing cluster.
    Join(cli::join::Args),
    /// Prints a one-time token with which another host may join.
    JoinToken(cli::join_token::Args),
    /// The cluster as a whole: its members, their replacement, backups.
    Cluster(cli::cluster::Args),
    /// Runs this host's node: API, replicated state, agent.
    Node(cli::node::Args),
    /// Shows how this host's node is.
    Status(cli::status::Args),
    /// Stops this host's node, switch and storage; guests too where asked.
    Stop(cli::stop::Args),
    /// Runs a switch (the node starts it by itself).
    Switch(cli::switch::Args),
    /// Runs a storage process (the node starts it by itself).
    Storage(cli::storage::Args),
    /// Runs one guest from a configuration file, without a cloud.
    Vmm(cli::vmm::Args),
    /// Three nodes on this machine, until stopped.
    Up(up::Args),
    /// Does the main job on this machine and shows it.
    Demo(demo::Args),
    /// Measures.
    Bench(bench::Args),
    /// The built-in guest image.
    Image(image::Args),
}

fn main() -> ExitCode {
    cli::logging::start();
    if rustls::crypto::ring::default_provider().install_default().is_err() {
        eprintln!("trine: another TLS provider was installed first");
        return ExitCode::FAILURE;
    }
    let result = match Cli::parse().command {
        Command::Init(args) => cli::init::run(args),
        Command::Join(args) => cli::join::run(args),
        Command::JoinToken(args) => cli::join_token::run(args),
        Command::Cluster(args) => cli::cluster::run(args),
        Command::Node(args) => cli::node::run(args),
        Command::Status(args) => cli::status::run(args),
        Command::Stop(args) => cli::stop::run(args),
        Command::Switch(args) => cli::switch::run(args),
        Command::Storage(args) => cli::storage::run(args),
        Command::Vmm(args) => cli::vmm::run(args),
        Command::Up(args) => up::run(args),
        Command::Demo(args) => demo::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Image(args) => image::run(args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("trine: {error:#}");
            ExitCode::FAILURE
        }
    }
}

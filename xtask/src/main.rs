//! The project's habits as commands: `cargo xtask --help`.

mod conformance;
mod dependencies;
mod fuzz;
mod guest_linux;
mod licences;
mod metadata;
mod shell;
mod sim;
mod torture;
mod verify;

use clap::{Parser, Subcommand};

/// Habits of trine's developers, one command each.
#[derive(Parser)]
#[command(name = "cargo xtask", version, about)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Everything CI checks: format, clippy, dependency direction, licences, all tests.
    #[command(after_help = "Examples:\n  cargo xtask verify\n  cargo xtask verify --only clippy")]
    Verify(verify::Arguments),
    /// Formats the code and applies clippy's own fixes.
    #[command(after_help = "Example:\n  cargo xtask fix")]
    Fix,
    /// Runs software that others wrote against a cloud of three nodes.
    #[command(
        after_help = "Examples:\n  cargo xtask conformance cli\n  cargo xtask conformance cli --keep"
    )]
    Conformance(conformance::Arguments),
    /// Runs the product's decisions and its consensus on simulated machines, under faults that a
    /// seed decides.
    #[command(
        after_help = "Examples:\n  cargo xtask sim --seeds 1000\n  cargo xtask sim --seed 7 --trace\n  cargo xtask sim --minutes 10\n  cargo xtask sim --mutations"
    )]
    Sim(sim::Arguments),
    /// Feeds parsers of foreign bytes with inputs that a seed decides.
    #[command(
        after_help = "Examples:\n  cargo xtask fuzz\n  cargo xtask fuzz pci --inputs 5000000 --seed 7"
    )]
    Fuzz(fuzz::Arguments),
    /// Boots unmodified Linux guests in an emulated host with hardware virtualisation.
    #[command(
        after_help = "Examples:\n  cargo xtask guest-linux\n  cargo xtask guest-linux --short\n  cargo xtask guest-linux --npt 0 reboot_is_a_reset"
    )]
    GuestLinux(guest_linux::Arguments),
    /// Runs three real nodes under random faults, and checks what clients and guests saw.
    #[command(
        after_help = "Examples:\n  cargo xtask torture\n  cargo xtask torture --minutes 30 --seed 7 --json"
    )]
    Torture(torture::Arguments),
}

fn main() -> anyhow::Result<()> {
    match Arguments::parse().command {
        Command::Verify(arguments) => verify::run(&arguments),
        Command::Fix => verify::fix(),
        Command::Conformance(arguments) => conformance::run(&arguments),
        Command::Sim(arguments) => sim::run(&arguments),
        Command::Fuzz(arguments) => fuzz::run(&arguments),
        Command::GuestLinux(arguments) => guest_linux::run(&arguments),
        Command::Torture(arguments) => torture::run(&arguments),
    }
}

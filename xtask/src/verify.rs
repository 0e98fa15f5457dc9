//! `cargo xtask verify`: exactly what CI checks, in the order of how soon each can fail.

use std::time::Instant;

use anyhow::{Context, Result};

use crate::{dependencies, guest_linux, licences, shell};

/// What `verify` takes.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Runs one part only.
    #[arg(long, value_enum)]
    only: Option<Part>,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    Format,
    Dependencies,
    Licences,
    Clippy,
    Guest,
    GuestLinux,
    Test,
}

/// The simulated world, without which the tests of consensus in it would be left out unseen.
const SIMULATED: &str = "raft/sim";

type Check = fn() -> Result<()>;

const PARTS: &[(Part, &str, Check)] = &[
    (Part::Format, "format", format),
    (Part::Dependencies, "dependencies", dependencies::check),
    (Part::Licences, "licences", licences::check),
    (Part::Guest, "guest", guest),
    (Part::Clippy, "clippy", clippy),
    (Part::GuestLinux, "guest-linux", guest_linux::verify),
    (Part::Test, "test", test),
];

/// Runs the parts and says how long each took.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    for (part, name, check) in PARTS {
        if arguments.only.is_some_and(|only| only != *part) {
            continue;
        }
        println!("== {name}");
        let start = Instant::now();
        check().with_context(|| {
            format!("{name} failed; to see it again: cargo xtask verify --only {name}")
        })?;
        println!("== {name}: ok in {:.1} s", start.elapsed().as_secs_f64());
    }
    Ok(())
}

/// Formats the code and applies clippy's own fixes.
pub(crate) fn fix() -> Result<()> {
    let clippy = ["clippy", "--workspace", "--all-targets", "--fix", "--allow-dirty"];
    shell::run(shell::cargo().args(clippy))?;
    shell::run(shell::cargo().args(["fmt", "--all"]))?;
    shell::run(shell::cargo().args(["fmt", "--all", "--manifest-path", "firmware/Cargo.toml"]))
}

fn format() -> Result<()> {
    shell::run(shell::cargo().args(["fmt", "--all", "--check"]))?;
    let firmware = ["fmt", "--all", "--check", "--manifest-path", "firmware/Cargo.toml"];
    shell::run(shell::cargo().args(firmware))
}

/// Clippy over everything; the test targets are built on what it leaves.
fn clippy() -> Result<()> {
    let all = ["clippy", "--locked", "--workspace", "--features", SIMULATED, "--all-targets"];
    shell::run(shell::cargo().args(all).args(["--", "--deny", "warnings"]))
}

/// The guest's own workspace: its lints, the tests of its pure parts, and the guest in our VMM.
fn guest() -> Result<()> {
    shell::run(shell::cargo().args(["build", "--locked", "-p", "vmm", "--bin", "trine-vmm"]))?;
    let vmm = shell::target_directory().join("debug/trine-vmm");
    let directory = shell::root().join("firmware");
    let target = shell::target_directory().join("guest-tests");
    let guest = |arguments: &[&str]| {
        shell::run(
            shell::cargo()
                .args(arguments)
                .current_dir(&directory)
                .env("CARGO_TARGET_DIR", &target)
                .env("TRINE_VMM", &vmm),
        )
    };
    guest(&["clippy", "--locked", "--workspace", "--", "--deny", "warnings"])?;
    guest(&["test", "--locked", "--workspace"])
}

/// First the product and all that tests it, built together, so that each crate is compiled once: the
/// end-to-end tests start `trine` itself. Then what needs the simulated world, which the product is
/// never built with.
fn test() -> Result<()> {
    let product = ["--workspace", "--exclude", "simulator"];
    shell::run(shell::cargo().args(["build", "--locked", "--all-targets"]).args(product))?;
    tests(&["--workspace", "--exclude", "simulator", "--exclude", "raft"])?;
    tests(&["--package", "raft", "--package", "simulator", "--features", SIMULATED])?;
    shell::run(shell::cargo().args(["test", "--locked", "--doc"]).args(product))
}

fn tests(packages: &[&str]) -> Result<()> {
    let mut cargo = shell::cargo();
    if which("cargo-nextest") {
        cargo.args(["nextest", "run", "--locked", "--no-fail-fast"]);
    } else {
        cargo.args(["test", "--locked", "--all-targets"]);
    }
    shell::run(cargo.args(packages))
}

fn which(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|directory| directory.join(program).is_file())
}

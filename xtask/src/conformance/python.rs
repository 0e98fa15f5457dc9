//! Virtual environments for clients that others wrote, made once and kept with the build output.

use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;

use crate::shell;

/// A virtual environment with `packages` (pinned), below the build's output directory.
pub(super) fn environment(name: &str, packages: &[&str]) -> Result<PathBuf> {
    let directory = shell::target_directory().join("conformance").join(name);
    let wanted = packages.join("\n");
    let stamp = directory.join("installed.txt");
    if std::fs::read_to_string(&stamp).is_ok_and(|installed| installed == wanted) {
        return Ok(directory);
    }
    println!("making a virtual environment with {}", packages.join(", "));
    shell::run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&directory))?;
    let pip = directory.join("bin/pip");
    shell::run(Command::new(pip).args(["install", "--quiet"]).args(packages))?;
    std::fs::write(stamp, wanted)?;
    Ok(directory)
}

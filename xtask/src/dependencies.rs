//! The direction of dependencies: which of our crates may use which.

use anyhow::{Result, bail};

use crate::metadata;

/// What each crate may use of ours; a crate that is not listed may not exist.
const ALLOWED: &[(&str, &[&str])] = &[
    ("abi", &[]),
    ("fuzz", &[]),
    ("controller", &[]),
    ("raft", &[]),
    ("vmm", &["abi"]),
    ("netstack", &["abi"]),
    ("storage", &["abi"]),
    ("node", &["abi", "controller", "netstack", "raft", "storage", "vmm"]),
    ("tests", &[]),
    ("simulator", &[]),
    ("xtask", &["tests"]),
];

/// Checks the workspace's graph against [`ALLOWED`].
pub(crate) fn check() -> Result<()> {
    let packages = metadata::packages("Cargo.toml")?;
    let ours: Vec<_> = packages.iter().filter(|package| package.in_workspace).collect();
    let mut wrong = Vec::new();
    for package in &ours {
        let Some((_, allowed)) = ALLOWED.iter().find(|(name, _)| *name == package.name) else {
            wrong.push(format!("crate {} is not in xtask's table of dependencies", package.name));
            continue;
        };
        let uses = package.dependencies.iter().filter(|d| ours.iter().any(|o| o.name == **d));
        for used in uses.filter(|used| !allowed.contains(&used.as_str())) {
            wrong.push(format!("{} must not depend on {used}", package.name));
        }
    }
    if !wrong.is_empty() {
        bail!("dependency direction:\n  {}", wrong.join("\n  "));
    }
    println!("dependency direction: {} crates, as ARCHITECTURE.md says", ours.len());
    Ok(())
}

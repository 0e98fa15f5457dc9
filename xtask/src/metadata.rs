//! `cargo metadata`, as far as the checks need it.

use anyhow::{Context, Result};
use serde_json::Value;

use crate::shell;

/// One package of the dependency graph.
pub(crate) struct Package {
    pub(crate) id: String,
    pub(crate) name: String,
    pub(crate) version: String,
    pub(crate) licence: Option<String>,
    /// Names of normal dependencies (without those of builds and tests).
    pub(crate) dependencies: Vec<String>,
    /// Whether it is ours.
    pub(crate) in_workspace: bool,
}

/// All packages that a build of `manifest` for this platform uses.
pub(crate) fn packages(manifest: &str) -> Result<Vec<Package>> {
    let text = shell::output(shell::cargo().args([
        "metadata",
        "--format-version=1",
        "--locked",
        "--filter-platform=x86_64-unknown-linux-gnu",
        "--manifest-path",
        manifest,
    ]))?;
    let metadata: Value = serde_json::from_str(&text).context("cargo metadata is not JSON")?;
    let members = metadata["workspace_members"].as_array().context("no workspace_members")?;
    let used: Vec<&Value> = metadata["resolve"]["nodes"]
        .as_array()
        .context("no resolve.nodes")?
        .iter()
        .map(|node| &node["id"])
        .collect();
    let packages = metadata["packages"].as_array().context("no packages")?;
    Ok(packages.iter().filter(|p| used.contains(&&p["id"])).map(|p| package(p, members)).collect())
}

fn package(value: &Value, members: &[Value]) -> Package {
    let text = |name: &str| value[name].as_str().unwrap_or_default().to_string();
    let dependencies = value["dependencies"].as_array().map_or(&[][..], Vec::as_slice);
    Package {
        id: text("id"),
        name: text("name"),
        version: text("version"),
        licence: value["license"].as_str().map(str::to_string),
        dependencies: dependencies
            .iter()
            .filter(|d| d["kind"].is_null())
            .filter_map(|d| d["name"].as_str().map(str::to_string))
            .collect(),
        in_workspace: members.contains(&value["id"]),
    }
}

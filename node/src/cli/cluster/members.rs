//! `trine cluster replace|remove|transfer|evacuate-on-failure`.

use super::{Common, ask};
use crate::cli::join_token::parse_ttl;
use crate::daemon::administration::ClusterRequest;
use anyhow::{Context, Result};
use serde_json::Value;

/// What `replace` takes.
#[derive(clap::Args)]
pub(super) struct ReplaceArgs {
    /// The dead host: name or id.
    host: String,
    /// How long the token may be used: a number and s, m, h or d.
    #[arg(long, default_value = "1h", value_parser = parse_ttl)]
    ttl: u64,
    /// Even though the host answers.
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    common: Common,
}

/// Prints the token on standard output and what to do with it on standard error.
pub(super) fn replace(args: ReplaceArgs) -> Result<()> {
    let ReplaceArgs { host, ttl: ttl_seconds, force, common } = args;
    let request = ClusterRequest::Replace { host, ttl_seconds, force };
    let answer = ask(&common.data_dir, request)?;
    if common.json {
        println!("{answer}");
        return Ok(());
    }
    let name = answer["replaces"]["name"].as_str().unwrap_or_default();
    eprintln!(
        "a token for the machine that takes the place of {name}; there:\n\
         \x20 trine join --data-dir … --address … --token-file -\n\
         \x20 trine node --data-dir …"
    );
    say_held(name, &answer["held"]);
    println!("{}", answer["token"].as_str().context("the node answered without a token")?);
    Ok(())
}

fn say_held(name: &str, held: &Value) {
    let count = |kind: &str| held[kind].as_array().map_or(0, Vec::len);
    if count("servers") > 0 {
        eprintln!("{} servers of {name} are made anew elsewhere", count("servers"));
    }
    for (kind, what) in [("volumes", "volumes"), ("images", "images that no other host has")] {
        if count(kind) > 0 {
            eprintln!("{} {what} were on {name} and stay lost unless it comes back", count(kind));
        }
    }
}

/// What `remove` takes.
#[derive(clap::Args)]
pub(super) struct RemoveArgs {
    /// The host: name or id.
    host: String,
    /// With everything that it holds.
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    common: Common,
}

/// Removes a host.
pub(super) fn remove(args: RemoveArgs) -> Result<()> {
    let RemoveArgs { host, force, common } = args;
    let answer = ask(&common.data_dir, ClusterRequest::Remove { host, force })?;
    if common.json {
        println!("{answer}");
        return Ok(());
    }
    println!("removed host {} ({})", answer["name"].as_str().unwrap_or_default(), answer["id"]);
    for kind in ["servers", "volumes", "images"] {
        for name in answer["lost"][kind].as_array().into_iter().flatten() {
            println!("lost with it, {kind}: {}", name.as_str().unwrap_or_default());
        }
    }
    Ok(())
}

/// What `transfer` takes.
#[derive(clap::Args)]
pub(super) struct TransferArgs {
    /// The host that shall lead: name or id.
    host: Option<String>,
    #[command(flatten)]
    common: Common,
}

/// Hands leadership over.
pub(super) fn transfer(args: TransferArgs) -> Result<()> {
    let TransferArgs { host, common } = args;
    let answer = ask(&common.data_dir, ClusterRequest::Transfer { to: host })?;
    match common.json {
        true => println!("{answer}"),
        false => println!("host {} leads (before: {})", answer["leader"], answer["before"]),
    }
    Ok(())
}

/// What `evacuate-on-failure` takes.
#[derive(clap::Args)]
pub(super) struct EvacuateArgs {
    /// The host: name or id.
    host: String,
    /// `on` or `off`.
    mark: Mark,
    #[command(flatten)]
    common: Common,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Mark {
    On,
    Off,
}

/// Marks a host.
pub(super) fn evacuate_on_failure(args: EvacuateArgs) -> Result<()> {
    let EvacuateArgs { host, mark, common } = args;
    let request = ClusterRequest::EvacuateOnFailure { host, on: mark == Mark::On };
    let answer = ask(&common.data_dir, request)?;
    match (common.json, mark) {
        (true, _) => println!("{answer}"),
        (false, Mark::On) => println!("servers of {} are made anew when it fails", answer["name"]),
        (false, Mark::Off) => println!("servers of {} wait for it when it fails", answer["name"]),
    }
    Ok(())
}

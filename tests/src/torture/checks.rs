//! What must hold after the faults.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use reqwest::Method;
use serde_json::Value;

use super::api::Reply;
use super::ground::{Ground, Made};
use super::journal::{Journal, Registers, Slots};
use super::objects::{Done, Entry};
use super::registers::INITIAL;
use super::seat::Seat;

/// How long what is under way may take after the last fault.
const SETTLED_WITHIN: Duration = Duration::from_secs(180);
const GONE_WITHIN: Duration = Duration::from_secs(180);
const PATIENCE: Duration = Duration::from_secs(60);
/// Steps of a model for each object of a history.
const STEPS_MAX: u64 = 20_000_000;
/// States of a volume in which nothing is under way.
const AT_REST: [&str; 3] = ["available", "in-use", "error"];

/// All servers and volumes, as one node shows them.
pub(super) struct Shown {
    servers: Vec<Value>,
    volumes: Vec<Value>,
}

/// Reads what is there.
pub(super) fn look(seat: &Seat, made: &Made) -> Result<Shown> {
    let rows = |path: String, kind: &str| -> Result<Vec<Value>> {
        let body = seat.get_patiently(path, PATIENCE)?;
        Ok(body[kind].as_array().context("a list")?.clone())
    };
    let servers = rows("/compute/v2.1/servers/detail".into(), "servers")?;
    let volumes = rows(format!("/volume/v3/{}/volumes/detail", made.project), "volumes")?;
    Ok(Shown { servers, volumes })
}

impl Shown {
    fn under_way(&self) -> Vec<String> {
        let servers = self.servers.iter().filter(|server| {
            server["status"] == "BUILD" || !server["OS-EXT-STS:task_state"].is_null()
        });
        let servers = servers.map(|server| {
            let task = &server["OS-EXT-STS:task_state"];
            format!("server {} is {} ({task})", server["id"], server["status"])
        });
        let volumes = self
            .volumes
            .iter()
            .filter(|volume| !AT_REST.iter().any(|status| volume["status"] == *status));
        let volumes =
            volumes.map(|volume| format!("volume {} is {}", volume["id"], volume["status"]));
        servers.chain(volumes).collect()
    }
}

/// Waits until nothing is under way.
pub(super) fn settle(seat: &Seat, made: &Made, findings: &mut Vec<String>) -> Result<Shown> {
    let start = Instant::now();
    loop {
        let shown = look(seat, made)?;
        let under_way = shown.under_way();
        if under_way.is_empty() {
            return Ok(shown);
        }
        if start.elapsed() > SETTLED_WITHIN {
            let patience = SETTLED_WITHIN.as_secs();
            findings.extend(under_way.into_iter().map(|what| format!("{what} after {patience} s")));
            return Ok(shown);
        }
        std::thread::sleep(Duration::from_millis(300));
    }
}

/// Every promise of the book, against what is there. Where disks were full, some could not be made;
/// a server says so in its fault.
pub(super) fn promises(journal: &Journal, shown: &Shown, disks_were_full: bool) -> Vec<String> {
    let says_full =
        |found: &Value| disks_were_full && found["fault"].to_string().contains("No space left");
    let entries = journal.entries();
    let mut findings = Vec::new();
    for server in &entries.book.servers {
        let found = presence("server", server, &shown.servers, &mut findings);
        let found = found.filter(|found| found["status"] != "ACTIVE");
        if let Some(found) = found.filter(|found| found["status"] != "ERROR" || !says_full(found)) {
            let fault = &found["fault"]["message"];
            findings.push(format!("server {} is {}: {fault}", server.name, found["status"]));
        }
    }
    for volume in &entries.book.volumes {
        let found = presence("volume", volume, &shown.volumes, &mut findings);
        if let Some(found) = found.filter(|found| found["status"] != "error" || !disks_were_full) {
            findings.extend(attachment(volume, found));
        }
    }
    findings
}

/// The object, where it is there; what its being there or not breaks.
fn presence<'a>(
    kind: &str,
    entry: &Entry,
    shown: &'a [Value],
    findings: &mut Vec<String>,
) -> Option<&'a Value> {
    let named = shown.iter().filter(|found| found["name"] == entry.name.as_str());
    let named: Vec<&Value> = named.collect();
    if named.len() > 1 {
        findings.push(format!("{} {kind}s are named {}", named.len(), entry.name));
    }
    let found = named.first().copied();
    match (found, entry.made, entry.removed) {
        (None, Done::Yes, Done::No) => {
            findings.push(format!(
                "{kind} {} ({:?}) was promised and is not there",
                entry.name, entry.id
            ));
        }
        (Some(_), _, Done::Yes) => {
            findings.push(format!(
                "{kind} {} ({:?}) was to be removed and is there",
                entry.name, entry.id
            ));
        }
        _ => {}
    }
    found
}

fn attachment(volume: &Entry, found: &Value) -> Option<String> {
    let at: Vec<&str> = found["attachments"].as_array().map_or(Vec::new(), |attachments| {
        attachments.iter().filter_map(|one| one["server_id"].as_str()).collect()
    });
    let status = found["status"].as_str().unwrap_or_default();
    let right = match at[..] {
        [] => status == "available" && volume.attachment.admits(None),
        [server] => status == "in-use" && volume.attachment.admits(Some(server)),
        _ => false,
    };
    let told = &volume.attachment;
    (!right).then(|| format!("volume {} is {status} {at:?}, but {told:?}", volume.name))
}

/// The histories, against the objects that they are of.
pub(super) fn histories(journal: &Journal) -> Vec<String> {
    let entries = journal.entries();
    let registers = entries.registers.check(&Registers::new(INITIAL.to_owned()), STEPS_MAX);
    let slots = entries.slots.check(&Slots::default(), STEPS_MAX);
    let registers = registers.iter().map(ToString::to_string);
    registers.chain(slots.iter().map(ToString::to_string)).collect()
}

/// Removes every server, then every volume, and waits until they are gone.
pub(super) fn remove_servers(seat: &Seat, made: &Made, findings: &mut Vec<String>) -> Result<()> {
    let shown = look(seat, made)?;
    let paths = ids(&shown.servers).map(|id| format!("/compute/v2.1/servers/{id}"));
    remove(seat, paths.collect(), findings)
}

/// See [`remove_servers`].
pub(super) fn remove_volumes(seat: &Seat, made: &Made, findings: &mut Vec<String>) -> Result<()> {
    let shown = look(seat, made)?;
    let paths = ids(&shown.volumes).map(|id| format!("/volume/v3/{}/volumes/{id}", made.project));
    remove(seat, paths.collect(), findings)
}

fn ids(rows: &[Value]) -> impl Iterator<Item = &str> {
    rows.iter().filter_map(|row| row["id"].as_str())
}

fn remove(seat: &Seat, paths: Vec<String>, findings: &mut Vec<String>) -> Result<()> {
    let api = seat.api.clone();
    let left = seat.run(async move {
        let until = tokio::time::Instant::now() + GONE_WITHIN;
        let mut left = paths;
        while !left.is_empty() && tokio::time::Instant::now() < until {
            let mut still = Vec::new();
            for path in left {
                let reply = api.call(Method::DELETE, &path, None).await;
                if !matches!(reply, Reply::Answer(404, _)) {
                    still.push(path);
                }
            }
            left = still;
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
        let mut described = Vec::new();
        for path in left {
            described.push(format!("{path} does not go: {:?}", api.get(&path).await));
        }
        Ok(described)
    })?;
    findings.extend(left);
    Ok(())
}

/// Guests that run on more than one host.
pub(super) fn running_twice(ground: &Ground) -> Result<Vec<String>> {
    let mut hosts: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for host in &ground.hosts {
        let status = host.status()?;
        for guest in status["guests"].as_array().into_iter().flatten() {
            if guest["state"] == "running" {
                let server = guest["id"].as_str().unwrap_or_default().to_owned();
                hosts.entry(server).or_default().push(&host.name);
            }
        }
    }
    let twice = hosts.into_iter().filter(|(_, hosts)| hosts.len() > 1);
    Ok(twice.map(|(server, hosts)| format!("server {server} runs on {hosts:?}")).collect())
}

/// What is left on the hosts of guests and volumes that are gone.
pub(super) fn leftovers(ground: &Ground) -> Result<Vec<String>> {
    let start = Instant::now();
    loop {
        let found = left_on_hosts(ground)?;
        if found.is_empty() || start.elapsed() > PATIENCE {
            return Ok(found);
        }
        std::thread::sleep(Duration::from_millis(300));
    }
}

fn left_on_hosts(ground: &Ground) -> Result<Vec<String>> {
    let mut findings = Vec::new();
    for host in &ground.hosts {
        for directory in ["guests", "storage/volumes", "storage/instances", "storage/staging"] {
            let Ok(entries) = std::fs::read_dir(host.data(directory)) else { continue };
            let names: Vec<_> = entries.flatten().map(|entry| entry.file_name()).collect();
            if !names.is_empty() {
                findings.push(format!("{directory} of {} still holds {names:?}", host.name));
            }
        }
        let status = host.status()?;
        if status["guests"].as_array().is_some_and(|guests| !guests.is_empty()) {
            findings.push(format!("guests of {}: {}", host.name, status["guests"]));
        }
    }
    Ok(findings)
}

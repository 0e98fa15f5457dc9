//! Rotation of the cluster's keys through its command: secrets are sealed anew, members that are
//! away catch up, and nothing that a guest or a client has is lost.

mod api;
mod hosts;
mod made;

use anyhow::{Context, Result, ensure};
use api::{Api, id};
use hosts::{Host, Hosts, PATIENCE, is_secret};
use made::{Made, prepare};
use serde_json::{Value, json};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use tests::kvm_opens;

/// Base64 of `#cloud-config`.
const USER_DATA: &str = "I2Nsb3VkLWNvbmZpZw==";

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime starts")
}

/// A guest with user data, on a host.
async fn boot(api: &Api, made: &Made, host: &str) -> Result<String> {
    let server = json!({"server": {
        "name": "guest", "imageRef": made.image, "flavorRef": made.flavor, "user_data": USER_DATA,
        "config_drive": true, "availability_zone": format!("nova:{host}"),
        "networks": [{"uuid": made.network}],
    }});
    let server = id(&api.make("/compute/v2.1/servers", server).await?)?;
    let path = format!("/compute/v2.1/servers/{server}");
    let settled = api.wait(&path, |answer| answer["server"]["status"] != "BUILD").await?;
    ensure!(settled["server"]["status"] == "ACTIVE", "{settled}");
    Ok(server)
}

/// The secrets in a host's key file.
fn secrets(host: &Host) -> Result<Vec<String>> {
    let path = host.data.join("cluster.key");
    ensure!(is_secret(&path)?, "others can read {}", path.display());
    let text = std::fs::read_to_string(&path)?;
    let words = text.split_whitespace().filter(|word| word.len() == 64);
    Ok(words.map(str::to_owned).collect())
}

/// The one secret that all these hosts hold.
fn the_secret(hosts: &[&Host]) -> Result<String> {
    let held = hosts.iter().map(|host| secrets(host)).collect::<Result<Vec<_>>>()?;
    let first = held[0].first().context("a key")?.clone();
    // No message may show them.
    ensure!(held.iter().all(|keys| *keys == [first.clone()]), "the hosts hold different keys");
    Ok(first)
}

/// Everything that needs a secret works on a host, also with a token made before.
async fn serves(hosts: &Hosts, index: usize, before: &Api, server: &str) -> Result<()> {
    let path = format!("/compute/v2.1/servers/{server}");
    let mut api = Api::sign_in_at(&hosts.credentials()?, &hosts[index].api()).await?;
    for token in [api.token.clone(), before.token.clone()] {
        api.token = token;
        let (status, answer) = api.get(&path).await?;
        ensure!(status == 200, "{status} {answer}");
        ensure!(answer["server"]["OS-EXT-SRV-ATTR:user_data"] == USER_DATA, "{answer}");
    }
    Ok(())
}

#[test]
fn keys_are_rotated_under_guests_and_a_member_that_was_away_catches_up() -> Result<()> {
    let name = "keys_are_rotated_under_guests_and_a_member_that_was_away_catches_up";
    if !kvm_opens(name) {
        return Ok(());
    }
    let mut hosts = Hosts::three()?;
    let first = the_secret(&[&hosts[0], &hosts[1], &hosts[2]])?;
    let old_key = hosts.path("old.key");
    std::fs::copy(hosts[0].data.join("cluster.key"), &old_key)?;
    let (api, server) = runtime().block_on(async {
        let api = Api::sign_in_at(&hosts.credentials()?, &hosts[0].api()).await?;
        let made = prepare(hosts.directory(), &api).await?;
        let server = boot(&api, &made, "node1").await?;
        anyhow::Ok((api, server))
    })?;
    let guests = hosts[0].guests()?;
    ensure!(guests.len() == 1, "{guests:?}");

    let answer = rotate(&hosts[1], &[])?;
    ensure!(answer["finished"] == true && answer["resumed"] == false, "{answer}");
    let second = the_secret(&[&hosts[0], &hosts[1], &hosts[2]])?;
    ensure!(first != second, "the key is the old one");
    runtime().block_on(serves(&hosts, 2, &api, &server))?;

    hosts[2].kill_node()?;
    let refused = hosts[0].refusal(&["cluster", "rotate-keys"])?;
    ensure!(refused.contains("node3") && refused.contains("--without"), "{refused}");
    ensure!(the_secret(&[&hosts[0], &hosts[1]])? == second, "a refusal changed the key");
    let answer = rotate(&hosts[0], &["--without", "node3"])?;
    ensure!(answer["finished"] == true, "{answer}");
    let third = the_secret(&[&hosts[0], &hosts[1]])?;
    ensure!(secrets(&hosts[2])? == [second.clone()] && third != second, "node3 was away");

    hosts[2].start()?;
    until_it_holds(&hosts[2], &third)?;
    a_rotation_that_is_cut_off_is_finished_by_the_next(&mut hosts)?;
    for index in [0, 1, 2] {
        hosts[index].stop_node()?;
        hosts[index].start()?;
    }
    for index in [0, 1, 2] {
        runtime().block_on(serves(&hosts, index, &api, &server))?;
    }
    ensure!(hosts[0].guests()? == guests, "{guests:?} became {:?}", hosts[0].guests()?);
    an_old_key_restores_no_new_backup(&mut hosts, &old_key)?;
    no_log_shows(&hosts, &[first, second, third])
}

/// The node that was asked dies once another one has got the new key.
fn a_rotation_that_is_cut_off_is_finished_by_the_next(hosts: &mut Hosts) -> Result<()> {
    let before = secrets(&hosts[1])?;
    let mut command = Command::new(tests::trine());
    command.args(["cluster", "rotate-keys", "--data-dir"]).arg(&hosts[0].data);
    let mut cut_off = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    let started = Instant::now();
    while secrets(&hosts[1])? == before {
        ensure!(started.elapsed() < PATIENCE, "no key is handed out");
    }
    hosts[0].kill_node()?;
    cut_off.wait()?;
    hosts[0].start()?;
    let answer = rotate(&hosts[0], &[])?;
    ensure!(answer["finished"] == true, "{answer}");
    let now = the_secret(&[&hosts[0], &hosts[1], &hosts[2]])?;
    ensure!(!before.contains(&now), "the key is the old one");
    Ok(())
}

fn an_old_key_restores_no_new_backup(hosts: &mut Hosts, old_key: &Path) -> Result<()> {
    let backup = hosts.path("backup");
    let (backup, key) = (backup.to_str().context("a path")?, old_key.to_str().context("a path")?);
    hosts[0].trine(&["cluster", "backup", backup])?;
    let new = hosts.add("restored");
    let address = hosts[new].address.clone();
    let restore = ["cluster", "restore", backup, "--address", &address, "--cluster-key-file"];
    let refused = hosts[new].refusal(&[&restore[..], &[key]].concat())?;
    ensure!(refused.contains("needs the cluster key") && !hosts[new].data.exists(), "{refused}");
    let key = hosts[0].data.join("cluster.key");
    hosts[new].trine(&[&restore[..], &[key.to_str().context("a path")?]].concat()).map(drop)
}

fn rotate(host: &Host, options: &[&str]) -> Result<Value> {
    host.json(&[&["cluster", "rotate-keys"], options].concat())
}

fn until_it_holds(host: &Host, secret: &str) -> Result<()> {
    let started = Instant::now();
    while secrets(host)? != [secret.to_owned()] {
        ensure!(started.elapsed() < PATIENCE, "it does not catch up: {}", host.log_tail());
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

fn no_log_shows(hosts: &Hosts, secrets: &[String]) -> Result<()> {
    for index in [0, 1, 2] {
        let log = std::fs::read_to_string(hosts[index].data.with_extension("log"))?;
        ensure!(!secrets.iter().any(|key| log.contains(key)), "{} shows a key", hosts[index].name);
    }
    Ok(())
}

//! Hosts that follow the state whatever happens to their processes: restarts in every order, a node
//! killed in the middle of its work, and a host that is cut off, evacuated and comes back.

mod api;
mod hosts;
mod made;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use api::{Api, id};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hosts::{Host, Hosts, PATIENCE};
use made::{Made, prepare};
use reqwest::Method;
use rustix::process::Signal;
use serde_json::{Value, json};
use tests::kvm_opens;

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime starts")
}

/// Asks for a server on a host and does not wait for it.
async fn create(api: &Api, made: &Made, host: &str, steps: &str) -> Result<String> {
    let server = json!({
        "name": "guest", "imageRef": made.image, "flavorRef": made.flavor,
        "networks": [{"uuid": made.network}], "config_drive": true,
        "availability_zone": format!("nova:{host}"),
        "user_data": STANDARD.encode(format!("#trine-steps\n{steps}\n")),
    });
    id(&api.make("/compute/v2.1/servers", json!({"server": server})).await?)
}

fn path_of(server: &str) -> String {
    format!("/compute/v2.1/servers/{server}")
}

async fn active(api: &Api, server: &str) -> Result<Value> {
    let settled = |answer: &Value| {
        answer["server"]["status"] == "ACTIVE"
            && answer["server"]["OS-EXT-STS:task_state"].is_null()
    };
    api.wait(&path_of(server), settled).await
}

async fn volume(api: &Api) -> Result<(String, String)> {
    let path = format!("/volume/v3/{}/volumes", api.project);
    let volume = id(&api.make(&path, json!({"volume": {"size": 1}})).await?)?;
    let path = format!("{path}/{volume}");
    let made = api.wait(&path, |answer| answer["volume"]["status"] == "available").await?;
    let home = made["volume"]["os-vol-host-attr:host"].as_str().context("a home")?;
    Ok((volume, home.split('@').next().context("a host")?.to_owned()))
}

/// Asks a host for its status until it is right.
fn until(host: &Host, what: &str, right: impl Fn(&Value) -> bool) -> Result<Value> {
    let started = Instant::now();
    loop {
        let status = host.json(&["status"])?;
        if right(&status) {
            return Ok(status);
        }
        ensure!(started.elapsed() < PATIENCE, "waited for {what}: {status}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn pid_of(status: &Value, process: &str) -> Option<u64> {
    let processes = status["processes"].as_array()?;
    processes.iter().find(|found| found["name"] == process)?["pid"].as_u64()
}

fn kill(pid: u64) -> Result<()> {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid)?).context("a process id")?;
    Ok(rustix::process::kill_process(pid, Signal::KILL)?)
}

/// SIGKILL to the node, the switch or the storage process of a host, which then runs again.
fn restart(host: &mut Host, process: &str) -> Result<()> {
    if process == "node" {
        host.kill_node()?;
        return host.start();
    }
    let before = pid_of(&host.json(&["status"])?, process).context("it runs")?;
    kill(before)?;
    until(host, process, |status| pid_of(status, process).is_some_and(|pid| pid != before))?;
    Ok(())
}

#[test]
fn guests_go_on_through_restarts_of_node_switch_and_storage_in_any_order() -> Result<()> {
    if !kvm_opens("guests_go_on_through_restarts_of_node_switch_and_storage_in_any_order") {
        return Ok(());
    }
    let mut hosts = Hosts::three()?;
    let asking = runtime();
    let (api, server, volume, home) = asking.block_on(async {
        let api = Api::sign_in_at(&hosts.credentials()?, &hosts[2].api()).await?;
        let made = prepare(hosts.directory(), &api).await?;
        let (volume, home) = volume(&api).await?;
        let guest_host = if home == "node1" { "node2" } else { "node1" };
        let serial = &volume[..20];
        let writes =
            (0..60).map(|n| format!("disk-write {serial} pattern=p{n} bytes=65536\nsleep 0.2\n"));
        let steps = format!(
            "disk-wait {serial}\n{}disk-verify {serial} pattern=p59 bytes=65536",
            writes.collect::<String>()
        );
        let server = create(&api, &made, guest_host, &steps).await?;
        active(&api, &server).await?;
        let attach = format!("{}/os-volume_attachments", path_of(&server));
        api.make(&attach, json!({"volumeAttachment": {"volumeId": volume}})).await?;
        api.console(&server, "trine: step 2 disk-write ok").await?;
        anyhow::Ok((api, server, volume, home))
    })?;
    let home: usize = home.trim_start_matches("node").parse::<usize>()? - 1;
    let guest_host = usize::from(home == 0);
    let before = hosts[guest_host].guests()?;

    for order in [
        ["node", "switch", "storage"],
        ["storage", "switch", "node"],
        ["switch", "node", "storage"],
    ] {
        for process in order {
            restart(&mut hosts[guest_host], process)?;
            if home != 2 {
                restart(&mut hosts[home], process)?;
            }
        }
    }
    // The third host answers the API; its storage may be the volume's home.
    restart(&mut hosts[home], "storage")?;

    asking.block_on(async {
        let log = api.console(&server, "trine: steps ").await?;
        ensure!(log.contains("trine: steps done"), "{log}");
        ensure!(log.matches("trine: booted").count() == 1, "it booted again:\n{log}");
        let attachment = format!("{}/os-volume_attachments/{volume}", path_of(&server));
        let (status, answer) = api.delete(&attachment).await?;
        ensure!(status == 202, "detach: {status} {answer}");
        let path = format!("/volume/v3/{}/volumes/{volume}", api.project);
        api.wait(&path, |answer| answer["volume"]["status"] == "available").await?;
        ensure!(hosts[guest_host].guests()? == before, "it is another process");
        for path in [path_of(&server), path] {
            api.delete(&path).await?;
            api.wait_gone(&path).await?;
        }
        Ok(())
    })
}

#[test]
fn what_a_node_was_doing_when_it_was_killed_is_done_after_its_start() -> Result<()> {
    if !kvm_opens("what_a_node_was_doing_when_it_was_killed_is_done_after_its_start") {
        return Ok(());
    }
    let mut hosts = Hosts::three()?;
    let asking = runtime();
    let (api, made) = asking.block_on(async {
        let api = Api::sign_in_at(&hosts.credentials()?, &hosts[0].api()).await?;
        let made = prepare(hosts.directory(), &api).await?;
        anyhow::Ok((api, made))
    })?;
    // Each round kills the node at another moment of the same work.
    for wait_ms in [0, 15, 40, 80] {
        let server = asking.block_on(create(&api, &made, "node3", "print x"))?;
        std::thread::sleep(Duration::from_millis(wait_ms));
        hosts[2].kill_node()?;
        hosts[2].start()?;
        let (volume, _) = asking.block_on(async {
            active(&api, &server).await?;
            volume(&api).await
        })?;
        let attach = format!("{}/os-volume_attachments", path_of(&server));
        let body = json!({"volumeAttachment": {"volumeId": volume}});
        asking.block_on(api.make(&attach, body))?;
        std::thread::sleep(Duration::from_millis(wait_ms));
        hosts[2].kill_node()?;
        hosts[2].start()?;
        let volume = format!("/volume/v3/{}/volumes/{volume}", api.project);
        asking.block_on(api.wait(&volume, |answer| answer["volume"]["status"] == "in-use"))?;
        let (status, answer) =
            asking.block_on(api.call(Method::DELETE, &path_of(&server), None))?;
        ensure!(status == 204, "{status} {answer}");
        std::thread::sleep(Duration::from_millis(wait_ms));
        hosts[2].kill_node()?;
        hosts[2].start()?;
        asking.block_on(async {
            api.wait_gone(&path_of(&server)).await?;
            api.wait(&volume, |answer| answer["volume"]["status"] == "available").await?;
            api.delete(&volume).await?;
            api.wait_gone(&volume).await
        })?;
    }
    let left = until(&hosts[2], "no guest to be left", |status| status["guests"] == json!([]))?;
    ensure!(left["reconcilers"]["open"] == true, "{left}");
    Ok(())
}

#[test]
fn a_host_that_is_cut_off_is_evacuated_and_returns_without_the_guests_that_left_it() -> Result<()> {
    if !kvm_opens("a_host_that_is_cut_off_is_evacuated_and_returns_without_the_guests_that_left_it")
    {
        return Ok(());
    }
    let hosts = Hosts::three()?;
    hosts[0].trine(&["cluster", "evacuate-on-failure", "node3", "on"])?;
    let asking = runtime();
    let (api, made, server) = asking.block_on(async {
        let api = Api::sign_in_at(&hosts.credentials()?, &hosts[0].api()).await?;
        let made = prepare(hosts.directory(), &api).await?;
        let server = create(&api, &made, "node3", "print x").await?;
        active(&api, &server).await?;
        anyhow::Ok((api, made, server))
    })?;
    until(&hosts[2], "a lease", |status| status["lease_ms"].as_u64() > Some(0))?;
    let (_, vmm) = hosts[2].guests()?.pop().context("the guest")?;

    hosts[2].signal_node(Signal::STOP)?;
    let moved = |answer: &Value| {
        let server = &answer["server"];
        server["OS-EXT-SRV-ATTR:host"] != "node3"
            && server["status"] == "ACTIVE"
            && server["OS-EXT-STS:task_state"].is_null()
    };
    asking.block_on(api.wait(&path_of(&server), moved))?;
    // The old guest's process is still there, but its host's lease had run out before.
    ensure!(std::path::Path::new(&format!("/proc/{vmm}")).exists(), "the guest's process ended");
    ensure!(lease_left(&hosts[2])? == Duration::ZERO, "the cut-off host may write");

    hosts[2].signal_node(Signal::CONT)?;
    until(&hosts[2], "its old guest to end", |status| status["guests"] == json!([]))?;
    ensure!(!std::path::Path::new(&format!("/proc/{vmm}")).exists(), "the old guest runs");
    until(&hosts[2], "its return", |status| status["lease_ms"].as_u64() > Some(0))?;
    asking.block_on(async {
        let again = create(&api, &made, "node3", "print x").await?;
        active(&api, &again).await?;
        let log = api.console(&server, "trine: booted").await?;
        ensure!(log.matches("trine: booted").count() == 1, "{log}");
        Ok(())
    })
}

/// How long the guests of a host may still change their disks, by the page that they read.
fn lease_left(host: &Host) -> Result<Duration> {
    let entries = std::fs::read_dir(&host.data)?.collect::<Result<Vec<_>, _>>()?;
    let pages = entries.iter().filter(|e| e.file_name().as_encoded_bytes().starts_with(b"lease-"));
    let page = pages.map(std::fs::DirEntry::path).next().context("a lease page")?;
    let bytes = std::fs::read(page)?;
    let until = bytes.get(16..24).and_then(|word| word.try_into().ok()).context("its time")?;
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let now = Duration::new(u64::try_from(now.tv_sec)?, u32::try_from(now.tv_nsec)?);
    Ok(Duration::from_nanos(u64::from_le_bytes(until)).saturating_sub(now))
}

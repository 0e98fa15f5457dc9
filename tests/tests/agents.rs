//! Hosts that follow the state whatever happens to their processes: restarts in every order, a node
//! killed in the middle of its work, and a host that is cut off, evacuated and comes back.

mod api;
mod hosts;
mod made;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use api::{Api, id};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hosts::power::rewrite;
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
fn what_a_host_was_doing_when_a_process_was_killed_is_done_after_its_start() -> Result<()> {
    if !kvm_opens("what_a_host_was_doing_when_a_process_was_killed_is_done_after_its_start") {
        return Ok(());
    }
    let mut hosts = Hosts::three()?;
    let asking = runtime();
    let (api, made) = asking.block_on(async {
        let api = Api::sign_in_at(&hosts.credentials()?, &hosts[1].api()).await?;
        let made = prepare(hosts.directory(), &api).await?;
        anyhow::Ok((api, made))
    })?;
    // Each round ends a process at another moment of the same work: of the guest's host, or of
    // the volume's home where that is another one.
    let victims = [(2, "node"), (2, "storage"), (0, "node"), (0, "storage")];
    let rounds = [0, 20, 60].into_iter().flat_map(|ms| victims.map(|victim| (victim, ms)));
    for ((host, process), wait_ms) in rounds {
        let mut killed = |asked: Result<()>| {
            asked?;
            std::thread::sleep(Duration::from_millis(wait_ms));
            restart(&mut hosts[host], process)
        };
        let mut server = String::new();
        killed(asking.block_on(async {
            server = create(&api, &made, "node3", "print x").await?;
            Ok(())
        }))?;
        let volume = asking.block_on(async {
            active(&api, &server).await?;
            anyhow::Ok(volume(&api).await?.0)
        })?;
        let attachments = format!("{}/os-volume_attachments", path_of(&server));
        let attach = || async {
            let body = json!({"volumeAttachment": {"volumeId": volume}});
            api.make(&attachments, body).await.map(drop)
        };
        let delete = |path: String| async {
            let path = path;
            let (status, answer) = api.call(Method::DELETE, &path, None).await?;
            ensure!(status < 300, "DELETE {path}: {status} {answer}");
            anyhow::Ok(())
        };
        let path = format!("/volume/v3/{}/volumes/{volume}", api.project);
        let becomes = |status: &'static str| {
            asking.block_on(api.wait(&path, move |answer| answer["volume"]["status"] == status))
        };
        killed(asking.block_on(attach()))?;
        becomes("in-use")?;
        killed(asking.block_on(delete(format!("{attachments}/{volume}"))))?;
        becomes("available")?;
        asking.block_on(attach())?;
        becomes("in-use")?;
        killed(asking.block_on(delete(path_of(&server))))?;
        asking.block_on(api.wait_gone(&path_of(&server)))?;
        becomes("available")?;
        killed(asking.block_on(delete(path.clone())))?;
        asking.block_on(api.wait_gone(&path))?;
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

#[test]
fn a_host_that_lost_power_starts_each_guest_once_and_remote_writers_hear_of_it() -> Result<()> {
    if !kvm_opens("a_host_that_lost_power_starts_each_guest_once_and_remote_writers_hear_of_it") {
        return Ok(());
    }
    let mut hosts = Hosts::three()?;
    let asking = runtime();
    let cloud = asking.block_on(Rebooted::prepare(&hosts))?;
    let Rebooted { host, runs, off, deleted, .. } = &cloud;
    let (lost, started_by_spawner) = (*host, hosts[*host].vmm_processes()?);
    let writer = hosts[2].guests()?;
    let before = hosts[lost].guests()?;
    ensure!(before.len() == 2, "{before:?}");

    hosts[lost].lose_power()?;
    asking.block_on(async {
        let (status, answer) = cloud.api.delete(&path_of(deleted)).await?;
        ensure!(status == 204, "delete while its host is away: {status} {answer}");
        anyhow::Ok(())
    })?;
    let foreign = Foreign::leave(&hosts[lost], runs)?;
    hosts[lost].start()?;

    let running = |status: &Value| {
        let guests = status["guests"].as_array().map(Vec::as_slice).unwrap_or_default();
        let running = guests.iter().filter(|guest| guest["state"] == "running");
        running.map(|guest| guest["id"].as_str().unwrap_or_default()).eq([runs.as_str()])
    };
    until(&hosts[lost], "the one guest that should run", running)?;
    asking.block_on(async {
        active(&cloud.api, runs).await?;
        cloud.api.wait_gone(&path_of(deleted)).await?;
        let (_, answer) = cloud.api.get(&path_of(off)).await?;
        ensure!(answer["server"]["status"] == "SHUTOFF", "{answer}");
        let log = cloud.api.console(runs, "trine: step 2 disk-wait ok").await?;
        ensure!(log.matches("trine: booted").count() == 1, "it booted twice:\n{log}");
        cloud.writer_hears_of_it().await
    })?;
    let after = hosts[lost].guests()?;
    ensure!(after.len() == 1 && !before.contains(&after[0]), "{before:?} then {after:?}");
    ensure!(hosts[2].guests()? == writer, "the writer's process is another one");
    // The spawner and one guest instead of two.
    ensure!(hosts[lost].vmm_processes()? == started_by_spawner - 1, "a VMM too many");

    foreign.check_while_held()?;
    let released = foreign.release();
    until(&hosts[lost], "what the foreign process left to go", |_| !released.exists())?;
    ensure!(hosts[lost].guests()? == after, "the guest is another one");
    asking.block_on(cloud.delete_all())?;
    until(&hosts[lost], "no guest to be left", |status| status["guests"] == json!([]))?;
    ensure!(hosts[lost].guest_records()?.is_empty(), "a guest's directory is left");
    Ok(())
}

#[test]
fn a_cloud_that_lost_power_as_a_whole_comes_back_as_it_was() -> Result<()> {
    if !kvm_opens("a_cloud_that_lost_power_as_a_whole_comes_back_as_it_was") {
        return Ok(());
    }
    let mut hosts = Hosts::three()?;
    let asking = runtime();
    let mut cloud = asking.block_on(Rebooted::prepare(&hosts))?;
    let before = [0, 1, 2].map(|host| hosts[host].guests());
    for host in 0..3 {
        hosts[host].lose_power()?;
    }
    hosts.start_all()?;

    // Its connections ended with the machines.
    let (credentials, address) = (hosts.credentials()?, hosts[2].api());
    cloud.api = asking.block_on(Api::sign_in_at(&credentials, &address))?;

    let running = [&cloud.runs, &cloud.deleted, &cloud.writer];
    asking.block_on(async {
        for server in running {
            active(&cloud.api, server).await?;
        }
        let (_, answer) = cloud.api.get(&path_of(&cloud.off)).await?;
        ensure!(answer["server"]["status"] == "SHUTOFF", "{answer}");
        // Both begin with a look at their volumes, of which one is at home on another host.
        cloud.api.console(&cloud.runs, "trine: step 2 disk-wait ok").await?;
        cloud.api.console(&cloud.writer, "trine: step 2 disk-load ok").await.map(drop)
    })?;
    for (host, before) in before.into_iter().enumerate() {
        let ids =
            |guests: &[(String, u64)]| guests.iter().map(|(id, _)| id.clone()).collect::<Vec<_>>();
        let (before, after) = (before?, hosts[host].guests()?);
        ensure!(ids(&before) == ids(&after), "host {host}: {before:?} then {after:?}");
        ensure!(before.iter().all(|guest| !after.contains(guest)), "host {host}: {after:?}");
    }
    asking.block_on(async {
        cloud.api.delete(&path_of(&cloud.deleted)).await?;
        cloud.delete_all().await
    })?;
    for host in 0..3 {
        until(&hosts[host], "no guest to be left", |status| status["guests"] == json!([]))?;
    }
    Ok(())
}

/// Servers and volumes around a host that loses power.
struct Rebooted {
    api: Api,
    /// The index of the host: the home of `far`.
    host: usize,
    /// Runs there, with `own` plugged.
    runs: String,
    /// Is there, stopped.
    off: String,
    /// Runs there until its host loses power.
    deleted: String,
    /// Runs on the third host and has written to `far`, without a flush.
    writer: String,
    far: String,
    own: String,
    signal: String,
}

impl Rebooted {
    async fn prepare(hosts: &Hosts) -> Result<Rebooted> {
        let api = Api::sign_in_at(&hosts.credentials()?, &hosts[2].api()).await?;
        let made = prepare(hosts.directory(), &api).await?;
        let volumes = [volume(&api).await?, volume(&api).await?, volume(&api).await?];
        let (far, home) = volumes.iter().find(|(_, home)| home != "node3").context("a home")?;
        let others = || volumes.iter().filter(|(_, other)| other != home).map(|(id, _)| id);
        let (own, signal) = (others().next().context("two")?, others().next_back().context("two")?);
        ensure!(own != signal, "all volumes have one home: {volumes:?}");
        let waits = format!("print x\ndisk-wait {own} timeout=300");
        let runs = create(&api, &made, home, &waits).await?;
        let (off, deleted) =
            (create(&api, &made, home, "print x").await?, create(&api, &made, home, "").await?);
        let steps = format!(
            "disk-wait {far}\ndisk-load {far} write seconds=0.3\nprint written\n\
             disk-wait {signal} timeout=600\ndisk-write {far} pattern=p bytes=4096"
        );
        let writer = create(&api, &made, "node3", &steps).await?;
        for server in [&runs, &off, &deleted, &writer] {
            active(&api, server).await?;
        }
        let host = home.trim_start_matches("node").parse::<usize>()? - 1;
        let [far, own, signal] = [far, own, signal].map(String::clone);
        let all = Rebooted { api, host, runs, off, deleted, writer, far, own, signal };
        all.attach(&all.runs, &all.own).await?;
        all.attach(&all.writer, &all.far).await?;
        all.api.console(&all.runs, "trine: step 2 disk-wait ok").await?;
        all.api.console(&all.writer, "trine: step 3 print ok").await?;
        let action = format!("{}/action", path_of(&all.off));
        all.api.make(&action, json!({"os-stop": null})).await?;
        let stopped = |answer: &Value| answer["server"]["status"] == "SHUTOFF";
        all.api.wait(&path_of(&all.off), stopped).await?;
        Ok(all)
    }

    fn path_of_volume(&self, volume: &str) -> String {
        format!("/volume/v3/{}/volumes/{volume}", self.api.project)
    }

    /// Attaches a volume, as soon as its hosts are not fenced.
    async fn attach(&self, server: &str, volume: &str) -> Result<()> {
        let path = format!("{}/os-volume_attachments", path_of(server));
        let started = Instant::now();
        loop {
            let body = json!({"volumeAttachment": {"volumeId": volume}});
            let (status, answer) = self.api.call(Method::POST, &path, Some(body)).await?;
            if status == 200 {
                break;
            }
            ensure!(started.elapsed() < PATIENCE, "attach: {status} {answer}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let in_use = |answer: &Value| answer["volume"]["status"] == "in-use";
        self.api.wait(&self.path_of_volume(volume), in_use).await.map(drop)
    }

    /// The guest whose writes may be lost is told so by its next flush.
    async fn writer_hears_of_it(&self) -> Result<()> {
        self.attach(&self.writer, &self.signal).await?;
        let log = self.api.console(&self.writer, "trine: steps ").await?;
        ensure!(
            log.contains("trine: step 5 disk-write failed"),
            "no error for lost writes:\n{log}"
        );
        Ok(())
    }

    async fn delete_all(&self) -> Result<()> {
        let servers = [&self.runs, &self.off, &self.writer].map(|server| path_of(server));
        let volumes = [&self.far, &self.own, &self.signal].map(|id| self.path_of_volume(id));
        for path in servers.iter().chain(&volumes) {
            let (status, answer) = self.api.delete(path).await?;
            ensure!(status < 300, "delete {path}: {status} {answer}");
            self.api.wait_gone(path).await?;
        }
        Ok(())
    }
}

/// What is in the guests' directory of a host and is none of its guests: this process holds one as a
/// VMM does, the other is a copy that nobody holds.
struct Foreign {
    held: PathBuf,
    copy: PathBuf,
    _lock: File,
    socket: UnixListener,
}

impl Foreign {
    fn leave(host: &Host, server: &str) -> Result<Foreign> {
        let guests = host.data.join("guests");
        let record = guests.join(server).join("guest.json");
        rewrite(&record, "nonce", json!("of-another-guest"))?;
        let [held, copy] = ["held", "copy"].map(|name| guests.join(format!("{name}-{server}")));
        for directory in [&held, &copy] {
            std::fs::create_dir(directory)?;
            std::fs::copy(&record, directory.join("guest.json"))?;
        }
        let lock = File::create(held.join("exit.json"))?;
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive)?;
        // A socket's path holds 108 bytes.
        let at = File::open(&held)?;
        let socket = UnixListener::bind(format!("/proc/self/fd/{}/control.sock", at.as_raw_fd()))?;
        socket.set_nonblocking(true)?;
        Ok(Foreign { held, copy, _lock: lock, socket })
    }

    fn check_while_held(&self) -> Result<()> {
        ensure!(!self.copy.exists(), "a copy of a guest's directory is still there");
        ensure!(self.held.exists(), "the directory of a living process is gone");
        let asked = self.socket.accept().map(drop).map_err(|error| error.kind());
        ensure!(asked == Err(std::io::ErrorKind::WouldBlock), "the foreign process was asked");
        Ok(())
    }

    fn release(self) -> PathBuf {
        self.held
    }
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

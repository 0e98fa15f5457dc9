//! The cluster's membership through its commands: nodes that die, return, lead, and clusters that
//! are backed up, restored and recovered.

mod api;
mod hosts;
mod made;

use anyhow::{Context, Result, ensure};
use api::{Api, id};
use hosts::{Hosts, is_secret, rows, voters};
use made::{Made, prepare};
use serde_json::{Value, json};
use tests::kvm_opens;

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime starts")
}

/// A server on a host; `None` leaves the choice to the scheduler.
async fn boot(api: &Api, made: &Made, host: Option<&str>) -> Result<String> {
    let mut server = json!({
        "name": "guest", "imageRef": made.image, "flavorRef": made.flavor,
        "networks": [{"uuid": made.network}],
    });
    if let Some(host) = host {
        server["availability_zone"] = format!("nova:{host}").into();
    }
    let created = api.make("/compute/v2.1/servers", json!({"server": server})).await?;
    let server = id(&created)?;
    let path = format!("/compute/v2.1/servers/{server}");
    let settled = api.wait(&path, |answer| answer["server"]["status"] != "BUILD").await?;
    ensure!(settled["server"]["status"] == "ACTIVE", "{settled}");
    Ok(server)
}

async fn keypair(api: &Api, name: &str) -> Result<Value> {
    let key =
        "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ4Zy1zH6Y0cKzHh7r0m7cYvZ3oDqE0m3mH4b5pVxk9d a@b";
    let body = json!({"keypair": {"name": name, "public_key": key}});
    api.make("/compute/v2.1/os-keypairs", body).await
}

async fn keypairs(api: &Api) -> Result<Vec<String>> {
    let (status, answer) = api.get("/compute/v2.1/os-keypairs").await?;
    ensure!(status == 200, "{status} {answer}");
    let names = rows(&answer, "keypairs").filter_map(|row| row["keypair"]["name"].as_str());
    Ok(names.map(str::to_owned).collect())
}

#[test]
fn a_dead_node_is_replaced_and_no_other_guest_is_harmed() -> Result<()> {
    if !kvm_opens("a_dead_node_is_replaced_and_no_other_guest_is_harmed") {
        return Ok(());
    }
    let mut hosts = Hosts::three()?;
    let lost = runtime().block_on(async {
        let api = Api::sign_in_at(&hosts.credentials()?, &hosts[0].api()).await?;
        let made = prepare(hosts.directory(), &api).await?;
        for host in ["node1", "node2"] {
            boot(&api, &made, Some(host)).await?;
        }
        boot(&api, &made, Some("node3")).await
    })?;
    let alive = hosts[0].refusal(&["cluster", "replace", "node3"])?;
    ensure!(alive.contains("is alive"), "{alive}");
    let guests = [hosts[0].guests()?, hosts[1].guests()?];
    ensure!(guests.iter().all(|guests| guests.len() == 1), "{guests:?}");

    hosts[2].lose()?;
    hosts[1].until("node3 to be down", |status| {
        rows(status, "hosts").any(|host| host["id"] == 3 && host["up"] == false)
    })?;
    let token = hosts[1].trine(&["cluster", "replace", "node3"])?;
    let new = hosts.add("node3");
    hosts[new].join(&token)?;
    hosts[new].start()?;

    let whole = hosts[0].until("the cluster to be whole", |status| {
        voters(status) == [1, 2, 4]
            && rows(status, "hosts").count() == 3
            && rows(status, "hosts").all(|host| host["up"] == true && host["images_only_here"] == 0)
    })?;
    ensure!(whole["quorum"] == true, "{whole}");
    for (index, before) in guests.into_iter().enumerate() {
        let now = hosts[index].guests()?;
        ensure!(before.iter().all(|guest| now.contains(guest)), "{before:?} became {now:?}");
    }
    runtime().block_on(async {
        let api = Api::sign_in_at(&hosts.credentials()?, &hosts[new].api()).await?;
        let path = format!("/compute/v2.1/servers/{lost}");
        let active = |answer: &Value| answer["server"]["status"] == "ACTIVE";
        let server = api.wait(&path, active).await?;
        ensure!(server["server"]["OS-EXT-SRV-ATTR:host"] != "node3-replaced-3", "{server}");
        // Any one of the old members may fail now: the new one is as good as they are.
        hosts[1].kill_node()?;
        keypair(&api, "after").await.map(drop)
    })
}

#[test]
fn nodes_lead_leave_and_do_not_come_back_under_a_lost_identity() -> Result<()> {
    if !kvm_opens("nodes_lead_leave_and_do_not_come_back_under_a_lost_identity") {
        return Ok(());
    }
    let mut hosts = Hosts::three()?;
    leadership_is_handed_over(&mut hosts)?;
    a_join_that_never_starts_is_listed_and_removed(&mut hosts)?;
    a_wiped_node_is_refused(&mut hosts)?;
    a_removed_node_ends_itself(&mut hosts)
}

fn leadership_is_handed_over(hosts: &mut Hosts) -> Result<()> {
    for to in [2, 3, 1] {
        let answer = hosts[0].json(&["cluster", "transfer", &to.to_string()])?;
        ensure!(answer["leader"] == to, "{answer}");
    }
    let unknown = hosts[0].refusal(&["cluster", "transfer", "node9"])?;
    ensure!(unknown.contains("node9") && unknown.contains("node1 (1)"), "{unknown}");
    // SIGTERM on the leader: another one leads before the process has ended.
    hosts[0].stop_node()?;
    let leader = hosts[1].json(&["status"])?["leader"].clone();
    ensure!(leader == 2 || leader == 3, "{leader} leads");
    hosts[0].start()
}

fn a_join_that_never_starts_is_listed_and_removed(hosts: &mut Hosts) -> Result<()> {
    let index = hosts.add("late");
    let token = hosts[0].trine(&["join-token"])?;
    hosts[index].join(&token)?;
    let listed = hosts[1].trine(&["cluster", "status"])?;
    ensure!(listed.contains("late has joined and never started"), "{listed}");
    hosts[1].trine(&["cluster", "remove", "late"])?;
    let status = hosts[1].json(&["cluster", "status"])?;
    ensure!(rows(&status, "hosts").count() == 3, "{status}");
    let said = hosts[index].start_in_vain()?;
    ensure!(said.contains("no host of this cluster"), "{said}");
    Ok(())
}

fn a_wiped_node_is_refused(hosts: &mut Hosts) -> Result<()> {
    hosts[2].end()?;
    let log = hosts[2].data.join("raft");
    std::fs::rename(&log, hosts[2].data.join("raft-kept"))?;
    std::fs::create_dir(&log)?;
    let said = hosts[2].start_in_vain()?;
    ensure!(said.contains("node 3") && said.contains("replace"), "{said}");
    // With its log it is the node that it was.
    std::fs::remove_dir_all(&log)?;
    std::fs::rename(hosts[2].data.join("raft-kept"), &log)?;
    hosts[2].start()
}

fn a_removed_node_ends_itself(hosts: &mut Hosts) -> Result<()> {
    runtime().block_on(async {
        let api = Api::sign_in_at(&hosts.credentials()?, &hosts[0].api()).await?;
        let made = prepare(hosts.directory(), &api).await?;
        let server = boot(&api, &made, Some("node3")).await?;
        let refused = hosts[0].refusal(&["cluster", "remove", "node3"])?;
        ensure!(refused.contains(&server) && refused.contains("--force"), "{refused}");
        api.delete(&format!("/compute/v2.1/servers/{server}")).await?;
        api.wait_gone(&format!("/compute/v2.1/servers/{server}")).await
    })?;
    // The image is on two hosts before one of them goes.
    hosts[0].until("a second copy of the image", |status| {
        rows(status, "hosts").all(|host| host["images_only_here"] == 0)
    })?;
    hosts[0].trine(&["cluster", "remove", "node3"])?;
    let said = hosts[2].wait_for_its_end()?;
    ensure!(said.contains("no host of this cluster"), "{said}");
    let said = hosts[2].start_in_vain()?;
    ensure!(said.contains("no host of this cluster"), "{said}");
    let status = hosts[1].json(&["cluster", "status"])?;
    ensure!(voters(&status) == [1, 2] && rows(&status, "hosts").count() == 2, "{status}");
    Ok(())
}

#[test]
fn a_backup_becomes_a_new_cluster_with_everything_that_was_acknowledged() -> Result<()> {
    if !kvm_opens("a_backup_becomes_a_new_cluster_with_everything_that_was_acknowledged") {
        return Ok(());
    }
    let mut hosts = Hosts::new()?;
    hosts.add("node1");
    hosts.init(0)?;
    hosts[0].start()?;
    let backup = hosts.path("backup");
    let file = backup.to_str().context("a path")?;
    runtime().block_on(async {
        let api = Api::sign_in_at(&hosts.credentials()?, &hosts[0].api()).await?;
        keypair(&api, "kept").await
    })?;
    let said = hosts[0].trine(&["cluster", "backup", file])?;
    ensure!(said.contains("cluster.key") && is_secret(&backup)?, "{said}");
    let taken = hosts[0].refusal(&["cluster", "backup", file])?;
    ensure!(taken.contains(file), "{taken}");

    let new = hosts.add("node1");
    let key = hosts[0].data.join("cluster.key");
    let (key, address) = (key.to_str().context("a path")?.to_owned(), hosts[new].address.clone());
    let restore = |file: &str| {
        let arguments =
            ["cluster", "restore", file, "--cluster-key-file", &key, "--address", &address];
        arguments.map(str::to_owned)
    };
    let damaged = hosts.path("damaged");
    let mut bytes = std::fs::read(&backup)?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&damaged, &bytes)?;
    let arguments = restore(damaged.to_str().context("a path")?);
    let refused = hosts[new].refusal(&arguments.each_ref().map(String::as_str))?;
    ensure!(refused.contains("damaged"), "{refused}");
    ensure!(!hosts[new].data.exists(), "a refused restore left something");

    let arguments = restore(file);
    hosts[new].trine(&arguments.each_ref().map(String::as_str))?;
    // The old cluster runs on beside it.
    hosts[new].start()?;
    let status = hosts[new].json(&["cluster", "status"])?;
    ensure!(voters(&status) == [2], "{status}");
    ensure!(status["cluster_id"] != hosts[0].json(&["status"])?["cluster_id"], "{status}");
    let dead = rows(&status, "hosts").find(|host| host["id"] == 1).context("the old host")?;
    ensure!(dead["forced_down"] == true && dead["up"] == false, "{status}");
    runtime().block_on(async {
        let mut credentials = hosts.credentials()?;
        credentials["cacert"] = hosts[new].data.join("ca.pem").to_str().context("path")?.into();
        let api = Api::sign_in_at(&credentials, &hosts[new].api()).await?;
        ensure!(keypairs(&api).await? == ["kept"], "{:?}", keypairs(&api).await?);
        keypair(&api, "new").await?;
        anyhow::Ok(())
    })?;
    // Started again it is the same cluster.
    hosts[new].stop_node()?;
    hosts[new].start()
}

#[test]
fn a_survivor_recovers_alone_with_its_guests() -> Result<()> {
    if !kvm_opens("a_survivor_recovers_alone_with_its_guests") {
        return Ok(());
    }
    let mut hosts = Hosts::three()?;
    let (api, server) = runtime().block_on(async {
        let api = Api::sign_in_at(&hosts.credentials()?, &hosts[0].api()).await?;
        let made = prepare(hosts.directory(), &api).await?;
        keypair(&api, "kept").await?;
        let server = boot(&api, &made, Some("node1")).await?;
        anyhow::Ok((api, server))
    })?;
    let guests = hosts[0].guests()?;
    ensure!(guests.len() == 1 && guests[0].0 == server, "{guests:?}");
    hosts[1].lose()?;
    hosts[2].lose()?;
    a_minority_answers_503(&hosts, &api)?;
    let running = hosts[0].refusal(&["cluster", "recover", "--yes"])?;
    ensure!(running.contains("in use"), "{running}");
    hosts[0].stop_node()?;
    let output = hosts[0].try_trine(&["cluster", "recover"])?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(!output.status.success(), "it must not recover without --yes");
    ensure!(said.contains("May be lost") && said.contains("node 2"), "{said}");
    hosts[0].trine(&["cluster", "recover", "--yes"])?;
    hosts[0].start()?;

    let status = hosts[0].json(&["cluster", "status"])?;
    ensure!(voters(&status) == [1] && status["quorum"] == true, "{status}");
    ensure!(hosts[0].guests()? == guests, "{:?} became {:?}", guests, hosts[0].guests()?);
    runtime().block_on(async {
        let api = Api::sign_in_at(&hosts.credentials()?, &hosts[0].api()).await?;
        ensure!(keypairs(&api).await? == ["kept"], "{:?}", keypairs(&api).await?);
        keypair(&api, "after").await.map(drop)
    })?;
    // Others join it as they joined the first cluster.
    let index = hosts.add("node2b");
    let token = hosts[0].trine(&["join-token"])?;
    hosts[index].join(&token)?;
    hosts[index].start()?;
    ensure!(voters(&hosts[index].json(&["cluster", "status"])?) == [1, 4], "it does not vote");
    Ok(())
}

/// Requests are refused, and told why; the status needs no quorum.
fn a_minority_answers_503(hosts: &Hosts, api: &Api) -> Result<()> {
    let status = hosts[0].until("the quorum to be lost", |status| status["quorum"] == false)?;
    ensure!(rows(&status, "members").filter(|m| m["reachable"] == true).count() == 1, "{status}");
    runtime().block_on(async {
        let right = |answer: &Value| answer.to_string().contains("no quorum");
        let path = "/compute/v2.1/servers";
        let answer = api.wait(path, right).await?;
        ensure!(api.get(path).await?.0 == 503, "{answer}");
        anyhow::Ok(())
    })
}

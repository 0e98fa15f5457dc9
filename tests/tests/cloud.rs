//! A cloud of three nodes from outside: what is refused changes nothing, and what was made
//! survives the restart of every node.

mod api;
mod made;

use anyhow::{Context, Result, ensure};
use api::{Api, id};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use made::{Made, prepare};
use reqwest::Method;
use serde_json::{Value, json};
use tests::{Cloud, Options, kvm_opens, trine};

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime starts")
}

fn server(made: &Made, flavor: &str, steps: &str) -> Value {
    json!({"server": {
        "name": "guest", "imageRef": made.image, "flavorRef": flavor,
        "networks": [{"uuid": made.network}], "config_drive": true,
        "user_data": STANDARD.encode(format!("#trine-steps\n{steps}\n")),
    }})
}

async fn boot(api: &Api, made: &Made, steps: &str) -> Result<String> {
    let created = api.make("/compute/v2.1/servers", server(made, &made.flavor, steps)).await?;
    let server = id(&created)?;
    let path = format!("/compute/v2.1/servers/{server}");
    let settled = api.wait(&path, |answer| answer["server"]["status"] != "BUILD").await?;
    ensure!(settled["server"]["status"] == "ACTIVE", "{settled}");
    Ok(server)
}

async fn volume(api: &Api) -> Result<String> {
    let path = format!("/volume/v3/{}/volumes", api.project);
    let volume = id(&api.make(&path, json!({"volume": {"size": 1}})).await?)?;
    volume_is(api, &volume, "available").await?;
    Ok(volume)
}

async fn volume_is(api: &Api, volume: &str, status: &str) -> Result<()> {
    let path = format!("/volume/v3/{}/volumes/{volume}", api.project);
    api.wait(&path, |answer| answer["volume"]["status"] == status).await.map(drop)
}

#[test]
fn refuses_bad_requests_and_changes_nothing() -> Result<()> {
    if !kvm_opens("refuses_bad_requests_and_changes_nothing") {
        return Ok(());
    }
    let cloud = Cloud::start(&trine(), Options::default())?;
    runtime().block_on(async {
        let mut api = Api::sign_in(&cloud, 2).await?;
        let made = prepare(cloud.directory(), &api).await?;
        a_wrong_token(&mut api).await?;
        an_unknown_image(&api, &made).await?;
        a_flavor_no_host_can_hold(&api, &made).await?;
        a_volume_in_use(&api, &made).await
    })
}

async fn a_wrong_token(api: &mut Api) -> Result<()> {
    let right = std::mem::replace(&mut api.token, "gAAAAABwrong".into());
    for path in ["/compute/v2.1/servers", "/image/v2/images", "/networking/v2.0/networks"] {
        let (status, answer) = api.get(path).await?;
        ensure!(status == 401, "{path}: {status} {answer}");
    }
    api.token = right;
    Ok(())
}

async fn an_unknown_image(api: &Api, made: &Made) -> Result<()> {
    let unknown = "7f2c0000-0000-4000-8000-000000000000";
    let mut body = server(made, &made.flavor, "print x");
    body["server"]["imageRef"] = unknown.into();
    let (status, answer) = api.call(Method::POST, "/compute/v2.1/servers", Some(body)).await?;
    ensure!(status == 400, "{status} {answer}");
    ensure!(answer.to_string().contains(unknown), "the message does not name the image: {answer}");
    let (_, servers) = api.get("/compute/v2.1/servers").await?;
    ensure!(servers["servers"] == json!([]), "a server was left behind: {servers}");
    let (_, ports) = api.get("/networking/v2.0/ports?device_owner=compute:nova").await?;
    ensure!(ports["ports"] == json!([]), "a port was left behind: {ports}");
    Ok(())
}

async fn a_flavor_no_host_can_hold(api: &Api, made: &Made) -> Result<()> {
    let flavor = json!({"flavor": {"name": "huge", "ram": 100_000_000, "vcpus": 1, "disk": 0}});
    let flavor = id(&api.make("/compute/v2.1/flavors", flavor).await?)?;
    let created = api.make("/compute/v2.1/servers", server(made, &flavor, "print x")).await?;
    let path = format!("/compute/v2.1/servers/{}", id(&created)?);
    let failed = api.wait(&path, |answer| answer["server"]["status"] == "ERROR").await?;
    let fault = failed["server"]["fault"].to_string();
    ensure!(fault.contains("No valid host"), "{fault}");
    for host in ["node1", "node2", "node3"] {
        ensure!(fault.contains(host), "the fault does not name {host}: {fault}");
    }
    ensure!(fault.contains("MEMORY_MB"), "the fault does not name what is missing: {fault}");
    api.delete(&path).await?;
    api.wait_gone(&path).await
}

async fn a_volume_in_use(api: &Api, made: &Made) -> Result<()> {
    let (one, two) = (boot(api, made, "print one").await?, boot(api, made, "print two").await?);
    for server in [&one, &two] {
        api.console(server, "trine: steps done").await?;
    }
    let volume = volume(api).await?;
    let attach = |server: &str| format!("/compute/v2.1/servers/{server}/os-volume_attachments");
    let body = json!({"volumeAttachment": {"volumeId": volume}});
    api.make(&attach(&one), body.clone()).await?;
    volume_is(api, &volume, "in-use").await?;

    let (status, answer) = api.call(Method::POST, &attach(&two), Some(body)).await?;
    ensure!((400..=409).contains(&status), "a second attachment: {status} {answer}");
    let path = format!("/volume/v3/{}/volumes/{volume}", api.project);
    let (status, answer) = api.delete(&path).await?;
    ensure!(status == 400, "deleting a volume in use: {status} {answer}");
    volume_is(api, &volume, "in-use").await?;
    let (_, answer) = api.get(&path).await?;
    let attachments = answer["volume"]["attachments"].as_array().context("attachments")?;
    ensure!(attachments.len() == 1 && attachments[0]["server_id"] == one, "{answer}");

    // Deleting the server gives the volume back.
    for server in [&one, &two] {
        api.delete(&format!("/compute/v2.1/servers/{server}")).await?;
        api.wait_gone(&format!("/compute/v2.1/servers/{server}")).await?;
    }
    volume_is(api, &volume, "available").await?;
    ensure!(api.delete(&path).await?.0 == 202, "deleting a free volume");
    api.wait_gone(&path).await
}

#[test]
fn data_and_guests_survive_a_restart_of_every_node() -> Result<()> {
    if !kvm_opens("data_and_guests_survive_a_restart_of_every_node") {
        return Ok(());
    }
    let mut cloud = Cloud::start(&trine(), Options::default())?;
    let (server, volume) = runtime().block_on(async {
        let api = Api::sign_in(&cloud, 1).await?;
        let made = prepare(cloud.directory(), &api).await?;
        let volume = volume(&api).await?;
        let serial = &volume[..20];
        let steps = format!(
            "disk-wait {serial}\ndisk-write {serial} pattern=kept bytes=65536\n\
             disk-gone {serial} timeout=300"
        );
        let server = boot(&api, &made, &steps).await?;
        let attach = format!("/compute/v2.1/servers/{server}/os-volume_attachments");
        api.make(&attach, json!({"volumeAttachment": {"volumeId": volume}})).await?;
        api.console(&server, "trine: step 2 disk-write ok").await?;
        anyhow::Ok((server, volume))
    })?;

    cloud.stop_nodes()?;
    cloud.up()?;

    runtime().block_on(async {
        let api = Api::sign_in(&cloud, 3).await?;
        let path = format!("/compute/v2.1/servers/{server}");
        let (status, answer) = api.get(&path).await?;
        ensure!(status == 200 && answer["server"]["status"] == "ACTIVE", "{status} {answer}");
        // The same guest still answers hot-unplug: it was neither lost nor started again.
        let attachment = format!("{path}/os-volume_attachments/{volume}");
        let (status, answer) = api.delete(&attachment).await?;
        ensure!(status == 202, "detach: {status} {answer}");
        let log = api.console(&server, "trine: steps done").await?;
        ensure!(log.matches("trine: booted").count() == 1, "it booted again:\n{log}");
        volume_is(&api, &volume, "available").await
    })
}

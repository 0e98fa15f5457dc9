//! The demo's single steps: calls of the API as a client makes them, and what must come of them.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::guests;
use crate::client::objects::{poll, poll_ok};
use crate::client::{Client, Service, text};
use crate::cluster::Cluster;

use Service::{Compute, Image, Network, Volume};

/// A public key in OpenSSH's form; its private half was thrown away.
const PUBLIC_KEY: &str =
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKnkfwdHUDEM2TgqoGwsL8QRBw6q999iIB24ghp17sb2 demo";
/// Guest port of the forwarding, and the port on the floating address.
const HTTP_PORT: u16 = 80;
const FORWARDED_PORT: u16 = 8080;

/// The objects that the demo made, in the words of the API.
#[derive(Clone, Default)]
pub(super) struct Made {
    pub(super) image: String,
    pub(super) flavor: String,
    pub(super) network: String,
    pub(super) subnet: String,
    pub(super) group: String,
    pub(super) volume: String,
    pub(super) ports: [String; 2],
    pub(super) addresses: [String; 2],
    pub(super) servers: [String; 2],
    pub(super) floating_ip: String,
    pub(super) forwarding: String,
    pub(super) forward_address: String,
}

pub(super) async fn create_keypair(client: &Client) -> Result<String> {
    let body = json!({"keypair": {"name": "demo-key", "public_key": PUBLIC_KEY}});
    text(&client.post(Compute, "os-keypairs", &body).await?, "/keypair/fingerprint")
}

pub(super) async fn create_volume(client: &Client) -> Result<String> {
    let body = json!({"volume": {"name": "demo-volume", "size": 1}});
    let volume = text(&client.post(Volume, "volumes", &body).await?, "/volume/id")?;
    volume_status(client, &volume, "available").await?;
    Ok(volume)
}

pub(super) async fn create_group(client: &Client) -> Result<String> {
    let body = json!({"server_group": {"name": "demo-apart", "policy": "anti-affinity"}});
    text(&client.post(Compute, "os-server-groups", &body).await?, "/server_group/id")
}

pub(super) async fn create_port(client: &Client, network: &str, index: usize) -> Result<String> {
    let name = format!("demo-port{}", index + 1);
    let body = json!({"port": {"name": name, "network_id": network}});
    text(&client.post(Network, "ports", &body).await?, "/port/id")
}

pub(super) async fn create_server(
    client: &Client,
    made: &Made,
    index: usize,
    user_data: &str,
) -> Result<String> {
    let body = json!({
        "server": {
            "name": format!("demo-guest{}", index + 1),
            "imageRef": made.image,
            "flavorRef": made.flavor,
            "key_name": "demo-key",
            "networks": [{"port": made.ports[index]}],
            "user_data": STANDARD.encode(user_data),
            "config_drive": true,
        },
        "os:scheduler_hints": {"group": made.group},
    });
    text(&client.post(Compute, "servers", &body).await?, "/server/id")
}

/// Follows a server to ACTIVE, and tells what each stage of its start took on its host.
pub(super) async fn wait_active(
    cluster: &Cluster,
    client: &Client,
    server: &str,
) -> Result<String> {
    let start = Instant::now();
    let path = format!("servers/{server}");
    let active = poll("the server to become ACTIVE", || async {
        let server = client.get(Compute, &path).await?["server"].take();
        ensure!(server["status"] != "ERROR", "it is in ERROR: {}", server["fault"]["message"]);
        Ok((server["status"] == "ACTIVE").then_some(server))
    });
    let host = text(&active.await?, "/OS-EXT-SRV-ATTR:host")?;
    let waited = start.elapsed().as_secs_f64() * 1e3;
    let member = cluster.members().iter().find(|member| member.name == host);
    let status = member.with_context(|| format!("host {host} is not a node"))?.status().await?;
    let guests = status["guests"].as_array().cloned().unwrap_or_default();
    let guest = guests.iter().find(|guest| guest["id"] == server).cloned().unwrap_or_default();
    let stages = guest["stages"].as_array().cloned().unwrap_or_default();
    let stages = stages.iter().map(|stage| {
        let name = stage["stage"].as_str().unwrap_or_default();
        format!("{name} {:.1} ms → ", stage["ms"].as_f64().unwrap_or_default())
    });
    let stages: String = stages.collect();
    Ok(format!("scheduling → {stages}ACTIVE on {host}, seen after {waited:.0} ms"))
}

async fn host_of(client: &Client, server: &str) -> Result<String> {
    let body = client.get(Compute, &format!("servers/{server}")).await?;
    text(&body, "/server/OS-EXT-SRV-ATTR:host")
}

pub(super) async fn different_hosts(client: &Client, servers: &[String; 2]) -> Result<String> {
    let hosts = [host_of(client, &servers[0]).await?, host_of(client, &servers[1]).await?];
    ensure!(hosts[0] != hosts[1], "both are on {}, in spite of anti-affinity", hosts[0]);
    Ok(format!("{} and {}", hosts[0], hosts[1]))
}

/// Waits for a line of the console log that begins with `start`.
pub(super) async fn console_line(client: &Client, server: &str, start: &str) -> Result<String> {
    poll_console(client, server, |line| line.strip_prefix(start).map(|_| Ok(line.to_string())))
        .await
        .with_context(|| format!("no console line begins with {start:?}"))
}

/// Waits until the guest's step `name` has ended well.
pub(super) async fn step_line(client: &Client, server: &str, name: &str) -> Result<String> {
    poll_console(client, server, |line| {
        let (step, outcome) =
            line.strip_prefix("trine: step ")?.split_once(' ')?.1.split_once(' ')?;
        if step != name {
            return None;
        }
        match outcome.split_once(' ').unwrap_or((outcome, "")) {
            ("ok", detail) => Some(Ok(detail.to_string())),
            (_, reason) => Some(Err(anyhow::anyhow!("{reason}"))),
        }
    })
    .await
    .with_context(|| format!("the guest's step {name}"))
}

/// Reads the console log until `find` has found something or the guest has given up.
async fn poll_console(
    client: &Client,
    server: &str,
    find: impl Fn(&str) -> Option<Result<String>>,
) -> Result<String> {
    let find = &find;
    let found = poll("the console line", || async move {
        let log = client.console_log(server).await?;
        if let Some(found) = log.lines().find_map(find) {
            return Ok(Some(found));
        }
        match log.lines().find(|line| gave_up(line)) {
            Some(line) => bail!("the guest says: {line}"),
            None => Ok(None),
        }
    });
    found.await?
}

fn gave_up(line: &str) -> bool {
    line.starts_with("trine: panic")
        || line.starts_with("trine: steps failed")
        || (line.starts_with("trine: ") && line.contains(" failed "))
}

/// Lets HTTP from anywhere into the project's default security group.
pub(super) async fn open_http(client: &Client) -> Result<String> {
    let groups = client.get(Network, "security-groups?name=default").await?;
    let of_project = |group: &&Value| group["project_id"] == client.project_id();
    let groups = groups["security_groups"].as_array().cloned().unwrap_or_default();
    let group = groups.iter().find(of_project).context("the project has no default group")?;
    let body = json!({"security_group_rule": {
        "security_group_id": text(group, "/id")?, "direction": "ingress", "ethertype": "IPv4",
        "protocol": "tcp", "port_range_min": HTTP_PORT, "port_range_max": HTTP_PORT,
        "remote_ip_prefix": "0.0.0.0/0",
    }});
    let answer = client.post(Network, "security-group-rules", &body).await?;
    text(&answer, "/security_group_rule/id")
}

pub(super) async fn create_floating_ip(client: &Client) -> Result<String> {
    let networks = client.get(Network, "networks?name=public").await?;
    let network = text(&networks, "/networks/0/id")?;
    let body = json!({"floatingip": {"floating_network_id": network}});
    text(&client.post(Network, "floatingips", &body).await?, "/floatingip/id")
}

pub(super) async fn create_forwarding(client: &Client, made: &Made) -> Result<String> {
    let body = json!({"port_forwarding": {
        "protocol": "tcp",
        "external_port": FORWARDED_PORT,
        "internal_port": HTTP_PORT,
        "internal_ip_address": made.addresses[0],
        "internal_port_id": made.ports[0],
    }});
    let path = format!("floatingips/{}/port_forwardings", made.floating_ip);
    text(&client.post(Network, &path, &body).await?, "/port_forwarding/id")
}

/// Where the forwarded port answers.
pub(super) async fn forward_address(client: &Client, floating_ip: &str) -> Result<String> {
    let body = client.get(Network, &format!("floatingips/{floating_ip}")).await?;
    let address = text(&body, "/floatingip/floating_ip_address")?;
    Ok(format!("{address}:{FORWARDED_PORT}"))
}

/// Fetches the first guest's page from this machine.
pub(super) async fn http_get(address: &str) -> Result<String> {
    let answer = poll_ok("an HTTP answer", || http_get_once(address)).await?;
    ensure!(answer.contains(guests::GREETING), "http://{address}/ answered {answer:?}");
    Ok(format!("http://{address}/ says {:?}", guests::GREETING))
}

async fn http_get_once(address: &str) -> Result<String> {
    let exchange = async {
        let mut stream = TcpStream::connect(address).await?;
        let request = format!("GET / HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        stream.take(1 << 16).read_to_string(&mut answer).await?;
        ensure!(!answer.is_empty(), "the connection closed without an answer");
        Ok(answer)
    };
    tokio::time::timeout(Duration::from_secs(5), exchange).await?
}

async fn volume_status(client: &Client, volume: &str, status: &str) -> Result<()> {
    let mut last = String::new();
    let reached = poll("the volume", || async {
        let body = client.get(Volume, &format!("volumes/{volume}")).await?;
        let now = text(&body, "/volume/status")?;
        ensure!(!now.starts_with("error"), "the volume is in {now}");
        Ok((now == status).then_some(()))
    });
    reached.await.with_context(|| {
        last.push_str(status);
        format!("waiting for the volume to be {last}")
    })
}

pub(super) async fn attach(client: &Client, server: &str, volume: &str) -> Result<String> {
    let path = format!("servers/{server}/os-volume_attachments");
    client.post(Compute, &path, &json!({"volumeAttachment": {"volumeId": volume}})).await?;
    volume_status(client, volume, "in-use").await?;
    let body = client.get(Volume, &format!("volumes/{volume}")).await?;
    let home = body["volume"]["os-vol-host-attr:host"].as_str().unwrap_or("its host");
    let home = home.split_once('@').map_or(home, |(host, _)| host);
    let host = host_of(client, server).await?;
    let way = if home == host { "local" } else { "NBD over TLS" };
    Ok(format!("volume on {home}, guest on {host}: {way}"))
}

pub(super) async fn detach(client: &Client, server: &str, volume: &str) -> Result<String> {
    client.delete(Compute, &format!("servers/{server}/os-volume_attachments/{volume}")).await?;
    volume_status(client, volume, "available").await?;
    Ok("available".into())
}

/// A write through each of the nodes that are left.
pub(super) async fn writes_go_on(others: &[Client]) -> Result<String> {
    let start = Instant::now();
    for (index, client) in others.iter().enumerate() {
        let body = json!({"keypair": {"name": format!("demo-key-after{index}"), "public_key": PUBLIC_KEY}});
        poll_ok("a write to be accepted", || async {
            match client.post(Compute, "os-keypairs", &body).await {
                // An earlier try that was cut off may have been committed all the same.
                Err(error) if format!("{error:#}").contains("409") => Ok(Value::Null),
                result => result,
            }
        })
        .await?;
    }
    Ok(format!(
        "accepted on {} nodes {:.2} s after the kill",
        others.len(),
        start.elapsed().as_secs_f64()
    ))
}

/// Everything that was acknowledged, the last write included, is there on each node.
pub(super) async fn nothing_lost(nodes: &[Client], made: &Made) -> Result<String> {
    for client in nodes {
        for (service, path) in [
            (Image, format!("images/{}", made.image)),
            (Compute, format!("flavors/{}", made.flavor)),
            (Network, format!("networks/{}", made.network)),
            (Network, format!("subnets/{}", made.subnet)),
            (Volume, format!("volumes/{}", made.volume)),
            (Compute, format!("os-server-groups/{}", made.group)),
            (Compute, format!("servers/{}", made.servers[0])),
            (Compute, format!("servers/{}", made.servers[1])),
            (Compute, "os-keypairs/demo-key".into()),
            (Compute, "os-keypairs/demo-key-after0".into()),
            (Compute, "os-keypairs/demo-key-after1".into()),
        ] {
            poll_ok("an answer", || client.get(service, &path))
                .await
                .with_context(|| format!("{path} is lost"))?;
        }
    }
    Ok(format!("11 objects found on {} node(s)", nodes.len()))
}

/// The returned node lists the guests that run on it, and their consoles answer through it.
pub(super) async fn guests_found(
    cluster: &Cluster,
    client: &Client,
    made: &Made,
) -> Result<String> {
    let mut hosts = BTreeSet::new();
    for server in &made.servers {
        let body = client.get(Compute, &format!("servers/{server}")).await?;
        ensure!(body["server"]["status"] == "ACTIVE", "{server} is {}", body["server"]["status"]);
        let host = host_of(client, server).await?;
        let member = cluster.members().iter().find(|member| member.name == host);
        let member = member.with_context(|| format!("host {host} is not a node"))?;
        poll("the node to find its guest", || async {
            let status = member.status().await?;
            let guests = status["guests"].as_array().cloned().unwrap_or_default();
            let found = guests
                .iter()
                .any(|guest| guest["id"] == server.as_str() && guest["state"] == "running");
            Ok(found.then_some(()))
        })
        .await
        .with_context(|| format!("{server} on {host}"))?;
        console_line(client, server, "trine: steps done").await?;
        hosts.insert(host);
    }
    Ok(format!("both ACTIVE on {}", hosts.into_iter().collect::<Vec<_>>().join(" and ")))
}

/// Deletes in the order that the API asks for, and sees each object go.
pub(super) async fn delete_all(client: &Client, made: &Made) -> Result<String> {
    let forwarding =
        format!("floatingips/{}/port_forwardings/{}", made.floating_ip, made.forwarding);
    let mut deleted = 0;
    for (service, path) in [
        (Network, forwarding),
        (Network, format!("floatingips/{}", made.floating_ip)),
        (Compute, format!("servers/{}", made.servers[0])),
        (Compute, format!("servers/{}", made.servers[1])),
        (Compute, format!("os-server-groups/{}", made.group)),
        (Volume, format!("volumes/{}", made.volume)),
        (Network, format!("ports/{}", made.ports[0])),
        (Network, format!("ports/{}", made.ports[1])),
        (Network, format!("subnets/{}", made.subnet)),
        (Network, format!("networks/{}", made.network)),
        (Compute, "os-keypairs/demo-key".into()),
        (Compute, "os-keypairs/demo-key-after0".into()),
        (Compute, "os-keypairs/demo-key-after1".into()),
        (Compute, format!("flavors/{}", made.flavor)),
        (Image, format!("images/{}", made.image)),
    ] {
        client.delete_and_wait(service, &path).await?;
        deleted += 1;
    }
    Ok(format!("{deleted} objects"))
}

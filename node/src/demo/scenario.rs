use anyhow::{Context, Result};

use super::guests;
use super::report::Report;
use super::steps::*;
use crate::bench::{self, Cloud, LaunchOptions};
use crate::client::objects::{create_flavor, create_image, create_network, create_subnet};
use crate::client::{Client, Service, text};
use crate::cluster::{Addresses, Cluster, NODES};

/// Makes the three nodes.
pub(super) async fn make_cluster(
    report: &mut Report,
    cluster: &mut Cluster,
    addresses: Addresses,
) -> Result<()> {
    report
        .step("trine init, trine node (node1)", async {
            cluster.make_first(addresses).await?;
            let first = &cluster.members()[0];
            let status = first.status().await?;
            let sandbox = status["sandbox"].as_str().unwrap_or("unknown");
            Ok(format!("https://{}, guests closed in: {sandbox}", first.api_address()))
        })
        .await?;
    for index in 1..NODES {
        let name = format!("trine join, trine node (node{})", index + 1);
        report
            .step(&name, async {
                cluster.join(index).await?;
                Ok(format!("https://{}", cluster.members()[index].api_address()))
            })
            .await?;
    }
    Ok(())
}

/// The demo on a running cluster, step by step.
pub(super) struct Scenario<'a> {
    cluster: &'a mut Cluster,
    report: &'a mut Report,
    client: Client,
    made: Made,
}

impl<'a> Scenario<'a> {
    pub(super) async fn new(cluster: &'a mut Cluster, report: &'a mut Report) -> Result<Self> {
        let mut client = None;
        report
            .step("token issue", async {
                let signed_in = cluster.client().await?;
                let detail = format!("project {}", signed_in.project_id());
                client = Some(signed_in);
                Ok(detail)
            })
            .await?;
        let client = client.context("the step above signed in")?;
        Ok(Scenario { cluster, report, client, made: Made::default() })
    }

    /// Image, flavor, network, subnet, keypair, volume, server group.
    pub(super) async fn fill_catalog(&mut self) -> Result<()> {
        let Scenario { report, client, made, .. } = self;
        made.image = report.step("image create --file", create_image(client)).await?;
        made.flavor = report.step("flavor create", create_flavor(client, "demo.tiny")).await?;
        made.network = report.step("network create", create_network(client, "demo-net")).await?;
        made.subnet = report.step("subnet create", create_subnet(client, &made.network)).await?;
        report.step("keypair create", create_keypair(client)).await?;
        made.volume = report.step("volume create", create_volume(client)).await?;
        made.group = report.step("server group create", create_group(client)).await?;
        for index in 0..2 {
            let name = format!("port create (guest{})", index + 1);
            let port = report.step(&name, create_port(client, &made.network, index)).await?;
            let body = client.get(Service::Network, &format!("ports/{port}")).await?;
            made.addresses[index] = text(&body, "/port/fixed_ips/0/ip_address")?;
            made.ports[index] = port;
        }
        Ok(())
    }

    /// Both guests at once, on different hosts.
    pub(super) async fn boot_guests(&mut self) -> Result<()> {
        let Scenario { cluster, report, client, made } = self;
        let user_data = [
            guests::first(&made.volume, &made.addresses[1]),
            guests::second(&made.volume, &made.addresses[0]),
        ];
        for (index, user_data) in user_data.iter().enumerate() {
            let name = format!("server create (guest{})", index + 1);
            made.servers[index] =
                report.step(&name, create_server(client, made, index, user_data)).await?;
        }
        for (index, server) in made.servers.iter().enumerate() {
            let name = format!("guest{} boots", index + 1);
            report.step(&name, wait_active(cluster, client, server)).await?;
        }
        report.step("different hosts", different_hosts(client, &made.servers)).await?;
        Ok(())
    }

    /// What the guests say of address, instance data, and each other.
    pub(super) async fn check_guests(&mut self) -> Result<()> {
        let Scenario { report, client, made, .. } = self;
        for (index, server) in made.servers.iter().enumerate() {
            let (name, address) = (format!("guest{}", index + 1), &made.addresses[index]);
            for (what, line) in [
                ("DHCP", format!("trine: network {address}/")),
                ("config drive", format!("trine: config-drive {server}")),
                ("metadata", format!("trine: metadata {server}")),
            ] {
                report.step(&format!("{name} {what}"), console_line(client, server, &line)).await?;
            }
        }
        let [first, second] = &made.servers;
        report.step("guest1 serves HTTP", step_line(client, first, "http-serve")).await?;
        report.step("guest1 pings guest2 over VXLAN", step_line(client, first, "ping")).await?;
        report.step("guest2 pings guest1 over VXLAN", step_line(client, second, "ping")).await?;
        report.step("guest2 fetches from guest1", step_line(client, second, "http-get")).await?;
        Ok(())
    }

    /// A port of a floating address that leads to the first guest.
    pub(super) async fn forward_port(&mut self) -> Result<()> {
        let Scenario { report, client, made, .. } = self;
        let rule = open_http(client);
        report.step("security group rule create (tcp 80)", rule).await?;
        made.floating_ip = report.step("floating ip create", create_floating_ip(client)).await?;
        made.forwarding =
            report.step("port forwarding create", create_forwarding(client, made)).await?;
        made.forward_address = forward_address(client, &made.floating_ip).await?;
        let get = http_get(&made.forward_address);
        report.step("HTTP through the forwarded port", get).await?;
        Ok(())
    }

    /// The volume goes from guest to guest, across hosts, and keeps its bytes.
    pub(super) async fn move_volume(&mut self) -> Result<()> {
        let Scenario { report, client, made, .. } = self;
        let [first, second] = &made.servers;
        let volume = &made.volume;
        report.step("server add volume (guest1)", attach(client, first, volume)).await?;
        report.step("guest1 sees the disk", step_line(client, first, "disk-wait")).await?;
        report.step("guest1 writes and verifies", step_line(client, first, "disk-write")).await?;
        report.step("server remove volume (guest1)", detach(client, first, volume)).await?;
        report.step("guest1 let go of it", step_line(client, first, "disk-gone")).await?;
        report.step("server add volume (guest2)", attach(client, second, volume)).await?;
        report.step("guest2 sees the disk", step_line(client, second, "disk-wait")).await?;
        let verify = step_line(client, second, "disk-verify");
        report.step("guest2 reads the same bytes", verify).await?;
        for (index, server) in made.servers.iter().enumerate() {
            let name = format!("guest{} ends its steps", index + 1);
            report.step(&name, console_line(client, server, "trine: steps done")).await?;
        }
        Ok(())
    }

    /// The leader's node process dies and comes back.
    pub(super) async fn lose_leader(&mut self) -> Result<()> {
        let Scenario { cluster, report, client, made } = self;
        let leader = cluster.leader().await?;
        let name = cluster.members()[leader].name.clone();
        let others: Vec<Client> = (0..NODES)
            .filter(|index| *index != leader)
            .map(|index| client.at(&cluster.members()[index].api_address()))
            .collect();
        let kill = async {
            cluster.member_mut(leader).kill().await?;
            Ok(format!("SIGKILL to {name}, the leader"))
        };
        report.step("kill the leader", kill).await?;
        report.step("writes go on", writes_go_on(&others)).await?;
        report.step("nothing acknowledged is lost", nothing_lost(&others, made)).await?;
        report.step("guests keep running", http_get(&made.forward_address)).await?;
        let back = async {
            cluster.member_mut(leader).start().await?;
            Ok(format!("{name} serves again"))
        };
        report.step("start it again", back).await?;
        let returned = client.at(&cluster.members()[leader].api_address());
        report.step("it caught up", nothing_lost(std::slice::from_ref(&returned), made)).await?;
        report.step("it finds its guests", guests_found(cluster, &returned, made)).await?;
        *client = cluster.client().await?;
        Ok(())
    }

    /// The launch benchmark, in this cloud.
    pub(super) async fn measure(&mut self, launches: usize) -> Result<()> {
        let cloud = Cloud {
            client: self.client.clone(),
            image: self.made.image.clone(),
            flavor: self.made.flavor.clone(),
            network: self.made.network.clone(),
            directory: self.cluster.directory().to_path_buf(),
        };
        let options = LaunchOptions { count: launches, concurrency: 1 };
        let figures = self.report.step("launch benchmark", bench::launch(&options, &cloud)).await?;
        self.report.set_launch(figures);
        Ok(())
    }

    /// Deletes what was made, in the order that the API asks for.
    pub(super) async fn delete_all(&mut self) -> Result<()> {
        let Scenario { report, client, made, .. } = self;
        report.step("delete all that was made", delete_all(client, made)).await?;
        Ok(())
    }
}

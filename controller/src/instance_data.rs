//! Instance data: what a guest finds on its config drive and at 169.254.169.254, as Nova
//! makes it. Pure: the agent opens the sealed user_data and passes it in.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::{Value, json};

use crate::ids::SubnetId;
use crate::plan::view::{PortView, ServerView, SubnetView, SwitchView};
use crate::state::cluster::DEFAULT_ZONE;
use crate::state::compute::Server;

/// Every document of a server by its path, without a leading slash: `openstack/latest/…`
/// as on the config drive, and `latest/…` in EC2's form.
pub fn documents(
    view: &ServerView,
    switch: &SwitchView,
    user_data: Option<&[u8]>,
) -> BTreeMap<String, Vec<u8>> {
    let mut documents = BTreeMap::new();
    let mut put = |path: &str, content: Vec<u8>| {
        documents.insert(path.to_owned(), content);
    };
    put("openstack/latest/meta_data.json", meta_data(&view.server).to_string().into_bytes());
    put("openstack/latest/network_data.json", network_data(view, switch).to_string().into_bytes());
    put("openstack/latest/vendor_data.json", b"{}".to_vec());
    put("openstack/latest/vendor_data2.json", b"{}".to_vec());
    if let Some(user_data) = user_data {
        put("openstack/latest/user_data", user_data.to_vec());
        put("latest/user-data", user_data.to_vec());
    }
    for (name, value) in ec2(view, switch) {
        put(&format!("latest/meta-data/{name}"), value.into_bytes());
    }
    documents
}

fn meta_data(server: &Server) -> Value {
    let mut document = json!({
        "uuid": server.id,
        "name": server.name,
        "hostname": server.hostname,
        "launch_index": server.launch_index,
        "availability_zone": zone(server),
        "project_id": server.project_id,
        "meta": server.metadata,
        "devices": [],
        "dedicated_cpus": [],
    });
    if let (Some(name), Some(key), Some(fields)) =
        (&server.key_name, &server.public_key, document.as_object_mut())
    {
        fields.insert("public_keys".into(), json!({name: key}));
        fields.insert("keys".into(), json!([{"name": name, "type": "ssh", "data": key}]));
    }
    document
}

fn zone(server: &Server) -> &str {
    server.availability_zone.as_deref().unwrap_or(DEFAULT_ZONE)
}

/// The ports of a server in the order of its devices.
fn ports<'a>(view: &ServerView, switch: &'a SwitchView) -> Vec<&'a PortView> {
    let find = |id| switch.ports.iter().find(|port| port.id == id);
    view.ports.iter().filter_map(|nic| find(nic.port.clone())).collect()
}

fn subnet<'a>(switch: &'a SwitchView, id: &SubnetId) -> Option<&'a SubnetView> {
    switch.networks.iter().flat_map(|network| &network.subnets).find(|subnet| subnet.id == *id)
}

/// A link's id, as Nova names the host's side of it.
fn link_id(port: &PortView) -> String {
    format!("tap{}", port.id.as_str().get(..11).unwrap_or(port.id.as_str()))
}

fn network_data(view: &ServerView, switch: &SwitchView) -> Value {
    let ports = ports(view, switch);
    let mtu = |port: &PortView| view.ports.iter().find(|nic| nic.port == port.id).map(|n| n.mtu);
    let links: Vec<Value> = ports
        .iter()
        .map(|port| {
            json!({
                "id": link_id(port),
                "vif_id": port.id,
                "type": "tap",
                "mtu": mtu(port),
                "ethernet_mac_address": port.mac,
            })
        })
        .collect();
    let mut networks = Vec::new();
    let mut services: Vec<Value> = Vec::new();
    for port in ports {
        for (subnet_id, address) in &port.fixed_ips {
            let Some(subnet) = subnet(switch, subnet_id) else { continue };
            let id = format!("network{}", networks.len());
            networks.push(network_entry(&id, port, subnet, *address));
            for server in &subnet.dns {
                let service = json!({"type": "dns", "address": server});
                if !services.contains(&service) {
                    services.push(service);
                }
            }
        }
    }
    json!({"links": links, "networks": networks, "services": services})
}

fn network_entry(id: &str, port: &PortView, subnet: &SubnetView, address: IpAddr) -> Value {
    let mut entry = json!({
        "id": id,
        "link": link_id(port),
        "network_id": port.network,
        "type": if subnet.dhcp { "ipv4_dhcp" } else { "ipv4" },
    });
    let (Some(fields), false) = (entry.as_object_mut(), subnet.dhcp) else { return entry };
    let netmask = subnet.cidr.parse::<IpNet>().map(|net| net.netmask().to_string());
    let default = subnet
        .gateway
        .map(|gateway| json!({"network": "0.0.0.0", "netmask": "0.0.0.0", "gateway": gateway}));
    let further = subnet.host_routes.iter().filter_map(|(destination, hop)| {
        let net = destination.parse::<IpNet>().ok()?;
        Some(json!({"network": net.network(), "netmask": net.netmask(), "gateway": hop}))
    });
    let routes: Vec<Value> = default.into_iter().chain(further).collect();
    fields.insert("ip_address".into(), json!(address));
    fields.insert("netmask".into(), json!(netmask.unwrap_or_default()));
    fields.insert("routes".into(), json!(routes));
    fields.insert("services".into(), json!([]));
    entry
}

/// EC2's id form of a UUID: its first eight hex digits.
fn short(id: &str) -> String {
    id.chars().filter(char::is_ascii_hexdigit).take(8).collect()
}

fn ec2(view: &ServerView, switch: &SwitchView) -> BTreeMap<&'static str, String> {
    let server = &view.server;
    let address = ports(view, switch)
        .iter()
        .flat_map(|port| &port.fixed_ips)
        .map(|(_, address)| address.to_string())
        .next()
        .unwrap_or_default();
    let image = server.image_id.as_ref().map_or_else(String::new, |id| short(id.as_str()));
    let mut values = BTreeMap::from([
        ("ami-id", format!("ami-{image}")),
        ("ami-launch-index", server.launch_index.to_string()),
        ("block-device-mapping/ami", "vda".to_owned()),
        ("block-device-mapping/root", "/dev/vda".to_owned()),
        ("hostname", server.hostname.clone()),
        ("instance-action", "none".to_owned()),
        ("instance-id", format!("i-{}", short(server.id.as_str()))),
        ("instance-type", server.flavor.name.clone()),
        ("local-hostname", server.hostname.clone()),
        ("local-ipv4", address),
        ("placement/availability-zone", zone(server).to_owned()),
        ("public-hostname", server.hostname.clone()),
        ("reservation-id", server.reservation_id.clone()),
    ]);
    if let Some(key) = &server.public_key {
        values.insert("public-keys/0/openssh-key", key.clone());
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::HostId;
    use crate::plan::host_view;
    use crate::state::fixture::Sample;

    #[test]
    fn a_guest_is_told_its_name_its_address_and_its_user_data() {
        let mut sample = Sample::new();
        let host = sample.running("web-1", None);
        let view = host_view(&sample.state, HostId(host.0));
        let documents =
            documents(&view.servers["web-1"], &view.switch, Some(b"#trine-steps\nprint hi\n"));
        let json = |path: &str| -> Value {
            serde_json::from_slice(&documents[path]).expect("the document is JSON")
        };
        let meta_data = json("openstack/latest/meta_data.json");
        assert_eq!(meta_data["uuid"], "web-1");
        assert_eq!(meta_data["hostname"], "web-1");
        assert!(meta_data.get("public_keys").is_none(), "without a keypair there is no key");
        let network_data = json("openstack/latest/network_data.json");
        assert_eq!(network_data["networks"][0]["type"], "ipv4_dhcp");
        assert_eq!(network_data["links"][0]["vif_id"], "port-of-web-1");
        assert_eq!(network_data["links"][0]["mtu"], 1450);
        assert_eq!(documents["latest/meta-data/local-ipv4"], b"10.0.0.2");
        assert_eq!(documents["openstack/latest/user_data"], b"#trine-steps\nprint hi\n");
        assert_eq!(documents["latest/user-data"], documents["openstack/latest/user_data"]);
    }
}

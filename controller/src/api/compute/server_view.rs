//! A server as Nova shows it, at each microversion.

use std::collections::{BTreeMap, BTreeSet};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha224};

use super::super::context::Context;
use super::super::time;
use super::flavors::{flavor_links, swap};
use crate::ids::PortId;
use crate::state::State;
use crate::state::compute::{Server, TaskState, VmState};

/// What Nova calls the server's status.
pub(super) fn status(server: &Server) -> &'static str {
    match (server.vm_state, server.task_state) {
        (VmState::Building, _) => "BUILD",
        (_, Some(TaskState::Rebuilding)) => "REBUILD",
        (VmState::Active, Some(TaskState::Rebooting)) => "REBOOT",
        (VmState::Active, _) => "ACTIVE",
        (VmState::Stopped, _) => "SHUTOFF",
        (VmState::Error, _) => "ERROR",
    }
}

/// The task state, with what only the server's host knows while it is being made.
async fn task_state(ctx: &Context, server: &Server) -> Option<&'static str> {
    if server.vm_state == VmState::Building
        && server.task_state != Some(TaskState::Deleting)
        && let Some(sub_state) = ctx.cloud().volatile(&server.id).await
    {
        return Some(sub_state.as_str());
    }
    server.task_state.map(TaskState::as_str)
}

/// The host as a tenant may know it: the same for servers of one project on one host.
fn host_id(state: &State, server: &Server) -> String {
    let host = server.host.and_then(|id| state.cluster.hosts.get(&id));
    host.map_or_else(String::new, |host| {
        hex::encode(Sha224::digest(format!("{}{}", server.project_id, host.name)))
    })
}

/// Addresses by the network's name, floating ones included.
pub(super) fn addresses(state: &State, server: &Server) -> Value {
    let mut networks: BTreeMap<&str, Vec<Value>> = BTreeMap::new();
    for port in &server.ports {
        let Some(port) = state.network.ports.get(&port.port_id) else { continue };
        let Some(network) = state.network.networks.get(&port.network_id) else { continue };
        let entries = networks.entry(&network.name).or_default();
        let entry = |address: &std::net::IpAddr, kind: &str| {
            json!({
                "version": if address.is_ipv4() { 4 } else { 6 },
                "addr": address.to_string(),
                "OS-EXT-IPS:type": kind,
                "OS-EXT-IPS-MAC:mac_addr": port.mac_address,
            })
        };
        entries.extend(port.fixed_ips.iter().map(|fixed| entry(&fixed.ip_address, "fixed")));
        entries.extend(floating(state, &port.id).map(|address| entry(&address, "floating")));
    }
    json!(networks)
}

fn floating(state: &State, port: &PortId) -> impl Iterator<Item = std::net::IpAddr> {
    let floating = state.network.floating_ips.values();
    floating
        .filter(move |one| one.port_id.as_ref() == Some(port))
        .map(|one| one.floating_ip_address)
}

/// The names of the security groups of the server's ports.
fn security_groups(state: &State, server: &Server) -> Vec<Value> {
    let ports = server.ports.iter().filter_map(|port| state.network.ports.get(&port.port_id));
    let ids: BTreeSet<_> = ports.flat_map(|port| port.security_groups.iter()).collect();
    let groups = ids.into_iter().filter_map(|id| state.network.security_groups.get(id));
    groups.map(|group| json!({"name": group.name})).collect()
}

pub(super) fn links(ctx: &Context, server: &Server) -> Value {
    let id = &server.id;
    json!([
        {"rel": "self", "href": ctx.url(&format!("/compute/v2.1/servers/{id}"))},
        {"rel": "bookmark", "href": ctx.url(&format!("/compute/servers/{id}"))},
    ])
}

pub(super) fn short_view(ctx: &Context, server: &Server) -> Value {
    json!({"id": server.id, "name": server.name, "links": links(ctx, server)})
}

fn flavor_part(ctx: &Context, server: &Server) -> Value {
    let flavor = &server.flavor;
    if ctx.at_least(2, 47) {
        json!({
            "original_name": flavor.name, "vcpus": flavor.vcpus, "ram": flavor.ram_mib,
            "disk": flavor.root_gib, "ephemeral": flavor.ephemeral_gib,
            "swap": if ctx.at_least(2, 75) { swap(ctx, flavor) } else { json!(flavor.swap_mib) },
            "extra_specs": flavor.extra_specs,
        })
    } else {
        json!({"id": flavor.id, "links": [flavor_links(ctx, &flavor.id)[1]]})
    }
}

fn image_part(ctx: &Context, server: &Server) -> Value {
    let Some(id) = &server.image_id else { return json!("") };
    let href = ctx.url(&format!("/compute/images/{id}"));
    json!({"id": id, "links": [{"rel": "bookmark", "href": href}]})
}

fn volumes_part(ctx: &Context, state: &State, server: &Server) -> Vec<Value> {
    let attached = state.attachments_of_server(&server.id);
    attached
        .map(|(volume, attachment)| {
            let mut view = json!({"id": volume.id});
            if ctx.at_least(2, 3) {
                view["delete_on_termination"] = json!(attachment.delete_on_termination);
            }
            view
        })
        .collect()
}

fn fault_part(ctx: &Context, server: &Server) -> Option<Value> {
    // A server that is not in ERROR and has a fault waits for its host, and the fault says so.
    let fault = server.fault.as_ref()?;
    let mut view = json!({
        "code": fault.code, "message": fault.message,
        "created": time::seconds(fault.created_ms),
    });
    // Details of the cloud's own failures name hosts: Nova keeps them for administrators.
    if ctx.is_admin() || fault.code != 500 {
        view["details"] = json!(fault.details);
    }
    Some(view)
}

/// A server in full. `state` may be newer than the request's.
pub(super) async fn server_view(ctx: &Context, state: &State, server: &Server) -> Value {
    let zone = server.host.and_then(|id| state.cluster.hosts.get(&id));
    let zone = zone.map(|host| host.availability_zone.as_str());
    let launched = server.launched_ms.map(time::micros_naive);
    let mut view = json!({
        "id": server.id,
        "name": server.name,
        "status": status(server),
        "tenant_id": server.project_id,
        "user_id": server.user_id,
        "metadata": server.metadata,
        "hostId": host_id(state, server),
        "image": image_part(ctx, server),
        "flavor": flavor_part(ctx, server),
        "created": time::seconds(server.created_ms),
        "updated": time::seconds(server.updated_ms),
        "addresses": addresses(state, server),
        "accessIPv4": "",
        "accessIPv6": "",
        "links": links(ctx, server),
        "key_name": server.key_name,
        "config_drive": if server.config_drive { "True" } else { "" },
        "OS-DCF:diskConfig": "MANUAL",
        "OS-EXT-AZ:availability_zone":
            zone.or(server.availability_zone.as_deref()).unwrap_or_default(),
        "OS-SRV-USG:launched_at": launched,
        "OS-SRV-USG:terminated_at": null,
        "OS-EXT-STS:vm_state": server.vm_state.as_str(),
        "OS-EXT-STS:task_state": task_state(ctx, server).await,
        "OS-EXT-STS:power_state": server.power_state.number(),
        "os-extended-volumes:volumes_attached": volumes_part(ctx, state, server),
    });
    if matches!(status(server), "BUILD" | "ACTIVE") {
        view["progress"] = json!(0);
    }
    if let Some(fault) = fault_part(ctx, server) {
        view["fault"] = fault;
    }
    // Nova shows the key only when the server has ports.
    if !server.ports.is_empty() {
        view["security_groups"] = json!(security_groups(state, server));
    }
    if let Value::Object(fields) = &mut view {
        if ctx.is_admin() {
            admin_part(ctx, state, server, fields);
        }
        versioned_part(ctx, server, fields);
    }
    view
}

fn admin_part(ctx: &Context, state: &State, server: &Server, fields: &mut Map<String, Value>) {
    let host = server.host.and_then(|id| state.cluster.hosts.get(&id));
    let name = host.map(|host| &host.name);
    let short: String = server.id.as_str().chars().take(8).collect();
    let mut put = |key: &str, value: Value| {
        fields.insert(format!("OS-EXT-SRV-ATTR:{key}"), value);
    };
    put("host", json!(name));
    put("hypervisor_hostname", json!(name));
    put("instance_name", json!(format!("instance-{short}")));
    if ctx.at_least(2, 3) {
        put("reservation_id", json!(server.reservation_id));
        put("launch_index", json!(server.launch_index));
        put("hostname", json!(server.hostname));
        put("kernel_id", json!(""));
        put("ramdisk_id", json!(""));
        put("root_device_name", json!("/dev/vda"));
        put("user_data", user_data(ctx, server));
    }
    if ctx.at_least(2, 16) {
        let up = ctx.cloud().liveness().up;
        let status = match host {
            None => "",
            Some(host) if host.disabled => "MAINTENANCE",
            Some(host) if up.contains(&host.id) && !host.is_out() => "UP",
            Some(_) => "DOWN",
        };
        fields.insert("host_status".to_owned(), json!(status));
    }
}

/// The user data as it was given: base64.
fn user_data(ctx: &Context, server: &Server) -> Value {
    let opened =
        server.user_data.as_ref().and_then(|sealed| ctx.cloud().sealer().open(sealed).ok());
    json!(opened.map(|bytes| STANDARD.encode(bytes)))
}

fn versioned_part(ctx: &Context, server: &Server, fields: &mut Map<String, Value>) {
    let mut put = |minor: u16, key: &str, value: Value| {
        if ctx.at_least(2, minor) {
            fields.insert(key.to_owned(), value);
        }
    };
    put(9, "locked", json!(false));
    put(19, "description", json!(server.description));
    put(26, "tags", json!(server.tags));
    put(63, "trusted_image_certificates", Value::Null);
    put(73, "locked_reason", Value::Null);
    put(90, "OS-EXT-SRV-ATTR:hostname", json!(server.hostname));
    put(96, "pinned_availability_zone", json!(server.availability_zone));
}

//! Hosts as administrators see them: hypervisors, services, availability zones.

use std::collections::BTreeMap;

use axum::extract::Path;
use serde_json::{Value, json};

use super::super::body::Json;
use super::super::context::Context;
use super::super::error::{ApiError, ErrorKind};
use super::super::routes::Routes;
use super::super::{policy, time};
use super::host_uuid;
use crate::state::cluster::Host;
use crate::state::compute::Placed;

pub(super) fn routes() -> Routes {
    Routes::new(super::PREFIX)
        .get("/v2.1/os-hypervisors", policy::HYPERVISOR_LIST, hypervisors)
        .get("/v2.1/os-hypervisors/detail", policy::HYPERVISOR_LIST, hypervisor_details)
        .get("/v2.1/os-hypervisors/{id}", policy::HYPERVISOR_GET, hypervisor)
        .get("/v2.1/os-availability-zone", policy::ZONE_LIST, zones)
        .get("/v2.1/os-availability-zone/detail", policy::ZONE_DETAIL, zone_details)
        .get("/v2.1/extensions", policy::EXTENSION_LIST, extensions)
}

pub(super) fn is_up(ctx: &Context, host: &Host) -> bool {
    !host.is_out() && ctx.cloud().liveness().up.contains(&host.id)
}

/// Numbers before 2.53, UUIDs from then on.
fn hypervisor_id(ctx: &Context, host: &Host) -> Value {
    match ctx.at_least(2, 53) {
        true => json!(host_uuid(ctx, "hypervisor", host.id)),
        false => json!(host.id),
    }
}

fn short_view(ctx: &Context, host: &Host) -> Value {
    json!({
        "id": hypervisor_id(ctx, host),
        "hypervisor_hostname": host.name,
        "state": if is_up(ctx, host) { "up" } else { "down" },
        "status": if host.disabled { "disabled" } else { "enabled" },
    })
}

fn full_view(ctx: &Context, host: &Host) -> Value {
    let mut view = short_view(ctx, host);
    let service_id = match ctx.at_least(2, 53) {
        true => json!(host_uuid(ctx, "compute service", host.id)),
        false => json!(host.id),
    };
    view["service"] = json!({
        "id": service_id, "host": host.name, "disabled_reason": host.disabled_reason,
    });
    view["hypervisor_type"] = json!("KVM");
    view["hypervisor_version"] = json!(1);
    view["host_ip"] = json!(host.addresses.api.ip().to_string());
    if ctx.at_least(2, 88) {
        view["uptime"] = Value::Null;
        return view;
    }
    let none = Placed::default();
    let placed = ctx.state.compute.placed.get(&host.id).unwrap_or(&none);
    let (ram, disk) = (host.capacity.ram_mib, host.capacity.disk_gib);
    let free_disk = ctx.state.free_disk_gib(host);
    let usage = json!({
        "vcpus": host.capacity.vcpus, "vcpus_used": placed.vcpus,
        "memory_mb": ram, "memory_mb_used": placed.ram_mib,
        "free_ram_mb": ram.saturating_sub(placed.ram_mib),
        "local_gb": disk, "local_gb_used": disk.saturating_sub(free_disk),
        "free_disk_gb": free_disk, "disk_available_least": free_disk,
        "running_vms": placed.servers.len(), "current_workload": 0,
        "cpu_info": if ctx.at_least(2, 28) { json!({}) } else { json!("{}") },
    });
    if let (Value::Object(view), Value::Object(usage)) = (&mut view, usage) {
        view.extend(usage);
    }
    view
}

fn list(ctx: &Context, view: fn(&Context, &Host) -> Value) -> Result<Json, ApiError> {
    let pattern = ctx.query.get("hypervisor_hostname_pattern").unwrap_or_default();
    let hosts = ctx.state.cluster.hosts.values().filter(|host| host.name.contains(pattern));
    let hosts: Vec<(String, &Host)> = hosts.map(|host| (marker(ctx, host), host)).collect();
    let slice = ctx.query.page()?.cut(hosts, |(marker, _)| marker)?;
    let views: Vec<Value> = slice.items.iter().map(|(_, host)| view(ctx, host)).collect();
    let mut body = json!({"hypervisors": views});
    if let Some(links) = slice.links(&ctx.self_url(), &ctx.query) {
        body["hypervisors_links"] = links;
    }
    Ok(Json::ok(body))
}

fn marker(ctx: &Context, host: &Host) -> String {
    match hypervisor_id(ctx, host) {
        Value::String(id) => id,
        other => other.to_string(),
    }
}

async fn hypervisors(ctx: Context) -> Result<Json, ApiError> {
    list(&ctx, short_view)
}

async fn hypervisor_details(ctx: Context) -> Result<Json, ApiError> {
    list(&ctx, full_view)
}

async fn hypervisor(ctx: Context, Path(id): Path<String>) -> Result<Json, ApiError> {
    let mut hosts = ctx.state.cluster.hosts.values();
    let host = hosts.find(|host| marker(&ctx, host) == id);
    let host = host.ok_or_else(|| {
        ApiError::new(ErrorKind::NotFound, format!("Hypervisor with ID '{id}' could not be found."))
    })?;
    Ok(Json::ok(json!({"hypervisor": full_view(&ctx, host)})))
}

fn zone_views(ctx: &Context, with_hosts: bool) -> Json {
    let mut zones: BTreeMap<&str, Vec<&Host>> = BTreeMap::new();
    for host in ctx.state.cluster.hosts.values() {
        zones.entry(&host.availability_zone).or_default().push(host);
    }
    let now = time::micros_naive(ctx.now_ms());
    let host_view = |host: &&Host| {
        let service = json!({
            "nova-compute": {
                "active": !host.disabled, "available": is_up(ctx, host), "updated_at": now,
            },
        });
        (host.name.clone(), service)
    };
    let views: Vec<Value> = zones
        .iter()
        .map(|(name, hosts)| {
            let available = hosts.iter().any(|host| !host.disabled);
            let hosts: BTreeMap<String, Value> = hosts.iter().map(host_view).collect();
            json!({
                "zoneName": name, "zoneState": {"available": available},
                "hosts": if with_hosts { json!(hosts) } else { Value::Null },
            })
        })
        .collect();
    Json::ok(json!({"availabilityZoneInfo": views}))
}

async fn zones(ctx: Context) -> Json {
    zone_views(&ctx, false)
}

async fn zone_details(ctx: Context) -> Json {
    zone_views(&ctx, true)
}

/// Everything is core since v2.1: there are no extensions to list.
async fn extensions(_: Context) -> Json {
    Json::ok(json!({"extensions": []}))
}

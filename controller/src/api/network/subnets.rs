//! `/v2.0/subnets`.

use std::net::IpAddr;

use axum::extract::Path;
use http::StatusCode;
use ipnet::IpNet;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{list, networks};
use crate::api::body::{Body, Json, nullable};
use crate::api::context::Context;
use crate::api::error::{ApiError, ErrorKind};
use crate::api::routes::Routes;
use crate::api::{policy, time};
use crate::ids::{NetworkId, SubnetId};
use crate::state::network::{
    AllocationPool, Gateway, HostRoute, NetworkCommand, NewSubnet, Subnet, SubnetUpdate,
};
use crate::state::{Command, Outcome};

pub(super) fn routes() -> Routes {
    Routes::new(super::PREFIX)
        .get("/v2.0/subnets", policy::SUBNET_LIST, list)
        .post("/v2.0/subnets", policy::SUBNET_CREATE, create)
        .get("/v2.0/subnets/{id}", policy::SUBNET_GET, show)
        .put("/v2.0/subnets/{id}", policy::SUBNET_UPDATE, update)
        .delete("/v2.0/subnets/{id}", policy::SUBNET_DELETE, delete)
}

fn visible(ctx: &Context, subnet: &Subnet) -> bool {
    let network = ctx.state.network.networks.get(&subnet.network_id);
    ctx.sees(&subnet.project_id) || network.is_some_and(|network| network.shared)
}

fn find<'a>(ctx: &'a Context, id: &str) -> Result<&'a Subnet, ApiError> {
    let found = ctx.state.network.subnets.get(id).filter(|subnet| visible(ctx, subnet));
    found.ok_or_else(|| ApiError::not_found("subnet", id))
}

fn find_own<'a>(ctx: &'a Context, id: &str) -> Result<&'a Subnet, ApiError> {
    let subnet = find(ctx, id)?;
    if ctx.sees(&subnet.project_id) {
        return Ok(subnet);
    }
    Err(ApiError::forbidden(format!("Subnet {id} belongs to another project.")))
}

fn view(subnet: &Subnet) -> Value {
    let pool = |pool: &AllocationPool| json!({"start": pool.start, "end": pool.end});
    let route = |route: &HostRoute| json!({"destination": route.destination.to_string(), "nexthop": route.nexthop});
    json!({
        "id": subnet.id,
        "name": subnet.name,
        "description": subnet.description,
        "project_id": subnet.project_id,
        "tenant_id": subnet.project_id,
        "network_id": subnet.network_id,
        "ip_version": if subnet.cidr.addr().is_ipv4() { 4 } else { 6 },
        "cidr": subnet.cidr.to_string(),
        "gateway_ip": subnet.gateway_ip,
        "enable_dhcp": subnet.enable_dhcp,
        "dns_nameservers": subnet.dns_nameservers,
        "host_routes": subnet.host_routes.iter().map(route).collect::<Vec<_>>(),
        "allocation_pools": subnet.allocation_pools.iter().map(pool).collect::<Vec<_>>(),
        "ipv6_ra_mode": null,
        "ipv6_address_mode": null,
        "subnetpool_id": null,
        "service_types": [],
        "tags": subnet.tags,
        "revision_number": subnet.revision_number,
        "created_at": time::seconds(subnet.created_ms),
        "updated_at": time::seconds(subnet.updated_ms),
    })
}

async fn list(ctx: Context) -> Result<Json, ApiError> {
    let subnets = ctx.state.network.subnets.values().filter(|subnet| visible(&ctx, subnet));
    list::list(&ctx, "subnets", subnets.map(view).collect())
}

async fn show(ctx: Context, Path(id): Path<String>) -> Result<Json, ApiError> {
    let subnet = view(find(&ctx, &id)?);
    Ok(list::show(&ctx, "subnet", subnet))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Pool {
    start: IpAddr,
    end: IpAddr,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Route {
    destination: String,
    nexthop: IpAddr,
}

fn pools(asked: Vec<Pool>) -> Vec<AllocationPool> {
    asked.into_iter().map(|pool| AllocationPool { start: pool.start, end: pool.end }).collect()
}

fn routes_of(asked: Vec<Route>) -> Result<Vec<HostRoute>, ApiError> {
    let route = |route: Route| {
        Ok(HostRoute {
            destination: range("destination", &route.destination)?,
            nexthop: route.nexthop,
        })
    };
    asked.into_iter().map(route).collect()
}

/// A range of addresses; a single address is a range of one.
pub(super) fn range(field: &str, text: &str) -> Result<IpNet, ApiError> {
    let single = || text.parse::<IpAddr>().ok().map(IpNet::from);
    text.parse().ok().or_else(single).ok_or_else(|| {
        ApiError::bad_request(format!(
            "Invalid input for {field}. Reason: '{text}' is not a valid IP subnet."
        ))
    })
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Create {
    subnet: CreateSubnet,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CreateSubnet {
    network_id: String,
    cidr: String,
    ip_version: Option<u8>,
    name: Option<String>,
    description: Option<String>,
    #[serde(default, deserialize_with = "nullable")]
    gateway_ip: Option<Option<IpAddr>>,
    enable_dhcp: Option<bool>,
    dns_nameservers: Option<Vec<IpAddr>>,
    host_routes: Option<Vec<Route>>,
    allocation_pools: Option<Vec<Pool>>,
    project_id: Option<String>,
    tenant_id: Option<String>,
}

async fn create(ctx: Context, Body(body): Body<Create>) -> Result<Json, ApiError> {
    let asked = body.subnet;
    let network = networks::find(&ctx, &asked.network_id)?;
    if !ctx.sees(&network.project_id) {
        return Err(ApiError::forbidden(format!(
            "Network {} belongs to another project.",
            network.id
        )));
    }
    let cidr = range("cidr", &asked.cidr)?;
    let version = if cidr.addr().is_ipv4() { 4 } else { 6 };
    if asked.ip_version.is_some_and(|asked| asked != version) {
        return Err(ApiError::bad_request(format!(
            "cidr {cidr} is of IP version {version}; ip_version says otherwise."
        )));
    }
    let command = NetworkCommand::CreateSubnet(Box::new(NewSubnet {
        id: SubnetId::from(ctx.mint()),
        network_id: NetworkId::from(asked.network_id),
        project_id: super::project_of(&ctx, asked.project_id, asked.tenant_id)?,
        name: asked.name.unwrap_or_default(),
        description: asked.description.unwrap_or_default(),
        cidr,
        gateway: match asked.gateway_ip {
            None => Gateway::First,
            Some(None) => Gateway::Absent,
            Some(Some(address)) => Gateway::Address(address),
        },
        enable_dhcp: asked.enable_dhcp.unwrap_or(true),
        dns_nameservers: asked.dns_nameservers.unwrap_or_default(),
        host_routes: routes_of(asked.host_routes.unwrap_or_default())?,
        allocation_pools: pools(asked.allocation_pools.unwrap_or_default()),
        tags: Default::default(),
    }));
    let subnet = changed(&ctx, command).await?;
    Ok(Json::created(json!({"subnet": subnet})))
}

async fn changed(ctx: &Context, command: NetworkCommand) -> Result<Value, ApiError> {
    match ctx.propose(Command::Network(command)).await? {
        Outcome::Subnet(subnet) => Ok(view(&subnet)),
        other => Err(ApiError::new(ErrorKind::Internal, format!("{other:?} is no subnet."))),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Update {
    subnet: UpdateSubnet,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct UpdateSubnet {
    name: Option<String>,
    description: Option<String>,
    #[serde(default, deserialize_with = "nullable")]
    gateway_ip: Option<Option<IpAddr>>,
    enable_dhcp: Option<bool>,
    dns_nameservers: Option<Vec<IpAddr>>,
    host_routes: Option<Vec<Route>>,
    allocation_pools: Option<Vec<Pool>>,
}

async fn update(
    ctx: Context,
    Path(id): Path<String>,
    Body(body): Body<Update>,
) -> Result<Json, ApiError> {
    let id = find_own(&ctx, &id)?.id.clone();
    let asked = body.subnet;
    let command = NetworkCommand::UpdateSubnet(Box::new(SubnetUpdate {
        id,
        name: asked.name,
        description: asked.description,
        gateway_ip: asked.gateway_ip,
        enable_dhcp: asked.enable_dhcp,
        dns_nameservers: asked.dns_nameservers,
        host_routes: asked.host_routes.map(routes_of).transpose()?,
        allocation_pools: asked.allocation_pools.map(pools),
        tags: None,
    }));
    let subnet = changed(&ctx, command).await?;
    Ok(Json::ok(json!({"subnet": subnet})))
}

async fn delete(ctx: Context, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    let id = find_own(&ctx, &id)?.id.clone();
    ctx.propose(Command::Network(NetworkCommand::DeleteSubnet(id))).await?;
    Ok(StatusCode::NO_CONTENT)
}

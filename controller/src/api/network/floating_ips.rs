//! `/v2.0/floatingips` and the port forwardings under them.

use std::net::IpAddr;

use axum::extract::Path;
use http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{list, networks, ports};
use crate::api::body::{Body, Json, nullable};
use crate::api::context::Context;
use crate::api::error::{ApiError, ErrorKind};
use crate::api::routes::Routes;
use crate::api::{policy, time};
use crate::ids::{FloatingIpId, PortForwardingId, PortId, SubnetId};
use crate::state::network::{
    FloatingIp, NetworkCommand, NewFloatingIp, NewPortForwarding, PortForwarding,
};
use crate::state::{Command, Outcome};

const FORWARDINGS: &str = "/v2.0/floatingips/{id}/port_forwardings";
const FORWARDING: &str = "/v2.0/floatingips/{id}/port_forwardings/{forwarding}";

pub(super) fn routes() -> Routes {
    Routes::new(super::PREFIX)
        .get("/v2.0/floatingips", policy::FLOATING_IP_LIST, list)
        .post("/v2.0/floatingips", policy::FLOATING_IP_CREATE, create)
        .get("/v2.0/floatingips/{id}", policy::FLOATING_IP_GET, show)
        .put("/v2.0/floatingips/{id}", policy::FLOATING_IP_UPDATE, update)
        .delete("/v2.0/floatingips/{id}", policy::FLOATING_IP_DELETE, delete)
        .get(FORWARDINGS, policy::PORT_FORWARDING_LIST, list_forwardings)
        .post(FORWARDINGS, policy::PORT_FORWARDING_CREATE, create_forwarding)
        .get(FORWARDING, policy::PORT_FORWARDING_GET, show_forwarding)
        .delete(FORWARDING, policy::PORT_FORWARDING_DELETE, delete_forwarding)
}

fn find<'a>(ctx: &'a Context, id: &str) -> Result<&'a FloatingIp, ApiError> {
    let found = ctx.state.network.floating_ips.get(id);
    found
        .filter(|floating| ctx.sees(&floating.project_id))
        .ok_or_else(|| ApiError::not_found("floating_ip", id))
}

fn view(floating: &FloatingIp) -> Value {
    let used = floating.port_id.is_some() || !floating.port_forwardings.is_empty();
    json!({
        "id": floating.id,
        "project_id": floating.project_id,
        "tenant_id": floating.project_id,
        "description": floating.description,
        "floating_network_id": floating.floating_network_id,
        "floating_ip_address": floating.floating_ip_address,
        "port_id": floating.port_id,
        "fixed_ip_address": floating.fixed_ip_address,
        "router_id": null,
        "status": if used { "ACTIVE" } else { "DOWN" },
        "port_forwardings":
            floating.port_forwardings.values().map(forwarding_view).collect::<Vec<_>>(),
        "tags": floating.tags,
        "revision_number": floating.revision_number,
        "created_at": time::seconds(floating.created_ms),
        "updated_at": time::seconds(floating.updated_ms),
    })
}

fn forwarding_view(forwarding: &PortForwarding) -> Value {
    json!({
        "id": forwarding.id,
        "protocol": forwarding.protocol,
        "external_port": forwarding.external_port,
        "internal_port": forwarding.internal_port,
        "internal_port_id": forwarding.internal_port_id,
        "internal_ip_address": forwarding.internal_ip_address,
        "description": forwarding.description,
    })
}

async fn list(ctx: Context) -> Result<Json, ApiError> {
    let all = ctx.state.network.floating_ips.values();
    let seen = all.filter(|floating| ctx.sees(&floating.project_id));
    list::list(&ctx, "floatingips", seen.map(view).collect())
}

async fn show(ctx: Context, Path(id): Path<String>) -> Result<Json, ApiError> {
    let floating = view(find(&ctx, &id)?);
    Ok(list::show(&ctx, "floatingip", floating))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Create {
    floatingip: CreateFloatingIp,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CreateFloatingIp {
    floating_network_id: String,
    subnet_id: Option<String>,
    floating_ip_address: Option<IpAddr>,
    port_id: Option<String>,
    fixed_ip_address: Option<IpAddr>,
    description: Option<String>,
    project_id: Option<String>,
    tenant_id: Option<String>,
}

async fn create(ctx: Context, Body(body): Body<Create>) -> Result<Json, ApiError> {
    let asked = body.floatingip;
    let network = networks::find(&ctx, &asked.floating_network_id)?.id.clone();
    let port_id = asked.port_id.map(|id| owned_port(&ctx, &id)).transpose()?;
    refuse_whole_port(&port_id)?;
    super::admin_only(&ctx, &asked.floating_ip_address, "create_floatingip:floating_ip_address")?;
    let command = NetworkCommand::CreateFloatingIp(Box::new(NewFloatingIp {
        id: FloatingIpId::from(ctx.mint()),
        project_id: super::project_of(&ctx, asked.project_id, asked.tenant_id)?,
        floating_network_id: network,
        subnet_id: asked.subnet_id.map(SubnetId::from),
        floating_ip_address: asked.floating_ip_address,
        port_id,
        fixed_ip_address: asked.fixed_ip_address,
        description: asked.description.unwrap_or_default(),
        tags: Default::default(),
    }));
    let floating = changed(&ctx, command).await?;
    Ok(Json::created(json!({"floatingip": floating})))
}

fn owned_port(ctx: &Context, id: &str) -> Result<PortId, ApiError> {
    ports::find(ctx, id).map(|port| port.id.clone())
}

/// The uplink is a user-mode one: an address is a loopback address, and only the ports that
/// were forwarded lead anywhere.
fn refuse_whole_port(port: &Option<PortId>) -> Result<(), ApiError> {
    match port {
        None => Ok(()),
        Some(port) => Err(ApiError::bad_request(format!(
            "port_id is {port}: the uplink of this cloud forwards single ports; POST to \
             port_forwardings of the floating IP instead."
        ))),
    }
}

async fn changed(ctx: &Context, command: NetworkCommand) -> Result<Value, ApiError> {
    match ctx.propose(Command::Network(command)).await? {
        Outcome::FloatingIp(floating) => Ok(view(&floating)),
        Outcome::PortForwarding(forwarding) => Ok(forwarding_view(&forwarding)),
        other => Err(ApiError::new(ErrorKind::Internal, format!("{other:?} is no floating IP."))),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Update {
    floatingip: UpdateFloatingIp,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct UpdateFloatingIp {
    #[serde(default, deserialize_with = "nullable")]
    port_id: Option<Option<String>>,
    fixed_ip_address: Option<IpAddr>,
    description: Option<String>,
}

async fn update(
    ctx: Context,
    Path(id): Path<String>,
    Body(body): Body<Update>,
) -> Result<Json, ApiError> {
    let id = find(&ctx, &id)?.id.clone();
    let asked = body.floatingip;
    let port_id = match asked.port_id {
        None => None,
        Some(None) => Some(None),
        Some(Some(port)) => Some(Some(owned_port(&ctx, &port)?)),
    };
    refuse_whole_port(&port_id.clone().flatten())?;
    let command = NetworkCommand::UpdateFloatingIp {
        id,
        port_id,
        fixed_ip_address: asked.fixed_ip_address,
        description: asked.description,
        tags: None,
    };
    let floating = changed(&ctx, command).await?;
    Ok(Json::ok(json!({"floatingip": floating})))
}

async fn delete(ctx: Context, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    let id = find(&ctx, &id)?.id.clone();
    ctx.propose(Command::Network(NetworkCommand::DeleteFloatingIp(id))).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn list_forwardings(ctx: Context, Path(id): Path<String>) -> Result<Json, ApiError> {
    let floating = find(&ctx, &id)?;
    let views = floating.port_forwardings.values().map(forwarding_view).collect();
    list::list(&ctx, "port_forwardings", views)
}

fn find_forwarding<'a>(
    ctx: &'a Context,
    id: &str,
    forwarding: &str,
) -> Result<(&'a FloatingIp, &'a PortForwarding), ApiError> {
    let floating = find(ctx, id)?;
    let found = floating.port_forwardings.get(forwarding);
    let found = found.ok_or_else(|| ApiError::not_found("port_forwarding", forwarding))?;
    Ok((floating, found))
}

async fn show_forwarding(
    ctx: Context,
    Path((id, forwarding)): Path<(String, String)>,
) -> Result<Json, ApiError> {
    let (_, forwarding) = find_forwarding(&ctx, &id, &forwarding)?;
    Ok(list::show(&ctx, "port_forwarding", forwarding_view(forwarding)))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CreateForwarding {
    port_forwarding: NewForwarding,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NewForwarding {
    protocol: String,
    external_port: u16,
    internal_port: u16,
    internal_port_id: String,
    internal_ip_address: Option<IpAddr>,
    description: Option<String>,
}

async fn create_forwarding(
    ctx: Context,
    Path(id): Path<String>,
    Body(body): Body<CreateForwarding>,
) -> Result<Json, ApiError> {
    let asked = body.port_forwarding;
    let command = NetworkCommand::CreatePortForwarding(Box::new(NewPortForwarding {
        id: PortForwardingId::from(ctx.mint()),
        floating_ip_id: find(&ctx, &id)?.id.clone(),
        protocol: asked.protocol,
        external_port: asked.external_port,
        internal_port_id: owned_port(&ctx, &asked.internal_port_id)?,
        internal_ip_address: asked.internal_ip_address,
        internal_port: asked.internal_port,
        description: asked.description.unwrap_or_default(),
    }));
    let forwarding = changed(&ctx, command).await?;
    Ok(Json::created(json!({"port_forwarding": forwarding})))
}

async fn delete_forwarding(
    ctx: Context,
    Path((id, forwarding)): Path<(String, String)>,
) -> Result<StatusCode, ApiError> {
    let (floating, forwarding) = find_forwarding(&ctx, &id, &forwarding)?;
    let command = NetworkCommand::DeletePortForwarding {
        floating_ip_id: floating.id.clone(),
        id: forwarding.id.clone(),
    };
    ctx.propose(Command::Network(command)).await?;
    Ok(StatusCode::NO_CONTENT)
}

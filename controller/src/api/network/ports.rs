//! `/v2.0/ports`.

use std::collections::BTreeSet;
use std::net::IpAddr;

use axum::extract::Path;
use http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};

use super::subnets::range;
use super::{list, networks, security_groups};
use crate::api::body::{Body, Json};
use crate::api::context::Context;
use crate::api::error::{ApiError, ErrorKind};
use crate::api::routes::Routes;
use crate::api::{policy, time};
use crate::ids::{NetworkId, PortId, SecurityGroupId, SubnetId};
use crate::state::network::{
    AddressPair, FixedIp, FixedIpRequest, NetworkCommand, NewPort, Port, PortUpdate,
};
use crate::state::{Command, Outcome, State};

pub(super) fn routes() -> Routes {
    Routes::new(super::PREFIX)
        .get("/v2.0/ports", policy::PORT_LIST, list)
        .post("/v2.0/ports", policy::PORT_CREATE, create)
        .get("/v2.0/ports/{id}", policy::PORT_GET, show)
        .put("/v2.0/ports/{id}", policy::PORT_UPDATE, update)
        .delete("/v2.0/ports/{id}", policy::PORT_DELETE, delete)
}

/// The port, if it is the caller's to see.
pub(super) fn find<'a>(ctx: &'a Context, id: &str) -> Result<&'a Port, ApiError> {
    let found = ctx.state.network.ports.get(id).filter(|port| ctx.sees(&port.project_id));
    found.map(AsRef::as_ref).ok_or_else(|| ApiError::not_found("port", id))
}

fn view(ctx: &Context, state: &State, port: &Port) -> Value {
    let fixed =
        |fixed: &FixedIp| json!({"subnet_id": fixed.subnet_id, "ip_address": fixed.ip_address});
    let pair = |pair: &AddressPair| {
        let mac = pair.mac_address.as_ref().unwrap_or(&port.mac_address);
        json!({"ip_address": pair.ip_address.to_string(), "mac_address": mac})
    };
    let mut view = json!({
        "id": port.id,
        "name": port.name,
        "description": port.description,
        "project_id": port.project_id,
        "tenant_id": port.project_id,
        "network_id": port.network_id,
        "mac_address": port.mac_address,
        "admin_state_up": port.admin_state_up,
        "status": port.status.as_str(),
        "device_id": port.device_id,
        "device_owner": port.device_owner,
        "fixed_ips": port.fixed_ips.iter().map(fixed).collect::<Vec<_>>(),
        "security_groups": port.security_groups,
        "port_security_enabled": port.port_security_enabled,
        "allowed_address_pairs":
            port.allowed_address_pairs.iter().map(pair).collect::<Vec<_>>(),
        "extra_dhcp_opts": [],
        "binding:vnic_type": "normal",
        "tags": port.tags,
        "revision_number": port.revision_number,
        "created_at": time::seconds(port.created_ms),
        "updated_at": time::seconds(port.updated_ms),
    });
    if ctx.is_admin() {
        let host = port.host.and_then(|host| state.cluster.hosts.get(&host));
        view["binding:host_id"] = json!(host.map_or("", |host| host.name.as_str()));
        view["binding:vif_type"] = json!(if host.is_some() { "trine" } else { "unbound" });
        view["binding:vif_details"] = json!({});
        view["binding:profile"] = json!({});
    }
    view
}

async fn list(ctx: Context) -> Result<Json, ApiError> {
    let ports = ctx.state.network.ports.values().filter(|port| ctx.sees(&port.project_id));
    list::list(&ctx, "ports", ports.map(|port| view(&ctx, &ctx.state, port)).collect())
}

async fn show(ctx: Context, Path(id): Path<String>) -> Result<Json, ApiError> {
    let port = view(&ctx, &ctx.state, find(&ctx, &id)?);
    Ok(list::show(&ctx, "port", port))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AskedAddress {
    subnet_id: Option<String>,
    ip_address: Option<IpAddr>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AskedPair {
    ip_address: String,
    mac_address: Option<String>,
}

fn addresses(asked: Vec<AskedAddress>) -> Vec<FixedIpRequest> {
    let request = |asked: AskedAddress| FixedIpRequest {
        subnet_id: asked.subnet_id.map(SubnetId::from),
        ip_address: asked.ip_address,
    };
    asked.into_iter().map(request).collect()
}

fn pairs(asked: Vec<AskedPair>) -> Result<Vec<AddressPair>, ApiError> {
    let pair = |asked: AskedPair| {
        Ok(AddressPair {
            ip_address: range("allowed_address_pairs", &asked.ip_address)?,
            mac_address: asked.mac_address,
        })
    };
    asked.into_iter().map(pair).collect()
}

/// Groups that exist and that the caller may use.
fn groups(ctx: &Context, asked: Vec<String>) -> Result<BTreeSet<SecurityGroupId>, ApiError> {
    let group = |id: String| security_groups::find(ctx, &id).map(|group| group.id.clone());
    asked.into_iter().map(group).collect()
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Create {
    port: CreatePort,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CreatePort {
    network_id: String,
    name: Option<String>,
    description: Option<String>,
    admin_state_up: Option<bool>,
    mac_address: Option<String>,
    fixed_ips: Option<Vec<AskedAddress>>,
    port_security_enabled: Option<bool>,
    security_groups: Option<Vec<String>>,
    allowed_address_pairs: Option<Vec<AskedPair>>,
    device_id: Option<String>,
    device_owner: Option<String>,
    project_id: Option<String>,
    tenant_id: Option<String>,
    #[serde(rename = "binding:vnic_type")]
    vnic_type: Option<String>,
}

async fn create(ctx: Context, Body(body): Body<Create>) -> Result<Json, ApiError> {
    let asked = body.port;
    let network = networks::find(&ctx, &asked.network_id)?;
    if network.external {
        ctx.require_admin("create_port:external_network")?;
    }
    if let Some(kind) = asked.vnic_type.filter(|kind| kind != "normal") {
        return Err(ApiError::bad_request(format!(
            "binding:vnic_type is {kind:?}; ports are of type \"normal\"."
        )));
    }
    let command = NetworkCommand::CreatePort(Box::new(NewPort {
        id: PortId::from(ctx.mint()),
        network_id: NetworkId::from(asked.network_id),
        project_id: super::project_of(&ctx, asked.project_id, asked.tenant_id)?,
        name: asked.name.unwrap_or_default(),
        description: asked.description.unwrap_or_default(),
        admin_state_up: asked.admin_state_up.unwrap_or(true),
        mac_address: asked.mac_address,
        fixed_ips: asked.fixed_ips.map(addresses),
        port_security_enabled: asked.port_security_enabled,
        security_groups: asked.security_groups.map(|ids| groups(&ctx, ids)).transpose()?,
        allowed_address_pairs: pairs(asked.allowed_address_pairs.unwrap_or_default())?,
        device_id: asked.device_id.unwrap_or_default(),
        device_owner: asked.device_owner.unwrap_or_default(),
        tags: Default::default(),
    }));
    let port = changed(&ctx, command).await?;
    Ok(Json::created(json!({"port": port})))
}

async fn changed(ctx: &Context, command: NetworkCommand) -> Result<Value, ApiError> {
    match ctx.propose(Command::Network(command)).await? {
        Outcome::Port(port) => Ok(view(ctx, &ctx.state, &port)),
        other => Err(ApiError::new(ErrorKind::Internal, format!("{other:?} is no port."))),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Update {
    port: UpdatePort,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct UpdatePort {
    name: Option<String>,
    description: Option<String>,
    admin_state_up: Option<bool>,
    fixed_ips: Option<Vec<AskedAddress>>,
    port_security_enabled: Option<bool>,
    security_groups: Option<Vec<String>>,
    allowed_address_pairs: Option<Vec<AskedPair>>,
    device_id: Option<String>,
    device_owner: Option<String>,
}

async fn update(
    ctx: Context,
    Path(id): Path<String>,
    Body(body): Body<Update>,
) -> Result<Json, ApiError> {
    let id = find(&ctx, &id)?.id.clone();
    let asked = body.port;
    let command = NetworkCommand::UpdatePort(Box::new(PortUpdate {
        id,
        name: asked.name,
        description: asked.description,
        admin_state_up: asked.admin_state_up,
        fixed_ips: asked.fixed_ips.map(addresses),
        port_security_enabled: asked.port_security_enabled,
        security_groups: asked.security_groups.map(|ids| groups(&ctx, ids)).transpose()?,
        allowed_address_pairs: asked.allowed_address_pairs.map(pairs).transpose()?,
        device_id: asked.device_id,
        device_owner: asked.device_owner,
        tags: None,
    }));
    let port = changed(&ctx, command).await?;
    Ok(Json::ok(json!({"port": port})))
}

async fn delete(ctx: Context, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    let id = find(&ctx, &id)?.id.clone();
    ctx.propose(Command::Network(NetworkCommand::DeletePort(id))).await?;
    Ok(StatusCode::NO_CONTENT)
}

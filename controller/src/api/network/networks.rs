//! `/v2.0/networks`.

use axum::extract::Path;
use http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};

use super::list;
use crate::api::body::{Body, Json};
use crate::api::context::Context;
use crate::api::error::{ApiError, ErrorKind};
use crate::api::routes::Routes;
use crate::api::{policy, time};
use crate::ids::NetworkId;
use crate::state::network::{Network, NetworkCommand, NewNetwork};
use crate::state::{Command, Outcome, State};

pub(super) fn routes() -> Routes {
    Routes::new(super::PREFIX)
        .get("/v2.0/networks", policy::NETWORK_LIST, list)
        .post("/v2.0/networks", policy::NETWORK_CREATE, create)
        .get("/v2.0/networks/{id}", policy::NETWORK_GET, show)
        .put("/v2.0/networks/{id}", policy::NETWORK_UPDATE, update)
        .delete("/v2.0/networks/{id}", policy::NETWORK_DELETE, delete)
}

/// The network, if the caller may see it: its project's, a shared or an external one.
pub(super) fn find<'a>(ctx: &'a Context, id: &str) -> Result<&'a Network, ApiError> {
    let found = ctx.state.network.networks.get(id).filter(|network| visible(ctx, network));
    found.ok_or_else(|| ApiError::not_found("network", id))
}

/// The network, if the caller may change it.
fn find_own<'a>(ctx: &'a Context, id: &str) -> Result<&'a Network, ApiError> {
    let network = find(ctx, id)?;
    if ctx.sees(&network.project_id) {
        return Ok(network);
    }
    Err(ApiError::forbidden(format!("Network {id} belongs to another project.")))
}

pub(super) fn visible(ctx: &Context, network: &Network) -> bool {
    ctx.sees(&network.project_id) || network.shared || network.external
}

fn view(ctx: &Context, state: &State, network: &Network) -> Value {
    let subnets = state.network.subnets.values();
    let subnets = subnets.filter(|subnet| subnet.network_id == network.id);
    let mut view = json!({
        "id": network.id,
        "name": network.name,
        "description": network.description,
        "project_id": network.project_id,
        "tenant_id": network.project_id,
        "admin_state_up": network.admin_state_up,
        "status": "ACTIVE",
        "mtu": network.mtu,
        "shared": network.shared,
        "router:external": network.external,
        "port_security_enabled": network.port_security_enabled,
        "subnets": subnets.map(|subnet| subnet.id.to_string()).collect::<Vec<_>>(),
        "tags": network.tags,
        "revision_number": network.revision_number,
        "created_at": time::seconds(network.created_ms),
        "updated_at": time::seconds(network.updated_ms),
    });
    if ctx.is_admin() {
        let kind = if network.vni.is_some() { "vxlan" } else { "local" };
        view["provider:network_type"] = json!(kind);
        view["provider:physical_network"] = Value::Null;
        view["provider:segmentation_id"] = json!(network.vni);
    }
    view
}

async fn list(ctx: Context) -> Result<Json, ApiError> {
    let networks = ctx.state.network.networks.values().filter(|network| visible(&ctx, network));
    let views = networks.map(|network| view(&ctx, &ctx.state, network)).collect();
    list::list(&ctx, "networks", views)
}

async fn show(ctx: Context, Path(id): Path<String>) -> Result<Json, ApiError> {
    let network = view(&ctx, &ctx.state, find(&ctx, &id)?);
    Ok(list::show(&ctx, "network", network))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Create {
    network: CreateNetwork,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CreateNetwork {
    name: Option<String>,
    description: Option<String>,
    admin_state_up: Option<bool>,
    shared: Option<bool>,
    #[serde(rename = "router:external")]
    external: Option<bool>,
    port_security_enabled: Option<bool>,
    mtu: Option<u16>,
    project_id: Option<String>,
    tenant_id: Option<String>,
    #[serde(rename = "provider:network_type")]
    network_type: Option<String>,
}

async fn create(ctx: Context, Body(body): Body<Create>) -> Result<Json, ApiError> {
    let asked = body.network;
    super::admin_only(&ctx, &asked.shared.filter(|shared| *shared), "create_network:shared")?;
    let external = asked.external.unwrap_or(false);
    super::admin_only(&ctx, &external.then_some(()), "create_network:router:external")?;
    super::admin_only(&ctx, &asked.network_type, "create_network:provider:network_type")?;
    if let Some(kind) = asked.network_type.filter(|kind| kind != "vxlan") {
        return Err(ApiError::bad_request(format!(
            "provider:network_type is {kind:?}; networks are of type \"vxlan\"."
        )));
    }
    let command = NetworkCommand::CreateNetwork(Box::new(NewNetwork {
        id: NetworkId::from(ctx.mint()),
        project_id: super::project_of(&ctx, asked.project_id, asked.tenant_id)?,
        name: asked.name.unwrap_or_default(),
        description: asked.description.unwrap_or_default(),
        admin_state_up: asked.admin_state_up.unwrap_or(true),
        shared: asked.shared.unwrap_or(false),
        external,
        port_security_enabled: asked.port_security_enabled.unwrap_or(true),
        mtu: asked.mtu.filter(|mtu| *mtu != 0),
        tags: Default::default(),
    }));
    let network = changed(&ctx, command).await?;
    Ok(Json::created(json!({"network": network})))
}

async fn changed(ctx: &Context, command: NetworkCommand) -> Result<Value, ApiError> {
    match ctx.propose(Command::Network(command)).await? {
        Outcome::Network(network) => Ok(view(ctx, &ctx.fresh().await?, &network)),
        other => Err(ApiError::new(ErrorKind::Internal, format!("{other:?} is no network."))),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Update {
    network: UpdateNetwork,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct UpdateNetwork {
    name: Option<String>,
    description: Option<String>,
    admin_state_up: Option<bool>,
    shared: Option<bool>,
    port_security_enabled: Option<bool>,
    mtu: Option<u16>,
}

async fn update(
    ctx: Context,
    Path(id): Path<String>,
    Body(body): Body<Update>,
) -> Result<Json, ApiError> {
    let id = find_own(&ctx, &id)?.id.clone();
    let asked = body.network;
    super::admin_only(&ctx, &asked.shared, "update_network:shared")?;
    let command = NetworkCommand::UpdateNetwork {
        id,
        name: asked.name,
        description: asked.description,
        admin_state_up: asked.admin_state_up,
        shared: asked.shared,
        port_security_enabled: asked.port_security_enabled,
        mtu: asked.mtu,
        tags: None,
    };
    let network = changed(&ctx, command).await?;
    Ok(Json::ok(json!({"network": network})))
}

async fn delete(ctx: Context, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    let id = find_own(&ctx, &id)?.id.clone();
    ctx.propose(Command::Network(NetworkCommand::DeleteNetwork(id))).await?;
    Ok(StatusCode::NO_CONTENT)
}

//! What hangs on a server: metadata, tags, addresses, interfaces, security groups.

use std::collections::{BTreeMap, BTreeSet};

use axum::extract::Path;
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};

use super::super::body::{Body, Json};
use super::super::context::Context;
use super::super::error::{ApiError, ErrorKind};
use super::super::policy;
use super::super::routes::Routes;
use super::find_server;
use super::server_create::{check_metadata, check_tags};
use super::server_view::addresses;
use crate::ids::ServerId;
use crate::state::Command;
use crate::state::compute::ComputeCommand;
use crate::state::network::Port;

pub(super) fn routes() -> Routes {
    const METADATA: &str = "/v2.1/servers/{id}/metadata";
    const ITEM: &str = "/v2.1/servers/{id}/metadata/{key}";
    const TAGS: &str = "/v2.1/servers/{id}/tags";
    const TAG: &str = "/v2.1/servers/{id}/tags/{tag}";
    Routes::new(super::PREFIX)
        .get(METADATA, policy::SERVER_METADATA_GET, metadata)
        .put(METADATA, policy::SERVER_METADATA_CHANGE, replace_metadata)
        .post(METADATA, policy::SERVER_METADATA_CHANGE, merge_metadata)
        .get(ITEM, policy::SERVER_METADATA_GET, metadata_item)
        .put(ITEM, policy::SERVER_METADATA_CHANGE, set_metadata_item)
        .delete(ITEM, policy::SERVER_METADATA_CHANGE, drop_metadata_item)
        .get(TAGS, policy::SERVER_TAGS_GET, tags)
        .put(TAGS, policy::SERVER_TAGS_CHANGE, replace_tags)
        .delete(TAGS, policy::SERVER_TAGS_CHANGE, drop_tags)
        .get(TAG, policy::SERVER_TAGS_GET, has_tag)
        .put(TAG, policy::SERVER_TAGS_CHANGE, add_tag)
        .delete(TAG, policy::SERVER_TAGS_CHANGE, drop_tag)
        .get("/v2.1/servers/{id}/ips", policy::SERVER_ADDRESSES, ips)
        .get("/v2.1/servers/{id}/ips/{network}", policy::SERVER_ADDRESSES, network_ips)
        .get("/v2.1/servers/{id}/os-interface", policy::INTERFACE_LIST, interfaces)
        .get("/v2.1/servers/{id}/os-interface/{port}", policy::INTERFACE_GET, interface)
        .get("/v2.1/servers/{id}/os-security-groups", policy::SERVER_GROUPS_GET, groups)
}

type Metadata = BTreeMap<String, String>;

#[derive(Deserialize)]
struct MetadataRequest {
    metadata: Metadata,
}

#[derive(Deserialize)]
struct ItemRequest {
    meta: Metadata,
}

#[derive(Deserialize)]
struct TagsRequest {
    tags: BTreeSet<String>,
}

async fn change(
    ctx: &Context,
    id: &ServerId,
    metadata: Option<Metadata>,
    tags: Option<BTreeSet<String>>,
) -> Result<(), ApiError> {
    let command = ComputeCommand::UpdateServer {
        id: id.clone(),
        name: None,
        description: None,
        hostname: None,
        metadata,
        tags,
    };
    ctx.propose(Command::Compute(command)).await?;
    Ok(())
}

async fn set_metadata(ctx: &Context, id: &ServerId, all: Metadata) -> Result<Metadata, ApiError> {
    check_metadata(&all)?;
    change(ctx, id, Some(all.clone()), None).await?;
    Ok(all)
}

async fn metadata(ctx: Context, Path(id): Path<String>) -> Result<Json, ApiError> {
    Ok(Json::ok(json!({"metadata": find_server(&ctx, &id)?.metadata})))
}

async fn replace_metadata(
    ctx: Context,
    Path(id): Path<String>,
    Body(request): Body<MetadataRequest>,
) -> Result<Json, ApiError> {
    let server = find_server(&ctx, &id)?;
    let all = set_metadata(&ctx, &server.id, request.metadata).await?;
    Ok(Json::ok(json!({"metadata": all})))
}

async fn merge_metadata(
    ctx: Context,
    Path(id): Path<String>,
    Body(request): Body<MetadataRequest>,
) -> Result<Json, ApiError> {
    let server = find_server(&ctx, &id)?;
    let mut all = server.metadata.clone();
    all.extend(request.metadata);
    let all = set_metadata(&ctx, &server.id, all).await?;
    Ok(Json::ok(json!({"metadata": all})))
}

type Part = Path<(String, String)>;

fn no_item() -> ApiError {
    ApiError::new(ErrorKind::NotFound, "Metadata item was not found")
}

async fn metadata_item(ctx: Context, Path((id, key)): Part) -> Result<Json, ApiError> {
    let server = find_server(&ctx, &id)?;
    let value = server.metadata.get(&key).ok_or_else(no_item)?;
    Ok(Json::ok(json!({"meta": {key: value}})))
}

async fn set_metadata_item(
    ctx: Context,
    Path((id, key)): Part,
    Body(request): Body<ItemRequest>,
) -> Result<Json, ApiError> {
    if request.meta.len() != 1 || !request.meta.contains_key(&key) {
        return Err(ApiError::bad_request("Request body and URI mismatch"));
    }
    let server = find_server(&ctx, &id)?;
    let mut all = server.metadata.clone();
    all.extend(request.meta.clone());
    set_metadata(&ctx, &server.id, all).await?;
    Ok(Json::ok(json!({"meta": request.meta})))
}

async fn drop_metadata_item(ctx: Context, Path((id, key)): Part) -> Result<StatusCode, ApiError> {
    let server = find_server(&ctx, &id)?;
    let mut all = server.metadata.clone();
    all.remove(&key).ok_or_else(no_item)?;
    set_metadata(&ctx, &server.id, all).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn tags(ctx: Context, Path(id): Path<String>) -> Result<Json, ApiError> {
    ctx.require_version(2, 26)?;
    Ok(Json::ok(json!({"tags": find_server(&ctx, &id)?.tags})))
}

async fn set_tags(ctx: &Context, id: &ServerId, all: BTreeSet<String>) -> Result<(), ApiError> {
    check_tags(&all)?;
    change(ctx, id, None, Some(all)).await
}

async fn replace_tags(
    ctx: Context,
    Path(id): Path<String>,
    Body(request): Body<TagsRequest>,
) -> Result<Json, ApiError> {
    ctx.require_version(2, 26)?;
    let server = find_server(&ctx, &id)?;
    set_tags(&ctx, &server.id, request.tags.clone()).await?;
    Ok(Json::ok(json!({"tags": request.tags})))
}

async fn drop_tags(ctx: Context, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    ctx.require_version(2, 26)?;
    let server = find_server(&ctx, &id)?;
    set_tags(&ctx, &server.id, BTreeSet::new()).await?;
    Ok(StatusCode::NO_CONTENT)
}

fn no_tag(tag: &str) -> ApiError {
    ApiError::new(ErrorKind::NotFound, format!("The server has no tag {tag:?}."))
}

async fn has_tag(ctx: Context, Path((id, tag)): Part) -> Result<StatusCode, ApiError> {
    ctx.require_version(2, 26)?;
    let has = find_server(&ctx, &id)?.tags.contains(&tag);
    if has { Ok(StatusCode::NO_CONTENT) } else { Err(no_tag(&tag)) }
}

async fn add_tag(ctx: Context, Path((id, tag)): Part) -> Result<Response, ApiError> {
    ctx.require_version(2, 26)?;
    let server = find_server(&ctx, &id)?;
    let mut all = server.tags.clone();
    let status = if all.insert(tag) { StatusCode::CREATED } else { StatusCode::NO_CONTENT };
    set_tags(&ctx, &server.id, all).await?;
    Ok(status.into_response())
}

async fn drop_tag(ctx: Context, Path((id, tag)): Part) -> Result<StatusCode, ApiError> {
    ctx.require_version(2, 26)?;
    let server = find_server(&ctx, &id)?;
    let mut all = server.tags.clone();
    if !all.remove(&tag) {
        return Err(no_tag(&tag));
    }
    set_tags(&ctx, &server.id, all).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn ips(ctx: Context, Path(id): Path<String>) -> Result<Json, ApiError> {
    let server = find_server(&ctx, &id)?;
    Ok(Json::ok(json!({"addresses": plain_addresses(&ctx, &server)})))
}

/// Addresses without the extended fields, which `/ips` doesn't show.
fn plain_addresses(ctx: &Context, server: &crate::state::compute::Server) -> Value {
    let mut all = addresses(&ctx.state, server);
    for list in all.as_object_mut().into_iter().flat_map(|networks| networks.values_mut()) {
        for entry in list.as_array_mut().into_iter().flatten() {
            if let Value::Object(fields) = entry {
                fields.retain(|key, _| key == "addr" || key == "version");
            }
        }
    }
    all
}

async fn network_ips(ctx: Context, Path((id, network)): Part) -> Result<Json, ApiError> {
    let server = find_server(&ctx, &id)?;
    let all = plain_addresses(&ctx, &server);
    let list = all.get(&network).ok_or_else(|| {
        ApiError::new(ErrorKind::NotFound, "Instance is not a member of specified network")
    })?;
    Ok(Json::ok(json!({network: list})))
}

fn interface_view(ctx: &Context, port: &Port, tag: Option<&str>) -> Value {
    let fixed: Vec<Value> = port
        .fixed_ips
        .iter()
        .map(|fixed| json!({"subnet_id": fixed.subnet_id, "ip_address": fixed.ip_address}))
        .collect();
    let mut view = json!({
        "port_id": port.id, "net_id": port.network_id, "mac_addr": port.mac_address,
        "port_state": port.status.as_str(), "fixed_ips": fixed,
    });
    if ctx.at_least(2, 70) {
        view["tag"] = json!(tag);
    }
    view
}

async fn interfaces(ctx: Context, Path(id): Path<String>) -> Result<Json, ApiError> {
    let server = find_server(&ctx, &id)?;
    let views: Vec<Value> = server
        .ports
        .iter()
        .filter_map(|own| {
            let port = ctx.state.network.ports.get(&own.port_id)?;
            Some(interface_view(&ctx, port, own.tag.as_deref()))
        })
        .collect();
    Ok(Json::ok(json!({"interfaceAttachments": views})))
}

async fn interface(ctx: Context, Path((id, port)): Part) -> Result<Json, ApiError> {
    let server = find_server(&ctx, &id)?;
    let own = server.ports.iter().find(|own| own.port_id.as_str() == port);
    let found = own.and_then(|own| Some((own, ctx.state.network.ports.get(&own.port_id)?)));
    let (own, port) = found.ok_or_else(|| ApiError::not_found("port", &port))?;
    let view = interface_view(&ctx, port, own.tag.as_deref());
    Ok(Json::ok(json!({"interfaceAttachment": view})))
}

async fn groups(ctx: Context, Path(id): Path<String>) -> Result<Json, ApiError> {
    let server = find_server(&ctx, &id)?;
    let ports = server.ports.iter().filter_map(|own| ctx.state.network.ports.get(&own.port_id));
    let ids: BTreeSet<_> = ports.flat_map(|port| port.security_groups.iter()).collect();
    let views: Vec<Value> = ids
        .into_iter()
        .filter_map(|id| ctx.state.network.security_groups.get(id))
        .map(|group| {
            json!({
                "id": group.id, "name": group.name, "description": group.description,
                "tenant_id": group.project_id, "rules": [],
            })
        })
        .collect();
    Ok(Json::ok(json!({"security_groups": views})))
}

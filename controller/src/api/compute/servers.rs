//! `/v2.1/servers`: list, show, create, update, delete.

use std::cmp::Ordering;
use std::sync::Arc;

use axum::extract::Path;
use http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};

use super::super::body::{Body, Json, nullable};
use super::super::context::Context;
use super::super::error::ApiError;
use super::super::routes::Routes;
use super::super::{policy, time};
use super::server_create;
use super::server_view::{server_view, short_view, status};
use super::{check_name, find_server};
use crate::ids::ProjectId;
use crate::state::Command;
use crate::state::compute::{ComputeCommand, Server, TaskState};

pub(super) fn routes() -> Routes {
    Routes::new(super::PREFIX)
        .get("/v2.1/servers", policy::SERVER_LIST, list)
        .post("/v2.1/servers", policy::SERVER_CREATE, server_create::create)
        .get("/v2.1/servers/detail", policy::SERVER_DETAIL, detail)
        .get("/v2.1/servers/{id}", policy::SERVER_GET, show)
        .put("/v2.1/servers/{id}", policy::SERVER_UPDATE, update)
        .delete("/v2.1/servers/{id}", policy::SERVER_DELETE, remove)
}

#[derive(Deserialize)]
struct UpdateRequest {
    server: UpdateFields,
}

#[derive(Deserialize)]
struct UpdateFields {
    name: Option<String>,
    #[serde(default, deserialize_with = "nullable")]
    description: Option<Option<String>>,
    hostname: Option<String>,
}

/// A filter as Nova's database applies it: a regular expression there; here its usual
/// forms, a part of the text or, with `^` and `$`, its begin and end.
fn matches_text(pattern: &str, text: &str) -> bool {
    let (pattern, from_start) = pattern.strip_prefix('^').map_or((pattern, false), |p| (p, true));
    let (pattern, to_end) = pattern.strip_suffix('$').map_or((pattern, false), |p| (p, true));
    let pattern = pattern.replace('\\', "").to_lowercase();
    let text = text.to_lowercase();
    match (from_start, to_end) {
        (true, true) => text == pattern,
        (true, false) => text.starts_with(&pattern),
        (false, true) => text.ends_with(&pattern),
        (false, false) => text.contains(&pattern),
    }
}

/// The values of a filter; the client writes `None` for what it doesn't ask for.
fn wanted<'a>(ctx: &'a Context, name: &'a str) -> impl Iterator<Item = &'a str> {
    ctx.query.get_all(name).filter(|value| !value.is_empty() && *value != "None")
}

fn passes(ctx: &Context, server: &Server) -> bool {
    let text = |name: &str, value: &str| wanted(ctx, name).all(|p| matches_text(p, value));
    let exact = |name: &str, value: &str| {
        let mut given = wanted(ctx, name).peekable();
        given.peek().is_none() || given.any(|one| one.eq_ignore_ascii_case(value))
    };
    let image = server.image_id.as_ref().map_or("", |id| id.as_str());
    text("name", &server.name)
        && exact("status", status(server))
        && exact("flavor", server.flavor.id.as_str())
        && exact("image", image)
        && exact("uuid", server.id.as_str())
        && exact("reservation_id", &server.reservation_id)
        && exact("user_id", server.user_id.as_str())
        && exact("key_name", server.key_name.as_deref().unwrap_or_default())
        && exact("vm_state", server.vm_state.as_str())
        && exact("task_state", server.task_state.map_or("", TaskState::as_str))
        && text("hostname", &server.hostname)
        && passes_place(ctx, server)
        && passes_tags(ctx, server)
        && ["ip", "ip6"].iter().all(|name| passes_address(ctx, server, name))
}

fn passes_place(ctx: &Context, server: &Server) -> bool {
    let host = server.host.and_then(|id| ctx.state.cluster.hosts.get(&id));
    let zone = host.map(|host| host.availability_zone.as_str());
    let zone = zone.or(server.availability_zone.as_deref()).unwrap_or_default();
    let name = host.map_or("", |host| host.name.as_str());
    wanted(ctx, "availability_zone").all(|one| one == zone)
        && (!ctx.is_admin() || wanted(ctx, "host").all(|one| one == name))
}

fn passes_tags(ctx: &Context, server: &Server) -> bool {
    let has = |list: &str, all: bool| {
        let mut tags = list.split(',').map(|tag| server.tags.contains(tag));
        if all { tags.all(|has| has) } else { tags.any(|has| has) }
    };
    wanted(ctx, "tags").all(|list| has(list, true))
        && wanted(ctx, "tags-any").all(|list| has(list, false))
        && wanted(ctx, "not-tags").all(|list| !has(list, true))
        && wanted(ctx, "not-tags-any").all(|list| !has(list, false))
}

fn passes_address(ctx: &Context, server: &Server, name: &str) -> bool {
    wanted(ctx, name).all(|pattern| {
        let ports = server.ports.iter();
        let ports = ports.filter_map(|port| ctx.state.network.ports.get(&port.port_id));
        let mut addresses = ports.flat_map(|port| port.fixed_ips.iter());
        addresses.any(|fixed| matches_text(pattern, &fixed.ip_address.to_string()))
    })
}

fn since(ctx: &Context, name: &str) -> Result<Option<u64>, ApiError> {
    let text = ctx.query.get(name).filter(|text| *text != "None");
    text.map(|text| {
        time::parse_ms(text)
            .ok_or_else(|| ApiError::bad_request(format!("Invalid time in {name}: {text}")))
    })
    .transpose()
}

fn compare(one: &Server, two: &Server, key: &str) -> Result<Ordering, ApiError> {
    Ok(match key {
        "created_at" => one.created_ms.cmp(&two.created_ms),
        "updated_at" => one.updated_ms.cmp(&two.updated_ms),
        "launched_at" => one.launched_ms.cmp(&two.launched_ms),
        "display_name" => one.name.cmp(&two.name),
        "hostname" => one.hostname.cmp(&two.hostname),
        "host" | "node" => one.host.cmp(&two.host),
        "uuid" => one.id.cmp(&two.id),
        "vm_state" => one.vm_state.as_str().cmp(two.vm_state.as_str()),
        "project_id" => one.project_id.cmp(&two.project_id),
        "user_id" => one.user_id.cmp(&two.user_id),
        "key_name" => one.key_name.cmp(&two.key_name),
        "image_ref" => one.image_id.cmp(&two.image_id),
        _ => return Err(ApiError::bad_request(format!("Invalid sort key: {key}"))),
    })
}

/// The newest first unless told otherwise.
fn sort(ctx: &Context, servers: &mut [Arc<Server>]) -> Result<(), ApiError> {
    let mut keys: Vec<&str> = ctx.query.get_all("sort_key").collect();
    let directions: Vec<&str> = ctx.query.get_all("sort_dir").collect();
    if keys.is_empty() {
        keys.push("created_at");
    }
    if let Some(server) = servers.first() {
        for key in &keys {
            compare(server, server, key)?;
        }
    }
    servers.sort_by(|one, two| {
        let by_key = keys.iter().enumerate().map(|(index, key)| {
            let order = compare(one, two, key).unwrap_or(Ordering::Equal);
            let direction = directions.get(index).or(directions.last());
            if direction == Some(&"asc") { order } else { order.reverse() }
        });
        by_key.fold(Ordering::Equal, Ordering::then).then_with(|| two.id.cmp(&one.id))
    });
    Ok(())
}

fn selected(ctx: &Context) -> Result<Vec<Arc<Server>>, ApiError> {
    let deleted = ctx.query.bool("deleted")?.unwrap_or(false);
    if deleted && ctx.is_admin() {
        // Deleted servers are not kept.
        return Ok(Vec::new());
    }
    let (from, until) = (since(ctx, "changes-since")?, since(ctx, "changes-before")?);
    let mut servers = Vec::new();
    for server in ctx.state.compute.servers.values() {
        if lists(ctx, &server.project_id)?
            && passes(ctx, server)
            && from.is_none_or(|from| server.updated_ms >= from)
            && until.is_none_or(|until| server.updated_ms <= until)
        {
            servers.push(Arc::clone(server));
        }
    }
    sort(ctx, &mut servers)?;
    Ok(servers)
}

fn lists(ctx: &Context, project: &ProjectId) -> Result<bool, ApiError> {
    let named = ctx.query.get("project_id").or(ctx.query.get("tenant_id"));
    if named == Some("None") { Ok(ctx.owns(project)) } else { ctx.lists(project) }
}

async fn list(ctx: Context) -> Result<Json, ApiError> {
    let slice = ctx.query.page()?.cut(selected(&ctx)?, |server| server.id.as_str())?;
    let views: Vec<Value> = slice.items.iter().map(|server| short_view(&ctx, server)).collect();
    let mut body = json!({"servers": views});
    if let Some(links) = slice.links(&ctx.self_url(), &ctx.query) {
        body["servers_links"] = links;
    }
    Ok(Json::ok(body))
}

async fn detail(ctx: Context) -> Result<Json, ApiError> {
    let slice = ctx.query.page()?.cut(selected(&ctx)?, |server| server.id.as_str())?;
    let mut views = Vec::with_capacity(slice.items.len());
    for server in &slice.items {
        views.push(server_view(&ctx, &ctx.state, server).await);
    }
    let mut body = json!({"servers": views});
    if let Some(links) = slice.links(&ctx.self_url(), &ctx.query) {
        body["servers_links"] = links;
    }
    Ok(Json::ok(body))
}

async fn show(ctx: Context, Path(id): Path<String>) -> Result<Json, ApiError> {
    let server = find_server(&ctx, &id)?;
    let mut view = server_view(&ctx, &ctx.state, &server).await;
    if ctx.at_least(2, 71) {
        view["server_groups"] = json!(server.group_id.iter().collect::<Vec<_>>());
    }
    Ok(Json::ok(json!({"server": view})))
}

async fn update(
    ctx: Context,
    Path(id): Path<String>,
    Body(request): Body<UpdateRequest>,
) -> Result<Json, ApiError> {
    let server = find_server(&ctx, &id)?;
    let fields = request.server;
    if let Some(name) = &fields.name {
        check_name("name", name)?;
    }
    let hostname = fields.hostname.filter(|_| ctx.at_least(2, 90));
    if let Some(hostname) = &hostname {
        server_create::check_hostname(&ctx, hostname)?;
    }
    let command = ComputeCommand::UpdateServer {
        id: server.id.clone(),
        name: fields.name,
        description: fields.description.filter(|_| ctx.at_least(2, 19)),
        hostname,
        metadata: None,
        tags: None,
    };
    ctx.propose(Command::Compute(command)).await?;
    let state = ctx.fresh().await?;
    let server = state.compute.servers.get(&server.id).cloned();
    let server = server.ok_or_else(|| ApiError::not_found("instance", &id))?;
    Ok(Json::ok(json!({"server": server_view(&ctx, &state, &server).await})))
}

async fn remove(ctx: Context, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    let id = find_server(&ctx, &id)?.id.clone();
    ctx.propose(Command::Compute(ComputeCommand::DeleteServer(id))).await?;
    Ok(StatusCode::NO_CONTENT)
}

#[cfg(test)]
mod tests {
    use super::matches_text;

    #[test]
    fn filters_by_part_begin_and_end() {
        assert!(matches_text("eb-", "web-1") && matches_text("^web", "Web-1"));
        assert!(matches_text("^web-1$", "web-1") && !matches_text("^web-1$", "web-11"));
        assert!(!matches_text("1$", "web-12"));
        assert!(matches_text(r"^10\.0\.0\.3$", "10.0.0.3"));
    }
}

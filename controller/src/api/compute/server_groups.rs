//! `/v2.1/os-server-groups`.

use axum::extract::Path;
use http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};

use super::super::body::{Body, Json, lenient_u64};
use super::super::context::Context;
use super::super::error::ApiError;
use super::super::routes::Routes;
use super::super::{policy, unexpected};
use crate::ids::ServerGroupId;
use crate::state::compute::{ComputeCommand, GroupPolicy, ServerGroup};
use crate::state::{Command, Outcome};

pub(super) fn routes() -> Routes {
    Routes::new(super::PREFIX)
        .get("/v2.1/os-server-groups", policy::GROUP_LIST, list)
        .post("/v2.1/os-server-groups", policy::GROUP_CREATE, create)
        .get("/v2.1/os-server-groups/{id}", policy::GROUP_GET, show)
        .delete("/v2.1/os-server-groups/{id}", policy::GROUP_DELETE, remove)
}

#[derive(Deserialize)]
struct CreateRequest {
    server_group: GroupFields,
}

#[derive(Deserialize)]
struct GroupFields {
    name: String,
    /// Before 2.64.
    policies: Option<Vec<String>>,
    /// From 2.64 on.
    policy: Option<String>,
    rules: Option<Rules>,
}

#[derive(Deserialize)]
struct Rules {
    #[serde(default, deserialize_with = "lenient_u64")]
    max_server_per_host: Option<u64>,
}

fn group_view(ctx: &Context, group: &ServerGroup) -> Value {
    let mut view = json!({"id": group.id, "name": group.name, "members": group.members});
    if ctx.at_least(2, 13) {
        view["project_id"] = json!(group.project_id);
        view["user_id"] = json!(group.user_id);
    }
    if ctx.at_least(2, 64) {
        view["policy"] = json!(group.policy.as_str());
        view["rules"] = match group.policy {
            GroupPolicy::AntiAffinity if group.max_server_per_host > 1 => {
                json!({"max_server_per_host": group.max_server_per_host})
            }
            _ => json!({}),
        };
    } else {
        view["policies"] = json!([group.policy.as_str()]);
        view["metadata"] = json!({});
    }
    view
}

async fn list(ctx: Context) -> Result<Json, ApiError> {
    let every = ctx.is_admin() && ctx.query.has("all_projects");
    let groups = ctx.state.compute.groups.values();
    let groups = groups.filter(|group| every || ctx.owns(&group.project_id)).collect();
    let offset = usize::try_from(ctx.query.u64("offset")?.unwrap_or(0)).unwrap_or(usize::MAX);
    let slice = ctx.query.page()?.cut(groups, |group: &&ServerGroup| group.id.as_str())?;
    let views = slice.items.iter().skip(offset).map(|group| group_view(&ctx, group));
    Ok(Json::ok(json!({"server_groups": views.collect::<Vec<_>>()})))
}

fn find<'a>(ctx: &'a Context, id: &str) -> Result<&'a ServerGroup, ApiError> {
    let group = ctx.state.compute.groups.get(id).filter(|group| ctx.sees(&group.project_id));
    group.ok_or_else(|| ApiError::not_found("instance_group", id))
}

async fn show(ctx: Context, Path(id): Path<String>) -> Result<Json, ApiError> {
    Ok(Json::ok(json!({"server_group": group_view(&ctx, find(&ctx, &id)?)})))
}

fn wanted_policy(ctx: &Context, fields: &GroupFields) -> Result<GroupPolicy, ApiError> {
    let word = match (&fields.policy, fields.policies.as_deref()) {
        (Some(word), _) if ctx.at_least(2, 64) => word,
        (_, Some([word])) if !ctx.at_least(2, 64) => word,
        _ => return Err(ApiError::bad_request("A server group has exactly one policy.")),
    };
    let policy = GroupPolicy::parse(word);
    policy.ok_or_else(|| ApiError::bad_request(format!("There is no policy {word:?}.")))
}

fn wanted_max(policy: GroupPolicy, rules: Option<&Rules>) -> Result<u32, ApiError> {
    let Some(max) = rules.and_then(|rules| rules.max_server_per_host) else { return Ok(1) };
    if policy != GroupPolicy::AntiAffinity {
        let message = "Only anti-affinity policy supports rules.";
        return Err(ApiError::bad_request(message));
    }
    u32::try_from(max).ok().filter(|max| *max > 0).ok_or_else(|| {
        ApiError::bad_request("max_server_per_host is a positive number.".to_owned())
    })
}

async fn create(ctx: Context, Body(request): Body<CreateRequest>) -> Result<Json, ApiError> {
    let fields = request.server_group;
    super::check_name("name", &fields.name)?;
    let policy = wanted_policy(&ctx, &fields)?;
    let command = ComputeCommand::CreateServerGroup {
        id: ServerGroupId::from(ctx.mint()),
        project_id: ctx.project_id()?,
        user_id: ctx.user_id(),
        policy,
        max_server_per_host: wanted_max(policy, fields.rules.as_ref())?,
        name: fields.name,
    };
    match ctx.propose(Command::Compute(command)).await? {
        Outcome::ServerGroup(group) => {
            Ok(Json::ok(json!({"server_group": group_view(&ctx, &group)})))
        }
        other => Err(unexpected(&other)),
    }
}

async fn remove(ctx: Context, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    let id = find(&ctx, &id)?.id.clone();
    ctx.propose(Command::Compute(ComputeCommand::DeleteServerGroup(id))).await?;
    Ok(StatusCode::NO_CONTENT)
}

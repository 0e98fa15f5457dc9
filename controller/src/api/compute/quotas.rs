//! `/v2.1/os-quota-sets` and `/v2.1/limits`.

use std::collections::BTreeMap;

use axum::extract::Path;
use http::StatusCode;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::super::body::{Body, Json};
use super::super::context::Context;
use super::super::error::ApiError;
use super::super::policy;
use super::super::routes::Routes;
use crate::ids::ProjectId;
use crate::state::{Command, QuotaCommand, QuotaResource, State};

/// What Nova limits.
const RESOURCES: [QuotaResource; 7] = [
    QuotaResource::Instances,
    QuotaResource::Cores,
    QuotaResource::Ram,
    QuotaResource::KeyPairs,
    QuotaResource::MetadataItems,
    QuotaResource::ServerGroups,
    QuotaResource::ServerGroupMembers,
];

pub(super) fn routes() -> Routes {
    const ONE: &str = "/v2.1/os-quota-sets/{project}";
    Routes::new(super::PREFIX)
        .get(ONE, policy::QUOTA_GET, show)
        .put(ONE, policy::QUOTA_UPDATE, update)
        .delete(ONE, policy::QUOTA_UPDATE, reset)
        .get("/v2.1/os-quota-sets/{project}/defaults", policy::QUOTA_GET, defaults)
        .get("/v2.1/os-quota-sets/{project}/detail", policy::QUOTA_GET, detail)
        .get("/v2.1/limits", policy::LIMITS_GET, limits)
}

#[derive(Deserialize)]
struct UpdateRequest {
    quota_set: BTreeMap<String, Value>,
}

/// The project, if its limits are the caller's to see.
fn project(ctx: &Context, id: &str) -> Result<ProjectId, ApiError> {
    let id = ProjectId::from(id);
    if !ctx.owns(&id) {
        ctx.require_admin(policy::QUOTA_GET.name)?;
    }
    if !ctx.state.identity.projects.contains_key(&id) {
        return Err(ApiError::bad_request(format!("Project ID {id} is not a valid project.")));
    }
    Ok(id)
}

fn set_of(value: impl Fn(QuotaResource) -> Value) -> Map<String, Value> {
    RESOURCES.iter().map(|one| (one.as_str().to_owned(), value(*one))).collect()
}

fn limits_of(state: &State, project: &ProjectId) -> Map<String, Value> {
    set_of(|resource| json!(state.quota.limit(project, resource)))
}

fn with_id(mut set: Map<String, Value>, project: &ProjectId) -> Json {
    set.insert("id".to_owned(), json!(project));
    Json::ok(json!({"quota_set": set}))
}

async fn show(ctx: Context, Path(id): Path<String>) -> Result<Json, ApiError> {
    let project = project(&ctx, &id)?;
    Ok(with_id(limits_of(&ctx.state, &project), &project))
}

async fn defaults(ctx: Context, Path(id): Path<String>) -> Result<Json, ApiError> {
    let project = project(&ctx, &id)?;
    Ok(with_id(set_of(|resource| json!(resource.default_limit())), &project))
}

async fn detail(ctx: Context, Path(id): Path<String>) -> Result<Json, ApiError> {
    let project = project(&ctx, &id)?;
    let quota = &ctx.state.quota;
    let set = set_of(|resource| {
        json!({
            "limit": quota.limit(&project, resource),
            "in_use": quota.used(&project, resource),
            "reserved": 0,
        })
    });
    Ok(with_id(set, &project))
}

/// Limits by name, as numbers from -1 on.
fn wanted(given: &BTreeMap<String, Value>) -> Result<Vec<(QuotaResource, i64)>, ApiError> {
    let bad = |name: &str, value: &Value| {
        ApiError::bad_request(format!(
            "Invalid input for field/attribute {name}. Value: {value}. It is -1 or more."
        ))
    };
    let mut limits = Vec::new();
    for (name, value) in given {
        if matches!(name.as_str(), "force" | "tenant_id" | "id") {
            continue;
        }
        let Some(resource) = RESOURCES.iter().find(|one| one.as_str() == name) else {
            return Err(ApiError::bad_request(format!("There is no quota for {name:?}.")));
        };
        let limit = match value {
            Value::Number(number) => number.as_i64(),
            Value::String(text) => text.parse().ok(),
            _ => None,
        };
        let limit = limit.filter(|limit| (-1..=i64::from(i32::MAX)).contains(limit));
        limits.push((*resource, limit.ok_or_else(|| bad(name, value))?));
    }
    Ok(limits)
}

async fn update(
    ctx: Context,
    Path(id): Path<String>,
    Body(request): Body<UpdateRequest>,
) -> Result<Json, ApiError> {
    let project_id = project(&ctx, &id)?;
    let limits = wanted(&request.quota_set)?;
    let command = QuotaCommand::Set { project_id: project_id.clone(), limits };
    ctx.propose(Command::Quota(command)).await?;
    let state = ctx.fresh().await?;
    Ok(Json::ok(json!({"quota_set": limits_of(&state, &project_id)})))
}

async fn reset(ctx: Context, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    let project = project(&ctx, &id)?;
    ctx.propose(Command::Quota(QuotaCommand::Reset(project))).await?;
    Ok(StatusCode::ACCEPTED)
}

async fn limits(ctx: Context) -> Result<Json, ApiError> {
    let named = ctx.query.get("tenant_id").map(str::to_owned);
    let project = match named {
        Some(id) => project(&ctx, &id)?,
        None => ctx.project_id()?,
    };
    let limit = |resource| ctx.state.quota.limit(&project, resource);
    let used = |resource| ctx.state.quota.used(&project, resource);
    Ok(Json::ok(json!({"limits": {"rate": [], "absolute": {
        "maxTotalInstances": limit(QuotaResource::Instances),
        "maxTotalCores": limit(QuotaResource::Cores),
        "maxTotalRAMSize": limit(QuotaResource::Ram),
        "maxTotalKeypairs": limit(QuotaResource::KeyPairs),
        "maxServerMeta": limit(QuotaResource::MetadataItems),
        "maxServerGroups": limit(QuotaResource::ServerGroups),
        "maxServerGroupMembers": limit(QuotaResource::ServerGroupMembers),
        "totalInstancesUsed": used(QuotaResource::Instances),
        "totalCoresUsed": used(QuotaResource::Cores),
        "totalRAMUsed": used(QuotaResource::Ram),
        "totalServerGroupsUsed": used(QuotaResource::ServerGroups),
    }}})))
}

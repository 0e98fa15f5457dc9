//! What the service says of itself: availability zones, services, quotas and limits.

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
use super::super::time;
use crate::ids::ProjectId;
use crate::state::{Command, QuotaCommand, QuotaResource, Quotas};

const QUOTAS: [QuotaResource; 2] = [QuotaResource::Volumes, QuotaResource::Gigabytes];

pub(super) fn routes() -> Routes {
    let quotas = "/v3/{project}/os-quota-sets/{of}";
    Routes::new(super::PREFIX)
        .get("/v3/{project}/os-availability-zone", policy::VOLUME_ZONE_LIST, zones)
        .get("/v3/{project}/os-services", policy::VOLUME_SERVICE_LIST, services)
        .get("/v3/{project}/limits", policy::VOLUME_LIMITS, limits)
        .get(quotas, policy::VOLUME_QUOTA_GET, quota)
        .get("/v3/{project}/os-quota-sets/{of}/defaults", policy::VOLUME_QUOTA_GET, defaults)
        .put(quotas, policy::VOLUME_QUOTA_CHANGE, set_quota)
        .delete(quotas, policy::VOLUME_QUOTA_CHANGE, reset_quota)
}

async fn zones(ctx: Context, Path(project): Path<String>) -> Result<Json, ApiError> {
    super::project(&ctx, &project)?;
    let up = ctx.cloud().liveness().up;
    let mut zones: BTreeMap<&str, bool> = BTreeMap::new();
    for host in ctx.state.cluster.hosts.values() {
        let usable = up.contains(&host.id) && !host.disabled && !host.is_out();
        *zones.entry(&host.availability_zone).or_default() |= usable;
    }
    let zones: Vec<Value> = zones
        .into_iter()
        .map(|(name, usable)| json!({"zoneName": name, "zoneState": {"available": usable}}))
        .collect();
    Ok(Json::ok(json!({"availabilityZoneInfo": zones})))
}

/// Every host is home to volumes: its storage process is what Cinder calls the service.
async fn services(ctx: Context, Path(project): Path<String>) -> Result<Json, ApiError> {
    super::project(&ctx, &project)?;
    let up = ctx.cloud().liveness().up;
    let now = time::micros_naive(ctx.now_ms());
    let services: Vec<Value> = ctx
        .state
        .cluster
        .hosts
        .values()
        .map(|host| {
            json!({
                "binary": "cinder-volume",
                "host": format!("{}@local", host.name),
                "zone": host.availability_zone,
                "status": if host.disabled { "disabled" } else { "enabled" },
                "disabled_reason": host.disabled_reason,
                "state": if up.contains(&host.id) { "up" } else { "down" },
                "updated_at": now,
            })
        })
        .filter(|view| ctx.query.admits("host", view["host"].as_str().unwrap_or_default()))
        .filter(|view| ctx.query.admits("binary", view["binary"].as_str().unwrap_or_default()))
        .collect();
    Ok(Json::ok(json!({"services": services})))
}

async fn limits(ctx: Context, Path(project): Path<String>) -> Result<Json, ApiError> {
    let project = super::project(&ctx, &project)?;
    let quota = &ctx.state.quota;
    Ok(Json::ok(json!({"limits": {"rate": [], "absolute": {
        "maxTotalVolumes": quota.limit(&project, QuotaResource::Volumes),
        "totalVolumesUsed": quota.used(&project, QuotaResource::Volumes),
        "maxTotalVolumeGigabytes": quota.limit(&project, QuotaResource::Gigabytes),
        "totalGigabytesUsed": quota.used(&project, QuotaResource::Gigabytes),
    }}})))
}

fn limits_of(quotas: &Quotas, of: &ProjectId, usage: bool) -> Map<String, Value> {
    let one = |resource: QuotaResource| {
        let limit = quotas.limit(of, resource);
        if usage {
            json!({"limit": limit, "in_use": quotas.used(of, resource), "reserved": 0})
        } else {
            json!(limit)
        }
    };
    QUOTAS.iter().map(|resource| (resource.as_str().to_owned(), one(*resource))).collect()
}

fn quota_set(of: &ProjectId, mut limits: Map<String, Value>) -> Json {
    limits.insert("id".into(), json!(of));
    Json::ok(json!({"quota_set": limits}))
}

/// The project whose quota is asked for: the caller's, or any for an administrator.
fn quota_of(ctx: &Context, of: String) -> Result<ProjectId, ApiError> {
    let of = ProjectId::from(of);
    if ctx.sees(&of) {
        return Ok(of);
    }
    Err(ApiError::forbidden("The quota of another project is for administrators."))
}

async fn quota(
    ctx: Context,
    Path((project, of)): Path<(String, String)>,
) -> Result<Json, ApiError> {
    super::project(&ctx, &project)?;
    let of = quota_of(&ctx, of)?;
    let usage = ctx.query.bool("usage")?.unwrap_or(false);
    Ok(quota_set(&of, limits_of(&ctx.state.quota, &of, usage)))
}

async fn defaults(
    ctx: Context,
    Path((project, of)): Path<(String, String)>,
) -> Result<Json, ApiError> {
    super::project(&ctx, &project)?;
    let of = quota_of(&ctx, of)?;
    Ok(quota_set(&of, limits_of(&Quotas::default(), &of, false)))
}

#[derive(Deserialize)]
struct QuotaRequest {
    quota_set: Map<String, Value>,
}

async fn set_quota(
    ctx: Context,
    Path((project, of)): Path<(String, String)>,
    Body(request): Body<QuotaRequest>,
) -> Result<Json, ApiError> {
    super::project(&ctx, &project)?;
    let mut limits = Vec::new();
    for (name, value) in &request.quota_set {
        if ["tenant_id", "project_id", "force"].contains(&name.as_str()) {
            continue;
        }
        let resource = QUOTAS.iter().find(|resource| resource.as_str() == name);
        let limit = value.as_i64().filter(|limit| (-1..=i64::from(i32::MAX)).contains(limit));
        let (Some(resource), Some(limit)) = (resource, limit) else {
            let message = format!("Invalid input for field/attribute {name}: {value}.");
            return Err(ApiError::bad_request(message));
        };
        limits.push((*resource, limit));
    }
    let of = ProjectId::from(of);
    let command = QuotaCommand::Set { project_id: of.clone(), limits };
    ctx.propose(Command::Quota(command)).await?;
    let state = ctx.fresh().await?;
    Ok(quota_set(&of, limits_of(&state.quota, &of, false)))
}

/// Only block storage's limits go back to the defaults; the other services keep theirs.
async fn reset_quota(
    ctx: Context,
    Path((project, of)): Path<(String, String)>,
) -> Result<StatusCode, ApiError> {
    super::project(&ctx, &project)?;
    let limits = QUOTAS.iter().map(|resource| (*resource, resource.default_limit())).collect();
    let command = QuotaCommand::Set { project_id: ProjectId::from(of), limits };
    ctx.propose(Command::Quota(command)).await?;
    Ok(StatusCode::OK)
}

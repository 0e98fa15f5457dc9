//! The compute services: one on each host. And what trine alone says of its hosts.

use axum::extract::Path;
use serde::Deserialize;
use serde_json::{Value, json};

use super::super::body::{Body, Json};
use super::super::context::Context;
use super::super::error::{ApiError, ErrorKind};
use super::super::routes::Routes;
use super::super::{policy, time};
use super::host_uuid;
use super::hosts::is_up;
use crate::ids::HostId;
use crate::state::cluster::{ClusterCommand, Host};
use crate::state::{Command, Outcome};

/// The only kind of service there is.
const BINARY: &str = "nova-compute";

pub(super) fn routes() -> Routes {
    Routes::new(super::PREFIX)
        .get("/v2.1/os-services", policy::COMPUTE_SERVICE_LIST, services)
        .put("/v2.1/os-services/{id}", policy::COMPUTE_SERVICE_UPDATE, update)
        .get("/v2.1/os-trine-hosts", policy::TRINE_HOST_LIST, trine_hosts)
        .get("/v2.1/os-trine-hosts/{id}", policy::TRINE_HOST_LIST, trine_host)
        .put("/v2.1/os-trine-hosts/{id}", policy::TRINE_HOST_UPDATE, update_trine_host)
}

/// Numbers before 2.53, UUIDs from then on.
fn service_id(ctx: &Context, host: HostId) -> Value {
    match ctx.at_least(2, 53) {
        true => json!(host_uuid(ctx, "compute service", host)),
        false => json!(host),
    }
}

fn service_view(ctx: &Context, host: &Host) -> Value {
    let up = is_up(ctx, host);
    let now = time::micros_naive(ctx.now_ms());
    let mut view = json!({
        "id": service_id(ctx, host.id), "binary": BINARY, "host": host.name,
        "zone": host.availability_zone,
        "status": if host.disabled { "disabled" } else { "enabled" },
        "state": if up { "up" } else { "down" },
        "updated_at": if up { json!(now) } else { Value::Null },
        "disabled_reason": host.disabled_reason,
    });
    if ctx.at_least(2, 11) {
        view["forced_down"] = json!(host.forced_down);
    }
    view
}

async fn services(ctx: Context) -> Json {
    let hosts = ctx.state.cluster.hosts.values();
    let hosts = hosts
        .filter(|host| ctx.query.admits("host", &host.name))
        .filter(|_| ctx.query.admits("binary", BINARY));
    let views: Vec<Value> = hosts.map(|host| service_view(&ctx, host)).collect();
    Json::ok(json!({"services": views}))
}

/// A change of a service: by id since 2.53, by host and binary before.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Update {
    host: Option<String>,
    binary: Option<String>,
    status: Option<String>,
    disabled_reason: Option<String>,
    forced_down: Option<bool>,
}

impl Update {
    fn command(self, id: HostId) -> Result<ClusterCommand, ApiError> {
        let disabled = match self.status.as_deref() {
            None => None,
            Some("enabled") => Some(false),
            Some("disabled") => Some(true),
            Some(other) => {
                return Err(ApiError::bad_request(format!(
                    "Invalid input for field/attribute status. Value: {other}. '{other}' is not one of ['enabled', 'disabled']"
                )));
            }
        };
        if self.disabled_reason.is_some() && disabled != Some(true) {
            let message = "Specifying disabled_reason requires that status is disabled.";
            return Err(ApiError::bad_request(message));
        }
        if disabled.is_none() && self.forced_down.is_none() {
            return Err(ApiError::bad_request(
                "No updates were requested. Fields 'status' or 'forced_down' should be specified.",
            ));
        }
        Ok(ClusterCommand::SetHostService {
            id,
            disabled,
            disabled_reason: self.disabled_reason,
            forced_down: self.forced_down,
            evacuate: None,
        })
    }
}

async fn update(
    ctx: Context,
    Path(id): Path<String>,
    Body(asked): Body<Update>,
) -> Result<Json, ApiError> {
    if !ctx.at_least(2, 53) {
        return update_by_name(&ctx, &id, asked).await;
    }
    if asked.host.is_some() || asked.binary.is_some() {
        return Err(ApiError::bad_request("A service is named by its id in the path."));
    }
    let mut hosts = ctx.state.cluster.hosts.values();
    let host = hosts.find(|host| service_id(&ctx, host.id) == json!(id));
    let host = host.ok_or_else(|| {
        ApiError::new(ErrorKind::NotFound, format!("Service {id} could not be found."))
    })?;
    let changed = propose(&ctx, asked.command(host.id)?).await?;
    Ok(Json::ok(json!({"service": service_view(&ctx, &changed)})))
}

/// `PUT /os-services/{action}`, as it was before 2.53.
async fn update_by_name(ctx: &Context, action: &str, asked: Update) -> Result<Json, ApiError> {
    let known = match action {
        "enable" | "disable" | "disable-log-reason" => true,
        "force-down" => ctx.at_least(2, 11),
        _ => false,
    };
    if !known {
        return Err(ApiError::new(ErrorKind::NotFound, format!("Unknown action: {action}")));
    }
    let name = asked.host.as_deref().unwrap_or_default();
    let mut hosts = ctx.state.cluster.hosts.values();
    let host = hosts.find(|host| host.name == name && asked.binary.as_deref() == Some(BINARY));
    let host = host.ok_or_else(|| {
        let binary = asked.binary.as_deref().unwrap_or_default();
        let message = format!("Could not find binary {binary} on host {name}.");
        ApiError::new(ErrorKind::NotFound, message)
    })?;
    if action == "disable-log-reason" && asked.disabled_reason.is_none() {
        return Err(ApiError::bad_request("Missing disabled reason field"));
    }
    if action == "force-down" && asked.forced_down.is_none() {
        return Err(ApiError::bad_request("Missing forced_down field"));
    }
    let command = ClusterCommand::SetHostService {
        id: host.id,
        disabled: (action != "force-down").then_some(action != "enable"),
        disabled_reason: asked.disabled_reason,
        forced_down: asked.forced_down.filter(|_| action == "force-down"),
        evacuate: None,
    };
    let changed = propose(ctx, command).await?;
    let mut view = json!({"host": changed.name, "binary": BINARY});
    match action {
        "force-down" => view["forced_down"] = json!(changed.forced_down),
        _ => view["status"] = json!(if changed.disabled { "disabled" } else { "enabled" }),
    }
    if action == "disable-log-reason" {
        view["disabled_reason"] = json!(changed.disabled_reason);
    }
    Ok(Json::ok(json!({"service": view})))
}

async fn propose(ctx: &Context, command: ClusterCommand) -> Result<Host, ApiError> {
    match ctx.propose(Command::Cluster(command)).await? {
        Outcome::Host(host) => Ok(*host),
        _ => Err(ApiError::new(ErrorKind::Internal, "A host's change did not give a host.")),
    }
}

fn trine_view(ctx: &Context, host: &Host) -> Value {
    json!({
        "id": host.id, "name": host.name, "up": is_up(ctx, host), "disabled": host.disabled,
        "forced_down": host.forced_down, "fenced": host.fenced.is_some(),
        "fence_epoch": host.fence_epoch, "evacuate_on_failure": host.evacuate,
        "feature_level": host.feature_level,
    })
}

async fn trine_hosts(ctx: Context) -> Json {
    let hosts = ctx.state.cluster.hosts.values();
    let views: Vec<Value> = hosts.map(|host| trine_view(&ctx, host)).collect();
    Json::ok(json!({"hosts": views, "feature_level": ctx.state.cluster.feature_level}))
}

/// A host by its number or its name.
fn find<'a>(ctx: &'a Context, id: &str) -> Result<&'a Host, ApiError> {
    let mut hosts = ctx.state.cluster.hosts.values();
    let host = hosts.find(|host| host.id.to_string() == id || host.name == id);
    host.ok_or_else(|| ApiError::not_found("host", id))
}

async fn trine_host(ctx: Context, Path(id): Path<String>) -> Result<Json, ApiError> {
    let host = find(&ctx, &id)?;
    Ok(Json::ok(json!({"host": trine_view(&ctx, host)})))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct HostUpdate {
    evacuate_on_failure: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct HostRequest {
    host: HostUpdate,
}

async fn update_trine_host(
    ctx: Context,
    Path(id): Path<String>,
    Body(asked): Body<HostRequest>,
) -> Result<Json, ApiError> {
    let command = ClusterCommand::SetHostService {
        id: find(&ctx, &id)?.id,
        disabled: None,
        disabled_reason: None,
        forced_down: None,
        evacuate: Some(asked.host.evacuate_on_failure),
    };
    let changed = propose(&ctx, command).await?;
    Ok(Json::ok(json!({"host": trine_view(&ctx, &changed)})))
}

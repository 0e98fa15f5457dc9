//! `evacuate`: a server of a host that is out is made anew on another.

use axum::response::{IntoResponse, Response};
use http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};

use super::super::body::{Json, lenient_bool};
use super::super::context::Context;
use super::super::error::{ApiError, ErrorKind};
use crate::state::Command;
use crate::state::compute::{ComputeCommand, Server, VmState};

/// What is asked.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Evacuate {
    /// The host to make it on, by name.
    host: Option<String>,
    /// Taken and shown back, as Nova does; no guest gets it.
    admin_pass: Option<String>,
    /// Said until 2.13; there is no shared storage here.
    #[serde(default, deserialize_with = "lenient_bool")]
    on_shared_storage: Option<bool>,
    /// Said from 2.29 to 2.67: go there whatever the scheduler says. It is asked anyway.
    #[serde(default, deserialize_with = "lenient_bool")]
    force: Option<bool>,
}

pub(super) async fn evacuate(
    ctx: &Context,
    server: &Server,
    argument: Value,
) -> Result<Response, ApiError> {
    let asked: Evacuate = serde_json::from_value(argument).map_err(|error| {
        ApiError::bad_request(format!("Invalid input for field/attribute evacuate: {error}."))
    })?;
    check_version(ctx, &asked)?;
    check_host(ctx, server, asked.host.as_deref())?;
    if !matches!(server.vm_state, VmState::Active | VmState::Stopped | VmState::Error) {
        return Err(ApiError::conflict(format!(
            "Cannot 'evacuate' instance {} while it is in vm_state {}",
            server.id,
            server.vm_state.as_str()
        )));
    }
    let command = ComputeCommand::EvacuateServer {
        id: server.id.clone(),
        requested_host: asked.host,
        stop: ctx.at_least(2, 95),
        placement: None,
    };
    ctx.propose(Command::Compute(command)).await?;
    if ctx.at_least(2, 14) {
        return Ok(StatusCode::OK.into_response());
    }
    let password = asked.admin_pass.unwrap_or_else(|| ctx.mint().replace('-', "")[..12].to_owned());
    Ok(Json::ok(json!({"adminPass": password})).into_response())
}

fn check_version(ctx: &Context, asked: &Evacuate) -> Result<(), ApiError> {
    let unknown = |field: &str| {
        let message = format!(
            "Additional properties are not allowed ('{field}' was unexpected) for this microversion."
        );
        Err(ApiError::bad_request(message))
    };
    match (asked.on_shared_storage, asked.force) {
        (None, _) if !ctx.at_least(2, 14) => {
            Err(ApiError::bad_request("'onSharedStorage' is a required property"))
        }
        (Some(true), _) if !ctx.at_least(2, 14) => {
            Err(ApiError::bad_request("Invalid state: there is no instance shared storage."))
        }
        (Some(_), _) if ctx.at_least(2, 14) => unknown("onSharedStorage"),
        (_, Some(_)) if !ctx.at_least(2, 29) || ctx.at_least(2, 68) => unknown("force"),
        _ => Ok(()),
    }
}

fn check_host(ctx: &Context, server: &Server, wanted: Option<&str>) -> Result<(), ApiError> {
    let hosts = &ctx.state.cluster.hosts;
    let known = |name: &str| hosts.values().any(|host| host.name == name);
    if let Some(name) = wanted.filter(|name| !known(name)) {
        let message = format!("Compute host {name} not found.");
        return Err(ApiError::new(ErrorKind::NotFound, message));
    }
    let Some(host) = server.host.and_then(|id| hosts.get(&id)) else {
        let message = format!("Instance {} is not ready: it has no host.", server.id);
        return Err(ApiError::conflict(message));
    };
    if wanted == Some(host.name.as_str()) {
        return Err(ApiError::bad_request("The target host can't be the same one."));
    }
    if !host.is_out() {
        let message = format!("Compute service of {} is still in use.", host.name);
        return Err(ApiError::bad_request(message));
    }
    Ok(())
}

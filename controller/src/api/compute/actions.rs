//! `POST /v2.1/servers/{id}/action`.

use axum::extract::Path;
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use serde_json::{Map, Value, json};

use super::super::body::{Body, Json};
use super::super::cloud::CloudError;
use super::super::context::Context;
use super::super::error::{ApiError, ErrorKind};
use super::super::policy::{self, server_action};
use super::super::routes::Routes;
use super::{evacuate, find_server};
use crate::state::Command;
use crate::state::compute::{ComputeCommand, Server};

pub(super) fn routes() -> Routes {
    Routes::new(super::PREFIX).post("/v2.1/servers/{id}/action", policy::SERVER_ACTION, act)
}

async fn act(
    ctx: Context,
    Path(id): Path<String>,
    Body(request): Body<Map<String, Value>>,
) -> Result<Response, ApiError> {
    let mut entries = request.into_iter();
    let (Some((action, argument)), None) = (entries.next(), entries.next()) else {
        return Err(ApiError::bad_request("A request has exactly one action."));
    };
    let server = find_server(&ctx, &id)?;
    let id = server.id.clone();
    match action.as_str() {
        "os-getConsoleOutput" => {
            ctx.caller.check(server_action::CONSOLE_OUTPUT)?;
            console_output(&ctx, &server, &argument).await
        }
        "evacuate" => {
            ctx.caller.check(server_action::EVACUATE)?;
            evacuate::evacuate(&ctx, &server, argument).await
        }
        "os-start" => power(&ctx, ComputeCommand::StartServer(id)).await,
        "os-stop" => power(&ctx, ComputeCommand::StopServer(id)).await,
        "reboot" => {
            let kind = argument["type"].as_str().unwrap_or_default().to_ascii_uppercase();
            if !matches!(kind.as_str(), "SOFT" | "HARD") {
                return Err(ApiError::bad_request("A reboot's type is SOFT or HARD."));
            }
            power(&ctx, ComputeCommand::RebootServer(id)).await
        }
        other => Err(ApiError::bad_request(format!("There is no such action: {other}"))),
    }
}

async fn power(ctx: &Context, command: ComputeCommand) -> Result<Response, ApiError> {
    ctx.caller.check(server_action::POWER)?;
    ctx.propose(Command::Compute(command)).await?;
    Ok(StatusCode::ACCEPTED.into_response())
}

/// How many lines are wanted: a number, perhaps as text; -1 and nothing mean all.
fn length(argument: &Value) -> Result<Option<usize>, ApiError> {
    let length = match argument.get("length") {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::Number(number)) => number.as_i64(),
        Some(Value::String(text)) => text.trim().parse().ok(),
        Some(_) => None,
    };
    match length {
        Some(-1) => Ok(None),
        Some(lines) => usize::try_from(lines)
            .map(Some)
            .map_err(|_| ApiError::bad_request("length is -1 or a number of lines.")),
        None => Err(ApiError::bad_request("length is -1 or a number of lines.")),
    }
}

async fn console_output(
    ctx: &Context,
    server: &Server,
    argument: &Value,
) -> Result<Response, ApiError> {
    let lines = length(argument)?;
    if server.host.is_none() {
        let message = format!("Instance {} is not ready: it has no host.", server.id);
        return Err(ApiError::conflict(message));
    }
    let output = match ctx.cloud().console_output(server, lines).await {
        Ok(output) => output,
        // A guest that has not been started yet has said nothing.
        Err(CloudError::NotFound(_)) if server.launched_ms.is_none() => String::new(),
        Err(error) => {
            let error = ApiError::from(error);
            let found = error.kind != ErrorKind::NotFound;
            return Err(if found { error } else { error.about("console") });
        }
    };
    Ok(Json::ok(json!({"output": output})).into_response())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_length_in_all_its_forms() {
        assert_eq!(length(&json!({})).unwrap(), None);
        assert_eq!(length(&json!(null)).unwrap(), None);
        assert_eq!(length(&json!({"length": null})).unwrap(), None);
        assert_eq!(length(&json!({"length": -1})).unwrap(), None);
        assert_eq!(length(&json!({"length": "10"})).unwrap(), Some(10));
        assert_eq!(length(&json!({"length": 0})).unwrap(), Some(0));
        for bad in [json!({"length": "x"}), json!({"length": -2}), json!({"length": []})] {
            assert!(length(&bad).is_err());
        }
    }
}

//! Nova's API v2.1 with its microversions.

mod actions;
mod attachments;
mod evacuate;
mod flavors;
mod hosts;
mod keypairs;
mod quotas;
mod server_create;
mod server_groups;
mod server_parts;
mod server_view;
mod servers;
mod services;

use std::sync::Arc;

use super::context::Context;
use super::error::{ApiError, ErrorKind};
use super::routes::Routes;
use crate::ids::derived_id;
use crate::state::Command;
use crate::state::compute::{ComputeCommand, Server};

pub(super) const PREFIX: &str = "/compute";

pub(super) fn routes() -> Routes {
    servers::routes()
        .and(server_parts::routes())
        .and(actions::routes())
        .and(attachments::routes())
        .and(flavors::routes())
        .and(keypairs::routes())
        .and(server_groups::routes())
        .and(hosts::routes())
        .and(services::routes())
        .and(quotas::routes())
}

/// The server, if the caller may see it.
fn find_server(ctx: &Context, id: &str) -> Result<Arc<Server>, ApiError> {
    let server = ctx.state.compute.servers.get(id);
    server
        .filter(|server| ctx.sees(&server.project_id))
        .cloned()
        .ok_or_else(|| ApiError::not_found("instance", id))
}

/// Proposes a command on compute. What it names and isn't there was named in the
/// request's body, not in its path: that is a bad request.
async fn propose_new(
    ctx: &Context,
    command: ComputeCommand,
) -> Result<crate::state::Outcome, ApiError> {
    ctx.propose(Command::Compute(command)).await.map_err(|mut error| {
        if error.kind == ErrorKind::NotFound {
            error.kind = ErrorKind::BadRequest;
        }
        error
    })
}

/// Checks a name: 1 to 255 characters.
fn check_name(field: &str, name: &str) -> Result<(), ApiError> {
    let length = name.chars().count();
    let printable = !name.chars().any(char::is_control);
    if name.trim().is_empty() || length > 255 || !printable {
        return Err(ApiError::bad_request(format!(
            "Invalid input for field/attribute {field}. Value: {name:?}. A name has 1 to 255 \
             printable characters."
        )));
    }
    Ok(())
}

/// The UUID by which Nova names a host's hypervisor or service.
fn host_uuid(ctx: &Context, kind: &str, host: crate::ids::HostId) -> String {
    derived_id(kind, &format!("{}/{host}", ctx.state.cluster.id)).to_string()
}

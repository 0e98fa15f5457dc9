//! Networking v2.0: one file per resource.

mod extensions;
mod floating_ips;
mod list;
mod networks;
mod ports;
mod security_groups;
mod subnets;

use super::context::Context;
use super::error::ApiError;
use super::routes::Routes;
use crate::ids::ProjectId;

/// The routes of networking.
pub(crate) fn routes() -> Routes {
    extensions::routes()
        .and(networks::routes())
        .and(subnets::routes())
        .and(ports::routes())
        .and(security_groups::routes())
        .and(floating_ips::routes())
}

const PREFIX: &str = "/networking";

/// The project that a new object is for: the token's, or the one an administrator names.
fn project_of(
    ctx: &Context,
    project_id: Option<String>,
    tenant_id: Option<String>,
) -> Result<ProjectId, ApiError> {
    match project_id.or(tenant_id) {
        None => ctx.project_id(),
        Some(named) => {
            let named = ProjectId::from(named);
            if !ctx.owns(&named) {
                ctx.require_admin("create_for_another_project")?;
            }
            Ok(named)
        }
    }
}

/// Refuses what only an administrator may change, where it was given.
fn admin_only<T>(ctx: &Context, given: &Option<T>, act: &'static str) -> Result<(), ApiError> {
    if given.is_some() { ctx.require_admin(act) } else { Ok(()) }
}

//! Cinder's API v3: volumes, and what the service says of itself.
//!
//! Every path carries the project, which must be the token's. Attaching is compute's:
//! `/compute/v2.1/servers/{id}/os-volume_attachments`.

mod service;
mod volumes;

use serde_json::Value;

use super::context::Context;
use super::error::{ApiError, ErrorKind};
use super::routes::Routes;
use crate::ids::ProjectId;
use crate::state::Outcome;

const PREFIX: &str = "/volume";

/// The routes of block storage.
pub(super) fn routes() -> Routes {
    service::routes().and(volumes::routes())
}

/// The project of the path, which must be the token's.
fn project(ctx: &Context, named: &str) -> Result<ProjectId, ApiError> {
    let own = ctx.project_id()?;
    if own.as_str() == named {
        return Ok(own);
    }
    Err(ApiError::bad_request(format!(
        "Malformed request URL: URL's project_id '{named}' doesn't match Context's project_id '{own}'"
    )))
}

/// The error for an outcome of another kind than the command's.
fn unexpected(outcome: &Outcome) -> ApiError {
    tracing::error!(?outcome, "a command came to an outcome of another kind");
    ApiError::new(ErrorKind::Internal, "The command came to something unexpected.")
}

/// Orders views by `sort=key:direction,…` or by `sort_key` and `sort_dir`.
fn sort(ctx: &Context, views: &mut [Value]) {
    let one = || {
        let key = ctx.query.get("sort_key")?;
        Some(format!("{key}:{}", ctx.query.get("sort_dir").unwrap_or("desc")))
    };
    let Some(order) = ctx.query.get("sort").map(str::to_owned).or_else(one) else { return };
    for part in order.split(',').rev() {
        let (key, direction) = part.split_once(':').unwrap_or((part, "desc"));
        views.sort_by(|left, right| compare(&left[key], &right[key]));
        if direction == "desc" {
            views.reverse();
        }
    }
}

fn compare(left: &Value, right: &Value) -> std::cmp::Ordering {
    match (left.as_u64(), right.as_u64()) {
        (Some(left), Some(right)) => left.cmp(&right),
        _ => left.to_string().cmp(&right.to_string()),
    }
}

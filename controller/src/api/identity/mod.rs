//! Keystone's API v3: tokens, catalog, domains, projects, users, roles and who has them.

mod assignments;
mod catalog;
mod domains;
mod projects;
mod roles;
mod tokens;
mod users;

use serde_json::{Value, json};

use super::context::Context;
use super::error::ApiError;
use super::routes::Routes;

pub(super) const PREFIX: &str = "/identity";

pub(super) fn routes() -> Routes {
    tokens::routes()
        .and(catalog::routes())
        .and(domains::routes())
        .and(projects::routes())
        .and(users::routes())
        .and(roles::routes())
        .and(assignments::routes())
}

/// A list in Keystone's form.
fn listed(ctx: &Context, collection: &str, items: Vec<Value>) -> Value {
    json!({
        collection: items,
        "links": {"self": ctx.self_url(), "next": null, "previous": null},
    })
}

/// Checks a name: 1 to `max` characters.
fn check_name(field: &str, name: &str, max: usize) -> Result<(), ApiError> {
    let length = name.chars().count();
    if name.trim().is_empty() || length > max {
        return Err(ApiError::bad_request(format!(
            "Invalid input for field '{field}': a name has 1 to {max} characters."
        )));
    }
    Ok(())
}

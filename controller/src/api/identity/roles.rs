//! `/v3/roles`.

use axum::extract::Path;
use http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};

use super::super::body::{Body, Json};
use super::super::context::Context;
use super::super::error::ApiError;
use super::super::policy;
use super::super::routes::Routes;
use crate::ids::{DomainId, RoleId};
use crate::state::identity::{IdentityCommand, Role};
use crate::state::{Command, Outcome};

const NAME_MAX: usize = 255;

pub(super) fn routes() -> Routes {
    Routes::new(super::PREFIX)
        .get("/v3/roles", policy::ROLE_LIST, list)
        .post("/v3/roles", policy::ROLE_CREATE, create)
        .get("/v3/roles/{id}", policy::ROLE_GET, show)
        .patch("/v3/roles/{id}", policy::ROLE_UPDATE, update)
        .delete("/v3/roles/{id}", policy::ROLE_DELETE, remove)
}

#[derive(Deserialize)]
struct RoleRequest {
    role: RoleFields,
}

#[derive(Deserialize)]
struct RoleFields {
    name: Option<String>,
    domain_id: Option<String>,
    description: Option<String>,
}

pub(super) fn role_view(ctx: &Context, role: &Role) -> Value {
    json!({
        "id": role.id, "name": role.name, "domain_id": role.domain_id,
        "description": role.description, "options": {},
        "links": {"self": ctx.url(&format!("/identity/v3/roles/{}", role.id))},
    })
}

fn answer(ctx: &Context, outcome: &Outcome) -> Result<Value, ApiError> {
    match outcome {
        Outcome::Role(role) => Ok(json!({"role": role_view(ctx, role)})),
        other => Err(super::super::unexpected(other)),
    }
}

async fn list(ctx: Context) -> Json {
    // Without a domain named, Keystone lists the roles that belong to none.
    let domain = ctx.query.get("domain_id");
    let views = ctx
        .state
        .identity
        .roles
        .values()
        .filter(|role| role.domain_id.as_ref().map(|id| id.as_str()) == domain)
        .filter(|role| ctx.query.admits("name", &role.name))
        .map(|role| role_view(&ctx, role))
        .collect();
    Json::ok(super::listed(&ctx, "roles", views))
}

async fn show(ctx: Context, Path(id): Path<String>) -> Result<Json, ApiError> {
    let role = ctx.state.identity.roles.get(id.as_str());
    let role = role.ok_or_else(|| ApiError::not_found("role", &id))?;
    Ok(Json::ok(json!({"role": role_view(&ctx, role)})))
}

async fn create(ctx: Context, Body(request): Body<RoleRequest>) -> Result<Json, ApiError> {
    let fields = request.role;
    let name = fields.name.unwrap_or_default();
    super::check_name("name", &name, NAME_MAX)?;
    let command = IdentityCommand::CreateRole(Role {
        id: RoleId::from(ctx.mint().replace('-', "")),
        name,
        domain_id: fields.domain_id.map(DomainId::from),
        description: fields.description,
    });
    let outcome = ctx.propose(Command::Identity(command)).await?;
    Ok(Json::created(answer(&ctx, &outcome)?))
}

async fn update(
    ctx: Context,
    Path(id): Path<String>,
    Body(request): Body<RoleRequest>,
) -> Result<Json, ApiError> {
    let fields = request.role;
    if let Some(name) = &fields.name {
        super::check_name("name", name, NAME_MAX)?;
    }
    let command = IdentityCommand::UpdateRole {
        id: RoleId::from(id),
        name: fields.name,
        description: fields.description,
    };
    let outcome = ctx.propose(Command::Identity(command)).await?;
    Ok(Json::ok(answer(&ctx, &outcome)?))
}

async fn remove(ctx: Context, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    ctx.propose(Command::Identity(IdentityCommand::DeleteRole(RoleId::from(id)))).await?;
    Ok(StatusCode::NO_CONTENT)
}

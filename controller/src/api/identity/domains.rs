//! `/v3/domains`.

use axum::extract::Path;
use http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};

use super::super::body::{Body, Json};
use super::super::context::Context;
use super::super::error::ApiError;
use super::super::policy;
use super::super::routes::Routes;
use crate::ids::DomainId;
use crate::state::identity::{Domain, IdentityCommand};
use crate::state::{Command, Outcome};

const NAME_MAX: usize = 64;

pub(super) fn routes() -> Routes {
    Routes::new(super::PREFIX)
        .get("/v3/domains", policy::DOMAIN_LIST, list)
        .post("/v3/domains", policy::DOMAIN_CREATE, create)
        .get("/v3/domains/{id}", policy::DOMAIN_GET, show)
        .patch("/v3/domains/{id}", policy::DOMAIN_UPDATE, update)
        .delete("/v3/domains/{id}", policy::DOMAIN_DELETE, remove)
}

#[derive(Deserialize)]
struct DomainRequest {
    domain: DomainFields,
}

#[derive(Deserialize)]
struct DomainFields {
    name: Option<String>,
    description: Option<String>,
    enabled: Option<bool>,
}

pub(super) fn domain_view(ctx: &Context, domain: &Domain) -> Value {
    json!({
        "id": domain.id, "name": domain.name, "description": domain.description,
        "enabled": domain.enabled, "tags": domain.tags, "options": {},
        "links": {"self": ctx.url(&format!("/identity/v3/domains/{}", domain.id))},
    })
}

fn answer(ctx: &Context, outcome: &Outcome) -> Result<Value, ApiError> {
    match outcome {
        Outcome::Domain(domain) => Ok(json!({"domain": domain_view(ctx, domain)})),
        other => Err(super::super::unexpected(other)),
    }
}

async fn list(ctx: Context) -> Result<Json, ApiError> {
    let enabled = ctx.query.bool("enabled")?;
    let views = ctx
        .state
        .identity
        .domains
        .values()
        .filter(|domain| ctx.query.admits("name", &domain.name))
        .filter(|domain| enabled.is_none_or(|wanted| domain.enabled == wanted))
        .map(|domain| domain_view(&ctx, domain))
        .collect();
    Ok(Json::ok(super::listed(&ctx, "domains", views)))
}

async fn show(ctx: Context, Path(id): Path<String>) -> Result<Json, ApiError> {
    if ctx.caller.user.domain_id.as_str() != id {
        ctx.caller.check(policy::DOMAIN_LIST)?;
    }
    let domain = ctx.state.identity.domains.get(id.as_str());
    let domain = domain.ok_or_else(|| ApiError::not_found("domain", &id))?;
    Ok(Json::ok(json!({"domain": domain_view(&ctx, domain)})))
}

async fn create(ctx: Context, Body(request): Body<DomainRequest>) -> Result<Json, ApiError> {
    let fields = request.domain;
    let name = fields.name.unwrap_or_default();
    super::check_name("name", &name, NAME_MAX)?;
    let command = IdentityCommand::CreateDomain(Domain {
        id: DomainId::from(ctx.mint().replace('-', "")),
        name,
        description: fields.description.unwrap_or_default(),
        enabled: fields.enabled.unwrap_or(true),
        tags: std::collections::BTreeSet::new(),
    });
    let outcome = ctx.propose(Command::Identity(command)).await?;
    Ok(Json::created(answer(&ctx, &outcome)?))
}

async fn update(
    ctx: Context,
    Path(id): Path<String>,
    Body(request): Body<DomainRequest>,
) -> Result<Json, ApiError> {
    let fields = request.domain;
    if let Some(name) = &fields.name {
        super::check_name("name", name, NAME_MAX)?;
    }
    let command = IdentityCommand::UpdateDomain {
        id: DomainId::from(id),
        name: fields.name,
        description: fields.description,
        enabled: fields.enabled,
    };
    let outcome = ctx.propose(Command::Identity(command)).await?;
    Ok(Json::ok(answer(&ctx, &outcome)?))
}

async fn remove(ctx: Context, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    ctx.propose(Command::Identity(IdentityCommand::DeleteDomain(DomainId::from(id)))).await?;
    Ok(StatusCode::NO_CONTENT)
}

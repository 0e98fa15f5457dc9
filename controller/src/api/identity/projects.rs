//! `/v3/projects`.

use std::collections::BTreeSet;

use axum::extract::Path;
use http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};

use super::super::body::{Body, Json};
use super::super::context::Context;
use super::super::error::ApiError;
use super::super::policy;
use super::super::routes::Routes;
use super::tokens::projects_of;
use crate::ids::{DomainId, ProjectId};
use crate::state::identity::{IdentityCommand, NewProject, Project};
use crate::state::{Command, Outcome};

const NAME_MAX: usize = 64;

pub(super) fn routes() -> Routes {
    Routes::new(super::PREFIX)
        .get("/v3/projects", policy::PROJECT_LIST, list)
        .post("/v3/projects", policy::PROJECT_CREATE, create)
        .get("/v3/projects/{id}", policy::PROJECT_GET, show)
        .patch("/v3/projects/{id}", policy::PROJECT_UPDATE, update)
        .delete("/v3/projects/{id}", policy::PROJECT_DELETE, remove)
        .get("/v3/users/{id}/projects", policy::USER_PROJECTS, of_user)
}

#[derive(Deserialize)]
struct ProjectRequest {
    project: ProjectFields,
}

#[derive(Deserialize)]
struct ProjectFields {
    name: Option<String>,
    description: Option<String>,
    enabled: Option<bool>,
    domain_id: Option<String>,
    parent_id: Option<String>,
    is_domain: Option<bool>,
    tags: Option<BTreeSet<String>>,
}

pub(super) fn project_view(ctx: &Context, project: &Project) -> Value {
    json!({
        "id": project.id, "name": project.name, "domain_id": project.domain_id,
        "parent_id": project.parent_id, "description": project.description,
        "enabled": project.enabled, "is_domain": false, "tags": project.tags, "options": {},
        "links": {"self": ctx.url(&format!("/identity/v3/projects/{}", project.id))},
    })
}

fn answer(ctx: &Context, outcome: &Outcome) -> Result<Value, ApiError> {
    match outcome {
        Outcome::Project(project) => Ok(json!({"project": project_view(ctx, project)})),
        other => Err(super::super::unexpected(other)),
    }
}

async fn list(ctx: Context) -> Result<Json, ApiError> {
    let enabled = ctx.query.bool("enabled")?;
    let views = ctx
        .state
        .identity
        .projects
        .values()
        .filter(|project| ctx.query.admits("name", &project.name))
        .filter(|project| ctx.query.admits("domain_id", project.domain_id.as_str()))
        .filter(|project| ctx.query.admits("parent_id", &project.parent_id))
        .filter(|project| enabled.is_none_or(|wanted| project.enabled == wanted))
        .filter(|_| ctx.query.get("is_domain").is_none_or(|wanted| wanted != "True"))
        .map(|project| project_view(&ctx, project))
        .collect();
    Ok(Json::ok(super::listed(&ctx, "projects", views)))
}

async fn of_user(ctx: Context, Path(id): Path<String>) -> Result<Json, ApiError> {
    if ctx.caller.user.id.as_str() != id {
        ctx.caller.check(policy::PROJECT_LIST)?;
    }
    let user = ctx.state.identity.users.get(id.as_str());
    let user = user.ok_or_else(|| ApiError::not_found("user", &id))?;
    let projects = projects_of(&ctx.state, user);
    let views = projects
        .into_iter()
        .filter(|project| ctx.query.admits("name", &project.name))
        .map(|project| project_view(&ctx, project));
    Ok(Json::ok(super::listed(&ctx, "projects", views.collect())))
}

async fn show(ctx: Context, Path(id): Path<String>) -> Result<Json, ApiError> {
    let has_role = || {
        let mine = projects_of(&ctx.state, &ctx.caller.user);
        mine.iter().any(|project| project.id.as_str() == id)
    };
    if !ctx.owns(&ProjectId::from(id.clone())) && !has_role() {
        ctx.caller.check(policy::PROJECT_LIST)?;
    }
    let project = ctx.state.identity.projects.get(id.as_str());
    let project = project.ok_or_else(|| ApiError::not_found("project", &id))?;
    Ok(Json::ok(json!({"project": project_view(&ctx, project)})))
}

async fn create(ctx: Context, Body(request): Body<ProjectRequest>) -> Result<Json, ApiError> {
    let fields = request.project;
    let name = fields.name.unwrap_or_default();
    super::check_name("name", &name, NAME_MAX)?;
    if fields.is_domain == Some(true) {
        return Err(ApiError::bad_request("Make a domain by POST /v3/domains."));
    }
    let own_domain = || ctx.caller.user.domain_id.to_string();
    let command = IdentityCommand::CreateProject(NewProject {
        id: ProjectId::from(ctx.mint().replace('-', "")),
        domain_id: DomainId::from(fields.domain_id.unwrap_or_else(own_domain)),
        parent_id: fields.parent_id,
        name,
        description: fields.description.unwrap_or_default(),
        enabled: fields.enabled.unwrap_or(true),
        tags: fields.tags.unwrap_or_default(),
    });
    let outcome = ctx.propose(Command::Identity(command)).await?;
    Ok(Json::created(answer(&ctx, &outcome)?))
}

async fn update(
    ctx: Context,
    Path(id): Path<String>,
    Body(request): Body<ProjectRequest>,
) -> Result<Json, ApiError> {
    let fields = request.project;
    if let Some(name) = &fields.name {
        super::check_name("name", name, NAME_MAX)?;
    }
    let command = IdentityCommand::UpdateProject {
        id: ProjectId::from(id),
        name: fields.name,
        description: fields.description,
        enabled: fields.enabled,
        tags: fields.tags,
    };
    let outcome = ctx.propose(Command::Identity(command)).await?;
    Ok(Json::ok(answer(&ctx, &outcome)?))
}

async fn remove(ctx: Context, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    ctx.propose(Command::Identity(IdentityCommand::DeleteProject(ProjectId::from(id)))).await?;
    Ok(StatusCode::NO_CONTENT)
}

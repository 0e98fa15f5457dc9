//! Who has which role where: grants at `/v3/{projects,domains}/…/users/…/roles/…` and
//! `/v3/system/users/…/roles/…`, and the list of all of them.

use axum::extract::Path;
use http::StatusCode;
use serde_json::{Value, json};

use super::super::body::Json;
use super::super::context::Context;
use super::super::error::ApiError;
use super::super::policy;
use super::super::routes::Routes;
use super::roles::role_view;
use crate::ids::{DomainId, ProjectId, RoleId, UserId};
use crate::state::Command;
use crate::state::identity::{Actor, Assignment, IdentityCommand, Target};

const ON_PROJECT: &str = "/v3/projects/{target}/users/{user}/roles/{role}";
const ON_DOMAIN: &str = "/v3/domains/{target}/users/{user}/roles/{role}";
const ON_SYSTEM: &str = "/v3/system/users/{user}/roles/{role}";

pub(super) fn routes() -> Routes {
    Routes::new(super::PREFIX)
        .get("/v3/role_assignments", policy::ASSIGNMENT_LIST, list)
        .get("/v3/projects/{target}/users/{user}/roles", policy::GRANT_LIST, list_on_project)
        .get("/v3/domains/{target}/users/{user}/roles", policy::GRANT_LIST, list_on_domain)
        .get("/v3/system/users/{user}/roles", policy::GRANT_LIST, list_on_system)
        .get(ON_PROJECT, policy::GRANT_CHECK, check_on_project)
        .get(ON_DOMAIN, policy::GRANT_CHECK, check_on_domain)
        .get(ON_SYSTEM, policy::GRANT_CHECK, check_on_system)
        .put(ON_PROJECT, policy::GRANT_CREATE, grant_on_project)
        .put(ON_DOMAIN, policy::GRANT_CREATE, grant_on_domain)
        .put(ON_SYSTEM, policy::GRANT_CREATE, grant_on_system)
        .delete(ON_PROJECT, policy::GRANT_REVOKE, revoke_on_project)
        .delete(ON_DOMAIN, policy::GRANT_REVOKE, revoke_on_domain)
        .delete(ON_SYSTEM, policy::GRANT_REVOKE, revoke_on_system)
}

type OnTarget = Path<(String, String, String)>;
type OnSystem = Path<(String, String)>;

fn assignment(target: Target, user: String, role: String) -> Assignment {
    Assignment { actor: Actor::User(UserId::from(user)), target, role_id: RoleId::from(role) }
}

fn on_project(target: String) -> Target {
    Target::Project(ProjectId::from(target))
}

fn on_domain(target: String) -> Target {
    Target::Domain(DomainId::from(target))
}

async fn grant(ctx: &Context, assignment: Assignment) -> Result<StatusCode, ApiError> {
    ctx.propose(Command::Identity(IdentityCommand::Assign(assignment))).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn revoke(ctx: &Context, assignment: Assignment) -> Result<StatusCode, ApiError> {
    ctx.propose(Command::Identity(IdentityCommand::Unassign(assignment))).await?;
    Ok(StatusCode::NO_CONTENT)
}

fn check(ctx: &Context, assignment: &Assignment) -> Result<StatusCode, ApiError> {
    if ctx.state.identity.assignments.contains(assignment) {
        return Ok(StatusCode::NO_CONTENT);
    }
    Err(ApiError::not_found("role_assignment", assignment.role_id.as_str()))
}

async fn grant_on_project(ctx: Context, Path((p, u, r)): OnTarget) -> Result<StatusCode, ApiError> {
    grant(&ctx, assignment(on_project(p), u, r)).await
}

async fn grant_on_domain(ctx: Context, Path((d, u, r)): OnTarget) -> Result<StatusCode, ApiError> {
    grant(&ctx, assignment(on_domain(d), u, r)).await
}

async fn grant_on_system(ctx: Context, Path((u, r)): OnSystem) -> Result<StatusCode, ApiError> {
    grant(&ctx, assignment(Target::System, u, r)).await
}

async fn revoke_on_project(
    ctx: Context,
    Path((p, u, r)): OnTarget,
) -> Result<StatusCode, ApiError> {
    revoke(&ctx, assignment(on_project(p), u, r)).await
}

async fn revoke_on_domain(ctx: Context, Path((d, u, r)): OnTarget) -> Result<StatusCode, ApiError> {
    revoke(&ctx, assignment(on_domain(d), u, r)).await
}

async fn revoke_on_system(ctx: Context, Path((u, r)): OnSystem) -> Result<StatusCode, ApiError> {
    revoke(&ctx, assignment(Target::System, u, r)).await
}

async fn check_on_project(ctx: Context, Path((p, u, r)): OnTarget) -> Result<StatusCode, ApiError> {
    check(&ctx, &assignment(on_project(p), u, r))
}

async fn check_on_domain(ctx: Context, Path((d, u, r)): OnTarget) -> Result<StatusCode, ApiError> {
    check(&ctx, &assignment(on_domain(d), u, r))
}

async fn check_on_system(ctx: Context, Path((u, r)): OnSystem) -> Result<StatusCode, ApiError> {
    check(&ctx, &assignment(Target::System, u, r))
}

fn granted(ctx: &Context, target: &Target, user: &str) -> Json {
    let ids = super::super::context::roles_at(&ctx.state, &UserId::from(user), target);
    let roles = ids.iter().filter_map(|id| ctx.state.identity.roles.get(id));
    let views = roles.map(|role| role_view(ctx, role)).collect();
    Json::ok(super::listed(ctx, "roles", views))
}

async fn list_on_project(ctx: Context, Path((project, user)): OnSystem) -> Json {
    granted(&ctx, &on_project(project), &user)
}

async fn list_on_domain(ctx: Context, Path((domain, user)): OnSystem) -> Json {
    granted(&ctx, &on_domain(domain), &user)
}

async fn list_on_system(ctx: Context, Path(user): Path<String>) -> Json {
    granted(&ctx, &Target::System, &user)
}

async fn list(ctx: Context) -> Result<Json, ApiError> {
    let Actor::User(own) = Actor::User(ctx.user_id());
    if ctx.query.get("user.id") != Some(own.as_str()) {
        ctx.caller.check(policy::GRANT_LIST)?;
    }
    let names = ctx.query.bool("include_names")?.unwrap_or(false);
    let views = ctx
        .state
        .identity
        .assignments
        .iter()
        .filter(|one| passes(&ctx, one))
        .map(|one| assignment_view(&ctx, one, names))
        .collect();
    Ok(Json::ok(super::listed(&ctx, "role_assignments", views)))
}

fn passes(ctx: &Context, one: &Assignment) -> bool {
    let Actor::User(user) = &one.actor;
    let (project, domain, system) = match &one.target {
        Target::Project(id) => (id.as_str(), "", ""),
        Target::Domain(id) => ("", id.as_str(), ""),
        Target::System => ("", "", "all"),
    };
    let admits = |name: &str, value: &str| {
        // The client writes `None` for what it doesn't ask for.
        ctx.query.get(name).is_none_or(|wanted| wanted == "None" || wanted == value)
    };
    admits("user.id", user.as_str())
        && admits("role.id", one.role_id.as_str())
        && admits("scope.project.id", project)
        && admits("scope.domain.id", domain)
        && admits("scope.system", system)
        && admits("group.id", "")
}

fn assignment_view(ctx: &Context, one: &Assignment, names: bool) -> Value {
    let identity = &ctx.state.identity;
    let Actor::User(user_id) = &one.actor;
    let domain_of = |id: &DomainId| json!({"id": id, "name": identity.domains.get(id).map(|domain| &domain.name)});
    let mut user = json!({"id": user_id});
    let mut role = json!({"id": one.role_id});
    let (scope, path) = match &one.target {
        Target::System => (json!({"system": {"all": true}}), "system".to_owned()),
        Target::Domain(id) => {
            let domain = if names { domain_of(id) } else { json!({"id": id}) };
            (json!({"domain": domain}), format!("domains/{id}"))
        }
        Target::Project(id) => {
            let mut project = json!({"id": id});
            if let Some(found) = identity.projects.get(id).filter(|_| names) {
                project["name"] = json!(found.name);
                project["domain"] = domain_of(&found.domain_id);
            }
            (json!({"project": project}), format!("projects/{id}"))
        }
    };
    if names {
        if let Some(found) = identity.users.get(user_id) {
            user["name"] = json!(found.name);
            user["domain"] = domain_of(&found.domain_id);
        }
        role["name"] = json!(identity.roles.get(&one.role_id).map(|found| &found.name));
    }
    let path = format!("/identity/v3/{path}/users/{user_id}/roles/{}", one.role_id);
    json!({
        "user": user, "role": role, "scope": scope, "links": {"assignment": ctx.url(&path)},
    })
}

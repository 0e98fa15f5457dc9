//! `/v3/users`.

use axum::extract::Path;
use http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};

use super::super::body::{Body, Json, nullable};
use super::super::context::Context;
use super::super::error::{ApiError, ErrorKind};
use super::super::password::PasswordError;
use super::super::policy;
use super::super::routes::Routes;
use crate::ids::{DomainId, ProjectId, UserId};
use crate::state::identity::{IdentityCommand, NewUser, User, UserUpdate};
use crate::state::{Command, Outcome};

const NAME_MAX: usize = 255;

pub(super) fn routes() -> Routes {
    Routes::new(super::PREFIX)
        .get("/v3/users", policy::USER_LIST, list)
        .post("/v3/users", policy::USER_CREATE, create)
        .get("/v3/users/{id}", policy::USER_GET, show)
        .patch("/v3/users/{id}", policy::USER_UPDATE, update)
        .delete("/v3/users/{id}", policy::USER_DELETE, remove)
        .post("/v3/users/{id}/password", policy::USER_PASSWORD, change_password)
}

#[derive(Deserialize)]
struct UserRequest {
    user: UserFields,
}

#[derive(Deserialize)]
struct UserFields {
    name: Option<String>,
    password: Option<String>,
    enabled: Option<bool>,
    domain_id: Option<String>,
    #[serde(default, deserialize_with = "nullable")]
    default_project_id: Option<Option<String>>,
    #[serde(default, deserialize_with = "nullable")]
    email: Option<Option<String>>,
    #[serde(default, deserialize_with = "nullable")]
    description: Option<Option<String>>,
}

#[derive(Deserialize)]
struct PasswordRequest {
    user: PasswordChange,
}

#[derive(Deserialize)]
struct PasswordChange {
    password: String,
    original_password: String,
}

impl From<PasswordError> for ApiError {
    fn from(error: PasswordError) -> Self {
        let kind = match error {
            PasswordError::TooLong => ErrorKind::BadRequest,
            PasswordError::Hash(_) => ErrorKind::Internal,
        };
        Self::new(kind, error.to_string())
    }
}

fn user_view(ctx: &Context, user: &User) -> Value {
    let mut view = json!({
        "id": user.id, "name": user.name, "domain_id": user.domain_id, "enabled": user.enabled,
        "password_expires_at": null, "options": {},
        "links": {"self": ctx.url(&format!("/identity/v3/users/{}", user.id))},
    });
    if let Some(project) = &user.default_project_id {
        view["default_project_id"] = json!(project);
    }
    if let Some(email) = &user.email {
        view["email"] = json!(email);
    }
    if let Some(description) = &user.description {
        view["description"] = json!(description);
    }
    view
}

fn answer(ctx: &Context, outcome: &Outcome) -> Result<Value, ApiError> {
    match outcome {
        Outcome::User(user) => Ok(json!({"user": user_view(ctx, user)})),
        other => Err(super::super::unexpected(other)),
    }
}

async fn list(ctx: Context) -> Result<Json, ApiError> {
    let enabled = ctx.query.bool("enabled")?;
    let views = ctx
        .state
        .identity
        .users
        .values()
        .filter(|user| ctx.query.admits("name", &user.name))
        .filter(|user| ctx.query.admits("domain_id", user.domain_id.as_str()))
        .filter(|user| enabled.is_none_or(|wanted| user.enabled == wanted))
        .map(|user| user_view(&ctx, user))
        .collect();
    Ok(Json::ok(super::listed(&ctx, "users", views)))
}

async fn show(ctx: Context, Path(id): Path<String>) -> Result<Json, ApiError> {
    if ctx.caller.user.id.as_str() != id {
        ctx.caller.check(policy::USER_LIST)?;
    }
    let user = ctx.state.identity.users.get(id.as_str());
    let user = user.ok_or_else(|| ApiError::not_found("user", &id))?;
    Ok(Json::ok(json!({"user": user_view(&ctx, user)})))
}

async fn hashed(ctx: &Context, password: Option<String>) -> Result<Option<String>, ApiError> {
    match password {
        None => Ok(None),
        Some(password) => Ok(Some(ctx.api.passwords.hash(password).await?)),
    }
}

async fn create(ctx: Context, Body(request): Body<UserRequest>) -> Result<Json, ApiError> {
    let fields = request.user;
    let name = fields.name.unwrap_or_default();
    super::check_name("name", &name, NAME_MAX)?;
    let own_domain = || ctx.caller.user.domain_id.to_string();
    let command = IdentityCommand::CreateUser(NewUser {
        id: UserId::from(ctx.mint().replace('-', "")),
        domain_id: DomainId::from(fields.domain_id.unwrap_or_else(own_domain)),
        name,
        password_hash: hashed(&ctx, fields.password).await?,
        enabled: fields.enabled.unwrap_or(true),
        default_project_id: fields.default_project_id.flatten().map(ProjectId::from),
        email: fields.email.flatten(),
        description: fields.description.flatten(),
    });
    let outcome = ctx.propose(Command::Identity(command)).await?;
    Ok(Json::created(answer(&ctx, &outcome)?))
}

async fn update(
    ctx: Context,
    Path(id): Path<String>,
    Body(request): Body<UserRequest>,
) -> Result<Json, ApiError> {
    let fields = request.user;
    if let Some(name) = &fields.name {
        super::check_name("name", name, NAME_MAX)?;
    }
    let command = IdentityCommand::UpdateUser(UserUpdate {
        id,
        name: fields.name,
        password_hash: hashed(&ctx, fields.password).await?,
        enabled: fields.enabled,
        default_project_id: fields.default_project_id.map(|project| project.map(ProjectId::from)),
        email: fields.email,
        description: fields.description,
    });
    let outcome = ctx.propose(Command::Identity(command)).await?;
    Ok(Json::ok(answer(&ctx, &outcome)?))
}

async fn change_password(
    ctx: Context,
    Path(id): Path<String>,
    Body(request): Body<PasswordRequest>,
) -> Result<StatusCode, ApiError> {
    let user = &ctx.caller.user;
    if user.id.as_str() != id {
        return Err(ApiError::forbidden("A user changes its own password only."));
    }
    let change = request.user;
    let right = ctx.api.passwords.verify(change.original_password, user.password_hash.clone());
    if !right.await {
        return Err(ApiError::unauthorized());
    }
    let command = IdentityCommand::UpdateUser(UserUpdate {
        id,
        password_hash: hashed(&ctx, Some(change.password)).await?,
        ..UserUpdate::default()
    });
    ctx.propose(Command::Identity(command)).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn remove(ctx: Context, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    ctx.propose(Command::Identity(IdentityCommand::DeleteUser(UserId::from(id)))).await?;
    Ok(StatusCode::NO_CONTENT)
}

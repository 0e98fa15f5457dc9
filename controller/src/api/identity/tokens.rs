//! `/v3/auth/…`: tokens are issued, shown, and say where else their user could go.

use std::collections::BTreeSet;
use std::sync::Arc;

use axum::Extension;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};

use super::super::body::{Body, Json};
use super::super::context::{Caller, Context, header_token, roles_at};
use super::super::edge::Edge;
use super::super::error::{ApiError, ErrorKind};
use super::super::routes::Routes;
use super::super::token::{self, Payload, Scope};
use super::super::{Api, policy, time};
use super::catalog::catalog;
use super::domains::domain_view;
use super::projects::project_view;
use crate::state::State as CloudState;
use crate::state::identity::{Actor, Domain, Project, Target, User};

const SUBJECT: HeaderName = HeaderName::from_static("x-subject-token");

/// How many tokens may follow from one another by re-scoping.
const METHODS_MAX: usize = 4;

pub(super) fn routes() -> Routes {
    Routes::new(super::PREFIX)
        .open_post("/v3/auth/tokens", issue)
        .get("/v3/auth/tokens", policy::TOKEN_VALIDATE, show)
        .get("/v3/auth/projects", policy::AUTH_PROJECTS, projects)
        .get("/v3/auth/domains", policy::AUTH_DOMAINS, domains)
        .get("/v3/auth/system", policy::AUTH_SYSTEM, system)
        .get("/v3/auth/catalog", policy::AUTH_CATALOG, show_catalog)
}

#[derive(Deserialize)]
struct IssueRequest {
    auth: Auth,
}

#[derive(Deserialize)]
struct Auth {
    identity: Identity,
    scope: Option<ScopeRequest>,
}

#[derive(Deserialize)]
struct Identity {
    methods: Vec<String>,
    password: Option<PasswordMethod>,
    token: Option<TokenMethod>,
}

#[derive(Deserialize)]
struct PasswordMethod {
    user: UserReference,
}

#[derive(Deserialize)]
struct UserReference {
    id: Option<String>,
    name: Option<String>,
    domain: Option<Named>,
    password: String,
}

#[derive(Deserialize)]
struct TokenMethod {
    id: String,
}

#[derive(Deserialize)]
struct Named {
    id: Option<String>,
    name: Option<String>,
}

#[derive(Deserialize)]
struct ProjectReference {
    id: Option<String>,
    name: Option<String>,
    domain: Option<Named>,
}

/// `"scope": "unscoped"` or an object with one of three keys.
#[derive(Deserialize)]
#[serde(untagged)]
enum ScopeRequest {
    Word(String),
    Object(ScopeObject),
}

#[derive(Deserialize)]
struct ScopeObject {
    project: Option<ProjectReference>,
    domain: Option<Named>,
    system: Option<SystemScope>,
}

#[derive(Deserialize)]
struct SystemScope {
    all: Option<bool>,
}

fn find_domain<'a>(state: &'a CloudState, named: &Named) -> Option<&'a Domain> {
    let domains = &state.identity.domains;
    match (&named.id, &named.name) {
        (Some(id), _) => domains.get(id.as_str()),
        (None, Some(name)) => domains.values().find(|domain| domain.name == *name),
        (None, None) => None,
    }
}

fn find_user<'a>(state: &'a CloudState, reference: &UserReference) -> Option<&'a User> {
    if let Some(id) = &reference.id {
        return state.identity.users.get(id.as_str());
    }
    let name = reference.name.as_ref()?;
    let domain = find_domain(state, reference.domain.as_ref()?)?;
    state.identity.users.values().find(|user| user.domain_id == domain.id && user.name == *name)
}

fn find_project<'a>(state: &'a CloudState, reference: &ProjectReference) -> Option<&'a Project> {
    if let Some(id) = &reference.id {
        return state.identity.projects.get(id.as_str());
    }
    let name = reference.name.as_ref()?;
    let domain = find_domain(state, reference.domain.as_ref()?)?;
    let mut projects = state.identity.projects.values();
    projects.find(|project| project.domain_id == domain.id && project.name == *name)
}

/// Who asks, and what their new token inherits.
struct Proven {
    user: User,
    methods: Vec<String>,
    expires_ms: u64,
    parent_audit: Option<String>,
    /// The scope to keep when none is asked for.
    scope: Option<Scope>,
}

async fn prove(api: &Api, state: &CloudState, identity: Identity) -> Result<Proven, ApiError> {
    let [method] = identity.methods.as_slice() else {
        return Err(ApiError::bad_request("Exactly one authentication method is supported."));
    };
    match (method.as_str(), identity.password, identity.token) {
        ("password", Some(password), _) => prove_password(api, state, password.user).await,
        ("token", _, Some(token)) => prove_token(api, state, &token.id),
        ("password" | "token", _, _) => {
            Err(ApiError::bad_request(format!("The method {method} lacks its object.")))
        }
        _ => Err(ApiError::unauthorized()),
    }
}

async fn prove_password(
    api: &Api,
    state: &CloudState,
    reference: UserReference,
) -> Result<Proven, ApiError> {
    let user = find_user(state, &reference).cloned();
    let hash = user.as_ref().and_then(|user| user.password_hash.clone());
    let right = api.passwords.verify(reference.password, hash).await;
    let user = user.filter(|user| {
        let domain = state.identity.domains.get(&user.domain_id);
        right && user.enabled && domain.is_some_and(|domain| domain.enabled)
    });
    Ok(Proven {
        user: user.ok_or_else(ApiError::unauthorized)?,
        methods: vec!["password".to_owned()],
        expires_ms: api.cloud.now_ms().saturating_add(api.config.token_lifetime_s * 1000),
        parent_audit: None,
        scope: None,
    })
}

fn prove_token(api: &Api, state: &CloudState, id: &str) -> Result<Proven, ApiError> {
    let payload = token::open(&api.cloud.token_keys(), id, api.cloud.now_ms());
    let payload = payload.ok_or_else(ApiError::unauthorized)?;
    let caller = Caller::confirm(state, payload).ok_or_else(ApiError::unauthorized)?;
    let mut methods = caller.token.methods;
    if !methods.iter().any(|method| method == "token") && methods.len() < METHODS_MAX {
        methods.push("token".to_owned());
    }
    Ok(Proven {
        user: caller.user,
        methods,
        // A token made from another one lives no longer than that one.
        expires_ms: caller.token.expires_ms,
        parent_audit: caller.token.audit_ids.last().cloned(),
        scope: Some(caller.token.scope),
    })
}

fn project_scope(project: &Project) -> Scope {
    Scope::Project(project.id.to_string(), project.auth_generation)
}

fn choose_scope(
    state: &CloudState,
    proven: &Proven,
    asked: Option<ScopeRequest>,
) -> Result<Scope, ApiError> {
    let Some(asked) = asked else { return Ok(default_scope(state, proven)) };
    let object = match asked {
        ScopeRequest::Word(word) if word == "unscoped" => return Ok(Scope::Unscoped),
        ScopeRequest::Word(word) => {
            return Err(ApiError::bad_request(format!("There is no scope {word:?}.")));
        }
        ScopeRequest::Object(object) => object,
    };
    match object {
        ScopeObject { project: Some(reference), .. } => {
            find_project(state, &reference).map(project_scope).ok_or_else(ApiError::unauthorized)
        }
        ScopeObject { domain: Some(named), .. } => find_domain(state, &named)
            .map(|domain| Scope::Domain(domain.id.to_string()))
            .ok_or_else(ApiError::unauthorized),
        ScopeObject { system: Some(SystemScope { all: Some(true) }), .. } => Ok(Scope::System),
        _ => Err(ApiError::bad_request("A scope names a project, a domain or the system.")),
    }
}

/// Without a scope asked for: that of the token it is made from, else the user's default
/// project if it has a role there.
fn default_scope(state: &CloudState, proven: &Proven) -> Scope {
    if let Some(scope) = &proven.scope {
        return scope.clone();
    }
    let user = &proven.user;
    let project = user.default_project_id.as_ref().and_then(|id| state.identity.projects.get(id));
    match project {
        Some(project)
            if project.enabled
                && !roles_at(state, &user.id, &Target::Project(project.id.clone())).is_empty() =>
        {
            project_scope(project)
        }
        _ => Scope::Unscoped,
    }
}

async fn issue(
    State(api): State<Arc<Api>>,
    Extension(edge): Extension<Edge>,
    uri: http::Uri,
    Body(request): Body<IssueRequest>,
) -> Result<Response, ApiError> {
    let state = api.cloud.read().await?;
    let proven = prove(&api, &state, request.auth.identity).await?;
    let scope = choose_scope(&state, &proven, request.auth.scope)?;
    let audit_ids = [Some(token::audit_id()), proven.parent_audit].into_iter().flatten().collect();
    let payload = Payload {
        user_id: proven.user.id.to_string(),
        generation: proven.user.auth_generation,
        scope,
        methods: proven.methods,
        issued_ms: api.cloud.now_ms(),
        expires_ms: proven.expires_ms,
        audit_ids,
    };
    let caller = Caller::confirm(&state, payload).ok_or_else(ApiError::unauthorized)?;
    let sealed = token::seal(&api.cloud.token_keys(), &caller.token)
        .ok_or_else(|| ApiError::new(ErrorKind::Internal, "There is no key for tokens."))?;
    let with_catalog = !uri.query().unwrap_or_default().contains("nocatalog");
    let body = json!({"token": token_view(&state, &caller, with_catalog.then_some(&edge))});
    Ok(with_subject(Json::created(body), &sealed))
}

fn with_subject(answer: Json, token: &str) -> Response {
    let mut response = answer.into_response();
    if let Ok(value) = HeaderValue::from_str(token) {
        response.headers_mut().insert(SUBJECT, value);
    }
    response
}

async fn show(ctx: Context, headers: HeaderMap) -> Result<Response, ApiError> {
    let subject = header_token(&headers, SUBJECT.as_str())
        .ok_or_else(|| ApiError::bad_request("The header X-Subject-Token is missing."))?;
    let caller = token::open(&ctx.cloud().token_keys(), subject, ctx.now_ms())
        .and_then(|payload| Caller::confirm(&ctx.state, payload))
        .ok_or_else(|| ApiError::new(ErrorKind::NotFound, "Could not find token."))?;
    let own = caller.user.id == ctx.caller.user.id;
    if !own && !ctx.caller.roles.contains("service") {
        ctx.require_admin(policy::TOKEN_VALIDATE.name)?;
    }
    let with_catalog = !ctx.query.has("nocatalog");
    let body = token_view(&ctx.state, &caller, with_catalog.then_some(&ctx.edge));
    Ok(with_subject(Json(StatusCode::OK, json!({"token": body})), subject))
}

fn domain_reference(state: &CloudState, id: &crate::ids::DomainId) -> Value {
    json!({"id": id, "name": state.identity.domains.get(id).map(|domain| &domain.name)})
}

fn role_references(state: &CloudState, caller: &Caller) -> Vec<Value> {
    let roles = state.identity.roles.values();
    roles
        .filter(|role| caller.roles.contains(&role.name))
        .map(|role| json!({"id": role.id, "name": role.name}))
        .collect()
}

fn token_view(state: &CloudState, caller: &Caller, edge: Option<&Edge>) -> Value {
    let user = &caller.user;
    let mut view = json!({
        "methods": caller.token.methods,
        "user": {
            "id": user.id,
            "name": user.name,
            "domain": domain_reference(state, &user.domain_id),
            "password_expires_at": null,
        },
        "audit_ids": caller.token.audit_ids,
        "issued_at": time::micros(caller.token.issued_ms),
        "expires_at": time::micros(caller.token.expires_ms),
    });
    if let Some(project) = &caller.project {
        view["project"] = json!({
            "id": project.id,
            "name": project.name,
            "domain": domain_reference(state, &project.domain_id),
        });
        view["is_domain"] = json!(false);
    }
    if let Some(domain) = &caller.domain {
        view["domain"] = json!({"id": domain.id, "name": domain.name});
    }
    if caller.system {
        view["system"] = json!({"all": true});
    }
    if caller.token.scope != Scope::Unscoped {
        view["roles"] = json!(role_references(state, caller));
        if let Some(edge) = edge {
            view["catalog"] = catalog(state, edge, caller.project.as_ref().map(|p| &p.id));
        }
    }
    view
}

/// Where a user has any role.
fn targets(state: &CloudState, user: &User) -> BTreeSet<Target> {
    let assignments = state.identity.assignments.iter();
    assignments
        .filter(|one| one.actor == Actor::User(user.id.clone()))
        .map(|one| one.target.clone())
        .collect()
}

/// The projects that a user has any role in.
pub(super) fn projects_of<'a>(state: &'a CloudState, user: &User) -> Vec<&'a Project> {
    targets(state, user)
        .iter()
        .filter_map(|target| match target {
            Target::Project(id) => state.identity.projects.get(id),
            _ => None,
        })
        .collect()
}

async fn projects(ctx: Context) -> Json {
    let projects = projects_of(&ctx.state, &ctx.caller.user);
    let views = projects.into_iter().filter(|p| p.enabled).map(|p| project_view(&ctx, p));
    Json::ok(super::listed(&ctx, "projects", views.collect()))
}

async fn domains(ctx: Context) -> Json {
    let views = targets(&ctx.state, &ctx.caller.user)
        .iter()
        .filter_map(|target| match target {
            Target::Domain(id) => ctx.state.identity.domains.get(id),
            _ => None,
        })
        .filter(|domain| domain.enabled)
        .map(|domain| domain_view(&ctx, domain))
        .collect();
    Json::ok(super::listed(&ctx, "domains", views))
}

async fn system(ctx: Context) -> Json {
    let all = targets(&ctx.state, &ctx.caller.user).contains(&Target::System);
    let system = if all { json!([{"all": true}]) } else { json!([]) };
    Json::ok(json!({"system": system, "links": {"self": ctx.self_url()}}))
}

async fn show_catalog(ctx: Context) -> Result<Json, ApiError> {
    if ctx.caller.token.scope == Scope::Unscoped {
        return Err(ApiError::forbidden("An unscoped token has no catalog."));
    }
    let project = ctx.caller.project.as_ref().map(|project| &project.id);
    let catalog = catalog(&ctx.state, &ctx.edge, project);
    Ok(Json::ok(json!({"catalog": catalog, "links": {"self": ctx.self_url()}})))
}

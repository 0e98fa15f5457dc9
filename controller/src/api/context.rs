//! What a handler knows of its request: the state it was read against, who asks and where.

use std::collections::BTreeSet;
use std::sync::Arc;

use axum::extract::FromRequestParts;
use http::HeaderMap;
use http::request::Parts;

use super::Api;
use super::cloud::Cloud;
use super::edge::Edge;
use super::error::{ApiError, ErrorKind};
use super::microversion::Microversion;
use super::policy::{Action, Rule};
use super::query::Params;
use super::token::{self, Payload, Scope};
use crate::ids::{ProjectId, RoleId, UserId};
use crate::state::identity::{Actor, Assignment, Domain, Project, Target, User};
use crate::state::{Command, Outcome, State};

/// Who asks, as its token says and the state confirms.
#[derive(Clone, Debug)]
pub(crate) struct Caller {
    pub(crate) user: User,
    /// Where the token is good, if in a project.
    pub(crate) project: Option<Project>,
    /// Where the token is good, if in a domain.
    pub(crate) domain: Option<Domain>,
    /// The token is good on the whole system.
    pub(crate) system: bool,
    /// The roles there, implied ones included, by name.
    pub(crate) roles: BTreeSet<String>,
    pub(crate) token: Payload,
}

/// A request, authenticated and allowed by its route's policy row.
#[derive(Clone)]
pub(crate) struct Context {
    pub(crate) api: Arc<Api>,
    /// The state when the request was read; older than what the request then changes.
    pub(crate) state: State,
    pub(crate) caller: Caller,
    pub(crate) query: Params,
    pub(crate) edge: Edge,
    /// The path, without the query.
    pub(crate) path: String,
}

impl FromRequestParts<Arc<Api>> for Context {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, api: &Arc<Api>) -> Result<Self, ApiError> {
        let edge = parts.extensions.get::<Edge>().cloned();
        let action = parts.extensions.get::<&'static Action>().copied();
        let (Some(edge), Some(action)) = (edge, action) else {
            return Err(ApiError::new(ErrorKind::Internal, "The route has no policy."));
        };
        let state = api.cloud.read().await?;
        let caller = authenticate(api, &state, &parts.headers)?;
        caller.check(action)?;
        let query = Params::parse(parts.uri.query().unwrap_or_default())?;
        let path = edge.path.clone();
        Ok(Self { api: Arc::clone(api), state, caller, query, edge, path })
    }
}

/// The token that a request carries.
pub(crate) fn header_token<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok().map(str::trim).filter(|token| !token.is_empty())
}

fn authenticate(api: &Api, state: &State, headers: &HeaderMap) -> Result<Caller, ApiError> {
    let token = header_token(headers, "x-auth-token").ok_or_else(ApiError::unauthorized)?;
    let payload = token::open(&api.cloud.token_keys(), token, api.cloud.now_ms())
        .ok_or_else(ApiError::unauthorized)?;
    Caller::confirm(state, payload).ok_or_else(ApiError::unauthorized)
}

/// A role and the roles it implies.
fn with_implied(role: &str) -> &[&str] {
    match role {
        "admin" => &["admin", "manager", "member", "reader"],
        "manager" => &["manager", "member", "reader"],
        "member" => &["member", "reader"],
        _ => &[],
    }
}

/// The roles of a user somewhere, by id and without implied ones.
pub(crate) fn roles_at(state: &State, user: &UserId, target: &Target) -> BTreeSet<RoleId> {
    let first = Assignment {
        actor: Actor::User(user.clone()),
        target: target.clone(),
        role_id: RoleId::from(String::new()),
    };
    let assignments = state.identity.assignments.range(first.clone()..);
    assignments
        .take_while(|one| one.actor == first.actor && one.target == first.target)
        .map(|one| one.role_id.clone())
        .collect()
}

/// The names of roles, with those they imply where such roles exist.
fn role_names(state: &State, ids: &BTreeSet<RoleId>) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for id in ids {
        let Some(role) = state.identity.roles.get(id) else { continue };
        names.insert(role.name.clone());
        if role.domain_id.is_none() {
            let implied = with_implied(&role.name).iter().map(|name| (*name).to_owned());
            names.extend(implied.filter(|name| global_role(state, name).is_some()));
        }
    }
    names
}

/// The id of a role that belongs to no domain.
pub(crate) fn global_role(state: &State, name: &str) -> Option<RoleId> {
    state
        .identity
        .roles
        .values()
        .find(|role| role.domain_id.is_none() && role.name == name)
        .map(|role| role.id.clone())
}

impl Caller {
    /// The caller that a token means now; `None` when it no longer means anybody.
    pub(crate) fn confirm(state: &State, token: Payload) -> Option<Self> {
        let identity = &state.identity;
        let user = identity.users.get(token.user_id.as_str())?.clone();
        let admitted = user.enabled
            && user.auth_generation == token.generation
            && identity.domains.get(&user.domain_id)?.enabled;
        if !admitted {
            return None;
        }
        let (mut project, mut domain, mut system) = (None, None, false);
        let target = match &token.scope {
            Scope::Unscoped => None,
            Scope::Project(id, generation) => {
                let found = identity.projects.get(id.as_str())?;
                let good = found.enabled
                    && found.auth_generation == *generation
                    && identity.domains.get(&found.domain_id)?.enabled;
                project = good.then(|| found.clone());
                Some(Target::Project(project.as_ref()?.id.clone()))
            }
            Scope::Domain(id) => {
                let found = identity.domains.get(id.as_str()).filter(|found| found.enabled)?;
                domain = Some(found.clone());
                Some(Target::Domain(found.id.clone()))
            }
            Scope::System => {
                system = true;
                Some(Target::System)
            }
        };
        let roles = match &target {
            None => BTreeSet::new(),
            Some(target) => {
                let ids = roles_at(state, &user.id, target);
                if ids.is_empty() {
                    return None;
                }
                role_names(state, &ids)
            }
        };
        Some(Self { user, project, domain, system, roles, token })
    }

    pub(crate) fn is_admin(&self) -> bool {
        self.roles.contains("admin")
    }

    /// Refuses unless the action's rule admits the caller.
    pub(crate) fn check(&self, action: &Action) -> Result<(), ApiError> {
        let has = |role: &str| self.roles.contains(role);
        let allowed = match action.rule {
            Rule::Authenticated => true,
            Rule::Reader => self.is_admin() || (self.project.is_some() && has("reader")),
            Rule::Member => self.is_admin() || (self.project.is_some() && has("member")),
            Rule::AdminReader => self.is_admin() || (self.system && has("reader")),
            Rule::Admin => self.is_admin(),
        };
        if allowed {
            return Ok(());
        }
        Err(ApiError::forbidden(format!("Policy doesn't allow {} to be performed.", action.name)))
    }
}

impl Context {
    pub(crate) fn cloud(&self) -> &dyn Cloud {
        self.api.cloud.as_ref()
    }

    pub(crate) fn is_admin(&self) -> bool {
        self.caller.is_admin()
    }

    /// Refuses with 403 unless the caller is an administrator.
    pub(crate) fn require_admin(&self, act: &'static str) -> Result<(), ApiError> {
        self.caller.check(&Action { name: act, rule: Rule::Admin })
    }

    /// The project that the request is about: the token's.
    pub(crate) fn project_id(&self) -> Result<ProjectId, ApiError> {
        self.caller
            .project
            .as_ref()
            .map(|project| project.id.clone())
            .ok_or_else(|| ApiError::forbidden("This needs a token that is scoped to a project."))
    }

    pub(crate) fn user_id(&self) -> UserId {
        self.caller.user.id.clone()
    }

    /// True when objects of `project` are the caller's to see: its own, or an
    /// administrator's.
    pub(crate) fn sees(&self, project: &ProjectId) -> bool {
        self.is_admin() || self.owns(project)
    }

    /// True when `project` is the token's.
    pub(crate) fn owns(&self, project: &ProjectId) -> bool {
        self.caller.project.as_ref().is_some_and(|own| own.id == *project)
    }

    /// True when a list shall show objects of `project`: the caller's own; for an
    /// administrator all of them if the query says `all_tenants` (or its other names), or
    /// those of the project it names.
    pub(crate) fn lists(&self, project: &ProjectId) -> Result<bool, ApiError> {
        if !self.is_admin() {
            return Ok(self.owns(project));
        }
        for name in ["project_id", "tenant_id"] {
            if let Some(named) = self.query.get(name) {
                return Ok(named == project.as_str());
            }
        }
        let all = self.query.bool("all_tenants")?.or(self.query.bool("all_projects")?);
        Ok(all.unwrap_or(false) || self.caller.project.is_none() || self.owns(project))
    }

    /// The microversion that the answer is to have.
    pub(crate) fn at_least(&self, major: u16, minor: u16) -> bool {
        self.edge.microversion >= Microversion(major, minor)
    }

    /// Refuses with 404 what a microversion doesn't have yet.
    pub(crate) fn require_version(&self, major: u16, minor: u16) -> Result<(), ApiError> {
        if self.at_least(major, minor) {
            return Ok(());
        }
        Err(ApiError::new(ErrorKind::NotFound, "The resource could not be found."))
    }

    /// A new UUID in its hyphenated form.
    pub(crate) fn mint(&self) -> String {
        uuid::Uuid::new_v4().to_string()
    }

    pub(crate) fn now_ms(&self) -> u64 {
        self.api.cloud.now_ms()
    }

    /// `https://host:port` and then `path`.
    pub(crate) fn url(&self, path: &str) -> String {
        format!("{}{path}", self.edge.base_url)
    }

    /// This request's own URL without its query.
    pub(crate) fn self_url(&self) -> String {
        self.url(&self.path)
    }

    /// Carries out a command and answers what came of it.
    pub(crate) async fn propose(&self, command: Command) -> Result<Outcome, ApiError> {
        self.state.cluster.admits(&command)?;
        let id = *uuid::Uuid::new_v4().as_bytes();
        let outcome = self.api.cloud.propose(id, command).await;
        if let Err(error) = &outcome {
            tracing::debug!(request_id = %self.edge.request_id, %error, "command not carried out");
        }
        Ok(outcome?)
    }

    /// The state after what this request changed.
    pub(crate) async fn fresh(&self) -> Result<State, ApiError> {
        Ok(self.api.cloud.read().await?)
    }
}

//! Domains, projects, users, roles and who has which role where.

use std::collections::BTreeSet;
use std::fmt;

use imbl::{OrdMap, OrdSet};
use serde::{Deserialize, Serialize};

use crate::ids::{DomainId, ProjectId, RoleId, UserId};

/// Identity.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Identity {
    /// Domains.
    pub domains: OrdMap<DomainId, Domain>,
    /// Projects.
    pub projects: OrdMap<ProjectId, Project>,
    /// Users.
    pub users: OrdMap<UserId, User>,
    /// Roles.
    pub roles: OrdMap<RoleId, Role>,
    /// Who has which role where.
    pub assignments: OrdSet<Assignment>,
}

/// A domain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Domain {
    /// Its id.
    pub id: DomainId,
    /// Its name, unique.
    pub name: String,
    /// Free text.
    pub description: String,
    /// A disabled domain admits nobody.
    pub enabled: bool,
    /// Tags.
    pub tags: BTreeSet<String>,
}

/// A project.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Project {
    /// Its id.
    pub id: ProjectId,
    /// Its domain.
    pub domain_id: DomainId,
    /// Its parent: a project, or the domain's id.
    pub parent_id: String,
    /// Its name, unique in the domain.
    pub name: String,
    /// Free text.
    pub description: String,
    /// A disabled project admits nobody.
    pub enabled: bool,
    /// Grows when tokens made before must no longer be good.
    pub auth_generation: u64,
    /// Tags.
    pub tags: BTreeSet<String>,
}

/// A user.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct User {
    /// Its id.
    pub id: UserId,
    /// Its domain.
    pub domain_id: DomainId,
    /// Its name, unique in the domain.
    pub name: String,
    /// The password's hash (PHC string).
    pub password_hash: Option<String>,
    /// When the password was set.
    pub password_created_ms: u64,
    /// A disabled user is not admitted.
    pub enabled: bool,
    /// Where it is scoped when it names no scope.
    pub default_project_id: Option<ProjectId>,
    /// Mail address.
    pub email: Option<String>,
    /// Free text.
    pub description: Option<String>,
    /// Grows when tokens made before must no longer be good.
    pub auth_generation: u64,
}

impl fmt::Debug for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("User")
            .field("id", &self.id)
            .field("domain_id", &self.domain_id)
            .field("name", &self.name)
            .field("enabled", &self.enabled)
            .field("auth_generation", &self.auth_generation)
            .finish_non_exhaustive()
    }
}

/// A role.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Role {
    /// Its id.
    pub id: RoleId,
    /// Its name, unique.
    pub name: String,
    /// The domain it belongs to, if any.
    pub domain_id: Option<DomainId>,
    /// Free text.
    pub description: Option<String>,
}

/// A role of someone, somewhere.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Assignment {
    /// Who.
    pub actor: Actor,
    /// Where.
    pub target: Target,
    /// Which role.
    pub role_id: RoleId,
}

/// Who can have a role.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Actor {
    /// A user.
    User(UserId),
}

/// Where one can have a role.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Target {
    /// In a project.
    Project(ProjectId),
    /// In a domain.
    Domain(DomainId),
    /// On the whole system.
    System,
}

//! Commands on identity. An update's `None` leaves the field as it is.

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Assignment, Domain, Role};
use crate::ids::{DomainId, ProjectId, RoleId, UserId};

/// A command on identity.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum IdentityCommand {
    /// Makes a domain.
    CreateDomain(Domain),
    /// Changes a domain.
    UpdateDomain {
        /// Which.
        id: DomainId,
        /// New name.
        name: Option<String>,
        /// New description.
        description: Option<String>,
        /// Enable or disable.
        enabled: Option<bool>,
    },
    /// Removes a disabled domain with its projects and users.
    DeleteDomain(DomainId),
    /// Makes a project.
    CreateProject(NewProject),
    /// Changes a project.
    UpdateProject {
        /// Which.
        id: ProjectId,
        /// New name.
        name: Option<String>,
        /// New description.
        description: Option<String>,
        /// Enable or disable.
        enabled: Option<bool>,
        /// New tags.
        tags: Option<BTreeSet<String>>,
    },
    /// Removes a project and every assignment in it.
    DeleteProject(ProjectId),
    /// Makes a user.
    CreateUser(NewUser),
    /// Changes a user.
    UpdateUser(UserUpdate),
    /// Removes a user, its assignments and keypairs.
    DeleteUser(UserId),
    /// Makes a role.
    CreateRole(Role),
    /// Changes a role.
    UpdateRole {
        /// Which.
        id: RoleId,
        /// New name.
        name: Option<String>,
        /// New description.
        description: Option<String>,
    },
    /// Removes a role and every assignment of it.
    DeleteRole(RoleId),
    /// Gives a role; giving it again changes nothing.
    Assign(Assignment),
    /// Takes a role away.
    Unassign(Assignment),
}

/// A project to make.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NewProject {
    /// Its id.
    pub id: ProjectId,
    /// Its domain.
    pub domain_id: DomainId,
    /// Its parent, the domain when absent.
    pub parent_id: Option<String>,
    /// Its name.
    pub name: String,
    /// Free text.
    pub description: String,
    /// Admits anybody.
    pub enabled: bool,
    /// Tags.
    pub tags: BTreeSet<String>,
}

/// A user to make.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub struct NewUser {
    /// Its id.
    pub id: UserId,
    /// Its domain.
    pub domain_id: DomainId,
    /// Its name.
    pub name: String,
    /// The password's hash (PHC string).
    pub password_hash: Option<String>,
    /// Is admitted.
    pub enabled: bool,
    /// Where it is scoped when it names no scope.
    pub default_project_id: Option<ProjectId>,
    /// Mail address.
    pub email: Option<String>,
    /// Free text.
    pub description: Option<String>,
}

/// A change of a user.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct UserUpdate {
    /// Which; an empty id is refused.
    pub id: String,
    /// New name.
    pub name: Option<String>,
    /// The new password's hash.
    pub password_hash: Option<String>,
    /// Enable or disable.
    pub enabled: Option<bool>,
    /// New default project; the inner `None` removes it.
    pub default_project_id: Option<Option<ProjectId>>,
    /// New mail address.
    pub email: Option<Option<String>>,
    /// New description.
    pub description: Option<Option<String>>,
}

impl fmt::Debug for NewUser {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NewUser")
            .field("id", &self.id)
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for UserUpdate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UserUpdate")
            .field("id", &self.id)
            .field("sets_password", &self.password_hash.is_some())
            .finish_non_exhaustive()
    }
}

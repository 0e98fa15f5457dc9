//! Changes of identity.

use super::{
    Actor, Assignment, Domain, IdentityCommand, NewProject, NewUser, Project, Role, Target, User,
    UserUpdate,
};
use crate::ids::{DomainId, ProjectId, RoleId, UserId};
use crate::state::State;
use crate::state::cluster::DEFAULT_DOMAIN;
use crate::state::limits::{
    ASSIGNMENTS_MAX, DOMAINS_MAX, PROJECTS_MAX, ROLES_MAX, USERS_MAX, room,
};
use crate::state::outcome::{Outcome, Rejection, RejectionKind};

impl State {
    pub(in crate::state) fn apply_identity(
        &mut self,
        command: &IdentityCommand,
    ) -> Result<Outcome, Rejection> {
        match command {
            IdentityCommand::CreateDomain(domain) => self.create_domain(domain),
            IdentityCommand::UpdateDomain { id, name, description, enabled } => {
                self.update_domain(id, name.as_ref(), description.as_ref(), *enabled)
            }
            IdentityCommand::DeleteDomain(id) => self.delete_domain(id),
            IdentityCommand::CreateProject(project) => self.create_project(project),
            IdentityCommand::UpdateProject { id, name, description, enabled, tags } => {
                let project = self.project(id)?;
                if let Some(name) = name {
                    let domain_id = project.domain_id.clone();
                    self.check_project_name(&domain_id, name, Some(id))?;
                }
                let project = self.identity.projects.get_mut(id).expect("it was found above");
                self.index.remove_project(project);
                set(&mut project.name, name);
                self.index.add_project(project);
                set(&mut project.description, description);
                set(&mut project.tags, tags);
                project.auth_generation += u64::from(project.enabled && *enabled == Some(false));
                set(&mut project.enabled, enabled);
                Ok(Outcome::Project(Box::new(project.clone())))
            }
            IdentityCommand::DeleteProject(id) => self.delete_project(id),
            IdentityCommand::CreateUser(user) => self.create_user(user),
            IdentityCommand::UpdateUser(update) => self.update_user(update),
            IdentityCommand::DeleteUser(id) => {
                self.user(id)?;
                self.remove_user(id);
                Ok(Outcome::Done)
            }
            IdentityCommand::CreateRole(role) => self.create_role(role),
            IdentityCommand::UpdateRole { id, name, description } => {
                self.role(id)?;
                if let Some(name) = name {
                    self.check_role_name(name, Some(id))?;
                }
                let role = self.identity.roles.get_mut(id).expect("it was found above");
                set(&mut role.name, name);
                if description.is_some() {
                    role.description.clone_from(description);
                }
                Ok(Outcome::Role(Box::new(role.clone())))
            }
            IdentityCommand::DeleteRole(id) => {
                self.role(id)?;
                self.identity.roles.remove(id);
                self.drop_assignments(|assignment| assignment.role_id == *id);
                Ok(Outcome::Done)
            }
            IdentityCommand::Assign(assignment) => self.assign(assignment),
            IdentityCommand::Unassign(assignment) => {
                if self.identity.assignments.remove(assignment).is_none() {
                    return Err(Rejection::not_found("role assignment", &assignment.role_id));
                }
                Ok(Outcome::Done)
            }
        }
    }

    fn domain(&self, id: &DomainId) -> Result<&Domain, Rejection> {
        self.identity.domains.get(id).ok_or_else(|| Rejection::not_found("domain", id))
    }

    fn project(&self, id: &ProjectId) -> Result<&Project, Rejection> {
        self.identity.projects.get(id).ok_or_else(|| Rejection::not_found("project", id))
    }

    fn user(&self, id: &UserId) -> Result<&User, Rejection> {
        self.identity.users.get(id).ok_or_else(|| Rejection::not_found("user", id))
    }

    fn role(&self, id: &RoleId) -> Result<&Role, Rejection> {
        self.identity.roles.get(id).ok_or_else(|| Rejection::not_found("role", id))
    }

    fn create_domain(&mut self, domain: &Domain) -> Result<Outcome, Rejection> {
        room(self.identity.domains.len(), DOMAINS_MAX, "domain")?;
        self.check_domain_name(&domain.name, None)?;
        if self.identity.domains.contains_key(&domain.id) {
            return Err(taken("domain", domain.id.as_str()));
        }
        self.identity.domains.insert(domain.id.clone(), domain.clone());
        Ok(Outcome::Domain(Box::new(domain.clone())))
    }

    fn check_domain_name(&self, name: &str, except: Option<&DomainId>) -> Result<(), Rejection> {
        let same = |known: &Domain| known.name == name && Some(&known.id) != except;
        if self.identity.domains.values().any(same) { Err(taken("domain", name)) } else { Ok(()) }
    }

    fn update_domain(
        &mut self,
        id: &DomainId,
        name: Option<&String>,
        description: Option<&String>,
        enabled: Option<bool>,
    ) -> Result<Outcome, Rejection> {
        self.domain(id)?;
        if let Some(name) = name {
            self.check_domain_name(name, Some(id))?;
        }
        if enabled == Some(false) && id.as_str() == DEFAULT_DOMAIN {
            let message = "The default domain can't be disabled.";
            return Err(Rejection::new(RejectionKind::Forbidden, "domain", id, message));
        }
        let domain = self.identity.domains.get_mut(id).expect("it was found above");
        set(&mut domain.name, &name.cloned());
        set(&mut domain.description, &description.cloned());
        set(&mut domain.enabled, &enabled);
        Ok(Outcome::Domain(Box::new(domain.clone())))
    }

    fn delete_domain(&mut self, id: &DomainId) -> Result<Outcome, Rejection> {
        if self.domain(id)?.enabled {
            let message = "Cannot delete a domain that is enabled, please disable it first.";
            return Err(Rejection::new(RejectionKind::Forbidden, "domain", id, message));
        }
        let projects: Vec<ProjectId> = self
            .identity
            .projects
            .values()
            .filter(|project| project.domain_id == *id)
            .map(|project| project.id.clone())
            .collect();
        let users: Vec<UserId> = self
            .identity
            .users
            .values()
            .filter(|user| user.domain_id == *id)
            .map(|user| user.id.clone())
            .collect();
        projects.iter().for_each(|project| self.remove_project(project));
        users.iter().for_each(|user| self.remove_user(user));
        self.drop_assignments(|assignment| assignment.target == Target::Domain(id.clone()));
        self.identity.domains.remove(id);
        Ok(Outcome::Done)
    }

    fn create_project(&mut self, new: &NewProject) -> Result<Outcome, Rejection> {
        room(self.identity.projects.len(), PROJECTS_MAX, "project")?;
        self.domain(&new.domain_id)?;
        self.check_project_name(&new.domain_id, &new.name, None)?;
        if self.identity.projects.contains_key(&new.id) {
            return Err(taken("project", new.id.as_str()));
        }
        let parent_id = new.parent_id.clone().unwrap_or_else(|| new.domain_id.to_string());
        if parent_id != new.domain_id.as_str() {
            self.project(&ProjectId::from(parent_id.clone()))?;
        }
        let project = Project {
            id: new.id.clone(),
            domain_id: new.domain_id.clone(),
            parent_id,
            name: new.name.clone(),
            description: new.description.clone(),
            enabled: new.enabled,
            auth_generation: 1,
            tags: new.tags.clone(),
        };
        self.index.add_project(&project);
        self.identity.projects.insert(project.id.clone(), project.clone());
        self.ensure_default_group(&project.id);
        Ok(Outcome::Project(Box::new(project)))
    }

    fn check_project_name(
        &self,
        domain: &DomainId,
        name: &str,
        except: Option<&ProjectId>,
    ) -> Result<(), Rejection> {
        let known = self.index.projects.get(&(domain.clone(), name.to_owned()));
        match known.filter(|known| Some(*known) != except) {
            Some(_) => Err(taken("project", name)),
            None => Ok(()),
        }
    }

    fn delete_project(&mut self, id: &ProjectId) -> Result<Outcome, Rejection> {
        self.project(id)?;
        if self.identity.projects.values().any(|project| project.parent_id == id.as_str()) {
            let message = "Cannot delete a project that has projects below it.";
            return Err(Rejection::new(RejectionKind::Forbidden, "project", id, message));
        }
        self.remove_project(id);
        Ok(Outcome::Done)
    }

    /// Removes a project. Its servers, volumes and networks stay, as in OpenStack, and an
    /// administrator removes them.
    fn remove_project(&mut self, id: &ProjectId) {
        if let Some(project) = self.identity.projects.remove(id) {
            self.index.remove_project(&project);
        }
        self.drop_assignments(|assignment| assignment.target == Target::Project(id.clone()));
        self.quota.forget_limits(id);
        self.drop_unused_default_group(id);
    }

    fn create_user(&mut self, new: &NewUser) -> Result<Outcome, Rejection> {
        room(self.identity.users.len(), USERS_MAX, "user")?;
        self.domain(&new.domain_id)?;
        self.check_user_name(&new.domain_id, &new.name, None)?;
        if self.identity.users.contains_key(&new.id) {
            return Err(taken("user", new.id.as_str()));
        }
        let user = User {
            id: new.id.clone(),
            domain_id: new.domain_id.clone(),
            name: new.name.clone(),
            password_hash: new.password_hash.clone(),
            password_created_ms: self.time_ms,
            enabled: new.enabled,
            default_project_id: new.default_project_id.clone(),
            email: new.email.clone(),
            description: new.description.clone(),
            auth_generation: 1,
        };
        self.index.add_user(&user);
        self.identity.users.insert(user.id.clone(), user.clone());
        Ok(Outcome::User(Box::new(user)))
    }

    fn check_user_name(
        &self,
        domain: &DomainId,
        name: &str,
        except: Option<&UserId>,
    ) -> Result<(), Rejection> {
        let known = self.index.users.get(&(domain.clone(), name.to_owned()));
        match known.filter(|known| Some(*known) != except) {
            Some(_) => Err(taken("user", name)),
            None => Ok(()),
        }
    }

    fn update_user(&mut self, update: &UserUpdate) -> Result<Outcome, Rejection> {
        let id = UserId::from(update.id.clone());
        let domain = self.user(&id)?.domain_id.clone();
        if let Some(name) = &update.name {
            self.check_user_name(&domain, name, Some(&id))?;
        }
        let now = self.time_ms;
        let user = self.identity.users.get_mut(&id).expect("it was found above");
        self.index.remove_user(user);
        set(&mut user.name, &update.name);
        self.index.add_user(user);
        set(&mut user.default_project_id, &update.default_project_id);
        set(&mut user.email, &update.email);
        set(&mut user.description, &update.description);
        let disabled = user.enabled && update.enabled == Some(false);
        set(&mut user.enabled, &update.enabled);
        if let Some(hash) = &update.password_hash {
            user.password_hash = Some(hash.clone());
            user.password_created_ms = now;
        }
        user.auth_generation += u64::from(disabled || update.password_hash.is_some());
        Ok(Outcome::User(Box::new(user.clone())))
    }

    fn remove_user(&mut self, id: &UserId) {
        if let Some(user) = self.identity.users.remove(id) {
            self.index.remove_user(&user);
        }
        let first = Assignment {
            actor: Actor::User(id.clone()),
            target: Target::Project(ProjectId::from(String::new())),
            role_id: RoleId::from(String::new()),
        };
        let of_user = self.identity.assignments.range(first.clone()..);
        let of_user: Vec<Assignment> =
            of_user.take_while(|known| known.actor == first.actor).cloned().collect();
        for assignment in of_user {
            self.identity.assignments.remove(&assignment);
        }
        self.drop_keypairs(id);
    }

    fn create_role(&mut self, role: &Role) -> Result<Outcome, Rejection> {
        room(self.identity.roles.len(), ROLES_MAX, "role")?;
        self.check_role_name(&role.name, None)?;
        if self.identity.roles.contains_key(&role.id) {
            return Err(taken("role", role.id.as_str()));
        }
        self.identity.roles.insert(role.id.clone(), role.clone());
        Ok(Outcome::Role(Box::new(role.clone())))
    }

    fn check_role_name(&self, name: &str, except: Option<&RoleId>) -> Result<(), Rejection> {
        let same = |known: &Role| known.name == name && Some(&known.id) != except;
        if self.identity.roles.values().any(same) { Err(taken("role", name)) } else { Ok(()) }
    }

    fn assign(&mut self, assignment: &Assignment) -> Result<Outcome, Rejection> {
        self.role(&assignment.role_id)?;
        let Actor::User(user) = &assignment.actor;
        self.user(user)?;
        match &assignment.target {
            Target::Project(id) => {
                self.project(id)?;
            }
            Target::Domain(id) => {
                self.domain(id)?;
            }
            Target::System => {}
        }
        if !self.identity.assignments.contains(assignment) {
            room(self.identity.assignments.len(), ASSIGNMENTS_MAX, "role assignment")?;
            self.identity.assignments.insert(assignment.clone());
        }
        Ok(Outcome::Done)
    }

    fn drop_assignments(&mut self, gone: impl Fn(&Assignment) -> bool) {
        self.identity.assignments =
            self.identity.assignments.iter().filter(|known| !gone(known)).cloned().collect();
    }
}

fn taken(resource: &str, name: &str) -> Rejection {
    let message = format!(
        "Conflict occurred attempting to store {resource} - Duplicate entry found with name or id {name}."
    );
    Rejection::conflict(resource, name, message)
}

/// Sets a field that the command names.
pub(in crate::state) fn set<T: Clone>(field: &mut T, value: &Option<T>) {
    if let Some(value) = value {
        field.clone_from(value);
    }
}

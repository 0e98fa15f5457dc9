//! Changes of the cluster itself.

use std::collections::BTreeSet;

use super::{Cluster, ClusterCommand, Host, Init, JoinToken, NewHost};
use crate::ids::{DomainId, HostId, ProjectId, RoleId, UserId, derived_id};
use crate::state::identity::{Actor, Assignment, Domain, Project, Role, Target, User};
use crate::state::limits::{HOSTS_MAX, JOIN_TOKENS_MAX, room};
use crate::state::outcome::{Outcome, Rejection, RejectionKind};
use crate::state::{QuotaResource, State, UNLIMITED};

/// The availability zone of hosts that weren't given another.
pub const DEFAULT_ZONE: &str = "nova";

/// The id of the default domain, as Keystone has it.
pub const DEFAULT_DOMAIN: &str = "default";

/// The roles that every cloud has.
pub const ROLES: [&str; 5] = ["admin", "manager", "member", "reader", "service"];

impl State {
    pub(in crate::state) fn apply_cluster(
        &mut self,
        command: &ClusterCommand,
    ) -> Result<Outcome, Rejection> {
        match command {
            ClusterCommand::Init(init) => self.init(init),
            ClusterCommand::IssueJoinToken { hash, expires_ms, replaces } => {
                self.issue_join_token(hash, *expires_ms, *replaces)
            }
            ClusterCommand::RegisterHost { token_hash, host } => {
                self.register_host(token_hash, host)
            }
            ClusterCommand::UpdateHost { id, addresses, capacity, feature_level } => {
                let host = self.host_mut(*id)?;
                host.addresses = addresses.clone();
                host.capacity = *capacity;
                host.feature_level = *feature_level;
                Ok(Outcome::Host(Box::new(host.clone())))
            }
            ClusterCommand::SetHostService {
                id,
                disabled,
                disabled_reason,
                forced_down,
                evacuate,
            } => {
                let host = self.host_mut(*id)?;
                host.evacuate = evacuate.unwrap_or(host.evacuate);
                if let Some(disabled) = *disabled {
                    host.disabled = disabled;
                    host.disabled_reason = disabled_reason.clone().filter(|_| disabled);
                }
                host.forced_down = forced_down.unwrap_or(host.forced_down);
                Ok(Outcome::Host(Box::new(host.clone())))
            }
            ClusterCommand::FenceHost { id, epoch } => self.fence_host(*id, *epoch),
            ClusterCommand::HostReturned { id, epoch } => self.host_returned(*id, *epoch),
            ClusterCommand::RemoveHost { id, force } => self.remove_host(*id, *force),
            ClusterCommand::RaiseFeatureLevel { level, next_host_id } => {
                self.raise_feature_level(*level, *next_host_id)
            }
            ClusterCommand::RotateKey { from, to } => self.rotate_key(from, to),
            ClusterCommand::RetireKey { id } => self.retire_key(id),
            ClusterCommand::RotateTokenKeys { rotations, staged } => {
                self.rotate_token_keys(*rotations, staged)
            }
            ClusterCommand::ResealTokenKeys { rotations, keys } => {
                self.reseal_token_keys(*rotations, keys)
            }
            ClusterCommand::Adopt { cluster_id, survivor, host } => {
                self.adopt(cluster_id, *survivor, host.as_deref())
            }
        }
    }

    pub(super) fn host_mut(&mut self, id: HostId) -> Result<&mut Host, Rejection> {
        self.cluster.hosts.get_mut(&id).ok_or_else(|| Rejection::not_found("host", id))
    }

    fn init(&mut self, init: &Init) -> Result<Outcome, Rejection> {
        if !self.cluster.id.is_empty() {
            let message = format!("The cluster is already initialised, as {}.", self.cluster.id);
            return Err(Rejection::conflict("cluster", &self.cluster.id, message));
        }
        if init.cluster_id.is_empty() {
            return Err(Rejection::invalid("cluster", "", "A cluster needs an id."));
        }
        self.check_external_range(init.floating_pool)?;
        if init.feature_level == 0 || init.feature_level > init.host.feature_level {
            let message = format!(
                "A cluster can't start with feature level {}: its first host supports {}.",
                init.feature_level, init.host.feature_level
            );
            return Err(Rejection::invalid("cluster", &init.cluster_id, message));
        }
        self.cluster = Cluster {
            id: init.cluster_id.clone(),
            name: init.name.clone(),
            region: init.region.clone(),
            next_host_id: 1,
            feature_level: init.feature_level,
            ..Cluster::default()
        };
        let host = self.admit(&init.host);
        self.init_identity(init);
        self.init_external_network(init.floating_pool);
        Ok(Outcome::Host(Box::new(host)))
    }

    /// The default domain, the usual roles, and an administrator of project `admin`.
    fn init_identity(&mut self, init: &Init) {
        let mint = |kind: &str| derived_id(kind, &init.cluster_id).simple().to_string();
        let domain_id = DomainId::from(DEFAULT_DOMAIN);
        self.identity.domains.insert(
            domain_id.clone(),
            Domain {
                id: domain_id.clone(),
                name: "Default".into(),
                description: "The default domain".into(),
                enabled: true,
                tags: BTreeSet::new(),
            },
        );
        for name in ROLES {
            let id = RoleId::from(mint(&format!("role/{name}")));
            let role =
                Role { id: id.clone(), name: name.into(), domain_id: None, description: None };
            self.identity.roles.insert(id, role);
        }
        let project_id = ProjectId::from(mint("project/admin"));
        self.identity.projects.insert(
            project_id.clone(),
            Project {
                id: project_id.clone(),
                domain_id: domain_id.clone(),
                parent_id: DEFAULT_DOMAIN.into(),
                name: "admin".into(),
                description: "The administrator's project".into(),
                enabled: true,
                auth_generation: 1,
                tags: BTreeSet::new(),
            },
        );
        let user_id = UserId::from(mint("user/admin"));
        self.identity.users.insert(
            user_id.clone(),
            User {
                id: user_id.clone(),
                domain_id: domain_id.clone(),
                name: init.admin_name.clone(),
                password_hash: Some(init.admin_password_hash.clone()),
                password_created_ms: self.time_ms,
                enabled: true,
                default_project_id: Some(project_id.clone()),
                email: None,
                description: None,
                auth_generation: 1,
            },
        );
        let made = "it was inserted above";
        self.index.add_project(self.identity.projects.get(&project_id).expect(made));
        self.index.add_user(self.identity.users.get(&user_id).expect(made));
        let role_id = RoleId::from(mint("role/admin"));
        for target in
            [Target::Project(project_id.clone()), Target::Domain(domain_id), Target::System]
        {
            self.identity.assignments.insert(Assignment {
                actor: Actor::User(user_id.clone()),
                target,
                role_id: role_id.clone(),
            });
        }
        // The operator's own project measures and repairs; it isn't the one to be limited.
        for resource in QuotaResource::ALL {
            self.quota.limits.insert((project_id.clone(), resource), UNLIMITED);
        }
        self.ensure_default_group(&project_id);
    }

    fn issue_join_token(
        &mut self,
        hash: &str,
        expires_ms: u64,
        replaces: Option<HostId>,
    ) -> Result<Outcome, Rejection> {
        self.check_replaced(replaces)?;
        if hash.is_empty() || expires_ms <= self.time_ms {
            return Err(Rejection::invalid("join token", "", "The token has already expired."));
        }
        if self.cluster.join_tokens.contains_key(hash) {
            return Err(Rejection::conflict("join token", "", "This token was issued already."));
        }
        let now = self.time_ms;
        let stale = |token: &JoinToken| token.used_by.is_none() && token.expires_ms <= now;
        let stale: Vec<String> = self
            .cluster
            .join_tokens
            .iter()
            .filter(|(_, token)| stale(token))
            .map(|(hash, _)| hash.clone())
            .collect();
        room(self.cluster.join_tokens.len() - stale.len(), JOIN_TOKENS_MAX, "join token")?;
        for hash in stale {
            self.cluster.join_tokens.remove(&hash);
        }
        let token = JoinToken { expires_ms, used_by: None, replaces };
        self.cluster.join_tokens.insert(hash.to_owned(), token);
        Ok(Outcome::Done)
    }

    fn register_host(&mut self, token_hash: &str, host: &NewHost) -> Result<Outcome, Rejection> {
        let forbidden =
            |message: &str| Rejection::new(RejectionKind::Forbidden, "join token", "", message);
        let token = self
            .cluster
            .join_tokens
            .get(token_hash)
            .ok_or_else(|| forbidden("This join token is unknown."))?;
        if token.used_by.is_some() {
            return Err(forbidden("This join token was used already; issue another one."));
        }
        if token.expires_ms <= self.time_ms {
            return Err(forbidden("This join token has expired; issue another one."));
        }
        let replaces = token.replaces;
        self.check_replaced(replaces)?;
        let others = || self.cluster.hosts.values().filter(|known| Some(known.id) != replaces);
        if others().any(|known| known.name == host.name) {
            let message = format!("A host named {} is already in the cluster.", host.name);
            return Err(Rejection::conflict("host", &host.name, message));
        }
        if others().any(|known| known.addresses.api == host.addresses.api) {
            let message = format!("A host at {} is already in the cluster.", host.addresses.api);
            return Err(Rejection::conflict("host", &host.name, message));
        }
        room(self.cluster.hosts.len(), HOSTS_MAX, "host")?;
        if host.feature_level < self.cluster.feature_level {
            let message = format!(
                "Host {} supports feature level {} and the cluster is at {}: install a newer trine there.",
                host.name, host.feature_level, self.cluster.feature_level
            );
            return Err(Rejection::conflict("host", &host.name, message));
        }
        let host = self.admit(host);
        if let Some(token) = self.cluster.join_tokens.get_mut(token_hash) {
            token.used_by = Some(host.id);
        }
        if let Some(old) = replaces {
            self.replace_host(old, &host);
        }
        Ok(Outcome::Host(Box::new(host)))
    }

    pub(super) fn admit(&mut self, host: &NewHost) -> Host {
        let id = HostId(self.cluster.next_host_id);
        self.cluster.next_host_id += 1;
        let host = Host {
            id,
            name: host.name.clone(),
            addresses: host.addresses.clone(),
            capacity: host.capacity,
            availability_zone: DEFAULT_ZONE.into(),
            disabled: false,
            disabled_reason: None,
            forced_down: false,
            registered_ms: self.time_ms,
            replaced_by: None,
            fenced: None,
            fence_epoch: 0,
            evacuate: false,
            feature_level: host.feature_level,
        };
        self.cluster.hosts.insert(id, host.clone());
        host
    }
}

//! Quotas: limits for each project, and what each uses, counted where it changes.

use imbl::OrdMap;
use serde::{Deserialize, Serialize};

use super::outcome::{Rejection, RejectionKind};
use crate::ids::ProjectId;

/// What a project has a limited amount of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum QuotaResource {
    /// Servers.
    Instances,
    /// Their vCPUs.
    Cores,
    /// Their memory, MiB.
    Ram,
    /// Server groups.
    ServerGroups,
    /// Servers in one group (a limit, not a count).
    ServerGroupMembers,
    /// Keypairs of one user (a limit, not a count).
    KeyPairs,
    /// Metadata items of one server (a limit, not a count).
    MetadataItems,
    /// Volumes.
    Volumes,
    /// Their size, GiB.
    Gigabytes,
    /// Networks.
    Networks,
    /// Subnets.
    Subnets,
    /// Ports.
    Ports,
    /// Security groups.
    SecurityGroups,
    /// Their rules.
    SecurityGroupRules,
    /// Floating IPs.
    FloatingIps,
}

impl QuotaResource {
    /// All of them.
    pub const ALL: [Self; 15] = [
        Self::Instances,
        Self::Cores,
        Self::Ram,
        Self::ServerGroups,
        Self::ServerGroupMembers,
        Self::KeyPairs,
        Self::MetadataItems,
        Self::Volumes,
        Self::Gigabytes,
        Self::Networks,
        Self::Subnets,
        Self::Ports,
        Self::SecurityGroups,
        Self::SecurityGroupRules,
        Self::FloatingIps,
    ];

    /// The name in the API of its service.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Instances => "instances",
            Self::Cores => "cores",
            Self::Ram => "ram",
            Self::ServerGroups => "server_groups",
            Self::ServerGroupMembers => "server_group_members",
            Self::KeyPairs => "key_pairs",
            Self::MetadataItems => "metadata_items",
            Self::Volumes => "volumes",
            Self::Gigabytes => "gigabytes",
            Self::Networks => "network",
            Self::Subnets => "subnet",
            Self::Ports => "port",
            Self::SecurityGroups => "security_group",
            Self::SecurityGroupRules => "security_group_rule",
            Self::FloatingIps => "floatingip",
        }
    }

    /// The limit that Nova, Cinder and Neutron ship with.
    pub fn default_limit(self) -> i64 {
        match self {
            Self::Instances
            | Self::ServerGroups
            | Self::ServerGroupMembers
            | Self::Volumes
            | Self::SecurityGroups => 10,
            Self::Cores => 20,
            Self::Ram => 51_200,
            Self::KeyPairs | Self::Networks | Self::Subnets | Self::SecurityGroupRules => 100,
            Self::MetadataItems => 128,
            Self::Gigabytes => 1000,
            Self::Ports => 500,
            Self::FloatingIps => 50,
        }
    }
}

/// No limit.
pub const UNLIMITED: i64 = -1;

/// Limits and usage of every project.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Quotas {
    /// Limits that differ from the default.
    pub limits: OrdMap<(ProjectId, QuotaResource), i64>,
    /// What is used; a pair that isn't here uses nothing.
    pub usage: OrdMap<(ProjectId, QuotaResource), u64>,
}

/// A command on quotas.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum QuotaCommand {
    /// Sets limits of a project; -1 means none.
    Set {
        /// Whose.
        project_id: ProjectId,
        /// Which, and to what.
        limits: Vec<(QuotaResource, i64)>,
    },
    /// Returns a project to the default limits.
    Reset(ProjectId),
}

impl Quotas {
    /// A project's limit; -1 means none.
    pub fn limit(&self, project: &ProjectId, resource: QuotaResource) -> i64 {
        self.limits
            .get(&(project.clone(), resource))
            .copied()
            .unwrap_or_else(|| resource.default_limit())
    }

    /// What a project uses.
    pub fn used(&self, project: &ProjectId, resource: QuotaResource) -> u64 {
        self.usage.get(&(project.clone(), resource)).copied().unwrap_or(0)
    }

    /// Checks that `more` still fits.
    ///
    /// # Errors
    /// `QuotaExceeded`, with the numbers.
    pub(crate) fn check(
        &self,
        project: &ProjectId,
        resource: QuotaResource,
        more: u64,
    ) -> Result<(), Rejection> {
        let used = self.used(project, resource);
        self.check_count(project, resource, used, more)
    }

    /// Checks that `more` fits beside `used`, which is counted elsewhere.
    pub(crate) fn check_count(
        &self,
        project: &ProjectId,
        resource: QuotaResource,
        used: u64,
        more: u64,
    ) -> Result<(), Rejection> {
        let limit = self.limit(project, resource);
        let fits = u64::try_from(limit).map_or(true, |limit| used.saturating_add(more) <= limit);
        if fits {
            return Ok(());
        }
        let name = resource.as_str();
        Err(Rejection::new(
            RejectionKind::QuotaExceeded,
            name,
            project,
            format!(
                "Quota exceeded for {name}: Requested {more}, but already used {used} of {limit} {name}"
            ),
        ))
    }

    /// Counts `more` in.
    pub(crate) fn charge(&mut self, project: &ProjectId, resource: QuotaResource, more: u64) {
        if more > 0 {
            *self.usage.entry((project.clone(), resource)).or_insert(0) += more;
        }
    }

    /// Counts `less` out.
    pub(crate) fn release(&mut self, project: &ProjectId, resource: QuotaResource, less: u64) {
        let key = (project.clone(), resource);
        let left = self.usage.get(&key).copied().unwrap_or(0).saturating_sub(less);
        if left == 0 {
            self.usage.remove(&key);
        } else {
            self.usage.insert(key, left);
        }
    }

    pub(crate) fn apply(&mut self, command: &QuotaCommand) {
        match command {
            QuotaCommand::Set { project_id, limits } => {
                for &(resource, limit) in limits {
                    self.limits.insert((project_id.clone(), resource), limit.max(UNLIMITED));
                }
            }
            QuotaCommand::Reset(project_id) => self.forget_limits(project_id),
        }
    }

    /// Forgets a project's own limits.
    pub(crate) fn forget_limits(&mut self, project_id: &ProjectId) {
        for resource in QuotaResource::ALL {
            self.limits.remove(&(project_id.clone(), resource));
        }
    }
}

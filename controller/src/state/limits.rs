//! The largest number of everything that is kept.

use super::State;
use super::outcome::{Rejection, RejectionKind};

/// Hosts of a cluster.
pub const HOSTS_MAX: usize = 1_000;
/// Join tokens that are kept, used ones included.
pub const JOIN_TOKENS_MAX: usize = 1_000;
/// Cluster keys that are being retired at a time.
pub const KEYS_RETIRING_MAX: usize = 4;
/// Ids of retired cluster keys that are kept.
pub const KEYS_RETIRED_MAX: usize = 64;
/// Secondary keys of tokens.
pub const TOKEN_KEYS_SECONDARY_MAX: usize = 4;
/// Domains.
pub const DOMAINS_MAX: usize = 10_000;
/// Projects.
pub const PROJECTS_MAX: usize = 100_000;
/// Users.
pub const USERS_MAX: usize = 100_000;
/// Roles.
pub const ROLES_MAX: usize = 1_000;
/// Assignments of roles.
pub const ASSIGNMENTS_MAX: usize = 500_000;
/// Limits of projects that differ from the default.
pub const QUOTA_LIMITS_MAX: usize = 1_500_000;
/// Images.
pub const IMAGES_MAX: usize = 100_000;
/// Flavors.
pub const FLAVORS_MAX: usize = 10_000;
/// Keypairs.
pub const KEYPAIRS_MAX: usize = 200_000;
/// Server groups.
pub const SERVER_GROUPS_MAX: usize = 100_000;
/// Servers.
pub const SERVERS_MAX: usize = 200_000;
/// Network devices of one server.
pub const SERVER_PORTS_MAX: usize = 16;
/// Volumes of one server: `/dev/vdb` to `/dev/vdz`.
pub const SERVER_VOLUMES_MAX: usize = 25;
/// Volumes.
pub const VOLUMES_MAX: usize = 500_000;
/// Networks.
pub const NETWORKS_MAX: usize = 100_000;
/// Subnets.
pub const SUBNETS_MAX: usize = 200_000;
/// Ports.
pub const PORTS_MAX: usize = 500_000;
/// Addresses of one port.
pub const PORT_ADDRESSES_MAX: usize = 8;
/// Further addresses of one port.
pub const ADDRESS_PAIRS_MAX: usize = 10;
/// Security groups.
pub const SECURITY_GROUPS_MAX: usize = 200_000;
/// Floating IPs.
pub const FLOATING_IPS_MAX: usize = 100_000;
/// Forwarded ports of one floating IP.
pub const PORT_FORWARDINGS_MAX: usize = 1_000;
/// Allocation pools, name servers or routes of one subnet.
pub const SUBNET_LISTS_MAX: usize = 20;

/// Projects that a private flavor is given to.
pub const FLAVOR_PROJECTS_MAX: usize = 10_000;
/// Extra specifications of one flavor.
pub const FLAVOR_SPECS_MAX: usize = 256;
/// Servers of one group, whatever its quota says.
pub const SERVER_GROUP_MEMBERS_MAX: usize = 10_000;
/// Rules of one security group, whatever its quota says.
pub const SECURITY_GROUP_RULES_MAX: usize = 10_000;
/// Tags of one thing.
pub const TAGS_MAX: usize = 256;
/// Metadata items or properties of one thing.
pub const METADATA_MAX: usize = 1_024;

/// Refuses one more when there are `max` already.
pub(crate) fn room(present: usize, max: usize, resource: &str) -> Result<(), Rejection> {
    if present < max {
        return Ok(());
    }
    let message = format!("No more than {max} of this kind ({resource}) can be kept.");
    Err(Rejection::new(RejectionKind::TooMany, resource, "", message))
}

impl State {
    /// Refuses more than `max` of something that belongs to one object; since feature level 2.
    pub(in crate::state) fn room_within(
        &self,
        wanted: usize,
        max: usize,
        resource: &str,
    ) -> Result<(), Rejection> {
        if wanted <= max || !self.cluster.has(2) {
            return Ok(());
        }
        room(max, max, resource)
    }
}

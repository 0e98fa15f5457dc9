//! How much there is of everything, and how much there may be.
//!
//! Every field of the state is named here, without `..`: a collection that is added without its
//! limit does not compile.

use super::State;
use super::cluster::{Cluster, KeyRing, TokenKeyRing};
use super::compute::Compute;
use super::identity::Identity;
use super::image::Images;
use super::limits::{
    ASSIGNMENTS_MAX, DOMAINS_MAX, FLAVORS_MAX, FLOATING_IPS_MAX, HOSTS_MAX, IMAGES_MAX,
    JOIN_TOKENS_MAX, KEYPAIRS_MAX, KEYS_RETIRED_MAX, KEYS_RETIRING_MAX, NETWORKS_MAX, PORTS_MAX,
    PROJECTS_MAX, QUOTA_LIMITS_MAX, ROLES_MAX, SECURITY_GROUPS_MAX, SERVER_GROUPS_MAX, SERVERS_MAX,
    SUBNETS_MAX, TOKEN_KEYS_SECONDARY_MAX, USERS_MAX, VOLUMES_MAX,
};
use super::network::Networking;
use super::outcome::OUTCOMES_MAX;
use super::quota::{QuotaResource, Quotas};
use super::volume::Volumes;

/// A collection's size beside its limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Its name.
    pub name: &'static str,
    /// How many there are.
    pub len: usize,
    /// How many there may be.
    pub max: usize,
}

fn size(name: &'static str, len: usize, max: usize) -> Size {
    Size { name, len, max }
}

impl State {
    /// Every collection of the state.
    pub fn sizes(&self) -> Vec<Size> {
        let Self {
            time_ms: _,
            applied_index: _,
            cluster,
            identity,
            image: Images { images },
            compute,
            volume: Volumes { volumes, homed, by_server },
            network,
            quota: Quotas { limits, usage },
            outcomes,
            index: _,
        } = self;
        let mut sizes = cluster_sizes(cluster);
        sizes.extend(identity_sizes(identity));
        sizes.extend(compute_sizes(compute));
        sizes.extend(network_sizes(network));
        sizes.extend([
            size("images", images.len(), IMAGES_MAX),
            size("volumes", volumes.len(), VOLUMES_MAX),
            size("volumes by home", homed.len(), HOSTS_MAX),
            size("volumes by server", by_server.len(), SERVERS_MAX),
            size("quota limits", limits.len(), QUOTA_LIMITS_MAX),
            size("quota usage", usage.len(), QUOTA_LIMITS_MAX * QuotaResource::ALL.len()),
            size("outcomes", outcomes.len(), OUTCOMES_MAX),
        ]);
        sizes
    }
}

fn cluster_sizes(cluster: &Cluster) -> Vec<Size> {
    let Cluster {
        id: _,
        name: _,
        region: _,
        hosts,
        join_tokens,
        next_host_id: _,
        feature_level: _,
        keys: KeyRing { current: _, retiring, retired },
        token_keys: TokenKeyRing { rotations: _, staged: _, primary: _, secondary, rotated_ms: _ },
    } = cluster;
    vec![
        size("hosts", hosts.len(), HOSTS_MAX),
        size("join tokens", join_tokens.len(), JOIN_TOKENS_MAX),
        size("retiring keys", retiring.len(), KEYS_RETIRING_MAX),
        size("retired keys", retired.len(), KEYS_RETIRED_MAX),
        size("secondary keys of tokens", secondary.len(), TOKEN_KEYS_SECONDARY_MAX),
    ]
}

fn identity_sizes(identity: &Identity) -> Vec<Size> {
    let Identity { domains, projects, users, roles, assignments } = identity;
    vec![
        size("domains", domains.len(), DOMAINS_MAX),
        size("projects", projects.len(), PROJECTS_MAX),
        size("users", users.len(), USERS_MAX),
        size("roles", roles.len(), ROLES_MAX),
        size("role assignments", assignments.len(), ASSIGNMENTS_MAX),
    ]
}

fn compute_sizes(compute: &Compute) -> Vec<Size> {
    let Compute { flavors, keypairs, groups, servers, placed } = compute;
    vec![
        size("flavors", flavors.len(), FLAVORS_MAX),
        size("keypairs", keypairs.len(), KEYPAIRS_MAX),
        size("server groups", groups.len(), SERVER_GROUPS_MAX),
        size("servers", servers.len(), SERVERS_MAX),
        size("servers by host", placed.len(), HOSTS_MAX),
    ]
}

fn network_sizes(network: &Networking) -> Vec<Size> {
    let Networking {
        networks,
        subnets,
        ports,
        security_groups,
        floating_ips,
        addresses,
        macs,
        group_ports,
        vnis,
    } = network;
    vec![
        size("networks", networks.len(), NETWORKS_MAX + 1),
        size("subnets", subnets.len(), SUBNETS_MAX + 1),
        size("ports", ports.len(), PORTS_MAX),
        size("security groups", security_groups.len(), SECURITY_GROUPS_MAX),
        size("floating IPs", floating_ips.len(), FLOATING_IPS_MAX),
        size("addresses by subnet", addresses.len(), SUBNETS_MAX + 1),
        size("ports by network", macs.len(), NETWORKS_MAX),
        size("ports by security group", group_ports.len(), SECURITY_GROUPS_MAX),
        size("networks by VXLAN identifier", vnis.len(), NETWORKS_MAX),
    ]
}

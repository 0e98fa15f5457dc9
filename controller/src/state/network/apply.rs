//! Changes of networks and subnets, and where each command goes.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net};

use super::addresses::{DONE, default_pools, usable};
use super::{
    AllocationPool, Gateway, Network, NetworkCommand, NewNetwork, NewSubnet, Subnet, SubnetUpdate,
};
use crate::ids::{NetworkId, ProjectId, SubnetId, derived_id};
use crate::state::identity::set;
use crate::state::limits::{NETWORKS_MAX, SUBNET_LISTS_MAX, SUBNETS_MAX, room};
use crate::state::outcome::{Outcome, Rejection, RejectionKind};
use crate::state::{QuotaResource, State};

/// The largest packet of a tenant network: what 1500 bytes leave after VXLAN over IPv4.
pub const TENANT_MTU: u16 = 1450;
/// The smallest that IPv4 allows a network to have.
pub const MTU_MIN: u16 = 68;
/// The first VXLAN network identifier that is given out.
pub const VNI_FIRST: u32 = 1001;
/// The last one that there is.
pub const VNI_LAST: u32 = 0x00ff_ffff;
/// The name of the external network.
pub const EXTERNAL_NETWORK: &str = "public";

impl State {
    pub(in crate::state) fn apply_network(
        &mut self,
        command: &NetworkCommand,
    ) -> Result<Outcome, Rejection> {
        match command {
            NetworkCommand::CreateNetwork(new) => self.create_network(new),
            NetworkCommand::UpdateNetwork { .. } => self.update_network(command),
            NetworkCommand::DeleteNetwork(id) => self.delete_network(id),
            NetworkCommand::CreateSubnet(new) => self.create_subnet(new),
            NetworkCommand::UpdateSubnet(update) => self.update_subnet(update),
            NetworkCommand::DeleteSubnet(id) => self.delete_subnet(id),
            NetworkCommand::CreatePort(new) => self.create_port(new),
            NetworkCommand::UpdatePort(update) => self.update_port(update),
            NetworkCommand::DeletePort(id) => self.delete_port(id),
            NetworkCommand::EnsureDefaultGroup(project) => {
                let id = self.ensure_default_group(project);
                self.show_group(&id)
            }
            NetworkCommand::CreateSecurityGroup { .. } => self.create_group_of_rules(command),
            NetworkCommand::UpdateSecurityGroup { id, name, description, tags } => {
                self.update_group_of_rules(id, name, description, tags)
            }
            NetworkCommand::DeleteSecurityGroup(id) => self.delete_group_of_rules(id),
            NetworkCommand::CreateSecurityGroupRule(new) => self.create_rule(new),
            NetworkCommand::DeleteSecurityGroupRule(id) => self.delete_rule(id),
            NetworkCommand::CreateFloatingIp(new) => self.create_floating_ip(new),
            NetworkCommand::UpdateFloatingIp { .. } => self.update_floating_ip(command),
            NetworkCommand::DeleteFloatingIp(id) => self.delete_floating_ip(id),
            NetworkCommand::CreatePortForwarding(new) => self.create_port_forwarding(new),
            NetworkCommand::DeletePortForwarding { floating_ip_id, id } => {
                self.delete_port_forwarding(floating_ip_id, id)
            }
        }
    }

    /// The network of that id.
    pub(super) fn network_of(&self, id: &NetworkId) -> Result<&Network, Rejection> {
        self.network.networks.get(id).ok_or_else(|| Rejection::not_found("network", id))
    }

    fn create_network(&mut self, new: &NewNetwork) -> Result<Outcome, Rejection> {
        room(self.network.networks.len(), NETWORKS_MAX, "network")?;
        if self.network.networks.contains_key(&new.id) {
            let message = format!("Network {} already exists.", new.id);
            return Err(Rejection::conflict("network", &new.id, message));
        }
        if new.external {
            let message = "The external network is made with the cluster; there is one.";
            return Err(Rejection::new(RejectionKind::Forbidden, "network", &new.id, message));
        }
        let mtu = check_mtu(&new.id, new.mtu.unwrap_or(TENANT_MTU))?;
        self.quota.check(&new.project_id, QuotaResource::Networks, 1)?;
        let vni = self.index.lowest_vni().ok_or_else(|| {
            let message = "Every VXLAN network identifier is in use.";
            Rejection::new(RejectionKind::TooMany, "network", &new.id, message)
        })?;
        let network = Network {
            id: new.id.clone(),
            name: new.name.clone(),
            description: new.description.clone(),
            project_id: new.project_id.clone(),
            admin_state_up: new.admin_state_up,
            shared: new.shared,
            external: false,
            port_security_enabled: new.port_security_enabled,
            vni: Some(vni),
            mtu,
            tags: new.tags.clone(),
            revision_number: 1,
            created_ms: self.time_ms,
            updated_ms: self.time_ms,
        };
        self.quota.charge(&network.project_id, QuotaResource::Networks, 1);
        self.network.vnis.insert(vni, network.id.clone());
        self.index.take_vni(vni);
        self.network.networks.insert(network.id.clone(), network.clone());
        Ok(Outcome::Network(Box::new(network)))
    }

    fn update_network(&mut self, command: &NetworkCommand) -> Result<Outcome, Rejection> {
        let NetworkCommand::UpdateNetwork {
            id,
            name,
            description,
            admin_state_up,
            shared,
            port_security_enabled,
            mtu,
            tags,
        } = command
        else {
            return Ok(Outcome::Ignored);
        };
        let now = self.time_ms;
        let owner = self.network_of(id)?.project_id.clone();
        if let Some(mtu) = *mtu {
            check_mtu(id, mtu)?;
        }
        let foreign = || {
            let ports = self.network.macs.get(id).into_iter().flat_map(|macs| macs.values());
            let mut ports = ports.filter_map(|port| self.network.ports.get(port));
            ports.any(|port| port.project_id != owner)
        };
        if *shared == Some(false) && foreign() {
            let message = format!(
                "Unable to reconfigure sharing settings for network {id}. Multiple tenants are using it."
            );
            return Err(Rejection::in_use("network", id, message));
        }
        let Some(network) = self.network.networks.get_mut(id) else {
            return Err(Rejection::not_found("network", id));
        };
        set(&mut network.name, name);
        set(&mut network.description, description);
        set(&mut network.admin_state_up, admin_state_up);
        set(&mut network.shared, shared);
        set(&mut network.port_security_enabled, port_security_enabled);
        set(&mut network.mtu, mtu);
        set(&mut network.tags, tags);
        network.revision_number += 1;
        network.updated_ms = now;
        Ok(Outcome::Network(Box::new(network.clone())))
    }

    fn delete_network(&mut self, id: &NetworkId) -> Result<Outcome, Rejection> {
        let network = self.network_of(id)?.clone();
        if network.external {
            let message = "The external network belongs to the cluster.";
            return Err(Rejection::new(RejectionKind::Forbidden, "network", id, message));
        }
        if self.network.macs.contains_key(id) {
            let message = format!(
                "Unable to complete operation on network {id}. There are one or more ports still in use on the network."
            );
            return Err(Rejection::in_use("network", id, message));
        }
        let subnets: Vec<SubnetId> = self.subnets_of(id).map(|subnet| subnet.id.clone()).collect();
        subnets.iter().for_each(|subnet| self.remove_subnet(subnet));
        self.network.networks.remove(id);
        if let Some(vni) = network.vni {
            self.network.vnis.remove(&vni);
            self.index.free_vni(vni);
        }
        self.quota.release(&network.project_id, QuotaResource::Networks, 1);
        DONE
    }

    fn create_subnet(&mut self, new: &NewSubnet) -> Result<Outcome, Rejection> {
        room(self.network.subnets.len(), SUBNETS_MAX, "subnet")?;
        if self.network.subnets.contains_key(&new.id) {
            let message = format!("Subnet {} already exists.", new.id);
            return Err(Rejection::conflict("subnet", &new.id, message));
        }
        self.network_of(&new.network_id)?;
        self.quota.check(&new.project_id, QuotaResource::Subnets, 1)?;
        let subnet = self.checked_subnet(new)?;
        self.quota.charge(&subnet.project_id, QuotaResource::Subnets, 1);
        self.index.add_subnet(&subnet);
        self.network.subnets.insert(subnet.id.clone(), subnet.clone());
        Ok(Outcome::Subnet(Box::new(subnet)))
    }

    fn checked_subnet(&self, new: &NewSubnet) -> Result<Subnet, Rejection> {
        let cidr = new.cidr.trunc();
        let invalid = |message: String| Rejection::invalid("subnet", &new.id, message);
        if !matches!(cidr, IpNet::V4(_)) {
            return Err(invalid(format!("Subnet {cidr} is IPv6, which is not supported yet.")));
        }
        if cidr.prefix_len() == 0 || cidr.prefix_len() > 30 {
            return Err(invalid(format!("Subnet {cidr} can't hold a gateway and a guest.")));
        }
        let overlaps = |known: &&Subnet| {
            known.cidr.contains(&cidr.network()) || cidr.contains(&known.cidr.network())
        };
        if let Some(known) = self.subnets_of(&new.network_id).find(overlaps) {
            return Err(invalid(format!(
                "Requested subnet with cidr: {cidr} for network: {} overlaps with another subnet: {}",
                new.network_id, known.cidr
            )));
        }
        let gateway_ip = match new.gateway {
            Gateway::First => Some(usable(cidr).start),
            Gateway::Absent => None,
            Gateway::Address(address) => Some(address),
        };
        let allocation_pools = if new.allocation_pools.is_empty() {
            default_pools(cidr, gateway_ip)
        } else {
            new.allocation_pools.clone()
        };
        let subnet = Subnet {
            id: new.id.clone(),
            network_id: new.network_id.clone(),
            project_id: new.project_id.clone(),
            name: new.name.clone(),
            description: new.description.clone(),
            cidr,
            gateway_ip,
            enable_dhcp: new.enable_dhcp,
            dns_nameservers: new.dns_nameservers.clone(),
            host_routes: new.host_routes.clone(),
            allocation_pools,
            tags: new.tags.clone(),
            revision_number: 0,
            created_ms: self.time_ms,
            updated_ms: self.time_ms,
        };
        check_subnet(&subnet)?;
        Ok(subnet)
    }

    fn update_subnet(&mut self, update: &SubnetUpdate) -> Result<Outcome, Rejection> {
        let known = self.network.subnets.get(&update.id);
        let known = known.ok_or_else(|| Rejection::not_found("subnet", &update.id))?;
        let mut subnet = known.clone();
        set(&mut subnet.name, &update.name);
        set(&mut subnet.description, &update.description);
        set(&mut subnet.gateway_ip, &update.gateway_ip);
        set(&mut subnet.enable_dhcp, &update.enable_dhcp);
        set(&mut subnet.dns_nameservers, &update.dns_nameservers);
        set(&mut subnet.host_routes, &update.host_routes);
        set(&mut subnet.allocation_pools, &update.allocation_pools);
        set(&mut subnet.tags, &update.tags);
        subnet.revision_number += 1;
        subnet.updated_ms = self.time_ms;
        check_subnet(&subnet)?;
        if let Some(gateway) = subnet.gateway_ip
            && self.address_owner(&subnet.id, gateway).is_some()
        {
            let message = format!("Gateway IP {gateway} is in use by a port of the subnet.");
            return Err(Rejection::in_use("subnet", &subnet.id, message));
        }
        self.index.forget_addresses(&subnet.id);
        self.network.subnets.insert(subnet.id.clone(), subnet.clone());
        Ok(Outcome::Subnet(Box::new(subnet)))
    }

    fn delete_subnet(&mut self, id: &SubnetId) -> Result<Outcome, Rejection> {
        let known = self.network.subnets.get(id);
        let known = known.ok_or_else(|| Rejection::not_found("subnet", id))?;
        if self.network_of(&known.network_id)?.external {
            let message = "The external network belongs to the cluster.";
            return Err(Rejection::new(RejectionKind::Forbidden, "subnet", id, message));
        }
        if self.network.addresses.contains_key(id) {
            let message = format!(
                "Unable to complete operation on subnet {id}: One or more ports have an IP allocation from this subnet."
            );
            return Err(Rejection::in_use("subnet", id, message));
        }
        self.remove_subnet(id);
        DONE
    }

    fn remove_subnet(&mut self, id: &SubnetId) {
        if let Some(subnet) = self.network.subnets.remove(id) {
            self.index.remove_subnet(&subnet);
            self.quota.release(&subnet.project_id, QuotaResource::Subnets, 1);
        }
    }

    /// Checks that floating IPs can come from a range.
    pub(in crate::state) fn check_external_range(&self, range: Ipv4Net) -> Result<(), Rejection> {
        if (8..=30).contains(&range.prefix_len()) {
            return Ok(());
        }
        let message = format!("The floating pool {range} must have a prefix between 8 and 30.");
        Err(Rejection::invalid("floating pool", range, message))
    }

    /// The external network and its subnet, from which floating IPs are taken.
    pub(in crate::state) fn init_external_network(&mut self, range: Ipv4Net) {
        let mint = |kind: &str| derived_id(kind, &self.cluster.id);
        let project_id =
            ProjectId::from(derived_id("project/admin", &self.cluster.id).simple().to_string());
        let (network_id, subnet_id) =
            (NetworkId::from(mint("network/public")), SubnetId::from(mint("subnet/public")));
        let cidr = IpNet::V4(range.trunc());
        let network = Network {
            id: network_id.clone(),
            name: EXTERNAL_NETWORK.into(),
            description: "Where floating IPs come from.".into(),
            project_id: project_id.clone(),
            admin_state_up: true,
            shared: false,
            external: true,
            port_security_enabled: true,
            vni: None,
            mtu: 1500,
            tags: BTreeSet::new(),
            revision_number: 1,
            created_ms: self.time_ms,
            updated_ms: self.time_ms,
        };
        let gateway_ip = Some(usable(cidr).start);
        let subnet = Subnet {
            id: subnet_id.clone(),
            network_id: network_id.clone(),
            project_id: project_id.clone(),
            name: "public-subnet".into(),
            description: String::new(),
            cidr,
            gateway_ip,
            enable_dhcp: false,
            dns_nameservers: Vec::new(),
            host_routes: Vec::new(),
            allocation_pools: default_pools(cidr, gateway_ip),
            tags: BTreeSet::new(),
            revision_number: 0,
            created_ms: self.time_ms,
            updated_ms: self.time_ms,
        };
        self.quota.charge(&project_id, QuotaResource::Networks, 1);
        self.quota.charge(&project_id, QuotaResource::Subnets, 1);
        self.network.networks.insert(network_id, network);
        self.index.add_subnet(&subnet);
        self.network.subnets.insert(subnet_id, subnet);
    }
}

fn check_mtu(id: &NetworkId, mtu: u16) -> Result<u16, Rejection> {
    if (MTU_MIN..=TENANT_MTU).contains(&mtu) {
        return Ok(mtu);
    }
    let message = format!("MTU {mtu} is not between {MTU_MIN} and {TENANT_MTU}.");
    Err(Rejection::invalid("network", id, message))
}

/// Checks what must hold of a subnet after every change.
fn check_subnet(subnet: &Subnet) -> Result<(), Rejection> {
    let invalid = |message: String| Rejection::invalid("subnet", &subnet.id, message);
    let lists =
        [subnet.dns_nameservers.len(), subnet.host_routes.len(), subnet.allocation_pools.len()];
    if lists.iter().any(|len| *len > SUBNET_LISTS_MAX) {
        return Err(invalid(format!("No list of a subnet can exceed {SUBNET_LISTS_MAX} entries.")));
    }
    let range = usable(subnet.cidr);
    let inside = |address: IpAddr| (range.start..=range.end).contains(&address);
    if let Some(gateway) = subnet.gateway_ip.filter(|gateway| !inside(*gateway)) {
        return Err(invalid(format!("Gateway {gateway} is not valid on subnet {}.", subnet.cidr)));
    }
    let mut pools = subnet.allocation_pools.clone();
    pools.sort_by_key(|pool| pool.start);
    for pool in &pools {
        if pool.start > pool.end || !inside(pool.start) || !inside(pool.end) {
            return Err(invalid(format!(
                "The allocation pool {}-{} is not valid.",
                pool.start, pool.end
            )));
        }
    }
    let touches = |pair: &[AllocationPool]| pair[1].start <= pair[0].end;
    if pools.windows(2).any(touches) {
        return Err(Rejection::conflict("subnet", &subnet.id, "Allocation pools overlap."));
    }
    let conflicts = |pool: &&AllocationPool| {
        subnet.gateway_ip.is_some_and(|gateway| (pool.start..=pool.end).contains(&gateway))
    };
    if let Some(pool) = pools.iter().find(conflicts) {
        let message =
            format!("Gateway ip conflicts with allocation pool {}-{}.", pool.start, pool.end);
        return Err(Rejection::conflict("subnet", &subnet.id, message));
    }
    if subnet.dns_nameservers.iter().any(IpAddr::is_ipv6) {
        return Err(invalid("An IPv4 subnet's name servers have IPv4 addresses.".into()));
    }
    let foreign = |route: &super::HostRoute| {
        route.nexthop.is_ipv6() || matches!(route.destination, IpNet::V6(_))
    };
    if subnet.host_routes.iter().any(foreign) {
        return Err(invalid("An IPv4 subnet's routes are IPv4 routes.".into()));
    }
    Ok(())
}

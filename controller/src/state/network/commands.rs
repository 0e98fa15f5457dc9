//! Commands on networking. An update's `None` leaves the field as it is.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::{AddressPair, AllocationPool, Direction, Ethertype, HostRoute};
use crate::ids::{
    FloatingIpId, NetworkId, PortForwardingId, PortId, ProjectId, SecurityGroupId,
    SecurityGroupRuleId, SubnetId,
};

/// A command on networking.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum NetworkCommand {
    /// Makes a network.
    CreateNetwork(Box<NewNetwork>),
    /// Changes a network.
    UpdateNetwork {
        /// Which.
        id: NetworkId,
        /// New name.
        name: Option<String>,
        /// New description.
        description: Option<String>,
        /// New administrative state.
        admin_state_up: Option<bool>,
        /// Share it or not.
        shared: Option<bool>,
        /// New default for ports.
        port_security_enabled: Option<bool>,
        /// New MTU.
        mtu: Option<u16>,
        /// New tags.
        tags: Option<BTreeSet<String>>,
    },
    /// Removes a network without ports, and its subnets.
    DeleteNetwork(NetworkId),
    /// Makes a subnet.
    CreateSubnet(Box<NewSubnet>),
    /// Changes a subnet.
    UpdateSubnet(Box<SubnetUpdate>),
    /// Removes a subnet without addresses in use.
    DeleteSubnet(SubnetId),
    /// Makes a port.
    CreatePort(Box<NewPort>),
    /// Changes a port.
    UpdatePort(Box<PortUpdate>),
    /// Removes a port that no server has.
    DeletePort(PortId),
    /// Makes a project's default security group if it has none.
    EnsureDefaultGroup(ProjectId),
    /// Makes a security group with the two rules that let everything out.
    CreateSecurityGroup {
        /// Its id.
        id: SecurityGroupId,
        /// Its project.
        project_id: ProjectId,
        /// Its name.
        name: String,
        /// Free text.
        description: String,
        /// Connections are tracked.
        stateful: bool,
        /// Tags.
        tags: BTreeSet<String>,
    },
    /// Changes a security group.
    UpdateSecurityGroup {
        /// Which.
        id: SecurityGroupId,
        /// New name.
        name: Option<String>,
        /// New description.
        description: Option<String>,
        /// New tags.
        tags: Option<BTreeSet<String>>,
    },
    /// Removes a security group that no port uses.
    DeleteSecurityGroup(SecurityGroupId),
    /// Adds a rule.
    CreateSecurityGroupRule(Box<NewRule>),
    /// Removes a rule.
    DeleteSecurityGroupRule(SecurityGroupRuleId),
    /// Takes a floating IP.
    CreateFloatingIp(Box<NewFloatingIp>),
    /// Changes a floating IP.
    UpdateFloatingIp {
        /// Which.
        id: FloatingIpId,
        /// Its new port; the inner `None` frees it.
        port_id: Option<Option<PortId>>,
        /// Which of the port's addresses.
        fixed_ip_address: Option<IpAddr>,
        /// New description.
        description: Option<String>,
        /// New tags.
        tags: Option<BTreeSet<String>>,
    },
    /// Gives a floating IP back.
    DeleteFloatingIp(FloatingIpId),
    /// Forwards a port.
    CreatePortForwarding(Box<NewPortForwarding>),
    /// Stops forwarding it.
    DeletePortForwarding {
        /// The floating IP.
        floating_ip_id: FloatingIpId,
        /// The forwarding.
        id: PortForwardingId,
    },
}

/// A network to make.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NewNetwork {
    /// Its id.
    pub id: NetworkId,
    /// Its project.
    pub project_id: ProjectId,
    /// Its name.
    pub name: String,
    /// Free text.
    pub description: String,
    /// Administratively up.
    pub admin_state_up: bool,
    /// Every project may use it.
    pub shared: bool,
    /// It is an external network.
    pub external: bool,
    /// Ports get port security unless they say otherwise.
    pub port_security_enabled: bool,
    /// Largest packet, bytes; the largest that fits the tunnel when absent.
    pub mtu: Option<u16>,
    /// Tags.
    pub tags: BTreeSet<String>,
}

/// A subnet's gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Gateway {
    /// The range's first address.
    First,
    /// None.
    Absent,
    /// This address.
    Address(IpAddr),
}

/// A subnet to make.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NewSubnet {
    /// Its id.
    pub id: SubnetId,
    /// Its network.
    pub network_id: NetworkId,
    /// Its project.
    pub project_id: ProjectId,
    /// Its name.
    pub name: String,
    /// Free text.
    pub description: String,
    /// Its range.
    pub cidr: IpNet,
    /// Its gateway.
    pub gateway: Gateway,
    /// The switch answers DHCP.
    pub enable_dhcp: bool,
    /// Name servers.
    pub dns_nameservers: Vec<IpAddr>,
    /// Further routes.
    pub host_routes: Vec<HostRoute>,
    /// Where addresses are taken from; everything but the gateway when empty.
    pub allocation_pools: Vec<AllocationPool>,
    /// Tags.
    pub tags: BTreeSet<String>,
}

/// A change of a subnet.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SubnetUpdate {
    /// Which.
    pub id: SubnetId,
    /// New name.
    pub name: Option<String>,
    /// New description.
    pub description: Option<String>,
    /// New gateway; the inner `None` removes it.
    pub gateway_ip: Option<Option<IpAddr>>,
    /// Answer DHCP or not.
    pub enable_dhcp: Option<bool>,
    /// New name servers.
    pub dns_nameservers: Option<Vec<IpAddr>>,
    /// New routes.
    pub host_routes: Option<Vec<HostRoute>>,
    /// New pools.
    pub allocation_pools: Option<Vec<AllocationPool>>,
    /// New tags.
    pub tags: Option<BTreeSet<String>>,
}

/// What is asked for one address of a port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FixedIpRequest {
    /// In this subnet, or any.
    pub subnet_id: Option<SubnetId>,
    /// This address, or any.
    pub ip_address: Option<IpAddr>,
}

/// A port to make.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NewPort {
    /// Its id.
    pub id: PortId,
    /// Its network.
    pub network_id: NetworkId,
    /// Its project.
    pub project_id: ProjectId,
    /// Its name.
    pub name: String,
    /// Free text.
    pub description: String,
    /// Administratively up.
    pub admin_state_up: bool,
    /// Its MAC address; derived from its id when absent.
    pub mac_address: Option<String>,
    /// Its addresses; one from the network's IPv4 subnets when `None`, none when empty.
    pub fixed_ips: Option<Vec<FixedIpRequest>>,
    /// Port security; as the network says when absent.
    pub port_security_enabled: Option<bool>,
    /// Its security groups; the project's default when `None`.
    pub security_groups: Option<BTreeSet<SecurityGroupId>>,
    /// Further addresses.
    pub allowed_address_pairs: Vec<AddressPair>,
    /// Neutron's `device_id`.
    pub device_id: String,
    /// Neutron's `device_owner`.
    pub device_owner: String,
    /// Tags.
    pub tags: BTreeSet<String>,
}

/// A change of a port.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PortUpdate {
    /// Which.
    pub id: PortId,
    /// New name.
    pub name: Option<String>,
    /// New description.
    pub description: Option<String>,
    /// New administrative state.
    pub admin_state_up: Option<bool>,
    /// New addresses.
    pub fixed_ips: Option<Vec<FixedIpRequest>>,
    /// Port security on or off.
    pub port_security_enabled: Option<bool>,
    /// New security groups.
    pub security_groups: Option<BTreeSet<SecurityGroupId>>,
    /// New further addresses.
    pub allowed_address_pairs: Option<Vec<AddressPair>>,
    /// New `device_id`.
    pub device_id: Option<String>,
    /// New `device_owner`.
    pub device_owner: Option<String>,
    /// New tags.
    pub tags: Option<BTreeSet<String>>,
}

/// A security group rule to make.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NewRule {
    /// Its id.
    pub id: SecurityGroupRuleId,
    /// Its group.
    pub security_group_id: SecurityGroupId,
    /// Free text.
    pub description: String,
    /// Which way.
    pub direction: Direction,
    /// Which family.
    pub ethertype: Ethertype,
    /// A name or a number as text.
    pub protocol: Option<String>,
    /// Lowest port, or ICMP type.
    pub port_range_min: Option<u16>,
    /// Highest port, or ICMP code.
    pub port_range_max: Option<u16>,
    /// From or to these addresses.
    pub remote_ip_prefix: Option<IpNet>,
    /// From or to the ports of this group.
    pub remote_group_id: Option<SecurityGroupId>,
}

/// A floating IP to take.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NewFloatingIp {
    /// Its id.
    pub id: FloatingIpId,
    /// Its project.
    pub project_id: ProjectId,
    /// The external network.
    pub floating_network_id: NetworkId,
    /// In which subnet of it, or any.
    pub subnet_id: Option<SubnetId>,
    /// This address, or any.
    pub floating_ip_address: Option<IpAddr>,
    /// The port it stands for.
    pub port_id: Option<PortId>,
    /// Which of the port's addresses.
    pub fixed_ip_address: Option<IpAddr>,
    /// Free text.
    pub description: String,
    /// Tags.
    pub tags: BTreeSet<String>,
}

/// A port to forward.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NewPortForwarding {
    /// Its id.
    pub id: PortForwardingId,
    /// The floating IP.
    pub floating_ip_id: FloatingIpId,
    /// `tcp`.
    pub protocol: String,
    /// The port of the floating IP.
    pub external_port: u16,
    /// The port behind it.
    pub internal_port_id: PortId,
    /// Which of its addresses; the first when absent.
    pub internal_ip_address: Option<IpAddr>,
    /// The port (number) there.
    pub internal_port: u16,
    /// Free text.
    pub description: String,
}

//! Networks, subnets, ports, security groups and floating IPs.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use imbl::{OrdMap, OrdSet};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::ids::{
    FloatingIpId, HostId, NetworkId, PortForwardingId, PortId, ProjectId, SecurityGroupId,
    SecurityGroupRuleId, ServerId, SubnetId,
};

/// Networking.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Networking {
    /// Networks.
    pub networks: OrdMap<NetworkId, Network>,
    /// Subnets.
    pub subnets: OrdMap<SubnetId, Subnet>,
    /// Ports.
    pub ports: OrdMap<PortId, Arc<Port>>,
    /// Security groups.
    pub security_groups: OrdMap<SecurityGroupId, SecurityGroup>,
    /// Floating IPs.
    pub floating_ips: OrdMap<FloatingIpId, FloatingIp>,
    /// Which address of which subnet belongs to what.
    pub addresses: OrdMap<SubnetId, OrdMap<IpAddr, AddressOwner>>,
    /// The ports of each network, by MAC address; follows from `ports`.
    pub macs: OrdMap<NetworkId, OrdMap<String, PortId>>,
    /// The ports in each security group; follows from `ports`.
    pub group_ports: OrdMap<SecurityGroupId, OrdSet<PortId>>,
    /// VXLAN network identifiers in use; follows from `networks`.
    pub vnis: OrdMap<u32, NetworkId>,
}

/// To what an address belongs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum AddressOwner {
    /// A port's fixed IP.
    Port(PortId),
    /// A floating IP.
    FloatingIp(FloatingIpId),
}

/// A network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// Its id.
    pub id: NetworkId,
    /// Its name.
    pub name: String,
    /// Free text.
    pub description: String,
    /// Its project.
    pub project_id: ProjectId,
    /// Administratively up.
    pub admin_state_up: bool,
    /// Every project may use it.
    pub shared: bool,
    /// It is an external network.
    pub external: bool,
    /// Ports get port security unless they say otherwise.
    pub port_security_enabled: bool,
    /// Its VXLAN network identifier; none for an external network.
    pub vni: Option<u32>,
    /// Largest packet, bytes.
    pub mtu: u16,
    /// Tags.
    pub tags: BTreeSet<String>,
    /// Grows with each change.
    pub revision_number: u64,
    /// When it was made.
    pub created_ms: u64,
    /// When it last changed.
    pub updated_ms: u64,
}

/// A range of addresses, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AllocationPool {
    /// The first.
    pub start: IpAddr,
    /// The last.
    pub end: IpAddr,
}

/// A route that DHCP hands out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostRoute {
    /// Where to.
    pub destination: IpNet,
    /// By way of.
    pub nexthop: IpAddr,
}

/// A subnet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subnet {
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
    /// The gateway's address.
    pub gateway_ip: Option<IpAddr>,
    /// The switch answers DHCP.
    pub enable_dhcp: bool,
    /// Name servers.
    pub dns_nameservers: Vec<IpAddr>,
    /// Further routes.
    pub host_routes: Vec<HostRoute>,
    /// Where addresses are taken from.
    pub allocation_pools: Vec<AllocationPool>,
    /// Tags.
    pub tags: BTreeSet<String>,
    /// Grows with each change.
    pub revision_number: u64,
    /// When it was made.
    pub created_ms: u64,
    /// When it last changed.
    pub updated_ms: u64,
}

/// An address of a port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FixedIp {
    /// In which subnet.
    pub subnet_id: SubnetId,
    /// The address.
    pub ip_address: IpAddr,
}

/// A further address that a port may use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddressPair {
    /// The address or range.
    pub ip_address: IpNet,
    /// The MAC address, the port's own when absent.
    pub mac_address: Option<String>,
}

/// A port's status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PortStatus {
    /// Plugged in and working.
    Active,
    /// Not plugged in.
    Down,
    /// Being plugged in.
    Build,
}

impl PortStatus {
    /// Neutron's word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Active => "ACTIVE",
            Self::Down => "DOWN",
            Self::Build => "BUILD",
        }
    }
}

/// A port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Port {
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
    /// Its MAC address, lower case with colons.
    pub mac_address: String,
    /// Its addresses.
    pub fixed_ips: Vec<FixedIp>,
    /// Anti-spoofing and security groups apply.
    pub port_security_enabled: bool,
    /// Its security groups.
    pub security_groups: BTreeSet<SecurityGroupId>,
    /// Further addresses.
    pub allowed_address_pairs: Vec<AddressPair>,
    /// Neutron's `device_id`: a server's id as a rule.
    pub device_id: String,
    /// Neutron's `device_owner`: `compute:nova` as a rule.
    pub device_owner: String,
    /// The server that has it.
    pub server_id: Option<ServerId>,
    /// The host it is bound to.
    pub host: Option<HostId>,
    /// Its status.
    pub status: PortStatus,
    /// Tags.
    pub tags: BTreeSet<String>,
    /// Grows with each change.
    pub revision_number: u64,
    /// When it was made.
    pub created_ms: u64,
    /// When it last changed.
    pub updated_ms: u64,
}

/// Which way traffic goes, seen from the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// To the guest.
    Ingress,
    /// From the guest.
    Egress,
}

impl Direction {
    /// Neutron's word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        }
    }
}

/// The family of addresses a rule is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ethertype {
    /// IPv4.
    IPv4,
    /// IPv6.
    IPv6,
}

impl Ethertype {
    /// Neutron's word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::IPv4 => "IPv4",
            Self::IPv6 => "IPv6",
        }
    }
}

/// A security group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SecurityGroup {
    /// Its id.
    pub id: SecurityGroupId,
    /// Its project.
    pub project_id: ProjectId,
    /// Its name.
    pub name: String,
    /// Free text.
    pub description: String,
    /// Connections are tracked.
    pub stateful: bool,
    /// Its rules.
    pub rules: OrdMap<SecurityGroupRuleId, SecurityGroupRule>,
    /// Tags.
    pub tags: BTreeSet<String>,
    /// Grows with each change.
    pub revision_number: u64,
    /// When it was made.
    pub created_ms: u64,
    /// When it last changed.
    pub updated_ms: u64,
}

/// A rule that lets traffic through.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SecurityGroupRule {
    /// Its id.
    pub id: SecurityGroupRuleId,
    /// Its group.
    pub security_group_id: SecurityGroupId,
    /// Its project.
    pub project_id: ProjectId,
    /// Free text.
    pub description: String,
    /// Which way.
    pub direction: Direction,
    /// Which family.
    pub ethertype: Ethertype,
    /// Neutron's protocol: a name or a number as text.
    pub protocol: Option<String>,
    /// Lowest port, or ICMP type.
    pub port_range_min: Option<u16>,
    /// Highest port, or ICMP code.
    pub port_range_max: Option<u16>,
    /// From or to these addresses.
    pub remote_ip_prefix: Option<IpNet>,
    /// From or to the ports of this group.
    pub remote_group_id: Option<SecurityGroupId>,
    /// Grows with each change.
    pub revision_number: u64,
    /// When it was made.
    pub created_ms: u64,
}

/// A floating IP.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FloatingIp {
    /// Its id.
    pub id: FloatingIpId,
    /// Its project.
    pub project_id: ProjectId,
    /// Free text.
    pub description: String,
    /// The external network.
    pub floating_network_id: NetworkId,
    /// In which subnet of it.
    pub subnet_id: SubnetId,
    /// The address.
    pub floating_ip_address: IpAddr,
    /// The port it stands for as a whole.
    pub port_id: Option<PortId>,
    /// That port's address.
    pub fixed_ip_address: Option<IpAddr>,
    /// Single ports that are forwarded.
    pub port_forwardings: OrdMap<PortForwardingId, PortForwarding>,
    /// Tags.
    pub tags: BTreeSet<String>,
    /// Grows with each change.
    pub revision_number: u64,
    /// When it was made.
    pub created_ms: u64,
    /// When it last changed.
    pub updated_ms: u64,
}

/// One forwarded port of a floating IP.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortForwarding {
    /// Its id.
    pub id: PortForwardingId,
    /// `tcp`.
    pub protocol: String,
    /// The port of the floating IP.
    pub external_port: u16,
    /// The port behind it.
    pub internal_port_id: PortId,
    /// That port's address.
    pub internal_ip_address: IpAddr,
    /// The port (number) there.
    pub internal_port: u16,
    /// Free text.
    pub description: String,
}

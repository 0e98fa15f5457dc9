//! Everything the switch knows, as the node hands it over: one [`Program`] replaces the one before
//! as a whole. [`crate::compile`] turns it into lookup tables and says what is wrong with it.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};

/// The desired forwarding state of one host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Program {
    /// Chosen by the node and reported back in the status; the switch does not order by it.
    pub revision: u64,
    /// Tenant networks with a port on this host.
    pub networks: Vec<Network>,
    /// Ports of guests on this host.
    pub ports: Vec<Port>,
    /// Loopback ports of this host that lead to guests on this host.
    pub forwards: Vec<Forward>,
}

/// One layer 2 network.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Network {
    /// The network's id.
    pub id: String,
    /// VXLAN network identifier, 1 to 2²⁴ − 1, unique in the program.
    pub vni: u32,
    /// MTU that DHCP hands out, bytes.
    pub mtu: u16,
    /// Its subnets.
    pub subnets: Vec<Subnet>,
    /// Ports of this network on other hosts.
    pub remotes: Vec<Remote>,
}

/// One address range of a network.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Subnet {
    /// The subnet's id.
    pub id: String,
    /// `address/prefix`.
    pub cidr: String,
    /// The address at which the switch itself answers, on every host.
    pub gateway: Option<Ipv4Addr>,
    /// Address of the DHCP server; the gateway's, else 169.254.169.254, where absent.
    pub dhcp_server: Option<Ipv4Addr>,
    /// Whether the switch answers DHCP on it.
    pub dhcp: bool,
    /// Name servers that DHCP hands out.
    pub dns: Vec<Ipv4Addr>,
    /// `(destination cidr, next hop)` that DHCP hands out.
    pub host_routes: Vec<(String, Ipv4Addr)>,
}

/// A port on another host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Remote {
    /// Its MAC, `aa:bb:cc:dd:ee:ff`.
    pub mac: String,
    /// Its fixed addresses.
    pub ips: Vec<IpAddr>,
    /// Address and UDP port of the other host's tunnel endpoint.
    pub vtep: SocketAddr,
}

/// A fixed address of a port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FixedIp {
    /// Subnet the address is from.
    pub subnet_id: String,
    /// The address.
    pub address: IpAddr,
}

/// A further address that a port may use as its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddressPair {
    /// Address or range, `address/prefix`.
    pub cidr: String,
    /// The MAC it is used with; the port's own where absent.
    #[serde(default)]
    pub mac: Option<String>,
}

/// Which way a rule looks, seen from the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// To the guest.
    Ingress,
    /// From the guest.
    Egress,
}

/// The protocol family of a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ethertype {
    /// IPv4.
    Ipv4,
    /// IPv6.
    Ipv6,
}

/// One permission; what no rule permits is denied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SecurityRule {
    /// Which way.
    pub direction: Direction,
    /// Which family.
    pub ethertype: Ethertype,
    /// IP protocol number; any where absent.
    #[serde(default)]
    pub protocol: Option<u8>,
    /// Lowest destination port; for ICMP the type.
    #[serde(default)]
    pub port_min: Option<u16>,
    /// Highest destination port; for ICMP the code.
    #[serde(default)]
    pub port_max: Option<u16>,
    /// The peer's range; any where absent.
    #[serde(default)]
    pub remote_cidr: Option<String>,
}

/// A port of a guest on this host.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Port {
    /// The port's id.
    pub id: String,
    /// The generation the node wants; informational here, see [`crate::control`] for the fence.
    pub generation: u64,
    /// Its network.
    pub network_id: String,
    /// Its MAC, `aa:bb:cc:dd:ee:ff`.
    pub mac: String,
    /// Its fixed addresses.
    pub fixed_ips: Vec<FixedIp>,
    /// The name DHCP hands out; none where empty.
    pub hostname: String,
    /// `false`: neither anti-spoofing nor security rules.
    pub port_security: bool,
    /// Further addresses it may use.
    pub allowed_address_pairs: Vec<AddressPair>,
    /// What is permitted, evaluated with connection state.
    pub security_rules: Vec<SecurityRule>,
    /// Path below `/` to body: what 169.254.169.254 answers this port.
    pub metadata: BTreeMap<String, String>,
}

impl fmt::Debug for Port {
    /// Leaves metadata bodies out: user data holds secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Port")
            .field("id", &self.id)
            .field("generation", &self.generation)
            .field("network_id", &self.network_id)
            .field("mac", &self.mac)
            .field("fixed_ips", &self.fixed_ips)
            .field("hostname", &self.hostname)
            .field("port_security", &self.port_security)
            .field("allowed_address_pairs", &self.allowed_address_pairs)
            .field("security_rules", &self.security_rules)
            .field("metadata", &self.metadata.keys())
            .finish()
    }
}

/// What a forward carries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ForwardProtocol {
    /// TCP connections.
    #[default]
    Tcp,
}

/// A loopback port of this host that leads into a guest on this host.
///
/// The guest sees connections from the switch's address on its subnet (the gateway's). Its security
/// rules are asked about the client's real address: a rule without a remote range admits it, one with
/// a range must contain the client's loopback address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forward {
    /// The forward's id.
    pub id: String,
    /// Loopback address and port to listen on.
    pub listen: SocketAddr,
    /// The guest's port, one of the program's.
    pub port_id: String,
    /// Where in the guest: one of the port's addresses.
    pub internal: SocketAddrV4,
    /// What it carries.
    #[serde(default)]
    pub protocol: ForwardProtocol,
}

//! A [`Program`] becomes [`Tables`]: what the data plane looks up, immutable, swapped as a whole.
//! All checking of a program happens here, so an error leaves the tables in force untouched.

use crate::control::RejectedPort;
use crate::program::{Direction, Ethertype, Forward, Network, Port, Program, SecurityRule, Subnet};
use crate::wire::{self, Mac};
use ipnet::{IpNet, Ipv4Net};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

/// Where every guest finds its metadata.
pub(crate) const METADATA_ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

/// Most networks of a program.
pub const NETWORKS_MAX: usize = 4096;
/// Most ports of a program.
pub const PORTS_MAX: usize = 4096;
/// Most remote ports of a network.
pub const REMOTES_MAX: usize = 65_536;
/// Most forwards of a program.
pub const FORWARDS_MAX: usize = 1024;
/// Most security rules of a port.
pub const RULES_MAX: usize = 4096;
/// Most fixed addresses and most address pairs of a port.
pub const ADDRESSES_MAX: usize = 64;
/// Most bytes of metadata of a port, paths included.
pub const METADATA_BYTES_MAX: usize = 1 << 20;
/// Smallest MTU of a network; a smaller one is raised to it.
pub const MTU_MIN: u16 = 576;
/// Largest MTU of a network, what fits a slot of the packet ring; a larger one is lowered to it.
pub const MTU_MAX: u16 = (abi::packet_ring::FRAME_BYTES_MAX - wire::ETHERNET_BYTES) as u16;

/// What is wrong with a program.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// A value does not parse or is out of its range.
    #[error("{thing} {id}: {field} {value:?} {rule}")]
    Value {
        /// Kind of thing.
        thing: &'static str,
        /// Its id.
        id: String,
        /// The field.
        field: &'static str,
        /// What it holds.
        value: String,
        /// What would be right.
        rule: &'static str,
    },
    /// A collection is too large.
    #[error("{thing} {id}: {count} {field}, at most {max} are taken")]
    TooMany {
        /// Kind of thing.
        thing: &'static str,
        /// Its id.
        id: String,
        /// The collection.
        field: &'static str,
        /// Its size.
        count: usize,
        /// The limit.
        max: usize,
    },
}

/// Everything the data plane looks up.
#[derive(Debug, Default)]
pub(crate) struct Tables {
    pub(crate) revision: u64,
    pub(crate) networks: Vec<NetworkTable>,
    pub(crate) ports: Vec<PortTable>,
    pub(crate) forwards: Vec<Forward>,
    pub(crate) network_by_vni: HashMap<u32, usize>,
    pub(crate) port_by_id: HashMap<String, usize>,
    /// Ports left out, and why.
    pub(crate) rejected: Vec<RejectedPort>,
}

#[derive(Debug)]
pub(crate) struct NetworkTable {
    pub(crate) vni: u32,
    pub(crate) mtu: u16,
    /// The switch's own MAC on this network, the same on every host.
    pub(crate) gateway_mac: Mac,
    /// The addresses at which the switch itself answers.
    pub(crate) services: Vec<Ipv4Addr>,
    pub(crate) stations: HashMap<Mac, Station>,
    /// For answering ARP on behalf of known ports.
    pub(crate) macs: HashMap<IpAddr, Mac>,
    pub(crate) ports: Vec<usize>,
    /// Local ports without port security: they may hold stations nobody announced.
    pub(crate) open_ports: Vec<usize>,
    pub(crate) vteps: Vec<SocketAddr>,
}

/// Where a MAC is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Station {
    Local(usize),
    Remote(SocketAddr),
}

pub(crate) struct PortTable {
    pub(crate) id: String,
    pub(crate) network: usize,
    pub(crate) mac: Mac,
    pub(crate) addresses: Vec<IpAddr>,
    pub(crate) pairs: Vec<(Mac, IpNet)>,
    pub(crate) secured: bool,
    rules: Vec<Rule>,
    pub(crate) lease: Option<Lease>,
    /// The switch's address and prefix length on the port's first IPv4 subnet.
    pub(crate) service: Option<(Ipv4Addr, u8)>,
    pub(crate) metadata: Arc<BTreeMap<String, String>>,
}

impl std::fmt::Debug for PortTable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PortTable").field("id", &self.id).finish_non_exhaustive()
    }
}

/// What DHCP gives a port.
#[derive(Debug)]
pub(crate) struct Lease {
    pub(crate) address: Ipv4Addr,
    pub(crate) server: Ipv4Addr,
    pub(crate) netmask: Ipv4Addr,
    pub(crate) router: Option<Ipv4Addr>,
    /// Option code and bytes, encoded once.
    pub(crate) options: Vec<(u8, Vec<u8>)>,
}

#[derive(Debug)]
struct Rule {
    direction: Direction,
    ethertype: Ethertype,
    protocol: Option<u8>,
    port_min: Option<u16>,
    port_max: Option<u16>,
    remote: Option<IpNet>,
}

/// What a rule is asked about: the first packet of a connection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Opening {
    pub(crate) direction: Direction,
    pub(crate) ethertype: Ethertype,
    pub(crate) protocol: u8,
    /// Destination port, or type and code of an ICMP message, where the transport has any.
    pub(crate) target: Option<Target>,
    pub(crate) remote: IpAddr,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Target {
    Port(u16),
    Icmp { kind: u8, code: u8 },
}

impl PortTable {
    /// Whether a security rule permits a connection that opens like this.
    pub(crate) fn permits(&self, opening: &Opening) -> bool {
        self.rules.iter().any(|rule| rule.permits(opening))
    }

    /// Whether the port may send from `address` with `mac`.
    pub(crate) fn owns(&self, mac: &Mac, address: IpAddr) -> bool {
        (self.mac == *mac && self.addresses.contains(&address))
            || self.pairs.iter().any(|(pair, range)| pair == mac && range.contains(&address))
    }

    /// Whether the port may send with `mac` at all.
    pub(crate) fn owns_mac(&self, mac: &Mac) -> bool {
        self.mac == *mac || self.pairs.iter().any(|(pair, _)| pair == mac)
    }
}

impl Rule {
    fn permits(&self, opening: &Opening) -> bool {
        self.direction == opening.direction
            && self.ethertype == opening.ethertype
            && self.protocol.is_none_or(|protocol| protocol == opening.protocol)
            && self.permits_target(opening.target)
            && self.remote.is_none_or(|range| range.contains(&opening.remote))
    }

    fn permits_target(&self, target: Option<Target>) -> bool {
        match target {
            Some(Target::Port(port)) => {
                self.port_min.is_none_or(|min| min <= port)
                    && self.port_max.is_none_or(|max| port <= max)
            }
            Some(Target::Icmp { kind, code }) => {
                self.port_min.is_none_or(|want| want == u16::from(kind))
                    && self.port_max.is_none_or(|want| want == u16::from(code))
            }
            None => self.port_min.is_none() && self.port_max.is_none(),
        }
    }
}

impl Tables {
    /// Checks a program and lays it out for lookups. A port with an error in it is left out and
    /// listed; any other error refuses the program.
    pub(crate) fn compile(program: Program) -> Result<Tables, Error> {
        limit("program", "", "networks", program.networks.len(), NETWORKS_MAX)?;
        limit("program", "", "ports", program.ports.len(), PORTS_MAX)?;
        limit("program", "", "forwards", program.forwards.len(), FORWARDS_MAX)?;
        let mut tables = Tables { revision: program.revision, ..Tables::default() };
        let mut subnets = HashMap::new();
        let mut network_by_id = HashMap::new();
        for network in &program.networks {
            let at = tables.networks.len();
            let table = compile_network(network, &mut subnets)?;
            if network_by_id.insert(network.id.as_str(), at).is_some() {
                return Err(value("network", &network.id, "id", &network.id, "must be unique"));
            }
            if tables.network_by_vni.insert(network.vni, at).is_some() {
                return Err(value("network", &network.id, "vni", network.vni, "must be unique"));
            }
            tables.networks.push(table);
        }
        for port in &program.ports {
            let added = match network_by_id.get(port.network_id.as_str()) {
                Some(network) => tables.add_port(port, *network, &subnets),
                None => {
                    let rule = "must be one of the program's networks";
                    Err(value("port", &port.id, "network_id", &port.network_id, rule))
                }
            };
            // What one tenant asked for must not keep the others' ports from being programmed.
            if let Err(error) = added {
                let message = error.to_string();
                tables.rejected.push(RejectedPort { port_id: port.id.clone(), message });
            }
        }
        for (network, at) in program.networks.iter().zip(0..) {
            tables.add_remotes(network, at)?;
        }
        tables.forwards = program.forwards;
        Ok(tables)
    }

    fn add_port(
        &mut self,
        port: &Port,
        network_at: usize,
        subnets: &HashMap<(&str, &str), SubnetTable<'_>>,
    ) -> Result<(), Error> {
        let at = self.ports.len();
        let network = &mut self.networks[network_at];
        let table = compile_port(port, network_at, network, subnets)?;
        if self.port_by_id.contains_key(&port.id) {
            return Err(value("port", &port.id, "id", &port.id, "must be unique"));
        }
        let station = network.stations.get(&table.mac);
        let twin =
            matches!(station, Some(Station::Local(other)) if self.ports[*other].mac == table.mac);
        if twin || table.mac == network.gateway_mac {
            return Err(value("port", &port.id, "mac", &port.mac, "must be unique in its network"));
        }
        network.stations.insert(table.mac, Station::Local(at));
        for (mac, _) in &table.pairs {
            network.stations.entry(*mac).or_insert(Station::Local(at));
        }
        for address in &table.addresses {
            network.macs.entry(*address).or_insert(table.mac);
        }
        network.ports.push(at);
        if !table.secured {
            network.open_ports.push(at);
        }
        self.port_by_id.insert(port.id.clone(), at);
        self.ports.push(table);
        Ok(())
    }

    /// A station that is also local stays local: a guest that just moved here is in both lists.
    fn add_remotes(&mut self, network: &Network, at: usize) -> Result<(), Error> {
        limit("network", &network.id, "remotes", network.remotes.len(), REMOTES_MAX)?;
        let table = &mut self.networks[at];
        let mut seen = HashSet::new();
        for remote in &network.remotes {
            let mac = mac("network", &network.id, "remotes.mac", &remote.mac)?;
            table.stations.entry(mac).or_insert(Station::Remote(remote.vtep));
            for address in &remote.ips {
                table.macs.entry(*address).or_insert(mac);
            }
            if seen.insert(remote.vtep) {
                table.vteps.push(remote.vtep);
            }
        }
        Ok(())
    }
}

struct SubnetTable<'a> {
    subnet: &'a Subnet,
    range: IpNet,
    server: Ipv4Addr,
}

fn compile_network<'a>(
    network: &'a Network,
    subnets: &mut HashMap<(&'a str, &'a str), SubnetTable<'a>>,
) -> Result<NetworkTable, Error> {
    let id = &network.id;
    if network.vni == 0 || network.vni >= 1 << 24 {
        return Err(value("network", id, "vni", network.vni, "must be from 1 to 16777215"));
    }
    limit("network", id, "subnets", network.subnets.len(), ADDRESSES_MAX)?;
    let mut services = vec![METADATA_ADDRESS];
    for subnet in &network.subnets {
        let range = range("subnet", &subnet.id, "cidr", &subnet.cidr)?;
        let server = subnet.dhcp_server.or(subnet.gateway).unwrap_or(METADATA_ADDRESS);
        for address in [subnet.gateway, subnet.dhcp_server].into_iter().flatten() {
            if !services.contains(&address) {
                services.push(address);
            }
        }
        let table = SubnetTable { subnet, range, server };
        if subnets.insert((id.as_str(), subnet.id.as_str()), table).is_some() {
            return Err(value("subnet", &subnet.id, "id", &subnet.id, "must be unique"));
        }
    }
    Ok(NetworkTable {
        vni: network.vni,
        mtu: network.mtu.clamp(MTU_MIN, MTU_MAX),
        gateway_mac: gateway_mac(id),
        services,
        stations: HashMap::new(),
        macs: HashMap::new(),
        ports: Vec::new(),
        open_ports: Vec::new(),
        vteps: Vec::new(),
    })
}

/// A locally administered MAC from the network's id (FNV-1a), so that every host has the same.
fn gateway_mac(network_id: &str) -> Mac {
    let hash = network_id
        .bytes()
        .fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    let [a, b, c, d] = hash.to_be_bytes();
    [0xfa, 0x16, 0x3f, a ^ d, b, c]
}

fn compile_port(
    port: &Port,
    network_at: usize,
    network: &NetworkTable,
    subnets: &HashMap<(&str, &str), SubnetTable<'_>>,
) -> Result<PortTable, Error> {
    let id = &port.id;
    limit("port", id, "fixed_ips", port.fixed_ips.len(), ADDRESSES_MAX)?;
    limit("port", id, "allowed_address_pairs", port.allowed_address_pairs.len(), ADDRESSES_MAX)?;
    limit("port", id, "security_rules", port.security_rules.len(), RULES_MAX)?;
    let metadata_bytes = port.metadata.iter().map(|(path, body)| path.len() + body.len()).sum();
    limit("port", id, "bytes of metadata", metadata_bytes, METADATA_BYTES_MAX)?;
    let own = mac("port", id, "mac", &port.mac)?;
    if wire::is_group(&own) {
        return Err(value("port", id, "mac", &port.mac, "must not be a group address"));
    }
    let mut lease = None;
    let mut service = None;
    for fixed in &port.fixed_ips {
        let key = (port.network_id.as_str(), fixed.subnet_id.as_str());
        let Some(table) = subnets.get(&key) else {
            let rule = "must be a subnet of the port's network";
            return Err(value("port", id, "fixed_ips.subnet_id", &fixed.subnet_id, rule));
        };
        let (IpAddr::V4(address), IpNet::V4(range)) = (fixed.address, table.range) else {
            continue;
        };
        service = service.or(Some((table.server, range.prefix_len())));
        if lease.is_none() && table.subnet.dhcp {
            lease = Some(compile_lease(address, &range, table, &port.hostname, network.mtu)?);
        }
    }
    let mut pairs = Vec::new();
    for pair in &port.allowed_address_pairs {
        let range = range("port", id, "allowed_address_pairs.cidr", &pair.cidr)?;
        let mac = match &pair.mac {
            Some(text) => mac("port", id, "allowed_address_pairs.mac", text)?,
            None => own,
        };
        pairs.push((mac, range));
    }
    Ok(PortTable {
        id: id.clone(),
        network: network_at,
        mac: own,
        addresses: port.fixed_ips.iter().map(|fixed| fixed.address).collect(),
        pairs,
        secured: port.port_security,
        rules: port
            .security_rules
            .iter()
            .map(|rule| compile_rule(id, rule))
            .collect::<Result<_, _>>()?,
        lease,
        service,
        metadata: Arc::new(normal_paths(&port.metadata)),
    })
}

fn normal_paths(metadata: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    let normal = |path: &String| path.trim_matches('/').to_owned();
    metadata.iter().map(|(path, body)| (normal(path), body.clone())).collect()
}

fn compile_rule(port_id: &str, rule: &SecurityRule) -> Result<Rule, Error> {
    let remote = match &rule.remote_cidr {
        Some(text) => Some(range("port", port_id, "security_rules.remote_cidr", text)?),
        None => None,
    };
    // Neutron takes "icmp" for IPv6 rules too.
    let protocol = match (rule.ethertype, rule.protocol) {
        (Ethertype::Ipv6, Some(wire::ICMP)) => Some(wire::ICMPV6),
        (_, protocol) => protocol,
    };
    Ok(Rule {
        direction: rule.direction,
        ethertype: rule.ethertype,
        protocol,
        port_min: rule.port_min,
        port_max: rule.port_max,
        remote,
    })
}

/// The options as Neutron's DHCP agent sends them. A client that takes classless routes ignores the
/// router option (RFC 3442), so the default route is in both.
fn compile_lease(
    address: Ipv4Addr,
    range: &Ipv4Net,
    table: &SubnetTable<'_>,
    hostname: &str,
    mtu: u16,
) -> Result<Lease, Error> {
    let subnet = table.subnet;
    // Without a gateway the metadata address is on the link itself.
    let metadata_hop =
        if table.server == METADATA_ADDRESS { Ipv4Addr::UNSPECIFIED } else { table.server };
    let mut routes = Vec::new();
    push_route(&mut routes, &Ipv4Net::from(METADATA_ADDRESS), metadata_hop);
    for (text, hop) in &subnet.host_routes {
        let Ok(IpNet::V4(destination)) = text.parse::<IpNet>() else {
            let rule = "must be an IPv4 range like 10.0.0.0/8";
            return Err(value("subnet", &subnet.id, "host_routes", text, rule));
        };
        push_route(&mut routes, &destination, *hop);
    }
    if let Some(gateway) = subnet.gateway {
        push_route(&mut routes, &Ipv4Net::default(), gateway);
    }
    let dns: Vec<u8> = subnet.dns.iter().flat_map(Ipv4Addr::octets).collect();
    let options = [
        (6, dns),
        (12, hostname.as_bytes().to_vec()),
        (26, mtu.to_be_bytes().to_vec()),
        (121, routes),
    ];
    let options: Vec<_> = options.into_iter().filter(|(_, bytes)| !bytes.is_empty()).collect();
    for (_, bytes) in &options {
        limit("subnet", &subnet.id, "bytes in one DHCP option", bytes.len(), 255)?;
    }
    Ok(Lease {
        address,
        server: table.server,
        netmask: range.netmask(),
        router: subnet.gateway,
        options,
    })
}

/// One route of option 121: prefix length, the octets it needs, next hop.
fn push_route(routes: &mut Vec<u8>, destination: &Ipv4Net, hop: Ipv4Addr) {
    let octets = usize::from(destination.prefix_len().div_ceil(8));
    routes.push(destination.prefix_len());
    routes.extend_from_slice(&destination.network().octets()[..octets]);
    routes.extend_from_slice(&hop.octets());
}

fn mac(thing: &'static str, id: &str, field: &'static str, text: &str) -> Result<Mac, Error> {
    wire::parse_mac(text)
        .ok_or_else(|| value(thing, id, field, text, "must look like fa:16:3e:00:00:01"))
}

fn range(thing: &'static str, id: &str, field: &'static str, text: &str) -> Result<IpNet, Error> {
    let range = text.parse::<IpNet>().or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
    range.map_err(|_| value(thing, id, field, text, "must be a range like 10.0.0.0/24"))
}

fn value(
    thing: &'static str,
    id: &str,
    field: &'static str,
    value: impl ToString,
    rule: &'static str,
) -> Error {
    Error::Value { thing, id: id.to_owned(), field, value: value.to_string(), rule }
}

fn limit(
    thing: &'static str,
    id: &str,
    field: &'static str,
    count: usize,
    max: usize,
) -> Result<(), Error> {
    if count > max {
        return Err(Error::TooMany { thing, id: id.to_owned(), field, count, max });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::program::{FixedIp, Remote};

    fn program() -> Program {
        let subnet = Subnet {
            id: "s".to_owned(),
            cidr: "10.0.0.0/24".to_owned(),
            gateway: None,
            dhcp: true,
            ..Subnet::default()
        };
        let network = Network {
            id: "n".to_owned(),
            vni: 9,
            mtu: 1500,
            subnets: vec![subnet],
            remotes: vec![],
        };
        let port = Port {
            id: "p".to_owned(),
            network_id: "n".to_owned(),
            mac: "fa:16:3e:00:00:01".to_owned(),
            fixed_ips: vec![FixedIp {
                subnet_id: "s".to_owned(),
                address: "10.0.0.5".parse().unwrap(),
            }],
            ..Port::default()
        };
        Program { revision: 1, networks: vec![network], ports: vec![port], forwards: vec![] }
    }

    /// The program, changed, is refused with a message that holds all of `words`.
    #[track_caller]
    fn check_refused(change: impl FnOnce(&mut Program), words: &[&str]) {
        let mut program = program();
        change(&mut program);
        let message = match Tables::compile(program) {
            Ok(tables) => tables.rejected.first().expect("nothing was refused").message.clone(),
            Err(error) => error.to_string(),
        };
        for word in words {
            assert!(message.contains(word), "{message} lacks {word}");
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        check_refused(|program| program.networks[0].vni = 0, &["network n", "vni", "0"]);
        check_refused(
            |program| program.networks[0].subnets[0].cidr = "10/8".to_owned(),
            &["subnet s", "cidr", "10/8"],
        );
        check_refused(|program| program.ports[0].mac = "1:2".to_owned(), &["port p", "mac", "1:2"]);
        check_refused(
            |program| program.ports[0].mac = "01:00:00:00:00:00".to_owned(),
            &["port p", "group"],
        );
        check_refused(
            |program| program.ports[0].network_id = "x".to_owned(),
            &["port p", "network_id", "x"],
        );
        check_refused(
            |program| program.ports[0].fixed_ips[0].subnet_id = "x".to_owned(),
            &["port p", "subnet_id", "x"],
        );
        check_refused(
            |program| {
                let mut twin = program.ports[0].clone();
                twin.id = "q".to_owned();
                program.ports.push(twin);
            },
            &["port q", "mac", "unique"],
        );
        check_refused(
            |program| {
                let body = "x".repeat(METADATA_BYTES_MAX);
                program.ports[0].metadata.insert("user_data".to_owned(), body);
            },
            &["port p", "metadata", "1048585", "1048576"],
        );
    }

    #[test]
    fn a_port_with_an_error_leaves_the_others_alone() {
        let mut program = program();
        let gateway_mac = gateway_mac("n").map(|byte| format!("{byte:02x}")).join(":");
        let bad = Port { id: "bad".to_owned(), mac: gateway_mac, ..program.ports[0].clone() };
        program.ports.insert(0, bad);
        let tables = Tables::compile(program).unwrap();
        assert_eq!(tables.rejected[0].port_id, "bad");
        assert_eq!(tables.port_by_id.get("p"), Some(&0));
        assert_eq!(tables.networks[0].stations.len(), 1);
    }

    #[test]
    fn a_guest_that_moved_here_is_local_even_while_it_is_still_listed_as_remote() {
        let mut program = program();
        let vtep = "127.0.0.9:4789".parse().unwrap();
        program.networks[0].remotes =
            vec![Remote { mac: program.ports[0].mac.clone(), ips: vec![], vtep }];
        let tables = Tables::compile(program).unwrap();
        let station = tables.networks[0].stations[&tables.ports[0].mac];
        assert_eq!(station, Station::Local(0));
    }

    #[test]
    fn without_a_gateway_metadata_is_on_the_link() {
        let tables = Tables::compile(program()).unwrap();
        let lease = tables.ports[0].lease.as_ref().unwrap();
        assert_eq!((lease.server, lease.router), (METADATA_ADDRESS, None));
        let routes = lease.options.iter().find(|(code, _)| *code == 121).unwrap();
        assert_eq!(routes.1, [32, 169, 254, 169, 254, 0, 0, 0, 0]);
    }
}

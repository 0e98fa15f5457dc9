//! From the controller's words to the switch's program.

use std::collections::BTreeMap;
use std::net::SocketAddrV4;

use controller::plan::view::{NetworkView, PortView, RuleView, SubnetView, SwitchView};
use netstack::program::{
    AddressPair, Direction, Ethertype, FixedIp, Forward, ForwardProtocol, Network, Port, Program,
    Remote, SecurityRule, Subnet,
};

/// Path → body of what a port's guest finds at 169.254.169.254.
pub(super) type Metadata = BTreeMap<String, String>;

/// The program for a switch; `metadata` gives each port its documents.
pub(super) fn compile(
    view: &SwitchView,
    revision: u64,
    metadata: impl Fn(&PortView) -> Metadata,
) -> Program {
    Program {
        revision,
        networks: view.networks.iter().map(network).collect(),
        ports: view.ports.iter().map(|view| port(view, metadata(view))).collect(),
        forwards: view
            .forwards
            .iter()
            .map(|forward| Forward {
                id: forward.id.clone(),
                listen: forward.listen,
                port_id: forward.port.to_string(),
                internal: SocketAddrV4::new(forward.internal.0, forward.internal.1),
                protocol: ForwardProtocol::Tcp,
            })
            .collect(),
    }
}

fn network(view: &NetworkView) -> Network {
    Network {
        id: view.id.to_string(),
        vni: view.vni,
        mtu: view.mtu,
        subnets: view.subnets.iter().map(subnet).collect(),
        remotes: view
            .remotes
            .iter()
            .map(|remote| Remote {
                mac: remote.mac.clone(),
                ips: remote.ips.clone(),
                vtep: remote.tunnel,
            })
            .collect(),
    }
}

fn subnet(view: &SubnetView) -> Subnet {
    Subnet {
        id: view.id.to_string(),
        cidr: view.cidr.clone(),
        gateway: view.gateway,
        dhcp_server: None,
        dhcp: view.dhcp,
        dns: view.dns.clone(),
        host_routes: view.host_routes.clone(),
    }
}

fn port(view: &PortView, metadata: Metadata) -> Port {
    Port {
        id: view.id.to_string(),
        generation: view.generation,
        network_id: view.network.to_string(),
        mac: view.mac.clone(),
        fixed_ips: view
            .fixed_ips
            .iter()
            .map(|(subnet, address)| FixedIp { subnet_id: subnet.to_string(), address: *address })
            .collect(),
        hostname: view.hostname.clone(),
        port_security: view.port_security,
        allowed_address_pairs: view
            .allowed_address_pairs
            .iter()
            .map(|(cidr, mac)| AddressPair { cidr: cidr.clone(), mac: mac.clone() })
            .collect(),
        security_rules: view.rules.iter().map(rule).collect(),
        metadata,
    }
}

fn rule(view: &RuleView) -> SecurityRule {
    SecurityRule {
        direction: if view.ingress { Direction::Ingress } else { Direction::Egress },
        ethertype: if view.ipv6 { Ethertype::Ipv6 } else { Ethertype::Ipv4 },
        protocol: view.protocol,
        port_min: view.port_min,
        port_max: view.port_max,
        remote_cidr: view.remote_cidr.clone(),
    }
}

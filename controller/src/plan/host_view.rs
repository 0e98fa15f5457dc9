//! `host_view`: what the state says about one host.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use super::protocol;
use super::view::{
    AttachmentView, ForwardView, Holder, HostView, ImageSource, NetworkView, Nic, Peer, PortView,
    RemoteView, RuleView, ServerView, Service, SubnetView, SwitchView, VolumeView, Wanted,
};
use crate::ids::{HostId, NetworkId, ServerId};
use crate::state::State;
use crate::state::cluster::Host;
use crate::state::compute::{Desired, Server, VmState};
use crate::state::image::ImageStatus;
use crate::state::network::{
    Direction, Ethertype, Network, Port, SecurityGroup, SecurityGroupRule, Subnet,
};
use crate::state::volume::{Attachment, AttachmentState, Volume, VolumeStatus};

/// The share of the state that `host`'s agent acts on.
pub fn host_view(state: &State, host: HostId) -> HostView {
    let placed = state.compute.placed.get(&host);
    let servers = placed.into_iter().flat_map(|placed| placed.servers.iter());
    let homed = state.volume.homed.get(&host);
    let volumes = homed.into_iter().flat_map(|homed| homed.volumes.iter());
    let servers: BTreeMap<_, _> = servers
        .filter_map(|id| state.compute.servers.get(id))
        .map(|server| (server.id.clone(), server_view(state, host, server)))
        .collect();
    HostView {
        host,
        switch: switch_view(state, host, &servers),
        servers,
        volumes: volumes
            .filter_map(|id| state.volume.volumes.get(id))
            .map(|volume| (volume.id.clone(), volume_view(state, host, volume)))
            .collect(),
        images: state
            .image
            .images
            .values()
            .filter_map(|image| image.content.as_ref())
            .map(|content| content.sha512.clone())
            .collect(),
        uploading: state.image.images.values().any(|image| image.status == ImageStatus::Saving),
        service: service(state, host),
    }
}

fn service(state: &State, host: HostId) -> Service {
    match state.cluster.hosts.get(&host) {
        Some(host) if host.forced_down => Service::ForcedDown,
        Some(Host { fenced: Some(epoch), .. }) => Service::Fenced(*epoch),
        // A host that isn't in the state yet (or any more) has nothing to do anyway.
        _ => Service::In,
    }
}

fn server_view(state: &State, host: HostId, server: &Server) -> ServerView {
    let (wanted, settled) = match (server.desired, server.vm_state) {
        (Desired::Deleted, _) => (Wanted::Gone, false),
        (_, VmState::Error) => (Wanted::Stopped, true),
        (Desired::Active, now) => {
            (Wanted::Running, now == VmState::Active && server.task_state.is_none())
        }
        (Desired::Stopped, now) => {
            (Wanted::Stopped, now == VmState::Stopped && server.task_state.is_none())
        }
    };
    ServerView {
        wanted,
        settled,
        generation: server.generation,
        image: image_source(state, host, server),
        ports: server.ports.iter().filter_map(|port| nic(state, port.port_id.as_str())).collect(),
        attachments: attachments(state, host, &server.id),
        server: server.clone(),
    }
}

fn image_source(state: &State, host: HostId, server: &Server) -> Option<ImageSource> {
    let image = state.image.images.get(server.image_id.as_ref()?)?;
    let content = image.content.as_ref()?;
    let others = image.hosts.iter().filter(|holder| **holder != host);
    Some(ImageSource {
        sha512: content.sha512.clone(),
        size_bytes: content.size_bytes,
        sources: others.filter_map(|holder| peer(state, *holder)).collect(),
    })
}

fn peer(state: &State, host: HostId) -> Option<Peer> {
    let addresses = &state.cluster.hosts.get(&host)?.addresses;
    Some(Peer { host, address: addresses.storage, server_name: addresses.server_name.clone() })
}

fn nic(state: &State, port: &str) -> Option<Nic> {
    let port = state.network.ports.get(port)?;
    let network = state.network.networks.get(&port.network_id)?;
    Some(Nic { port: port.id.clone(), mac: port.mac_address.clone(), mtu: network.mtu })
}

fn attachments(state: &State, host: HostId, server: &ServerId) -> Vec<AttachmentView> {
    let volumes = state.volume.by_server.get(server);
    let volumes = volumes.into_iter().flatten().filter_map(|id| state.volume.volumes.get(id));
    volumes
        .filter_map(|volume| {
            let attachment = volume.attachments.iter().find(|a| a.server_id == *server)?;
            Some(attachment_view(state, host, volume, attachment))
        })
        .collect()
}

fn attachment_view(
    state: &State,
    host: HostId,
    volume: &Volume,
    attachment: &Attachment,
) -> AttachmentView {
    let elsewhere = volume.home.filter(|home| *home != host);
    AttachmentView {
        attachment: attachment.id.clone(),
        volume: volume.id.clone(),
        generation: attachment.generation,
        size_bytes: volume.size_gib << 30,
        home: elsewhere.and_then(|home| peer(state, home)),
        wanted: attachment.state != AttachmentState::Detaching,
        settled: attachment.state == AttachmentState::Attached,
    }
}

fn volume_view(state: &State, host: HostId, volume: &Volume) -> VolumeView {
    let elsewhere = |attachment: &Attachment| attachment.host.filter(|at| *at != host);
    VolumeView {
        size_bytes: volume.size_gib << 30,
        wanted: volume.status != VolumeStatus::Deleting,
        settled: volume.status != VolumeStatus::Creating,
        generation: volume.generation,
        holder: volume.attachments.first().map(|attachment| Holder {
            server: attachment.server_id.clone(),
            generation: attachment.generation,
            remote: attachment.host != Some(host),
            host: elsewhere(attachment).and_then(|at| peer(state, at)).map(|at| at.server_name),
        }),
    }
}

fn switch_view(
    state: &State,
    host: HostId,
    servers: &BTreeMap<ServerId, ServerView>,
) -> SwitchView {
    let live = servers.values().filter(|server| server.wanted != Wanted::Gone);
    let ports: Vec<PortView> = live
        .flat_map(|server| server.ports.iter().map(move |nic| (server, nic)))
        .filter_map(|(server, nic)| Some((server, state.network.ports.get(&nic.port)?)))
        .map(|(server, port)| port_view(state, server, port))
        .collect();
    let networks: BTreeSet<&NetworkId> = ports.iter().map(|port| &port.network).collect();
    SwitchView {
        networks: networks
            .into_iter()
            .filter_map(|id| network_view(state, host, state.network.networks.get(id)?))
            .collect(),
        forwards: forwards(state, &ports),
        ports,
    }
}

fn network_view(state: &State, host: HostId, network: &Network) -> Option<NetworkView> {
    let ports = state.network.macs.get(&network.id);
    let ports = ports.into_iter().flat_map(|macs| macs.values());
    Some(NetworkView {
        id: network.id.clone(),
        vni: network.vni?,
        mtu: network.mtu,
        subnets: state.subnets_of(&network.id).filter_map(subnet_view).collect(),
        remotes: ports
            .filter_map(|port| state.network.ports.get(port))
            .filter_map(|port| remote_view(state, host, port))
            .collect(),
    })
}

fn v4(address: IpAddr) -> Option<Ipv4Addr> {
    match address {
        IpAddr::V4(address) => Some(address),
        IpAddr::V6(_) => None,
    }
}

/// An IPv4 subnet; the switch does not serve IPv6 yet.
fn subnet_view(subnet: &Subnet) -> Option<SubnetView> {
    subnet.cidr.addr().is_ipv4().then(|| SubnetView {
        id: subnet.id.clone(),
        cidr: subnet.cidr.to_string(),
        gateway: subnet.gateway_ip.and_then(v4),
        dhcp: subnet.enable_dhcp,
        dns: subnet.dns_nameservers.iter().copied().filter_map(v4).collect(),
        host_routes: subnet
            .host_routes
            .iter()
            .filter_map(|route| Some((route.destination.to_string(), v4(route.nexthop)?)))
            .collect(),
    })
}

fn remote_view(state: &State, host: HostId, port: &Port) -> Option<RemoteView> {
    let other = port.host.filter(|other| *other != host)?;
    Some(RemoteView {
        mac: port.mac_address.clone(),
        ips: port.fixed_ips.iter().map(|fixed| fixed.ip_address).collect(),
        tunnel: state.cluster.hosts.get(&other)?.addresses.tunnel,
    })
}

fn port_view(state: &State, server: &ServerView, port: &Port) -> PortView {
    let groups = port.security_groups.iter().filter_map(|id| state.network.security_groups.get(id));
    let pair = |pair: &crate::state::network::AddressPair| {
        (pair.ip_address.to_string(), pair.mac_address.clone())
    };
    PortView {
        id: port.id.clone(),
        server: server.server.id.clone(),
        generation: server.generation,
        network: port.network_id.clone(),
        mac: port.mac_address.clone(),
        fixed_ips: port
            .fixed_ips
            .iter()
            .map(|fixed| (fixed.subnet_id.clone(), fixed.ip_address))
            .collect(),
        hostname: server.server.hostname.clone(),
        port_security: port.port_security_enabled,
        allowed_address_pairs: port.allowed_address_pairs.iter().map(pair).collect(),
        rules: groups.flat_map(|group| rules(state, group)).collect(),
        server_name: server.server.name.clone(),
        server_metadata: server.server.metadata.clone(),
    }
}

fn rules(state: &State, group: &SecurityGroup) -> Vec<RuleView> {
    group.rules.values().flat_map(|rule| rule_views(state, rule)).collect()
}

/// A rule, once for each address of its remote group where it has one.
fn rule_views(state: &State, rule: &SecurityGroupRule) -> Vec<RuleView> {
    let ipv6 = rule.ethertype == Ethertype::IPv6;
    let view = |remote_cidr: Option<String>| RuleView {
        ingress: rule.direction == Direction::Ingress,
        ipv6,
        protocol: rule.protocol.as_deref().and_then(|name| protocol::number(name, ipv6)),
        port_min: rule.port_range_min,
        port_max: rule.port_range_max,
        remote_cidr,
    };
    let Some(group) = &rule.remote_group_id else {
        return vec![view(rule.remote_ip_prefix.map(|prefix| prefix.to_string()))];
    };
    let members = state.network.group_ports.get(group);
    members
        .into_iter()
        .flatten()
        .filter_map(|port| state.network.ports.get(port))
        .flat_map(|port| port.fixed_ips.iter())
        .filter(|fixed| fixed.ip_address.is_ipv6() == ipv6)
        .map(|fixed| view(Some(format!("{}/{}", fixed.ip_address, if ipv6 { 128 } else { 32 }))))
        .collect()
}

fn forwards(state: &State, ports: &[PortView]) -> Vec<ForwardView> {
    let all = state.network.floating_ips.values().flat_map(|floating| {
        floating.port_forwardings.values().map(move |forwarding| (floating, forwarding))
    });
    all.filter(|(_, forwarding)| ports.iter().any(|p| p.id == forwarding.internal_port_id))
        .filter_map(|(floating, forwarding)| {
            Some(ForwardView {
                id: forwarding.id.to_string(),
                listen: SocketAddr::new(floating.floating_ip_address, forwarding.external_port),
                port: forwarding.internal_port_id.clone(),
                internal: (v4(forwarding.internal_ip_address)?, forwarding.internal_port),
            })
        })
        .collect()
}

//! Anti-spoofing: a guest speaks only with its own MAC and addresses (and its allowed pairs), and
//! plays neither DHCP server nor IPv6 router. Neutron's port security, without the rules.

use super::{DropReason, Verdict};
use crate::compile::PortTable;
use crate::program::Ethertype;
use crate::wire::{self, Arp, Content, Frame, Packet, Transport};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

pub(super) fn check(port: &PortTable, frame: &Frame, bytes: &[u8]) -> Verdict {
    if wire::is_group(&frame.source) || !port.owns_mac(&frame.source) {
        return Err(DropReason::SpoofedMac);
    }
    match &frame.content {
        Content::Arp(arp) => check_arp(port, frame, arp),
        Content::Ip(packet) if is_server(packet) => Err(DropReason::RogueServer),
        Content::Ip(packet) => match packet.source {
            IpAddr::V4(source) => check_ipv4(port, frame, packet, source),
            IpAddr::V6(source) => check_ipv6(port, frame, packet, source, bytes),
        },
        Content::Other => Ok(()),
    }
}

fn check_arp(port: &PortTable, frame: &Frame, arp: &Arp) -> Verdict {
    let probe = arp.sender == Ipv4Addr::UNSPECIFIED && arp.request;
    let owned = port.owns(&frame.source, IpAddr::V4(arp.sender));
    if arp.sender_mac == frame.source && (probe || owned) {
        Ok(())
    } else {
        Err(DropReason::SpoofedNeighbour)
    }
}

fn check_ipv4(port: &PortTable, frame: &Frame, packet: &Packet, source: Ipv4Addr) -> Verdict {
    let asks_for_address = source == Ipv4Addr::UNSPECIFIED
        && matches!(packet.transport, Transport::Udp { source: 68, destination: 67 });
    if asks_for_address || port.owns(&frame.source, IpAddr::V4(source)) {
        Ok(())
    } else {
        Err(DropReason::SpoofedAddress)
    }
}

fn check_ipv6(
    port: &PortTable,
    frame: &Frame,
    packet: &Packet,
    source: Ipv6Addr,
    bytes: &[u8],
) -> Verdict {
    let owns = |address: Ipv6Addr| {
        address == wire::link_local(&frame.source) || port.owns(&frame.source, IpAddr::V6(address))
    };
    let probe = source == Ipv6Addr::UNSPECIFIED && is_neighbour_discovery(packet);
    if !probe && !owns(source) {
        return Err(DropReason::SpoofedAddress);
    }
    if let Transport::Icmp { kind: 136, .. } = packet.transport {
        // Neighbour advertisement: the target is at 8 (RFC 4861, section 4.4).
        let target = bytes.get(packet.transport_at + 8..packet.end);
        let target: Option<&[u8; 16]> = target.and_then(<[u8]>::first_chunk);
        if !target.is_some_and(|target| owns(Ipv6Addr::from(*target))) {
            return Err(DropReason::SpoofedNeighbour);
        }
    }
    Ok(())
}

/// DHCP and DHCPv6 servers, IPv6 routers and redirects.
fn is_server(packet: &Packet) -> bool {
    match (packet.ethertype, packet.transport) {
        (Ethertype::Ipv4, Transport::Udp { source, destination }) => {
            (source, destination) == (67, 68)
        }
        (Ethertype::Ipv6, Transport::Udp { source, destination }) => {
            (source, destination) == (547, 546)
        }
        (Ethertype::Ipv6, Transport::Icmp { kind: 134 | 137, .. }) => {
            packet.protocol == wire::ICMPV6
        }
        _ => false,
    }
}

/// What IPv6 needs to work at all, always admitted: solicitations, advertisements of neighbours,
/// multicast listener reports.
pub(super) fn is_neighbour_discovery(packet: &Packet) -> bool {
    packet.ethertype == Ethertype::Ipv6
        && packet.protocol == wire::ICMPV6
        && matches!(packet.transport, Transport::Icmp { kind: 130..=133 | 135 | 136 | 143, .. })
}

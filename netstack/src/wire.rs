//! From bytes to the few facts the pipeline decides on, and back. Parsing is smoltcp's where it has
//! a format; every function takes hostile bytes and answers with `None` rather than a panic.

use crate::program::Ethertype;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetFrame, EthernetProtocol, Ipv4Packet,
    Ipv6Packet, TcpPacket, UdpPacket,
};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// An Ethernet address.
pub(crate) type Mac = [u8; 6];

/// Bytes of an Ethernet header without VLAN tag.
pub(crate) const ETHERNET_BYTES: usize = 14;
/// Bytes of a VXLAN header.
pub(crate) const VXLAN_BYTES: usize = 8;
/// The address of all stations.
pub(crate) const BROADCAST: Mac = [0xff; 6];

/// IP protocol numbers.
pub(crate) const ICMP: u8 = 1;
pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
pub(crate) const ICMPV6: u8 = 58;

/// TCP flags as in the header.
pub(crate) const FIN: u8 = 1;
pub(crate) const SYN: u8 = 2;
pub(crate) const RST: u8 = 4;
pub(crate) const ACK: u8 = 16;

/// Extension headers followed before an IPv6 packet counts as malformed.
const EXTENSION_HEADERS_MAX: usize = 8;

/// One Ethernet frame, looked at.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Frame {
    pub(crate) destination: Mac,
    pub(crate) source: Mac,
    pub(crate) content: Content,
}

/// What a frame carries.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Content {
    Arp(Arp),
    Ip(Packet),
    /// Any other ethertype.
    Other,
}

/// An ARP message for IPv4 over Ethernet.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Arp {
    pub(crate) request: bool,
    pub(crate) sender_mac: Mac,
    pub(crate) sender: Ipv4Addr,
    pub(crate) target: Ipv4Addr,
}

/// An IP packet's addresses and the head of its transport.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Packet {
    pub(crate) ethertype: Ethertype,
    pub(crate) source: IpAddr,
    pub(crate) destination: IpAddr,
    pub(crate) protocol: u8,
    pub(crate) transport: Transport,
    /// Identification where this is the first of several fragments.
    pub(crate) first_fragment: Option<u32>,
    /// Where in the frame the IP header, the transport header, and what follows the packet begin.
    pub(crate) ip_at: usize,
    pub(crate) transport_at: usize,
    pub(crate) end: usize,
}

/// The head of a transport header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transport {
    Tcp { source: u16, destination: u16, flags: u8 },
    Udp { source: u16, destination: u16 },
    Icmp { kind: u8, code: u8, ident: u16 },
    Other,
    LaterFragment { ident: u32 },
}

/// The packet that an ICMP error quotes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Quoted {
    pub(crate) source: IpAddr,
    pub(crate) destination: IpAddr,
    pub(crate) protocol: u8,
    pub(crate) source_port: u16,
    pub(crate) destination_port: u16,
}

/// Looks at a frame; `None` where a header contradicts itself or the frame's length.
pub(crate) fn parse(bytes: &[u8]) -> Option<Frame> {
    let frame = EthernetFrame::new_checked(bytes).ok()?;
    let content = match frame.ethertype() {
        EthernetProtocol::Arp => Content::Arp(parse_arp(frame.payload())?),
        EthernetProtocol::Ipv4 => Content::Ip(parse_ipv4(bytes)?),
        EthernetProtocol::Ipv6 => Content::Ip(parse_ipv6(bytes)?),
        EthernetProtocol::Unknown(_) => Content::Other,
    };
    Some(Frame { destination: frame.dst_addr().0, source: frame.src_addr().0, content })
}

/// Whether a MAC names a group of stations.
pub(crate) fn is_group(mac: &Mac) -> bool {
    mac[0] & 1 == 1
}

fn parse_arp(payload: &[u8]) -> Option<Arp> {
    let ArpRepr::EthernetIpv4 {
        operation,
        source_hardware_addr,
        source_protocol_addr,
        target_protocol_addr,
        ..
    } = ArpRepr::parse(&ArpPacket::new_checked(payload).ok()?).ok()?
    else {
        return None;
    };
    Some(Arp {
        request: operation == ArpOperation::Request,
        sender_mac: source_hardware_addr.0,
        sender: source_protocol_addr,
        target: target_protocol_addr,
    })
}

fn parse_ipv4(bytes: &[u8]) -> Option<Packet> {
    let packet = Ipv4Packet::new_checked(bytes.get(ETHERNET_BYTES..)?).ok()?;
    if packet.version() != 4 || packet.header_len() < 20 {
        return None;
    }
    let transport_at = ETHERNET_BYTES + usize::from(packet.header_len());
    let end = ETHERNET_BYTES + usize::from(packet.total_len());
    let protocol = u8::from(packet.next_header());
    let ident = u32::from(packet.ident());
    let transport = if packet.frag_offset() > 0 {
        Transport::LaterFragment { ident }
    } else {
        parse_transport(protocol, bytes.get(transport_at..end)?)?
    };
    Some(Packet {
        ethertype: Ethertype::Ipv4,
        source: IpAddr::V4(packet.src_addr()),
        destination: IpAddr::V4(packet.dst_addr()),
        protocol,
        transport,
        first_fragment: (packet.more_frags() && packet.frag_offset() == 0).then_some(ident),
        ip_at: ETHERNET_BYTES,
        transport_at,
        end,
    })
}

fn parse_ipv6(bytes: &[u8]) -> Option<Packet> {
    let packet = Ipv6Packet::new_checked(bytes.get(ETHERNET_BYTES..)?).ok()?;
    if packet.version() != 6 {
        return None;
    }
    let mut at = ETHERNET_BYTES + 40;
    let end = at + usize::from(packet.payload_len());
    let mut protocol = u8::from(packet.next_header());
    let mut first_fragment = None;
    let mut later_fragment = None;
    for _ in 0..EXTENSION_HEADERS_MAX {
        match protocol {
            0 | 43 | 60 => {
                let header = bytes.get(at..end)?;
                protocol = *header.first()?;
                at += 8 * (1 + usize::from(*header.get(1)?));
            }
            44 => {
                let header: &[u8; 8] = bytes.get(at..end)?.first_chunk()?;
                protocol = header[0];
                let offset_and_more = u16::from_be_bytes([header[2], header[3]]);
                let ident = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
                at += 8;
                if offset_and_more >> 3 > 0 {
                    later_fragment = Some(ident);
                    break;
                }
                first_fragment = (offset_and_more & 1 == 1).then_some(ident);
            }
            _ => break,
        }
    }
    if at > end || matches!(protocol, 0 | 43 | 44 | 60) && later_fragment.is_none() {
        return None;
    }
    let transport = match later_fragment {
        Some(ident) => Transport::LaterFragment { ident },
        None => parse_transport(protocol, bytes.get(at..end)?)?,
    };
    Some(Packet {
        ethertype: Ethertype::Ipv6,
        source: IpAddr::V6(packet.src_addr()),
        destination: IpAddr::V6(packet.dst_addr()),
        protocol,
        transport,
        first_fragment,
        ip_at: ETHERNET_BYTES,
        transport_at: at,
        end,
    })
}

fn parse_transport(protocol: u8, payload: &[u8]) -> Option<Transport> {
    Some(match protocol {
        // A first fragment need not hold all of a TCP header's options.
        TCP if payload.len() >= 20 => {
            let header = TcpPacket::new_unchecked(payload);
            Transport::Tcp {
                source: header.src_port(),
                destination: header.dst_port(),
                flags: payload[13],
            }
        }
        UDP if payload.len() >= 8 => {
            let header = UdpPacket::new_unchecked(payload);
            Transport::Udp { source: header.src_port(), destination: header.dst_port() }
        }
        ICMP | ICMPV6 if payload.len() >= 8 => Transport::Icmp {
            kind: payload[0],
            code: payload[1],
            ident: u16::from_be_bytes([payload[4], payload[5]]),
        },
        TCP | UDP | ICMP | ICMPV6 => return None,
        _ => Transport::Other,
    })
}

/// The packet quoted behind the eight bytes of an ICMP error's header (RFC 792, RFC 4443).
pub(crate) fn parse_quoted(bytes: &[u8], packet: &Packet) -> Option<Quoted> {
    let quoted = bytes.get(packet.transport_at + 8..packet.end)?;
    let (source, destination, protocol, at) = match packet.ethertype {
        Ethertype::Ipv4 => {
            let header: &[u8; 20] = quoted.first_chunk()?;
            let at = 4 * usize::from(header[0] & 0x0f);
            let source: [u8; 4] = *header[12..].first_chunk()?;
            let destination: [u8; 4] = *header[16..].first_chunk()?;
            (IpAddr::from(source), IpAddr::from(destination), header[9], at)
        }
        Ethertype::Ipv6 => {
            let header: &[u8; 40] = quoted.first_chunk()?;
            let source: [u8; 16] = *header[8..].first_chunk()?;
            let destination: [u8; 16] = *header[24..].first_chunk()?;
            (IpAddr::from(source), IpAddr::from(destination), header[6], 40)
        }
    };
    let transport: &[u8; 8] = quoted.get(at..)?.first_chunk()?;
    let (source_port, destination_port) = match protocol {
        ICMP | ICMPV6 => (u16::from_be_bytes([transport[4], transport[5]]), 0),
        _ => (
            u16::from_be_bytes([transport[0], transport[1]]),
            u16::from_be_bytes([transport[2], transport[3]]),
        ),
    };
    Some(Quoted { source, destination, protocol, source_port, destination_port })
}

/// The link-local address that a station derives from its MAC (RFC 4291, appendix A).
pub(crate) fn link_local(mac: &Mac) -> Ipv6Addr {
    Ipv6Addr::from([
        0xfe,
        0x80,
        0,
        0,
        0,
        0,
        0,
        0,
        mac[0] ^ 2,
        mac[1],
        mac[2],
        0xff,
        0xfe,
        mac[3],
        mac[4],
        mac[5],
    ])
}

/// Starts a frame in `buffer` and returns the room for its payload.
pub(crate) fn ethernet<'a>(
    buffer: &'a mut Vec<u8>,
    destination: &Mac,
    source: &Mac,
    ethertype: EthernetProtocol,
    payload_bytes: usize,
) -> &'a mut [u8] {
    buffer.clear();
    buffer.resize(ETHERNET_BYTES + payload_bytes, 0);
    let mut frame = EthernetFrame::new_unchecked(&mut buffer[..]);
    frame.set_dst_addr(EthernetAddress(*destination));
    frame.set_src_addr(EthernetAddress(*source));
    frame.set_ethertype(ethertype);
    &mut buffer[ETHERNET_BYTES..]
}

/// Writes the ARP reply "`address` is at `mac`" for the asker into `buffer`.
pub(crate) fn arp_reply(buffer: &mut Vec<u8>, asked: &Arp, mac: &Mac) {
    let reply = ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Reply,
        source_hardware_addr: EthernetAddress(*mac),
        source_protocol_addr: asked.target,
        target_hardware_addr: EthernetAddress(asked.sender_mac),
        target_protocol_addr: asked.sender,
    };
    let payload =
        ethernet(buffer, &asked.sender_mac, mac, EthernetProtocol::Arp, reply.buffer_len());
    reply.emit(&mut ArpPacket::new_unchecked(payload));
}

/// The VXLAN header (RFC 7348, section 5) of a network.
pub(crate) fn vxlan_header(vni: u32) -> [u8; VXLAN_BYTES] {
    let [_, high, middle, low] = vni.to_be_bytes();
    [0x08, 0, 0, 0, high, middle, low, 0]
}

/// Splits a VXLAN datagram into network identifier and inner frame; `None` without a valid one.
pub(crate) fn parse_vxlan(datagram: &[u8]) -> Option<(u32, &[u8])> {
    let (header, frame) = datagram.split_first_chunk::<VXLAN_BYTES>()?;
    let vni = u32::from_be_bytes([0, header[4], header[5], header[6]]);
    (header[0] & 0x08 != 0).then_some((vni, frame))
}

/// Parses `aa:bb:cc:dd:ee:ff`.
pub(crate) fn parse_mac(text: &str) -> Option<Mac> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|part| part.len() == 2)?;
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    parts.next().is_none().then_some(mac)
}

//! The DHCP server (RFC 2131): each port has its one address from the program, so there is nothing to
//! allocate, store or lose.

use crate::compile::{Lease, NetworkTable, PortTable};
use crate::program::Ethertype;
use crate::wire::{self, Mac, Packet, Transport};
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    DhcpMessageType, DhcpOption, DhcpPacket, DhcpRepr, EthernetAddress, EthernetProtocol,
    IpAddress, IpProtocol, Ipv4Packet, Ipv4Repr, UdpPacket, UdpRepr,
};
use std::net::Ipv4Addr;

/// Lease time, seconds. Neutron's default: addresses never change hands behind a guest's back.
const LEASE_SECONDS: u32 = 86_400;
/// Shortest message: some clients drop anything below BOOTP's size.
const MESSAGE_BYTES_MIN: usize = 300;

const REQUESTED_ADDRESS: u8 = 50;
const MESSAGE_TYPE: u8 = 53;
const SERVER_ID: u8 = 54;
const CLIENT_ID: u8 = 61;

/// Whether a packet is for a DHCP server.
pub(super) fn is_request(packet: &Packet) -> bool {
    packet.ethertype == Ethertype::Ipv4
        && packet.first_fragment.is_none()
        && matches!(packet.transport, Transport::Udp { source: 68, destination: 67 })
}

/// What a client says, as far as it matters.
struct Asked<'a> {
    kind: DhcpMessageType,
    requested: Option<Ipv4Addr>,
    server: Option<Ipv4Addr>,
    client_id: Option<&'a [u8]>,
}

/// Writes the answer as a frame into `buffer`; `false` where there is none to give.
pub(super) fn answer(
    port: &PortTable,
    lease: &Lease,
    network: &NetworkTable,
    packet: &Packet,
    bytes: &[u8],
    buffer: &mut Vec<u8>,
) -> bool {
    let payload = bytes.get(packet.transport_at..packet.end);
    let Some(datagram) = payload.and_then(|payload| UdpPacket::new_checked(payload).ok()) else {
        return false;
    };
    let Ok(message) = DhcpPacket::new_checked(datagram.payload()) else { return false };
    let Some(asked) = read(&message) else { return false };
    let Some(kind) = decide(lease, &asked, message.client_ip()) else { return false };
    if message.client_hardware_address().0 != port.mac {
        return false;
    }
    let reply = Reply { kind, lease, asked: &asked, message: &message };
    reply.write(&port.mac, &network.gateway_mac, buffer);
    true
}

fn read<'a>(message: &'a DhcpPacket<&'a [u8]>) -> Option<Asked<'a>> {
    let mut kind = None;
    let mut requested = None;
    let mut server = None;
    let mut client_id = None;
    for option in message.options() {
        let address = <[u8; 4]>::try_from(option.data).ok().map(Ipv4Addr::from);
        match option.kind {
            MESSAGE_TYPE => kind = option.data.first().map(|byte| DhcpMessageType::from(*byte)),
            REQUESTED_ADDRESS => requested = address,
            SERVER_ID => server = address,
            CLIENT_ID => client_id = Some(option.data),
            _ => {}
        }
    }
    Some(Asked { kind: kind?, requested, server, client_id })
}

/// The kind of answer, if any (RFC 2131, section 4.3).
fn decide(lease: &Lease, asked: &Asked<'_>, client: Ipv4Addr) -> Option<DhcpMessageType> {
    match asked.kind {
        DhcpMessageType::Discover => Some(DhcpMessageType::Offer),
        DhcpMessageType::Inform => Some(DhcpMessageType::Ack),
        DhcpMessageType::Request => {
            if asked.server.is_some_and(|server| server != lease.server) {
                return None;
            }
            let wants = asked.requested.unwrap_or(client);
            let right = wants == lease.address;
            Some(if right { DhcpMessageType::Ack } else { DhcpMessageType::Nak })
        }
        _ => None,
    }
}

struct Reply<'a> {
    kind: DhcpMessageType,
    lease: &'a Lease,
    asked: &'a Asked<'a>,
    message: &'a DhcpPacket<&'a [u8]>,
}

impl Reply<'_> {
    fn write(&self, client_mac: &Mac, server_mac: &Mac, buffer: &mut Vec<u8>) {
        let options = self.options();
        let repr = self.message(EthernetAddress(*client_mac), &options);
        let message_bytes = repr.buffer_len().max(MESSAGE_BYTES_MIN);
        let udp = UdpRepr { src_port: 67, dst_port: 68 };
        let ip = Ipv4Repr {
            src_addr: self.lease.server,
            dst_addr: self.destination(),
            next_header: IpProtocol::Udp,
            payload_len: udp.header_len() + message_bytes,
            hop_limit: 64,
        };
        let destination_mac =
            if ip.dst_addr.is_broadcast() { wire::BROADCAST } else { *client_mac };
        let frame = wire::ethernet(
            buffer,
            &destination_mac,
            server_mac,
            EthernetProtocol::Ipv4,
            ip.buffer_len() + ip.payload_len,
        );
        let checksums = ChecksumCapabilities::default();
        let mut header = Ipv4Packet::new_unchecked(frame);
        ip.emit(&mut header, &checksums);
        udp.emit(
            &mut UdpPacket::new_unchecked(header.payload_mut()),
            &IpAddress::Ipv4(ip.src_addr),
            &IpAddress::Ipv4(ip.dst_addr),
            message_bytes,
            // A message that does not fit its own computed length would be a bug in smoltcp; the
            // guest then gets a message without options, not a dead switch.
            |payload| {
                let _ = repr.emit(&mut DhcpPacket::new_unchecked(payload));
            },
            &checksums,
        );
    }

    fn options(&self) -> Vec<DhcpOption<'_>> {
        let mut options = Vec::new();
        // RFC 6842: the client's identifier goes back to it.
        if let Some(data) = self.asked.client_id {
            options.push(DhcpOption { kind: CLIENT_ID, data });
        }
        if self.kind != DhcpMessageType::Nak {
            let given = self.lease.options.iter();
            options.extend(given.map(|(kind, data)| DhcpOption { kind: *kind, data }));
        }
        options
    }

    fn message<'b>(&self, client: EthernetAddress, options: &'b [DhcpOption<'b>]) -> DhcpRepr<'b> {
        let nak = self.kind == DhcpMessageType::Nak;
        let leased = !nak && self.asked.kind != DhcpMessageType::Inform;
        DhcpRepr {
            message_type: self.kind,
            transaction_id: self.message.transaction_id(),
            secs: 0,
            client_hardware_address: client,
            client_ip: if nak { Ipv4Addr::UNSPECIFIED } else { self.message.client_ip() },
            your_ip: if leased { self.lease.address } else { Ipv4Addr::UNSPECIFIED },
            server_ip: if nak { Ipv4Addr::UNSPECIFIED } else { self.lease.server },
            router: self.lease.router.filter(|_| !nak),
            subnet_mask: (!nak).then_some(self.lease.netmask),
            relay_agent_ip: Ipv4Addr::UNSPECIFIED,
            broadcast: self.broadcast_wanted(),
            requested_ip: None,
            client_identifier: None,
            server_identifier: Some(self.lease.server),
            parameter_request_list: None,
            dns_servers: None,
            max_size: None,
            lease_duration: leased.then_some(LEASE_SECONDS),
            renew_duration: None,
            rebind_duration: None,
            additional_options: options,
        }
    }

    fn broadcast_wanted(&self) -> bool {
        self.message.flags().contains(smoltcp::wire::DhcpFlags::BROADCAST)
    }

    /// RFC 2131, section 4.1.
    fn destination(&self) -> Ipv4Addr {
        let client = self.message.client_ip();
        if self.kind == DhcpMessageType::Nak {
            Ipv4Addr::BROADCAST
        } else if client != Ipv4Addr::UNSPECIFIED {
            client
        } else if self.broadcast_wanted() {
            Ipv4Addr::BROADCAST
        } else {
            self.lease.address
        }
    }
}

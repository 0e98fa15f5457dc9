//! What happens to a frame: pure, apart from I/O. A frame and the time go in, frames come out
//! through [`Output`]; the tables are swapped as a whole, the connection table lives on.
//!
//! ```text
//! guest ─► parse ─► anti-spoofing ─┬─ ARP ──────────► answered, or flooded
//!                                  ├─ DHCP ─────────► answered
//!                                  ├─ metadata ─────► local TCP stack
//!                                  └─ egress rules ─┬► gateway: ping, or local TCP stack
//!                                                   └► layer 2 ─┬► ingress rules ─► guest
//! tunnel ─► VXLAN ─► parse ──────────────────────────────────────┤
//! local TCP stack ───────────────────────────────────────────────┘ (and the tunnel, for layer 2)
//! ```

mod connections;
mod dhcp;
mod spoof;
#[cfg(test)]
mod tests;

use crate::compile::{METADATA_ADDRESS, NetworkTable, PortTable, Station, Tables};
use crate::program::{Direction, Ethertype};
use crate::wire::{self, Arp, Content, Frame, Mac, Packet, Transport};
use connections::Connections;
use smoltcp::wire::{EthernetProtocol, Icmpv4Message, Icmpv4Packet, Ipv4Packet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};
use std::sync::Arc;

/// The port of the metadata service.
pub(crate) const METADATA_PORT: u16 = 80;

/// Where the pipeline's frames go. A port is its index in the tables in force.
pub(crate) trait Output {
    /// A frame for a local guest.
    fn port(&mut self, port: usize, frame: &[u8]);
    /// A frame for another host.
    fn tunnel(&mut self, vtep: SocketAddr, vni: u32, frame: &[u8]);
    /// An IPv4 packet from a guest for the local TCP stack of its port.
    fn service(&mut self, port: usize, packet: &[u8]);
}

/// Why a frame went nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DropReason {
    Malformed,
    UnknownPort,
    SpoofedMac,
    SpoofedAddress,
    SpoofedNeighbour,
    RogueServer,
    Ethertype,
    SecurityEgress,
    SecurityIngress,
    ConnectionsFull,
    UnknownStation,
    NoRoute,
    TunnelSource,
    TunnelNetwork,
}

impl DropReason {
    pub(crate) const ALL: [(DropReason, &'static str); 14] = [
        (DropReason::Malformed, "malformed"),
        (DropReason::UnknownPort, "unknown_port"),
        (DropReason::SpoofedMac, "spoofed_mac"),
        (DropReason::SpoofedAddress, "spoofed_address"),
        (DropReason::SpoofedNeighbour, "spoofed_neighbour"),
        (DropReason::RogueServer, "rogue_server"),
        (DropReason::Ethertype, "ethertype"),
        (DropReason::SecurityEgress, "security_egress"),
        (DropReason::SecurityIngress, "security_ingress"),
        (DropReason::ConnectionsFull, "connections_full"),
        (DropReason::UnknownStation, "unknown_station"),
        (DropReason::NoRoute, "no_route"),
        (DropReason::TunnelSource, "tunnel_source"),
        (DropReason::TunnelNetwork, "tunnel_network"),
    ];
}

/// A frame goes on or is dropped.
type Verdict = Result<(), DropReason>;

/// The tables in force and what was learnt from traffic.
pub(crate) struct Pipeline {
    tables: Arc<Tables>,
    /// Counts swaps: a connection admitted under older tables is asked again.
    epoch: u64,
    connections: Connections,
    drops: [u64; DropReason::ALL.len()],
    /// Where answers are written; kept for its capacity.
    scratch: Vec<u8>,
}

impl Pipeline {
    pub(crate) fn new() -> Pipeline {
        Pipeline {
            tables: Arc::default(),
            epoch: 0,
            connections: Connections::default(),
            drops: [0; DropReason::ALL.len()],
            scratch: Vec::new(),
        }
    }

    pub(crate) fn tables(&self) -> &Arc<Tables> {
        &self.tables
    }

    /// Puts new tables in force. Connections stay where the new rules still permit them.
    pub(crate) fn swap(&mut self, tables: Arc<Tables>) {
        self.tables = tables;
        self.epoch += 1;
    }

    /// Frames dropped so far, by reason.
    pub(crate) fn drops(&self) -> impl Iterator<Item = (&'static str, u64)> {
        DropReason::ALL.iter().map(|(reason, name)| (*name, self.drops[*reason as usize]))
    }

    /// Connections tracked now.
    pub(crate) fn connections(&self) -> usize {
        self.connections.len()
    }

    /// Forgets connections that timed out.
    pub(crate) fn sweep(&mut self, now_ms: u64) {
        self.connections.sweep(now_ms);
    }

    /// A frame from a local guest.
    pub(crate) fn guest_frame(
        &mut self,
        port: usize,
        bytes: &[u8],
        now_ms: u64,
        output: &mut impl Output,
    ) {
        let verdict = self.step(now_ms, output).guest_frame(port, bytes);
        self.count(verdict);
    }

    /// A datagram that arrived at the tunnel endpoint.
    pub(crate) fn tunnel_datagram(
        &mut self,
        source: SocketAddr,
        datagram: &[u8],
        now_ms: u64,
        output: &mut impl Output,
    ) {
        let verdict = self.step(now_ms, output).tunnel_datagram(source, datagram);
        self.count(verdict);
    }

    /// An IPv4 packet that the local TCP stack of a port sends to its guest.
    pub(crate) fn service_packet(
        &mut self,
        port: usize,
        packet: &[u8],
        now_ms: u64,
        output: &mut impl Output,
    ) {
        let verdict = self.step(now_ms, output).service_packet(port, packet);
        self.count(verdict);
    }

    /// Whether a forwarded connection of `client` to `guest` may begin, sent from the switch's
    /// `service` address. The rules see the client's real address, not the switch's.
    pub(crate) fn admit_forward(
        &mut self,
        port: usize,
        client: IpAddr,
        service: SocketAddrV4,
        guest: SocketAddrV4,
        now_ms: u64,
    ) -> bool {
        let Some(table) = self.tables.ports.get(port) else { return false };
        let vni = self.tables.networks[table.network].vni;
        let verdict =
            self.connections.open_forward(table, vni, client, service, guest, (now_ms, self.epoch));
        self.count(verdict);
        verdict.is_ok()
    }

    fn step<'a, O: Output>(&'a mut self, now_ms: u64, output: &'a mut O) -> Step<'a, O> {
        Step {
            tables: &self.tables,
            connections: &mut self.connections,
            scratch: &mut self.scratch,
            output,
            now_ms,
            epoch: self.epoch,
        }
    }

    fn count(&mut self, verdict: Verdict) {
        if let Err(reason) = verdict {
            self.drops[reason as usize] += 1;
        }
    }
}

/// One frame's way through.
struct Step<'a, O> {
    tables: &'a Tables,
    connections: &'a mut Connections,
    scratch: &'a mut Vec<u8>,
    output: &'a mut O,
    now_ms: u64,
    epoch: u64,
}

impl<'a, O: Output> Step<'a, O> {
    fn guest_frame(&mut self, at: usize, bytes: &[u8]) -> Verdict {
        let (port, network) = self.port(at)?;
        let frame = wire::parse(bytes).ok_or(DropReason::Malformed)?;
        if port.secured {
            spoof::check(port, &frame, bytes)?;
        }
        match frame.content {
            Content::Arp(arp) => self.arp(at, network, &frame, &arp, bytes),
            Content::Ip(packet) => self.guest_packet(at, port, network, &frame, &packet, bytes),
            Content::Other if port.secured => Err(DropReason::Ethertype),
            Content::Other => self.layer2(Some(at), network, &frame, bytes),
        }
    }

    fn tunnel_datagram(&mut self, source: SocketAddr, datagram: &[u8]) -> Verdict {
        let tables = self.tables;
        let (vni, bytes) = wire::parse_vxlan(datagram).ok_or(DropReason::Malformed)?;
        let at = tables.network_by_vni.get(&vni).ok_or(DropReason::TunnelNetwork)?;
        let network = &tables.networks[*at];
        // Peers other than this switch choose a source port per flow (RFC 7348, section 5).
        if !network.vteps.iter().any(|vtep| vtep.ip() == source.ip()) {
            return Err(DropReason::TunnelSource);
        }
        let frame = wire::parse(bytes).ok_or(DropReason::Malformed)?;
        self.layer2(None, network, &frame, bytes)
    }

    fn service_packet(&mut self, at: usize, packet: &[u8]) -> Verdict {
        let (port, network) = self.port(at)?;
        let mut bytes = std::mem::take(self.scratch);
        wire::ethernet(
            &mut bytes,
            &port.mac,
            &network.gateway_mac,
            EthernetProtocol::Ipv4,
            packet.len(),
        )
        .copy_from_slice(packet);
        let verdict = self.deliver_from_service(at, &bytes);
        *self.scratch = bytes;
        verdict
    }

    fn deliver_from_service(&mut self, at: usize, bytes: &[u8]) -> Verdict {
        let frame = wire::parse(bytes).ok_or(DropReason::Malformed)?;
        match frame.content {
            Content::Ip(packet)
                if packet.source == IpAddr::V4(METADATA_ADDRESS) && is_metadata_reply(&packet) =>
            {
                self.output.port(at, bytes);
                Ok(())
            }
            _ => self.deliver(at, &frame, bytes),
        }
    }

    fn port(&self, at: usize) -> Result<(&'a PortTable, &'a NetworkTable), DropReason> {
        let port = self.tables.ports.get(at).ok_or(DropReason::UnknownPort)?;
        Ok((port, &self.tables.networks[port.network]))
    }

    /// Answers for the switch's own addresses and for every known port; asks around otherwise.
    fn arp(
        &mut self,
        at: usize,
        network: &NetworkTable,
        frame: &Frame,
        arp: &Arp,
        bytes: &[u8],
    ) -> Verdict {
        match arp_answer(network, arp) {
            Some(mac) => {
                wire::arp_reply(self.scratch, arp, &mac);
                self.output.port(at, self.scratch);
                Ok(())
            }
            None => self.layer2(Some(at), network, frame, bytes),
        }
    }

    fn guest_packet(
        &mut self,
        at: usize,
        port: &PortTable,
        network: &NetworkTable,
        frame: &Frame,
        packet: &Packet,
        bytes: &[u8],
    ) -> Verdict {
        if let (Some(lease), true) = (&port.lease, dhcp::is_request(packet)) {
            if dhcp::answer(port, lease, network, packet, bytes, self.scratch) {
                self.output.port(at, self.scratch);
            }
            return Ok(());
        }
        if is_metadata_request(packet) {
            self.output.service(at, &bytes[packet.ip_at..packet.end]);
            return Ok(());
        }
        self.track(port, network, packet, bytes, Direction::Egress)?;
        if frame.destination == network.gateway_mac {
            return self.gateway(at, port, network, packet, bytes);
        }
        self.layer2(Some(at), network, frame, bytes)
    }

    /// What is sent to the switch itself: echo, and the far end of forwarded connections.
    fn gateway(
        &mut self,
        at: usize,
        port: &PortTable,
        network: &NetworkTable,
        packet: &Packet,
        bytes: &[u8],
    ) -> Verdict {
        let IpAddr::V4(destination) = packet.destination else { return Err(DropReason::NoRoute) };
        if !network.services.contains(&destination) {
            return Err(DropReason::NoRoute);
        }
        match packet.transport {
            Transport::Icmp { kind: 8, code: 0, .. } if packet.ethertype == Ethertype::Ipv4 => {
                echo_reply(self.scratch, port, network, packet, bytes)
                    .ok_or(DropReason::Malformed)?;
                self.output.port(at, self.scratch);
                Ok(())
            }
            Transport::Tcp { .. } => {
                self.output.service(at, &bytes[packet.ip_at..packet.end]);
                Ok(())
            }
            _ => Err(DropReason::NoRoute),
        }
    }

    /// By destination MAC. `from` is the local port it came from; what came through the tunnel never
    /// goes back into it.
    fn layer2(
        &mut self,
        from: Option<usize>,
        network: &NetworkTable,
        frame: &Frame,
        bytes: &[u8],
    ) -> Verdict {
        if wire::is_group(&frame.destination) {
            self.flood(&network.ports, from, frame, bytes);
            self.tunnel_all(from, network, bytes);
            return Ok(());
        }
        if frame.destination == network.gateway_mac {
            return Err(DropReason::NoRoute);
        }
        match network.stations.get(&frame.destination) {
            Some(Station::Local(to)) if from == Some(*to) => Err(DropReason::UnknownStation),
            Some(Station::Local(to)) => self.deliver(*to, frame, bytes),
            Some(Station::Remote(vtep)) if from.is_some() => {
                self.output.tunnel(*vtep, network.vni, bytes);
                Ok(())
            }
            Some(Station::Remote(_)) => Err(DropReason::UnknownStation),
            None if network.open_ports.is_empty() => Err(DropReason::UnknownStation),
            None => {
                self.flood(&network.open_ports, from, frame, bytes);
                Ok(())
            }
        }
    }

    /// A port whose rules refuse a flooded frame counts nothing: the frame was not for it.
    fn flood(&mut self, ports: &[usize], from: Option<usize>, frame: &Frame, bytes: &[u8]) {
        for to in ports {
            if from != Some(*to) {
                let _ = self.deliver(*to, frame, bytes);
            }
        }
    }

    fn tunnel_all(&mut self, from: Option<usize>, network: &NetworkTable, bytes: &[u8]) {
        if from.is_some() {
            for vtep in &network.vteps {
                self.output.tunnel(*vtep, network.vni, bytes);
            }
        }
    }

    /// The last step to a guest: its ingress rules.
    fn deliver(&mut self, to: usize, frame: &Frame, bytes: &[u8]) -> Verdict {
        let (port, network) = self.port(to)?;
        match &frame.content {
            Content::Ip(packet) => self.track(port, network, packet, bytes, Direction::Ingress)?,
            Content::Other if port.secured => return Err(DropReason::Ethertype),
            Content::Arp(_) | Content::Other => {}
        }
        self.output.port(to, bytes);
        Ok(())
    }

    fn track(
        &mut self,
        port: &PortTable,
        network: &NetworkTable,
        packet: &Packet,
        bytes: &[u8],
        direction: Direction,
    ) -> Verdict {
        if !port.secured {
            return Ok(());
        }
        let sighting = connections::Sighting { port, vni: network.vni, packet, bytes, direction };
        self.connections.admit(&sighting, self.now_ms, self.epoch)
    }
}

/// The MAC to answer an ARP request with. A station that asks for its own address (announcing or
/// probing it) gets no answer from us.
fn arp_answer(network: &NetworkTable, arp: &Arp) -> Option<Mac> {
    if !arp.request || arp.sender == arp.target {
        return None;
    }
    if network.services.contains(&arp.target) {
        return Some(network.gateway_mac);
    }
    network.macs.get(&IpAddr::V4(arp.target)).copied().filter(|mac| *mac != arp.sender_mac)
}

fn is_metadata_request(packet: &Packet) -> bool {
    packet.destination == IpAddr::V4(METADATA_ADDRESS)
        && matches!(packet.transport, Transport::Tcp { destination: METADATA_PORT, .. })
}

fn is_metadata_reply(packet: &Packet) -> bool {
    matches!(packet.transport, Transport::Tcp { source: METADATA_PORT, .. })
}

/// Turns an echo request around into `buffer`.
fn echo_reply(
    buffer: &mut Vec<u8>,
    port: &PortTable,
    network: &NetworkTable,
    packet: &Packet,
    bytes: &[u8],
) -> Option<()> {
    let (IpAddr::V4(asker), IpAddr::V4(asked)) = (packet.source, packet.destination) else {
        return None;
    };
    if packet.first_fragment.is_some() || asker == Ipv4Addr::UNSPECIFIED {
        return None;
    }
    let request = bytes.get(packet.ip_at..packet.end)?;
    let reply = wire::ethernet(
        buffer,
        &port.mac,
        &network.gateway_mac,
        EthernetProtocol::Ipv4,
        request.len(),
    );
    reply.copy_from_slice(request);
    let mut header = Ipv4Packet::new_checked(reply).ok()?;
    header.set_src_addr(asked);
    header.set_dst_addr(asker);
    header.set_hop_limit(64);
    header.fill_checksum();
    let mut message = Icmpv4Packet::new_checked(header.payload_mut()).ok()?;
    message.set_msg_type(Icmpv4Message::EchoReply);
    message.fill_checksum();
    Some(())
}

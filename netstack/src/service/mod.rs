//! The TCP stack that stands behind the switch's own addresses, one per port: metadata for its guest
//! and the inner ends of forwarded connections. One stack per port means that a caller is known by
//! its port and that tenants with the same addresses never meet.
//!
//! A stack speaks IPv4 packets, not frames: its only neighbour is the guest, whose MAC the pipeline
//! knows. It is made on first use and dropped when nothing used it for a while.

mod http;
mod metadata;
mod splice;

use crate::compile::{METADATA_ADDRESS, PortTable};
use metadata::MetadataServer;
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp;
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::{HardwareAddress, IpAddress, IpCidr};
use splice::Splice;
use std::collections::{BTreeMap, VecDeque};
use std::net::{Ipv4Addr, SocketAddrV4, TcpStream};
use std::sync::Arc;

/// Packets queued for a stack before more are dropped; TCP sends them again.
const QUEUE_MAX: usize = 256;
/// Forwarded connections of one port.
pub(crate) const SPLICES_PER_PORT_MAX: usize = 128;
/// An unused stack is dropped after this.
const IDLE_MS: u64 = 30_000;
/// Local ports of forwarded connections.
const EPHEMERAL: std::ops::Range<u16> = 32_768..61_000;

/// The stack of one port.
pub(crate) struct PortStack {
    pub(crate) port_id: String,
    /// Index of the port in the tables in force.
    pub(crate) port: usize,
    service: (Ipv4Addr, u8),
    mtu: u16,
    interface: Interface,
    device: PacketQueue,
    sockets: SocketSet<'static>,
    metadata: MetadataServer,
    splices: BTreeMap<u32, Splice>,
    next_local_port: u16,
    used_ms: u64,
    deadline_ms: u64,
}

impl PortStack {
    pub(crate) fn new(at: usize, port: &PortTable, mtu: u16, seed: u64, now_ms: u64) -> PortStack {
        let mut device = PacketQueue { mtu: usize::from(mtu), ..PacketQueue::default() };
        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = seed;
        let mut interface = Interface::new(config, &mut device, instant(now_ms));
        let service = port.service.unwrap_or((METADATA_ADDRESS, 32));
        interface.update_ip_addrs(|addresses| {
            // Two addresses are what smoltcp holds by default.
            let _ = addresses.push(IpCidr::new(IpAddress::Ipv4(METADATA_ADDRESS), 32));
            if service.0 != METADATA_ADDRESS {
                let _ = addresses.push(IpCidr::new(IpAddress::Ipv4(service.0), service.1));
            }
        });
        // There is no neighbour to resolve, but smoltcp wants a route before it sends.
        let _ = interface.routes_mut().add_default_ipv4_route(METADATA_ADDRESS);
        PortStack {
            port_id: port.id.clone(),
            port: at,
            service,
            mtu,
            interface,
            device,
            sockets: SocketSet::new(Vec::new()),
            metadata: MetadataServer::new(Arc::clone(&port.metadata)),
            splices: BTreeMap::new(),
            // Not guessable from outside, so that a closed connection's port is not met again soon.
            next_local_port: EPHEMERAL.start + (seed % 20_000) as u16,
            used_ms: now_ms,
            deadline_ms: 0,
        }
    }

    /// Takes over a new program's view of the port; `false` where the stack no longer fits it.
    pub(crate) fn adopt(&mut self, at: usize, port: &PortTable, mtu: u16) -> bool {
        self.port = at;
        self.metadata.replace(Arc::clone(&port.metadata));
        self.service == port.service.unwrap_or((METADATA_ADDRESS, 32)) && self.mtu == mtu
    }

    /// A packet from the guest.
    pub(crate) fn receive(&mut self, packet: &[u8], now_ms: u64) {
        self.used_ms = now_ms;
        self.deadline_ms = 0;
        if self.device.received.len() < QUEUE_MAX {
            self.device.received.push_back(packet.to_vec());
        }
    }

    /// The address and port that the next forwarded connection will come from.
    pub(crate) fn next_endpoint(&mut self) -> SocketAddrV4 {
        let taken = |port: u16| self.splices.values().any(|splice| splice.local_port == port);
        // There are far more local ports than splices, so this ends.
        while taken(self.next_local_port) {
            self.next_local_port = following(self.next_local_port);
        }
        SocketAddrV4::new(self.service.0, self.next_local_port)
    }

    /// Whether another forwarded connection fits.
    pub(crate) fn has_room(&self) -> bool {
        self.splices.len() < SPLICES_PER_PORT_MAX
    }

    /// Connects an accepted connection to the guest, from [`PortStack::next_endpoint`].
    pub(crate) fn splice(&mut self, accepted: Accepted, now_ms: u64) {
        let Accepted { id, listener, stream, guest } = accepted;
        let local_port = self.next_local_port;
        self.next_local_port = following(local_port);
        self.used_ms = now_ms;
        self.deadline_ms = 0;
        let mut socket = splice::socket();
        let remote = (IpAddress::Ipv4(*guest.ip()), guest.port());
        let local = (IpAddress::Ipv4(self.service.0), local_port);
        if socket.connect(self.interface.context(), remote, local).is_err() {
            // Only an unspecified address or port does this; the client sees the connection close.
            return;
        }
        let handle = self.sockets.add(socket);
        self.splices.insert(id, Splice::new(listener, stream, handle, local_port, now_ms));
    }

    /// The client's side of a splice became readable, writable or both.
    pub(crate) fn stream_ready(&mut self, id: u32, readable: bool, writable: bool) {
        if let Some(splice) = self.splices.get_mut(&id) {
            splice.ready(readable, writable);
            self.deadline_ms = 0;
        }
    }

    /// Ends the splices of forwards that are no more.
    pub(crate) fn retain_listeners(&mut self, keep: impl Fn(u32) -> bool) {
        for splice in self.splices.values_mut() {
            if !keep(splice.listener) {
                splice.abort(&mut self.sockets);
                self.deadline_ms = 0;
            }
        }
    }

    /// Forwarded connections open now.
    pub(crate) fn splices(&self) -> usize {
        self.splices.len()
    }

    /// When the stack wants to run; in the past where something just happened.
    pub(crate) fn deadline_ms(&self) -> u64 {
        self.deadline_ms
    }

    /// Whether nothing is left to do and nobody came for a while.
    pub(crate) fn is_idle(&self, now_ms: u64) -> bool {
        self.splices.is_empty() && self.metadata.is_idle() && now_ms >= self.used_ms + IDLE_MS
    }

    /// Runs until nothing moves; packets for the guest go to `send`.
    pub(crate) fn run(&mut self, now_ms: u64, mut send: impl FnMut(&[u8])) {
        // Each round moves bytes between bounded buffers; the bound keeps one guest from holding
        // the thread, and what is left over runs in the next turn.
        let mut moved = true;
        for _ in 0..ROUNDS_MAX {
            // First, so that a connection's first packet finds a socket that listens.
            moved = self.metadata.serve(&mut self.sockets, now_ms);
            self.interface.poll(instant(now_ms), &mut self.device, &mut self.sockets);
            moved |= self.metadata.serve(&mut self.sockets, now_ms);
            moved |= self.pump(now_ms);
            let sent = !self.device.sent.is_empty();
            self.device.sent.drain(..).for_each(|packet| send(&packet));
            if !moved && !sent {
                break;
            }
        }
        let delay = self.interface.poll_delay(instant(now_ms), &self.sockets);
        let stack_ms = delay.map_or(u64::MAX, |delay| delay.total_micros().div_ceil(1000));
        self.deadline_ms = if moved { 0 } else { now_ms + stack_ms.clamp(1, HOUSEKEEPING_MS) };
    }

    fn pump(&mut self, now_ms: u64) -> bool {
        let mut moved = false;
        let sockets = &mut self.sockets;
        self.splices.retain(|_, splice| {
            let pumped = splice.pump(sockets, now_ms);
            moved |= pumped.moved;
            pumped.alive
        });
        moved
    }
}

/// Rounds of one [`PortStack::run`].
const ROUNDS_MAX: usize = 16;
/// A stack looks for connections that time out at least this often.
const HOUSEKEEPING_MS: u64 = 5000;

/// An accepted connection on its way to a guest.
pub(crate) struct Accepted {
    /// Unique in the switch.
    pub(crate) id: u32,
    /// The listener that accepted it.
    pub(crate) listener: u32,
    /// The client; does not block.
    pub(crate) stream: TcpStream,
    /// Where in the guest.
    pub(crate) guest: SocketAddrV4,
}

fn following(port: u16) -> u16 {
    if port + 1 < EPHEMERAL.end { port + 1 } else { EPHEMERAL.start }
}

fn instant(now_ms: u64) -> Instant {
    Instant::from_millis(i64::try_from(now_ms).unwrap_or(i64::MAX))
}

/// Removes a socket at once.
fn discard(sockets: &mut SocketSet<'_>, handle: SocketHandle) {
    drop(sockets.remove(handle));
}

/// A socket with buffers of the given sizes that sends without delay.
fn tcp_socket(receive_bytes: usize, send_bytes: usize) -> tcp::Socket<'static> {
    let mut socket = tcp::Socket::new(
        tcp::SocketBuffer::new(vec![0; receive_bytes]),
        tcp::SocketBuffer::new(vec![0; send_bytes]),
    );
    socket.set_nagle_enabled(false);
    socket.set_ack_delay(Some(Duration::from_millis(1)));
    socket
}

/// smoltcp's idea of a network card: two queues.
#[derive(Default)]
struct PacketQueue {
    mtu: usize,
    received: VecDeque<Vec<u8>>,
    sent: Vec<Vec<u8>>,
}

struct Received(Vec<u8>);
struct Sending<'a>(&'a mut Vec<Vec<u8>>);

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Sending<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut packet = vec![0; len];
        let result = f(&mut packet);
        self.0.push(packet);
        result
    }
}

impl Device for PacketQueue {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sending<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Received, Sending<'_>)> {
        // The answer to a packet needs room even when the queue is full: it ends the backlog.
        let packet = self.received.pop_front()?;
        Some((Received(packet), Sending(&mut self.sent)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Sending<'_>> {
        (self.sent.len() < QUEUE_MAX).then_some(Sending(&mut self.sent))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = self.mtu;
        capabilities
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compile::Tables;
    use crate::program::{FixedIp, Network, Port, Program, Subnet};
    use proptest::prelude::*;
    use smoltcp::phy::ChecksumCapabilities;
    use smoltcp::wire::{
        IpProtocol, Ipv4Packet, Ipv4Repr, TcpControl, TcpPacket, TcpRepr, TcpSeqNumber,
    };

    fn stack() -> PortStack {
        let program = Program {
            networks: vec![Network {
                id: "n".to_owned(),
                vni: 1,
                mtu: 1450,
                subnets: vec![Subnet {
                    id: "s".to_owned(),
                    cidr: "10.0.0.0/24".to_owned(),
                    gateway: Some(Ipv4Addr::new(10, 0, 0, 1)),
                    ..Subnet::default()
                }],
                remotes: Vec::new(),
            }],
            ports: vec![Port {
                id: "p".to_owned(),
                network_id: "n".to_owned(),
                mac: "fa:16:3e:00:00:01".to_owned(),
                fixed_ips: vec![FixedIp {
                    subnet_id: "s".to_owned(),
                    address: "10.0.0.5".parse().unwrap(),
                }],
                ..Port::default()
            }],
            ..Program::default()
        };
        let tables = Tables::compile(program).unwrap();
        PortStack::new(0, &tables.ports[0], 1450, 1, 0)
    }

    fn segment(control: TcpControl, seq: u32, ack: Option<u32>, payload: &[u8]) -> Vec<u8> {
        let tcp = TcpRepr {
            src_port: 4000,
            dst_port: 80,
            control,
            seq_number: TcpSeqNumber(seq as i32),
            ack_number: ack.map(|ack| TcpSeqNumber(ack as i32)),
            window_len: 60_000,
            window_scale: None,
            max_seg_size: Some(1400),
            sack_permitted: false,
            sack_ranges: [None; 3],
            timestamp: None,
            payload,
        };
        let (source, destination) = (Ipv4Addr::new(10, 0, 0, 5), METADATA_ADDRESS);
        let ip = Ipv4Repr {
            src_addr: source,
            dst_addr: destination,
            next_header: IpProtocol::Tcp,
            payload_len: tcp.buffer_len(),
            hop_limit: 64,
        };
        let mut bytes = vec![0; 20 + tcp.buffer_len()];
        let mut packet = Ipv4Packet::new_unchecked(&mut bytes[..]);
        let checksums = ChecksumCapabilities::default();
        ip.emit(&mut packet, &checksums);
        let mut inner = TcpPacket::new_unchecked(packet.payload_mut());
        tcp.emit(&mut inner, &source.into(), &destination.into(), &checksums);
        bytes
    }

    /// Sends a packet and returns the sequence number of the last segment that came back.
    fn exchange(stack: &mut PortStack, packet: &[u8], now_ms: u64) -> Option<u32> {
        let mut last = None;
        stack.receive(packet, now_ms);
        stack.run(now_ms, |answer| {
            let packet = Ipv4Packet::new_checked(answer).unwrap();
            // What is not TCP is an ICMP error about a packet that a test has mangled.
            if packet.next_header() == IpProtocol::Tcp {
                let segment = TcpPacket::new_checked(packet.payload()).unwrap();
                last = Some(segment.seq_number().0 as u32);
            }
        });
        last
    }

    #[test]
    fn an_abandoned_handshake_or_request_gives_its_place_back() {
        let mut stack = stack();
        let answer = exchange(&mut stack, &segment(TcpControl::Syn, 100, None, b""), 0).unwrap();
        let part = segment(TcpControl::Psh, 101, Some(answer.wrapping_add(1)), b"GET / HT");
        exchange(&mut stack, &part, 10);
        assert!(!stack.metadata.is_idle());
        let mut now_ms = 10;
        while !stack.is_idle(now_ms) {
            assert!(now_ms < 120_000, "the connection is still open");
            now_ms = stack.deadline_ms().max(now_ms + 1);
            stack.run(now_ms, |_| {});
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(500) })]

        #[test]
        fn no_packet_panics_the_stack(
            changes in proptest::collection::vec(
                proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..3), 1..12),
            repair in any::<bool>(),
        ) {
            let mut stack = stack();
            let answer = exchange(&mut stack, &segment(TcpControl::Syn, 100, None, b""), 0).unwrap();
            for (n, changes) in changes.into_iter().enumerate() {
                let body = b"GET / HTTP/1.1\r\n\r\n";
                let ack = Some(answer.wrapping_add(1));
                let mut packet = segment(TcpControl::Psh, 101, ack, body);
                for (at, byte) in changes {
                    let at = at.index(packet.len());
                    packet[at] = byte;
                }
                if repair
                    && let Ok(mut ip) = Ipv4Packet::new_checked(&mut packet[..])
                {
                    ip.fill_checksum();
                    let (source, destination) = (ip.src_addr(), ip.dst_addr());
                    if let Ok(mut tcp) = TcpPacket::new_checked(ip.payload_mut()) {
                        tcp.fill_checksum(&source.into(), &destination.into());
                    }
                }
                exchange(&mut stack, &packet, n as u64);
            }
        }
    }
}

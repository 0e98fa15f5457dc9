//! The network device with smoltcp's stack on it, its DHCP lease, and what it serves.

use crate::http_server::HttpServer;
use abi::boot::MARK_NETWORK;
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::net::Ipv4Addr;
use inputs::dhcp::{self, OPTION_CLASSLESS_ROUTES, OPTION_MTU};
use runtime::clock::Instant;
use runtime::virtio::net::NetDevice;
use runtime::{boot, cpu, println};
use smoltcp::iface::{
    Config, Interface, PollIngressSingleResult, PollResult, Route, SocketHandle, SocketSet,
};
use smoltcp::phy::{Device as _, TxToken as _};
use smoltcp::socket::dhcpv4;
use smoltcp::time::{Duration, Instant as StackInstant};
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetFrame, EthernetProtocol,
    HardwareAddress, IpCidr, Ipv4Cidr,
};

/// Where instance metadata is served.
pub(crate) const METADATA_ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
/// Subnet mask, router, name server, MTU, classless routes.
const DHCP_PARAMETERS: &[u8] = &[1, 3, 6, OPTION_MTU, OPTION_CLASSLESS_ROUTES];
const DHCP_PACKET_BYTES: usize = 1500;
const DHCP_RETRY: Duration = Duration::from_millis(500);
/// So that a flood of frames can't keep steps, disks and hot-plug from their turn.
const FRAMES_PER_TURN: usize = 256;
const EPHEMERAL_PORTS: core::ops::Range<u16> = 49152..65535;

/// One network device in use.
pub(crate) struct Network {
    device: NetDevice,
    pub(crate) interface: Interface,
    pub(crate) sockets: SocketSet<'static>,
    pub(crate) servers: Vec<HttpServer>,
    dhcp: SocketHandle,
    address: Option<Ipv4Cidr>,
    next_port: u16,
    generation: Generation,
}

/// Tells a network device from another that was plugged in its place: the sockets of one mean
/// nothing to the other.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Generation(u64);

impl Generation {
    pub(crate) fn advance(&mut self) -> Generation {
        self.0 += 1;
        *self
    }
}

/// What a lease says, in our words.
struct Lease {
    address: Ipv4Cidr,
    routes: Vec<(Ipv4Cidr, Ipv4Addr)>,
    mtu: Option<u16>,
}

pub(crate) fn stack_time(now: Instant) -> StackInstant {
    StackInstant::from_micros(now.micros() as i64)
}

fn seed() -> u64 {
    let seed = boot::parameters().seed;
    let (first, _) = seed.split_at(8);
    first.iter().fold(cpu::tsc(), |seed, byte| seed.rotate_left(8) ^ u64::from(*byte))
}

fn new_interface(device: &mut NetDevice) -> Interface {
    let mut config = Config::new(HardwareAddress::Ethernet(EthernetAddress(device.mac())));
    config.random_seed = seed();
    Interface::new(config, device, stack_time(runtime::clock::now()))
}

fn new_dhcp_socket() -> dhcpv4::Socket<'static> {
    let mut socket = dhcpv4::Socket::new();
    let mut retries = socket.get_retry_config();
    retries.discover_timeout = DHCP_RETRY;
    retries.initial_request_timeout = DHCP_RETRY;
    socket.set_retry_config(retries);
    socket.set_parameter_request_list(DHCP_PARAMETERS);
    // Never given back: a guest has one network device, and rarely a second one after it.
    socket.set_receive_packet_buffer(Box::leak(Box::new([0; DHCP_PACKET_BYTES])));
    socket
}

impl Network {
    pub(crate) fn new(mut device: NetDevice, generation: Generation) -> Network {
        let interface = new_interface(&mut device);
        let mut sockets = SocketSet::new(Vec::new());
        let dhcp = sockets.add(new_dhcp_socket());
        let ports = u64::from(EPHEMERAL_PORTS.end - EPHEMERAL_PORTS.start);
        let next_port = EPHEMERAL_PORTS.start + (seed() % ports) as u16;
        Network {
            device,
            interface,
            sockets,
            servers: Vec::new(),
            dhcp,
            address: None,
            next_port,
            generation,
        }
    }

    pub(crate) fn slot(&self) -> u16 {
        self.device.slot()
    }

    pub(crate) fn generation(&self) -> Generation {
        self.generation
    }

    pub(crate) fn has_address(&self) -> bool {
        self.address.is_some()
    }

    /// Asks for the MAC of a station of our subnet, ahead of the first packet to it. The stack
    /// itself asks at most once a second, whichever station it is for, so that the second one
    /// would wait for a second; an answer to our question is as good to it.
    pub(crate) fn ask_for(&mut self, station: Ipv4Addr, now: Instant) {
        let Some(own) = self.address.filter(|own| own.contains_addr(&station)) else { return };
        let request = ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Request,
            source_hardware_addr: EthernetAddress(self.device.mac()),
            source_protocol_addr: own.address(),
            target_hardware_addr: EthernetAddress([0; 6]),
            target_protocol_addr: station,
        };
        let length = EthernetFrame::<&[u8]>::header_len() + request.buffer_len();
        let source = EthernetAddress(self.device.mac());
        let Some(token) = self.device.transmit(stack_time(now)) else { return };
        token.consume(length, |bytes| {
            let mut frame = EthernetFrame::new_unchecked(bytes);
            frame.set_src_addr(source);
            frame.set_dst_addr(EthernetAddress::BROADCAST);
            frame.set_ethertype(EthernetProtocol::Arp);
            request.emit(&mut ArpPacket::new_unchecked(frame.payload_mut()));
        });
        self.device.flush();
    }

    /// A local port for a new connection.
    pub(crate) fn take_port(&mut self) -> u16 {
        let port = self.next_port;
        self.next_port =
            if port + 1 < EPHEMERAL_PORTS.end { port + 1 } else { EPHEMERAL_PORTS.start };
        port
    }

    /// Receives, serves, transmits; `true` where a socket may have changed.
    pub(crate) fn poll(&mut self, now: Instant) -> bool {
        self.device.disarm();
        self.interface.poll_maintenance(stack_time(now));
        let mut active = self.transmit(now);
        // Each frame's connection is served before the next frame is looked at: a burst of
        // connections is not refused while sockets that are done wait to listen again.
        for _ in 0..FRAMES_PER_TURN {
            match self.interface.poll_ingress_single(
                stack_time(now),
                &mut self.device,
                &mut self.sockets,
            ) {
                PollIngressSingleResult::None => break,
                PollIngressSingleResult::PacketProcessed => {}
                PollIngressSingleResult::SocketStateChanged => {
                    self.transmit(now);
                    self.serve(now);
                    active = true;
                }
            }
        }
        active |= self.serve(now);
        active |= self.transmit(now);
        self.device.flush();
        active
    }

    fn transmit(&mut self, now: Instant) -> bool {
        let result =
            self.interface.poll_egress(stack_time(now), &mut self.device, &mut self.sockets);
        result == PollResult::SocketStateChanged
    }

    fn serve(&mut self, now: Instant) -> bool {
        let mut active = self.follow_lease();
        for server in &mut self.servers {
            active |= server.serve(&mut self.sockets, now);
        }
        active
    }

    pub(crate) fn arm(&mut self) -> bool {
        self.device.arm()
    }

    /// When the stack or a server has something to do without being asked.
    pub(crate) fn next_deadline(&mut self, now: Instant) -> Option<Instant> {
        let stack = self.interface.poll_at(stack_time(now), &self.sockets);
        let stack = stack.map(|at| Instant::from_micros(at.total_micros().max(0) as u64));
        self.servers.iter().filter_map(HttpServer::next_deadline).chain(stack).min()
    }

    fn follow_lease(&mut self) -> bool {
        let lease = match self.sockets.get_mut::<dhcpv4::Socket>(self.dhcp).poll() {
            None => return false,
            Some(dhcpv4::Event::Deconfigured) => None,
            Some(dhcpv4::Event::Configured(config)) => Some(read_lease(&config)),
        };
        match lease {
            Some(lease) => self.configure(lease),
            None if self.address.is_some() => self.deconfigure(),
            None => {}
        }
        true
    }

    fn configure(&mut self, lease: Lease) {
        let fresh = self.address != Some(lease.address);
        if fresh {
            cpu::mark(MARK_NETWORK);
        }
        let mtu_before = self.device.mtu();
        self.device.lower_mtu(lease.mtu.unwrap_or(mtu_before));
        if self.device.mtu() != mtu_before {
            self.interface = new_interface(&mut self.device);
        }
        self.interface.update_ip_addrs(|addresses| {
            addresses.clear();
            let _ = addresses.push(IpCidr::Ipv4(lease.address));
        });
        self.interface.routes_mut().update(|routes| {
            routes.clear();
            for (network, via) in &lease.routes {
                // Full is impossible: a lease has fewer routes than the table.
                let _ = routes.push(Route {
                    cidr: IpCidr::Ipv4(*network),
                    via_router: (*via).into(),
                    preferred_until: None,
                    expires_at: None,
                });
            }
        });
        self.address = Some(lease.address);
        if fresh {
            announce(&lease, self.device.mtu());
        }
    }

    fn deconfigure(&mut self) {
        self.address = None;
        self.interface.update_ip_addrs(|addresses| addresses.clear());
        self.interface.routes_mut().update(|routes| routes.clear());
    }
}

fn announce(lease: &Lease, mtu: u16) {
    let gateway = lease.routes.iter().find(|(network, _)| network.prefix_len() == 0);
    match gateway {
        Some((_, gateway)) => {
            println!("trine: network {} gateway {gateway} mtu {mtu}", lease.address)
        }
        None => println!("trine: network {} gateway none mtu {mtu}", lease.address),
    }
}

fn read_lease(config: &dhcpv4::Config<'_>) -> Lease {
    let option = |code| {
        config
            .packet
            .as_ref()
            .and_then(|packet| packet.options().find(|option| option.kind == code))
            .map(|o| o.data)
    };
    let mut routes: Vec<(Ipv4Cidr, Ipv4Addr)> = option(OPTION_CLASSLESS_ROUTES)
        .map(dhcp::classless_routes)
        .unwrap_or_default()
        .into_iter()
        .map(|route| {
            // The stack knows no routes to the link itself; a host on it is its own next hop.
            let via = if route.via == [0; 4] { route.network } else { route.via };
            (Ipv4Cidr::new(route.network.into(), route.prefix), via.into())
        })
        .filter(|(_, via): &(_, Ipv4Addr)| is_unicast(*via))
        .collect();
    let covers = |routes: &[(Ipv4Cidr, Ipv4Addr)], address| {
        routes.iter().any(|(network, _)| network.contains_addr(&address))
    };
    if let Some(router) = config.router.filter(|router| is_unicast(*router))
        && !routes.iter().any(|(network, _)| network.prefix_len() == 0)
    {
        routes.push((Ipv4Cidr::new(Ipv4Addr::UNSPECIFIED, 0), router));
    }
    // A network without a gateway: who gives addresses there also serves metadata.
    let server = config.server.address;
    if !covers(&routes, METADATA_ADDRESS) && is_unicast(server) {
        routes.push((Ipv4Cidr::new(METADATA_ADDRESS, 32), server));
    }
    Lease { address: config.address, routes, mtu: option(OPTION_MTU).and_then(dhcp::mtu) }
}

fn is_unicast(address: Ipv4Addr) -> bool {
    !(address.is_unspecified() || address.is_multicast() || address.is_broadcast())
}

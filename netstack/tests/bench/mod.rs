//! Real switches in threads, and guests made of smoltcp's stack over real packet rings.

use abi::packet_ring::{Consumer, Direction, FRAME_BYTES_MAX, Producer, Region};
use netstack::program::{
    Direction as RuleDirection, Ethertype, FixedIp, Network, Port, Program, SecurityRule, Subnet,
};
use netstack::{Client, Switch, SwitchConfig};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::{dhcpv4, tcp};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, IpAddress, IpCidr};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

/// A test that has not got what it waits for by then has failed.
const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
pub(crate) const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

/// A switch that runs in a thread for the rest of the test's process.
pub(crate) struct TestSwitch {
    pub(crate) client: Client,
    pub(crate) vtep: SocketAddr,
    pub(crate) control: PathBuf,
    _directory: tempfile::TempDir,
}

impl TestSwitch {
    pub(crate) fn start(address: &str) -> TestSwitch {
        let directory = tempfile::tempdir().unwrap();
        let control = directory.path().join("switch.sock");
        let vtep = SocketAddr::new(address.parse().unwrap(), 0);
        let switch = Switch::bind(&SwitchConfig { control: control.clone(), vtep }).unwrap();
        let vtep = switch.vtep();
        std::thread::spawn(move || switch.run());
        let client = Client::connect(&control).unwrap();
        TestSwitch { client, vtep, control, _directory: directory }
    }

    pub(crate) fn total(&mut self, name: &str) -> u64 {
        self.client.counters().unwrap().totals[name]
    }
}

pub(crate) fn network(id: &str, vni: u32) -> Network {
    Network {
        id: id.to_owned(),
        vni,
        mtu: 1450,
        subnets: vec![Subnet {
            id: format!("{id}-subnet"),
            cidr: "10.0.0.0/24".to_owned(),
            gateway: Some(GATEWAY),
            dhcp: true,
            dns: vec![Ipv4Addr::new(9, 9, 9, 9)],
            ..Subnet::default()
        }],
        ..Network::default()
    }
}

/// A port that may send anything and receive TCP port 80 and ping.
pub(crate) fn port(network: &str, number: u8) -> Port {
    let rule = |direction, protocol, ports: Option<u16>| SecurityRule {
        direction,
        ethertype: Ethertype::Ipv4,
        protocol,
        port_min: ports,
        port_max: ports,
        remote_cidr: None,
    };
    Port {
        id: format!("{network}-port-{number}"),
        network_id: network.to_owned(),
        mac: format!("fa:16:3e:00:00:{number:02x}"),
        fixed_ips: vec![FixedIp {
            subnet_id: format!("{network}-subnet"),
            address: address(number).into(),
        }],
        hostname: format!("guest-{number}"),
        port_security: true,
        security_rules: vec![
            rule(RuleDirection::Egress, None, None),
            rule(RuleDirection::Ingress, Some(6), Some(80)),
            rule(RuleDirection::Ingress, Some(1), None),
        ],
        metadata: [(
            "openstack/latest/meta_data.json".to_owned(),
            format!(r#"{{"name":"{network}-{number}"}}"#),
        )]
        .into(),
        ..Port::default()
    }
}

pub(crate) fn address(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 0, 0, number)
}

pub(crate) fn program(networks: Vec<Network>, ports: Vec<Port>) -> Program {
    Program { revision: 1, networks, ports, ..Program::default() }
}

/// A guest: the VMM's end of the rings and a TCP/IP stack on it.
pub(crate) struct Guest {
    pub(crate) region: Region,
    pub(crate) sockets: SocketSet<'static>,
    pub(crate) interface: Interface,
    card: Card,
    started: std::time::Instant,
}

struct Card {
    from_guest: Producer,
    to_guest: Consumer,
}

impl Guest {
    /// A guest without an address.
    pub(crate) fn new(number: u8) -> Guest {
        let region = Region::create().unwrap();
        let mut card = Card {
            from_guest: region.producer(Direction::FromGuest).unwrap(),
            to_guest: region.consumer(Direction::ToGuest).unwrap(),
        };
        let mac = EthernetAddress([0xfa, 0x16, 0x3e, 0, 0, number]);
        let mut config = Config::new(mac.into());
        config.random_seed = u64::from(number);
        let interface = Interface::new(config, &mut card, Instant::ZERO);
        let sockets = SocketSet::new(Vec::new());
        Guest { region, sockets, interface, card, started: std::time::Instant::now() }
    }

    /// A guest with its address and route set by hand.
    pub(crate) fn with_address(number: u8) -> Guest {
        let mut guest = Guest::new(number);
        guest.configure(IpCidr::new(IpAddress::Ipv4(address(number)), 24), Some(GATEWAY));
        guest
    }

    pub(crate) fn configure(&mut self, address: IpCidr, router: Option<Ipv4Addr>) {
        self.interface.update_ip_addrs(|addresses| {
            addresses.clear();
            addresses.push(address).unwrap();
        });
        if let Some(router) = router {
            self.interface.routes_mut().add_default_ipv4_route(router).unwrap();
        }
    }

    /// Takes an address by DHCP; returns what the server said.
    pub(crate) fn take_address(&mut self) -> (Ipv4Addr, Option<Ipv4Addr>, Vec<Ipv4Addr>) {
        let handle = self.sockets.add(dhcpv4::Socket::new());
        let lease = until(&mut [self], |guests| {
            let guest = &mut *guests[0];
            match guest.sockets.get_mut::<dhcpv4::Socket>(handle).poll() {
                Some(dhcpv4::Event::Configured(lease)) => {
                    let dns: Vec<Ipv4Addr> = lease.dns_servers.iter().copied().collect();
                    Some((lease.address, lease.router, dns))
                }
                _ => None,
            }
        });
        self.configure(IpCidr::Ipv4(lease.0), lease.1);
        (lease.0.address(), lease.1, lease.2)
    }

    pub(crate) fn connect(&mut self, to: Ipv4Addr, port: u16, local_port: u16) -> SocketHandle {
        let mut socket = tcp_socket();
        let remote = (IpAddress::Ipv4(to), port);
        socket.connect(self.interface.context(), remote, local_port).unwrap();
        self.sockets.add(socket)
    }

    pub(crate) fn listen(&mut self, port: u16) -> SocketHandle {
        let mut socket = tcp_socket();
        socket.listen(port).unwrap();
        self.sockets.add(socket)
    }

    pub(crate) fn tcp(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    /// GETs a path with `Connection: close` and returns the whole answer.
    pub(crate) fn get(&mut self, from: Ipv4Addr, path: &str, local_port: u16) -> String {
        let handle = self.connect(from, 80, local_port);
        let request = format!("GET {path} HTTP/1.1\r\nHost: {from}\r\nConnection: close\r\n\r\n");
        let mut sent = 0;
        let mut answer = Vec::new();
        until(&mut [self], |guests| {
            let socket = guests[0].tcp(handle);
            if socket.can_send() && sent < request.len() {
                sent += socket.send_slice(&request.as_bytes()[sent..]).unwrap();
            }
            while socket.can_recv() {
                let taken = socket.recv(|bytes| (bytes.len(), bytes.to_vec())).unwrap();
                answer.extend_from_slice(&taken);
            }
            (sent == request.len() && !socket.may_recv()).then_some(())
        });
        self.tcp(handle).close();
        String::from_utf8(answer).unwrap()
    }

    fn poll(&mut self) -> Duration {
        let now = Instant::from_micros(self.started.elapsed().as_micros() as i64);
        self.interface.poll(now, &mut self.card, &mut self.sockets);
        self.card.from_guest.publish().unwrap();
        let delay = self.interface.poll_delay(now, &self.sockets);
        delay.map_or(PATIENCE, |delay| Duration::from_micros(delay.total_micros()))
    }
}

fn tcp_socket() -> tcp::Socket<'static> {
    let buffer = || tcp::SocketBuffer::new(vec![0; 65_535]);
    let mut socket = tcp::Socket::new(buffer(), buffer());
    socket.set_nagle_enabled(false);
    socket
}

/// Runs the guests until `done` has an answer. What is not a guest's doing is looked at again every
/// ten milliseconds.
pub(crate) fn until<T>(
    guests: &mut [&mut Guest],
    mut done: impl FnMut(&mut [&mut Guest]) -> Option<T>,
) -> T {
    let deadline = std::time::Instant::now() + PATIENCE;
    loop {
        let mut wait = Duration::from_millis(10);
        for guest in guests.iter_mut() {
            wait = wait.min(guest.poll());
        }
        if let Some(answer) = done(guests) {
            for guest in guests.iter_mut() {
                guest.poll();
            }
            return answer;
        }
        assert!(std::time::Instant::now() < deadline, "nothing came within {PATIENCE:?}");
        if guests.iter_mut().all(|guest| guest.card.to_guest.prepare_sleep()) {
            let mut events: Vec<PollFd<'_>> = guests
                .iter()
                .map(|guest| PollFd::new(guest.card.to_guest.event(), PollFlags::IN))
                .collect();
            let wait = Timespec { tv_sec: 0, tv_nsec: wait.as_nanos() as i64 };
            poll(&mut events, Some(&wait)).unwrap();
        }
        guests.iter().for_each(|guest| guest.card.to_guest.clear_event());
    }
}

struct Received(Vec<u8>);
struct Sending<'a>(&'a mut Producer);

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Sending<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let result = f(&mut frame);
        self.0.push(&frame).unwrap();
        result
    }
}

impl Device for Card {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sending<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Received, Sending<'_>)> {
        let mut frame = vec![0; FRAME_BYTES_MAX];
        let length = self.to_guest.pop(&mut frame).unwrap()?;
        frame.truncate(length);
        Some((Received(frame), Sending(&mut self.from_guest)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Sending<'_>> {
        Some(Sending(&mut self.from_guest))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 1464;
        capabilities
    }
}

//! Each test goes through [`Bench::check`]: a frame in, the frames that must come out.

use super::*;
use crate::program::{AddressPair, FixedIp, Network, Port, Program, Remote, SecurityRule, Subnet};
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, DhcpMessageType, DhcpPacket, DhcpRepr, EthernetAddress,
    EthernetFrame, Icmpv4Repr, IpProtocol, Ipv4Repr, TcpPacket, UdpPacket,
};

const A: Mac = [0xfa, 0x16, 0x3e, 0, 0, 0xa];
const B: Mac = [0xfa, 0x16, 0x3e, 0, 0, 0xb];
const OPEN: Mac = [0xfa, 0x16, 0x3e, 0, 0, 0xc];
const FAR: Mac = [0xfa, 0x16, 0x3e, 0, 0, 0xf];
const IP_A: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 10);
const IP_B: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 11);
const IP_OPEN: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 12);
const IP_FAR: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 15);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
const VNI: u32 = 0x12_3456;

#[derive(Debug, PartialEq, Eq, Clone)]
enum Out {
    Port(usize, Vec<u8>),
    Tunnel(SocketAddr, u32, Vec<u8>),
    Service(usize, Vec<u8>),
}

#[derive(Default)]
struct Seen(Vec<Out>);

impl Output for Seen {
    fn port(&mut self, port: usize, frame: &[u8]) {
        self.0.push(Out::Port(port, frame.to_vec()));
    }
    fn tunnel(&mut self, vtep: SocketAddr, vni: u32, frame: &[u8]) {
        self.0.push(Out::Tunnel(vtep, vni, frame.to_vec()));
    }
    fn service(&mut self, port: usize, packet: &[u8]) {
        self.0.push(Out::Service(port, packet.to_vec()));
    }
}

fn vtep() -> SocketAddr {
    "192.0.2.2:4789".parse().unwrap()
}

fn text(mac: Mac) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

fn rule(direction: Direction, protocol: Option<u8>, ports: Option<(u16, u16)>) -> SecurityRule {
    SecurityRule {
        direction,
        ethertype: Ethertype::Ipv4,
        protocol,
        port_min: ports.map(|ports| ports.0),
        port_max: ports.map(|ports| ports.1),
        remote_cidr: None,
    }
}

fn port(name: &str, mac: Mac, address: Ipv4Addr) -> Port {
    Port {
        id: name.to_owned(),
        network_id: "net".to_owned(),
        mac: text(mac),
        fixed_ips: vec![FixedIp { subnet_id: "sub".to_owned(), address: address.into() }],
        hostname: format!("host-{name}"),
        port_security: true,
        security_rules: vec![rule(Direction::Egress, None, None)],
        ..Port::default()
    }
}

/// Ports 0 (A) and 1 (B) may send anything and receive nothing unasked; port 2 has no port security;
/// one port is on another host.
fn program() -> Program {
    let network = Network {
        id: "net".to_owned(),
        vni: VNI,
        mtu: 1450,
        subnets: vec![Subnet {
            id: "sub".to_owned(),
            cidr: "10.0.0.0/24".to_owned(),
            gateway: Some(GATEWAY),
            dhcp: true,
            dns: vec![Ipv4Addr::new(9, 9, 9, 9)],
            host_routes: vec![("10.9.0.0/16".to_owned(), Ipv4Addr::new(10, 0, 0, 9))],
            ..Subnet::default()
        }],
        remotes: vec![Remote { mac: text(FAR), ips: vec![IP_FAR.into()], vtep: vtep() }],
    };
    let mut open = port("open", OPEN, IP_OPEN);
    open.port_security = false;
    Program {
        revision: 1,
        networks: vec![network],
        ports: vec![port("a", A, IP_A), port("b", B, IP_B), open],
        ..Program::default()
    }
}

struct Bench {
    pipeline: Pipeline,
    now_ms: u64,
}

impl Bench {
    fn new(program: Program) -> Bench {
        let mut bench = Bench { pipeline: Pipeline::new(), now_ms: 1000 };
        bench.swap(program);
        bench
    }

    fn swap(&mut self, program: Program) {
        self.pipeline.swap(Arc::new(Tables::compile(program).unwrap()));
    }

    fn from(&mut self, port: usize, frame: &[u8]) -> Vec<Out> {
        let mut seen = Seen::default();
        self.pipeline.guest_frame(port, frame, self.now_ms, &mut seen);
        seen.0
    }

    fn tunnel(&mut self, source: &str, vni: u32, frame: &[u8]) -> Vec<Out> {
        let mut datagram = wire::vxlan_header(vni).to_vec();
        datagram.extend_from_slice(frame);
        let mut seen = Seen::default();
        self.pipeline.tunnel_datagram(source.parse().unwrap(), &datagram, self.now_ms, &mut seen);
        seen.0
    }

    #[track_caller]
    fn check(&mut self, port: usize, frame: &[u8], expected: &[Out]) {
        assert_eq!(self.from(port, frame), expected);
    }

    /// The frame goes nowhere and is counted under `reason`.
    #[track_caller]
    fn check_dropped(&mut self, port: usize, frame: &[u8], reason: &str) {
        let before = self.dropped(reason);
        self.check(port, frame, &[]);
        assert_eq!(self.dropped(reason), before + 1, "not counted as {reason}");
    }

    fn dropped(&self, reason: &str) -> u64 {
        self.pipeline.drops().find(|(name, _)| *name == reason).unwrap().1
    }
}

fn arp(from: Mac, operation: ArpOperation, sender: Ipv4Addr, target: Ipv4Addr) -> Vec<u8> {
    let repr = ArpRepr::EthernetIpv4 {
        operation,
        source_hardware_addr: EthernetAddress(from),
        source_protocol_addr: sender,
        target_hardware_addr: EthernetAddress([0; 6]),
        target_protocol_addr: target,
    };
    let mut buffer = Vec::new();
    let payload = wire::ethernet(
        &mut buffer,
        &wire::BROADCAST,
        &from,
        EthernetProtocol::Arp,
        repr.buffer_len(),
    );
    repr.emit(&mut ArpPacket::new_unchecked(payload));
    buffer
}

struct Ends {
    from: Mac,
    to: Mac,
    source: Ipv4Addr,
    destination: Ipv4Addr,
}

const A_TO_B: Ends = Ends { from: A, to: B, source: IP_A, destination: IP_B };
const B_TO_A: Ends = Ends { from: B, to: A, source: IP_B, destination: IP_A };
const FAR_TO_A: Ends = Ends { from: FAR, to: A, source: IP_FAR, destination: IP_A };
const A_TO_FAR: Ends = Ends { from: A, to: FAR, source: IP_A, destination: IP_FAR };

fn ipv4(ends: &Ends, protocol: IpProtocol, payload: &[u8]) -> Vec<u8> {
    let ip = Ipv4Repr {
        src_addr: ends.source,
        dst_addr: ends.destination,
        next_header: protocol,
        payload_len: payload.len(),
        hop_limit: 64,
    };
    let mut buffer = Vec::new();
    let frame = wire::ethernet(
        &mut buffer,
        &ends.to,
        &ends.from,
        EthernetProtocol::Ipv4,
        20 + payload.len(),
    );
    let mut packet = Ipv4Packet::new_unchecked(frame);
    ip.emit(&mut packet, &ChecksumCapabilities::default());
    packet.payload_mut().copy_from_slice(payload);
    buffer
}

fn udp(ends: &Ends, source: u16, destination: u16, body: &[u8]) -> Vec<u8> {
    let mut payload = vec![0; 8 + body.len()];
    let mut packet = UdpPacket::new_unchecked(&mut payload[..]);
    packet.set_src_port(source);
    packet.set_dst_port(destination);
    packet.set_len(8 + body.len() as u16);
    packet.payload_mut().copy_from_slice(body);
    ipv4(ends, IpProtocol::Udp, &payload)
}

fn tcp(ends: &Ends, source: u16, destination: u16, flags: u8) -> Vec<u8> {
    let mut payload = vec![0; 20];
    let mut packet = TcpPacket::new_unchecked(&mut payload[..]);
    packet.set_src_port(source);
    packet.set_dst_port(destination);
    packet.set_header_len(20);
    payload[13] = flags;
    ipv4(ends, IpProtocol::Tcp, &payload)
}

fn ping(ends: &Ends, request: bool) -> Vec<u8> {
    let repr = if request {
        Icmpv4Repr::EchoRequest { ident: 7, seq_no: 1, data: b"ping" }
    } else {
        Icmpv4Repr::EchoReply { ident: 7, seq_no: 1, data: b"ping" }
    };
    let mut payload = vec![0; repr.buffer_len()];
    repr.emit(&mut Icmpv4Packet::new_unchecked(&mut payload[..]), &ChecksumCapabilities::default());
    ipv4(ends, IpProtocol::Icmp, &payload)
}

fn to_b(frame: &[u8]) -> Vec<Out> {
    vec![Out::Port(1, frame.to_vec())]
}

fn to_a(frame: &[u8]) -> Vec<Out> {
    vec![Out::Port(0, frame.to_vec())]
}

fn with_ingress(rules: Vec<SecurityRule>) -> Program {
    let mut program = program();
    program.ports[1].security_rules.extend(rules);
    program
}

#[test]
fn arp_is_answered_for_the_switch_and_for_known_ports() {
    let mut bench = Bench::new(program());
    let gateway_mac = bench.pipeline.tables().networks[0].gateway_mac;
    for (target, mac) in
        [(GATEWAY, gateway_mac), (METADATA_ADDRESS, gateway_mac), (IP_B, B), (IP_FAR, FAR)]
    {
        let out = bench.from(0, &arp(A, ArpOperation::Request, IP_A, target));
        let [Out::Port(0, reply)] = &out[..] else { panic!("{target}: {out:?}") };
        let Content::Arp(answer) = wire::parse(reply).unwrap().content else { panic!() };
        assert_eq!((answer.request, answer.sender, answer.sender_mac), (false, target, mac));
        assert_eq!(reply[..6], A);
    }
}

#[test]
fn unknown_and_gratuitous_arp_reaches_every_known_port_and_each_host_once() {
    let mut bench = Bench::new(program());
    for target in [Ipv4Addr::new(10, 0, 0, 99), IP_A] {
        let frame = arp(A, ArpOperation::Request, IP_A, target);
        bench.check(
            0,
            &frame,
            &[
                Out::Port(1, frame.clone()),
                Out::Port(2, frame.clone()),
                Out::Tunnel(vtep(), VNI, frame.clone()),
            ],
        );
    }
}

#[test]
fn a_guest_speaks_only_for_itself() {
    let mut bench = Bench::new(program());
    let foreign = Ends { source: IP_B, ..A_TO_B };
    bench.check_dropped(0, &udp(&foreign, 1, 2, b""), "spoofed_address");
    let foreign = Ends { from: FAR, ..A_TO_B };
    bench.check_dropped(0, &udp(&foreign, 1, 2, b""), "spoofed_mac");
    bench.check_dropped(0, &arp(A, ArpOperation::Reply, GATEWAY, IP_B), "spoofed_neighbour");
    bench.check_dropped(0, &udp(&A_TO_B, 67, 68, b""), "rogue_server");
    let mut vlan = udp(&A_TO_B, 1, 2, b"");
    vlan[12..14].copy_from_slice(&[0x81, 0]);
    bench.check_dropped(0, &vlan, "ethertype");
    bench.check_dropped(0, &[0; 13], "malformed");
}

#[test]
fn an_address_pair_widens_what_a_guest_may_send() {
    let virtual_ip = Ipv4Addr::new(10, 0, 0, 200);
    let mut program = with_ingress(vec![rule(Direction::Ingress, None, None)]);
    let frame = udp(&Ends { source: virtual_ip, ..A_TO_B }, 1, 2, b"x");
    Bench::new(program.clone()).check_dropped(0, &frame, "spoofed_address");
    program.ports[0].allowed_address_pairs =
        vec![AddressPair { cidr: virtual_ip.to_string(), mac: None }];
    Bench::new(program).check(0, &frame, &to_b(&frame));
}

#[test]
fn ingress_needs_a_rule_and_replies_do_not() {
    let mut bench = Bench::new(program());
    bench.check_dropped(0, &tcp(&A_TO_B, 4000, 80, wire::SYN), "security_ingress");

    let http = rule(Direction::Ingress, Some(wire::TCP), Some((80, 80)));
    let mut bench = Bench::new(with_ingress(vec![http]));
    let syn = tcp(&A_TO_B, 4000, 80, wire::SYN);
    bench.check(0, &syn, &to_b(&syn));
    let reply = tcp(&B_TO_A, 80, 4000, wire::SYN | wire::ACK);
    bench.check(1, &reply, &to_a(&reply));
    bench.check_dropped(0, &tcp(&A_TO_B, 4000, 81, wire::SYN), "security_ingress");
    bench.check_dropped(0, &udp(&A_TO_B, 4000, 80, b""), "security_ingress");
    bench.check_dropped(1, &tcp(&B_TO_A, 80, 4001, wire::ACK), "security_ingress");
}

#[test]
fn egress_needs_a_rule_too() {
    let mut program = program();
    program.ports[0].security_rules =
        vec![rule(Direction::Egress, Some(wire::UDP), Some((53, 53)))];
    program.ports[1].security_rules.push(rule(Direction::Ingress, None, None));
    let mut bench = Bench::new(program);
    bench.check_dropped(0, &udp(&A_TO_B, 1000, 54, b""), "security_egress");
    let query = udp(&A_TO_B, 1000, 53, b"");
    bench.check(0, &query, &to_b(&query));
}

#[test]
fn a_removed_rule_ends_the_connections_it_admitted() {
    let http = rule(Direction::Ingress, Some(wire::TCP), Some((80, 80)));
    let mut bench = Bench::new(with_ingress(vec![http]));
    let syn = tcp(&A_TO_B, 4000, 80, wire::SYN);
    bench.check(0, &syn, &to_b(&syn));
    // A swap that keeps the rule keeps the connection.
    bench.swap(with_ingress(vec![rule(Direction::Ingress, None, None)]));
    let data = tcp(&A_TO_B, 4000, 80, wire::ACK);
    bench.check(0, &data, &to_b(&data));
    bench.swap(program());
    bench.check_dropped(0, &data, "security_ingress");
}

#[test]
fn an_idle_connection_is_forgotten() {
    let mut bench = Bench::new(program());
    let query = udp(&A_TO_FAR, 1000, 53, b"q");
    bench.check(0, &query, &[Out::Tunnel(vtep(), VNI, query.clone())]);
    let answer = udp(&FAR_TO_A, 53, 1000, b"a");
    assert_eq!(bench.tunnel("192.0.2.2:4789", VNI, &answer), to_a(&answer));
    bench.now_ms += 181_000;
    assert_eq!(bench.tunnel("192.0.2.2:4789", VNI, &answer), []);
    let now_ms = bench.now_ms;
    bench.pipeline.sweep(now_ms);
    assert_eq!(bench.pipeline.connections(), 0);
}

#[test]
fn a_port_cannot_fill_the_connection_table() {
    let mut bench = Bench::new(program());
    let total = connections::CONNECTIONS_PER_PORT_MAX;
    for n in 0..total + 10 {
        let frame = udp(&A_TO_FAR, (n % 60_000) as u16, (n / 60_000) as u16, b"");
        bench.from(0, &frame);
    }
    assert_eq!(bench.pipeline.connections() as u32, total);
    assert_eq!(bench.dropped("connections_full"), 10);
    let other = udp(&Ends { from: B, to: FAR, source: IP_B, destination: IP_FAR }, 1, 2, b"");
    assert_eq!(bench.from(1, &other).len(), 1);
}

#[test]
fn later_fragments_follow_their_first() {
    let mut bench =
        Bench::new(with_ingress(vec![rule(Direction::Ingress, Some(wire::UDP), Some((9, 9)))]));
    let fragment = |ident: u16, offset: u16, more: bool| {
        let mut frame = udp(&A_TO_B, 1, 9, &[0; 16]);
        let mut packet = Ipv4Packet::new_unchecked(&mut frame[14..]);
        packet.set_ident(ident);
        packet.set_frag_offset(offset);
        packet.set_more_frags(more);
        packet.fill_checksum();
        frame
    };
    bench.check_dropped(0, &fragment(5, 24, false), "security_egress");
    let (first, last) = (fragment(5, 0, true), fragment(5, 24, false));
    bench.check(0, &first, &to_b(&first));
    bench.check(0, &last, &to_b(&last));
    bench.check_dropped(0, &fragment(6, 24, false), "security_egress");
}

#[test]
fn an_icmp_error_passes_only_for_a_known_connection() {
    let mut bench = Bench::new(program());
    let error_about = |sent: &[u8]| {
        let mut payload = vec![3, 4, 0, 0, 0, 0, 5, 0];
        payload.extend_from_slice(&sent[14..14 + 28]);
        ipv4(&FAR_TO_A, IpProtocol::Icmp, &payload)
    };
    let sent = udp(&A_TO_FAR, 1000, 2000, &[0; 8]);
    let error = error_about(&sent);
    assert_eq!(bench.tunnel("192.0.2.2:1", VNI, &error), []);
    bench.from(0, &sent);
    assert_eq!(bench.tunnel("192.0.2.2:1", VNI, &error), to_a(&error));
}

#[test]
fn the_gateway_answers_ping() {
    let mut bench = Bench::new(program());
    let gateway_mac = bench.pipeline.tables().networks[0].gateway_mac;
    let ends = Ends { from: A, to: gateway_mac, source: IP_A, destination: GATEWAY };
    let back = Ends { from: gateway_mac, to: A, source: GATEWAY, destination: IP_A };
    bench.check(0, &ping(&ends, true), &to_a(&ping(&back, false)));
    let elsewhere = Ends { destination: Ipv4Addr::new(8, 8, 8, 8), ..ends };
    bench.check_dropped(0, &ping(&elsewhere, true), "no_route");
}

#[test]
fn the_tunnel_takes_only_known_hosts_and_networks() {
    let mut bench = Bench::new(with_ingress(vec![rule(Direction::Ingress, None, None)]));
    let frame = udp(&Ends { to: B, destination: IP_B, ..FAR_TO_A }, 1, 2, b"x");
    assert_eq!(bench.tunnel("192.0.2.2:555", VNI, &frame), to_b(&frame));
    assert_eq!(bench.tunnel("192.0.2.3:4789", VNI, &frame), []);
    assert_eq!(bench.dropped("tunnel_source"), 1);
    assert_eq!(bench.tunnel("192.0.2.2:4789", VNI + 1, &frame), []);
    assert_eq!(bench.dropped("tunnel_network"), 1);
    // What comes through the tunnel does not go back into it, flooded or not.
    let broadcast = arp(FAR, ArpOperation::Request, IP_FAR, IP_FAR);
    let out = bench.tunnel("192.0.2.2:4789", VNI, &broadcast);
    assert!(out.iter().all(|out| matches!(out, Out::Port(..))) && out.len() == 3, "{out:?}");
    let back = udp(&Ends { to: FAR, ..FAR_TO_A }, 1, 2, b"x");
    assert_eq!(bench.tunnel("192.0.2.2:4789", VNI, &back), []);
}

#[test]
fn without_port_security_anything_passes_both_ways() {
    let mut bench = Bench::new(program());
    let ends = Ends { from: [2, 0, 0, 0, 0, 1], to: FAR, source: IP_B, destination: IP_FAR };
    let frame = udp(&ends, 67, 68, b"");
    bench.check(2, &frame, &[Out::Tunnel(vtep(), VNI, frame.clone())]);
    let inward = udp(&Ends { to: OPEN, destination: IP_OPEN, ..A_TO_B }, 1, 2, b"");
    bench.check(0, &inward, &[Out::Port(2, inward.clone())]);
}

#[test]
fn metadata_is_reached_whatever_the_rules() {
    let mut program = program();
    program.ports[0].security_rules.clear();
    let mut bench = Bench::new(program);
    let gateway_mac = bench.pipeline.tables().networks[0].gateway_mac;
    let ends = Ends { from: A, to: gateway_mac, source: IP_A, destination: METADATA_ADDRESS };
    let syn = tcp(&ends, 4000, 80, wire::SYN);
    bench.check(0, &syn, &[Out::Service(0, syn[14..].to_vec())]);
    bench.check_dropped(0, &tcp(&ends, 4000, 81, wire::SYN), "security_egress");
}

#[test]
fn a_forward_needs_a_rule_for_its_real_client() {
    let client: IpAddr = "127.0.0.1".parse().unwrap();
    let service = SocketAddrV4::new(GATEWAY, 40_000);
    let guest = SocketAddrV4::new(IP_B, 80);
    let mut http = rule(Direction::Ingress, Some(wire::TCP), Some((80, 80)));
    http.remote_cidr = Some("127.0.0.0/8".to_owned());
    let mut bench = Bench::new(with_ingress(vec![http]));
    let elsewhere: IpAddr = "10.1.1.1".parse().unwrap();
    assert!(!bench.pipeline.admit_forward(1, elsewhere, service, guest, 1000));
    assert!(bench.pipeline.admit_forward(1, client, service, guest, 1000));

    let gateway_mac = bench.pipeline.tables().networks[0].gateway_mac;
    let ends = Ends { from: gateway_mac, to: B, source: GATEWAY, destination: IP_B };
    let from_stack = |bench: &mut Bench, frame: &[u8]| {
        let mut seen = Seen::default();
        bench.pipeline.service_packet(1, &frame[14..], 1000, &mut seen);
        seen.0
    };
    let syn = tcp(&ends, 40_000, 80, wire::SYN);
    assert_eq!(from_stack(&mut bench, &syn), to_b(&syn));
    assert_eq!(from_stack(&mut bench, &tcp(&ends, 40_001, 80, wire::SYN)), []);
    let reply = tcp(
        &Ends { from: B, to: gateway_mac, source: IP_B, destination: GATEWAY },
        80,
        40_000,
        wire::SYN | wire::ACK,
    );
    bench.check(1, &reply, &[Out::Service(1, reply[14..].to_vec())]);
}

fn dhcp(kind: DhcpMessageType, requested: Option<Ipv4Addr>, server: Option<Ipv4Addr>) -> Vec<u8> {
    let repr = DhcpRepr {
        message_type: kind,
        transaction_id: 0xdead_beef,
        secs: 0,
        client_hardware_address: EthernetAddress(A),
        client_ip: Ipv4Addr::UNSPECIFIED,
        your_ip: Ipv4Addr::UNSPECIFIED,
        server_ip: Ipv4Addr::UNSPECIFIED,
        router: None,
        subnet_mask: None,
        relay_agent_ip: Ipv4Addr::UNSPECIFIED,
        broadcast: false,
        requested_ip: requested,
        client_identifier: Some(EthernetAddress(A)),
        server_identifier: server,
        parameter_request_list: Some(&[1, 3, 6, 12, 26, 121]),
        dns_servers: None,
        max_size: None,
        lease_duration: None,
        renew_duration: None,
        rebind_duration: None,
        additional_options: &[],
    };
    let mut body = vec![0; repr.buffer_len()];
    repr.emit(&mut DhcpPacket::new_unchecked(&mut body[..])).unwrap();
    let ends = Ends {
        from: A,
        to: wire::BROADCAST,
        source: Ipv4Addr::UNSPECIFIED,
        destination: Ipv4Addr::BROADCAST,
    };
    udp(&ends, 68, 67, &body)
}

/// The DHCP message in the only frame of `out`, with its options by code.
fn dhcp_answer(out: &[Out]) -> (DhcpMessageType, Ipv4Addr, Vec<(u8, Vec<u8>)>) {
    let [Out::Port(0, frame)] = out else { panic!("{out:?}") };
    let Content::Ip(packet) = wire::parse(frame).unwrap().content else { panic!("no IP") };
    let ip = Ipv4Packet::new_checked(&frame[14..]).unwrap();
    assert!(ip.verify_checksum());
    let datagram = UdpPacket::new_checked(&frame[packet.transport_at..packet.end]).unwrap();
    assert!(datagram.verify_checksum(&ip.src_addr().into(), &ip.dst_addr().into()));
    let message = DhcpPacket::new_checked(datagram.payload()).unwrap();
    assert_eq!(message.transaction_id(), 0xdead_beef);
    let repr = DhcpRepr::parse(&message).unwrap();
    let options = message.options().map(|option| (option.kind, option.data.to_vec())).collect();
    (repr.message_type, repr.your_ip, options)
}

#[test]
fn dhcp_hands_out_the_programmed_address_with_all_options() {
    let mut bench = Bench::new(program());
    let out = bench.from(0, &dhcp(DhcpMessageType::Discover, None, None));
    let (kind, address, _) = dhcp_answer(&out);
    assert_eq!((kind, address), (DhcpMessageType::Offer, IP_A));

    let out = bench.from(0, &dhcp(DhcpMessageType::Request, Some(IP_A), Some(GATEWAY)));
    let (kind, address, options) = dhcp_answer(&out);
    assert_eq!((kind, address), (DhcpMessageType::Ack, IP_A));
    let option = |code: u8| {
        let found = options.iter().find(|(kind, _)| *kind == code);
        found.unwrap_or_else(|| panic!("no option {code}")).1.clone()
    };
    assert_eq!(option(1), [255, 255, 255, 0]);
    assert_eq!(option(3), GATEWAY.octets());
    assert_eq!(option(6), [9, 9, 9, 9]);
    assert_eq!(option(12), b"host-a");
    assert_eq!(option(26), 1450u16.to_be_bytes());
    assert_eq!(option(51), 86_400u32.to_be_bytes());
    assert_eq!(option(54), GATEWAY.octets());
    let routes =
        [&[32, 169, 254, 169, 254, 10, 0, 0, 1][..], &[16, 10, 9, 10, 0, 0, 9], &[0, 10, 0, 0, 1]];
    assert_eq!(option(121), routes.concat());
}

#[test]
fn dhcp_refuses_another_address_and_ignores_requests_to_other_servers() {
    let mut bench = Bench::new(program());
    let out = bench.from(0, &dhcp(DhcpMessageType::Request, Some(IP_B), None));
    assert_eq!(dhcp_answer(&out).0, DhcpMessageType::Nak);
    let other = Some(Ipv4Addr::new(10, 0, 0, 77));
    bench.check(0, &dhcp(DhcpMessageType::Request, Some(IP_A), other), &[]);
    bench.check(0, &dhcp(DhcpMessageType::Release, None, None), &[]);
}

#[test]
fn ipv6_guests_find_each_other_but_advertise_only_themselves() {
    let mut bench = Bench::new(program());
    let advertisement = |source: Ipv6, target: Ipv6, kind: u8| {
        let mut payload = vec![kind, 0, 0, 0, 0, 0, 0, 0];
        payload.extend_from_slice(&target.octets());
        let mut buffer = Vec::new();
        let room = wire::ethernet(&mut buffer, &B, &A, EthernetProtocol::Ipv6, 40 + payload.len());
        let mut packet = smoltcp::wire::Ipv6Packet::new_unchecked(room);
        packet.set_version(6);
        packet.set_payload_len(payload.len() as u16);
        packet.set_next_header(IpProtocol::Icmpv6);
        packet.set_hop_limit(255);
        packet.set_src_addr(source);
        packet.set_dst_addr(wire::link_local(&B));
        packet.payload_mut().copy_from_slice(&payload);
        buffer
    };
    let (own, foreign) = (wire::link_local(&A), wire::link_local(&B));
    let good = advertisement(own, own, 136);
    bench.check(0, &good, &to_b(&good));
    bench.check_dropped(0, &advertisement(own, foreign, 136), "spoofed_neighbour");
    bench.check_dropped(0, &advertisement(foreign, foreign, 136), "spoofed_address");
    bench.check_dropped(0, &advertisement(own, own, 134), "rogue_server");
}

type Ipv6 = std::net::Ipv6Addr;

mod hostile {
    use super::*;
    use proptest::prelude::*;

    fn seeds() -> Vec<Vec<u8>> {
        let gateway_mac = Bench::new(program()).pipeline.tables().networks[0].gateway_mac;
        let ends = Ends { from: A, to: gateway_mac, source: IP_A, destination: GATEWAY };
        vec![
            arp(A, ArpOperation::Request, IP_A, IP_B),
            dhcp(DhcpMessageType::Discover, None, None),
            dhcp(DhcpMessageType::Request, Some(IP_A), Some(GATEWAY)),
            ping(&ends, true),
            tcp(&A_TO_B, 1, 2, wire::SYN),
            udp(&A_TO_FAR, 1, 2, &[0; 40]),
            ipv4(&A_TO_B, IpProtocol::Icmp, &[3; 60]),
            [&[0xff; 12][..], &[0x86, 0xdd, 0x60], &[0; 60]].concat(),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2000) })]

        #[test]
        fn no_frame_panics_the_switch(
            seed in 0usize..8,
            port in 0usize..4,
            changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
            length in proptest::option::of(0usize..2044),
        ) {
            let mut frame = seeds().swap_remove(seed);
            for (at, byte) in changes {
                let at = at.index(frame.len());
                frame[at] = byte;
            }
            if let Some(length) = length {
                frame.resize(length, 0xa5);
            }
            let mut bench = Bench::new(program());
            for out in bench.from(port, &frame) {
                // Nothing forged leaves: what a secured port sends carries its own MAC.
                if let Out::Tunnel(_, _, sent) = &out && port < 2 {
                    let source = EthernetFrame::new_unchecked(&sent[..]).src_addr().0;
                    prop_assert_eq!(source, [A, B][port]);
                }
            }
            bench.tunnel("192.0.2.2:4789", VNI, &frame);
            let mut seen = Seen::default();
            bench.pipeline.service_packet(port, &frame, 1, &mut seen);
            bench.pipeline.tunnel_datagram(vtep(), &frame, 1, &mut seen);
        }

        #[test]
        fn no_random_bytes_panic_the_switch(frame in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut bench = Bench::new(program());
            bench.from(0, &frame);
            bench.from(2, &frame);
            bench.tunnel("192.0.2.2:4789", VNI, &frame);
        }
    }
}

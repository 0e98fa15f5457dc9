//! The switch as its node and its guests meet it: control socket, packet rings, VXLAN and forwards.

mod bench;

use bench::{GATEWAY, Guest, METADATA, TestSwitch, address, network, port, program, until};
use netstack::client::Error as ClientError;
use netstack::control::{AttachedPort, ErrorKind};
use netstack::program::{Forward, ForwardProtocol, Program, Remote};
use netstack::{Client, Switch, SwitchConfig};
use smoltcp::socket::{icmp, tcp};
use smoltcp::wire::{Icmpv4Packet, Icmpv4Repr, IpAddress};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, SocketAddrV4, TcpListener, TcpStream};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::time::{Duration, Instant};

/// Pings until an answer comes: smoltcp drops its first reply to a station whose MAC it must ask for.
fn ping(guests: &mut [&mut Guest], to: Ipv4Addr) {
    let buffer = || icmp::PacketBuffer::new(vec![icmp::PacketMetadata::EMPTY; 8], vec![0; 1024]);
    let mut socket = icmp::Socket::new(buffer(), buffer());
    socket.bind(icmp::Endpoint::Ident(0x22)).unwrap();
    let handle = guests[0].sockets.add(socket);
    let request = Icmpv4Repr::EchoRequest { ident: 0x22, seq_no: 1, data: b"trine" };
    let mut sent: Option<Instant> = None;
    until(guests, |guests| {
        let socket = guests[0].sockets.get_mut::<icmp::Socket>(handle);
        if sent.is_none_or(|at| at.elapsed() > Duration::from_millis(200)) && socket.can_send() {
            let room = socket.send(request.buffer_len(), IpAddress::Ipv4(to)).unwrap();
            request.emit(&mut Icmpv4Packet::new_unchecked(room), &Default::default());
            sent = Some(Instant::now());
        }
        let (answer, from) = socket.recv().ok()?;
        let answer = Icmpv4Packet::new_checked(answer).unwrap();
        let answer = Icmpv4Repr::parse(&answer, &Default::default()).unwrap();
        assert_eq!(from, IpAddress::Ipv4(to));
        assert_eq!(answer, Icmpv4Repr::EchoReply { ident: 0x22, seq_no: 1, data: b"trine" });
        Some(())
    });
}

#[test]
fn a_guest_takes_its_address_and_reads_its_metadata() {
    let mut switch = TestSwitch::start("127.0.0.1");
    let mut guest = Guest::new(10);
    // Attached before the program names the port.
    switch.client.attach("net-port-10", 1, &guest.region).unwrap();
    switch.client.program(&program(vec![network("net", 7)], vec![port("net", 10)])).unwrap();

    let (taken, router, dns) = guest.take_address();
    assert_eq!((taken, router), (address(10), Some(GATEWAY)));
    assert_eq!(dns, [Ipv4Addr::new(9, 9, 9, 9)]);
    ping(&mut [&mut guest], GATEWAY);

    let answer = guest.get(METADATA, "/openstack/latest/meta_data.json", 5000);
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    assert!(answer.ends_with("\r\n\r\n{\"name\":\"net-10\"}"), "{answer}");
    let answer = guest.get(METADATA, "/nothing", 5001);
    assert!(answer.starts_with("HTTP/1.1 404 Not Found\r\n"), "{answer}");
}

#[test]
fn tenants_with_the_same_address_each_get_their_own_metadata() {
    let mut switch = TestSwitch::start("127.0.0.1");
    let mut guests = [Guest::with_address(10), Guest::with_address(10)];
    for (guest, port) in guests.iter().zip(["red-port-10", "blue-port-10"]) {
        switch.client.attach(port, 1, &guest.region).unwrap();
    }
    let networks = vec![network("red", 1), network("blue", 2)];
    switch.client.program(&program(networks, vec![port("red", 10), port("blue", 10)])).unwrap();
    for (guest, name) in guests.iter_mut().zip(["red-10", "blue-10"]) {
        let answer = guest.get(METADATA, "/openstack/latest/meta_data.json", 5000);
        assert!(answer.ends_with(&format!("{{\"name\":\"{name}\"}}")), "{answer}");
    }
}

#[test]
fn a_metadata_connection_answers_several_requests_and_a_large_file() {
    let mut switch = TestSwitch::start("127.0.0.1");
    let mut guest = Guest::with_address(10);
    let mut with_data = port("net", 10);
    let user_data = "0123456789abcdef".repeat(20_000);
    with_data.metadata.insert("openstack/latest/user_data".to_owned(), user_data.clone());
    switch.client.program(&program(vec![network("net", 7)], vec![with_data])).unwrap();
    switch.client.attach("net-port-10", 1, &guest.region).unwrap();

    let handle = guest.connect(METADATA, 80, 5000);
    let requests =
        "GET /openstack/latest/user_data HTTP/1.1\r\n\r\n".repeat(2) + "GET / HTTP/1.0\r\n\r\n";
    let mut sent = false;
    let mut answer = Vec::new();
    until(&mut [&mut guest], |guests| {
        let socket = guests[0].tcp(handle);
        if socket.can_send() && !sent {
            assert_eq!(socket.send_slice(requests.as_bytes()).unwrap(), requests.len());
            sent = true;
        }
        while socket.can_recv() {
            let taken = socket.recv(|bytes| (bytes.len(), bytes.to_vec())).unwrap();
            answer.extend_from_slice(&taken);
        }
        (sent && !socket.may_recv()).then_some(())
    });
    let answer = String::from_utf8(answer).unwrap();
    assert_eq!(answer.matches("HTTP/1.1 200 OK").count(), 3);
    assert_eq!(answer.matches(&user_data).count(), 2);
    assert!(answer.ends_with("\r\n\r\nopenstack"));
}

/// Two switches, a guest on each, joined by VXLAN on loopback.
fn two_hosts() -> (TestSwitch, TestSwitch, Guest, Guest) {
    let (mut one, mut two) = (TestSwitch::start("127.0.0.2"), TestSwitch::start("127.0.0.3"));
    let (here, there) = (Guest::with_address(10), Guest::with_address(20));
    one.client.attach("net-port-10", 1, &here.region).unwrap();
    two.client.attach("net-port-20", 1, &there.region).unwrap();
    let program = |local, far, vtep| {
        let mut network = network("net", 0xab_cdef);
        let mac = port("net", far).mac;
        network.remotes = vec![Remote { mac, ips: vec![address(far).into()], vtep }];
        program(vec![network], vec![port("net", local)])
    };
    one.client.program(&program(10, 20, two.vtep)).unwrap();
    two.client.program(&program(20, 10, one.vtep)).unwrap();
    (one, two, here, there)
}

#[test]
fn guests_on_two_hosts_reach_each_other_through_the_tunnel() {
    let (mut one, mut two, mut here, mut there) = two_hosts();
    ping(&mut [&mut here, &mut there], address(20));

    let server = there.listen(80);
    let client = here.connect(address(20), 80, 5000);
    let mut sent = false;
    let got = until(&mut [&mut here, &mut there], |guests| {
        let socket = guests[0].tcp(client);
        if socket.can_send() && !sent {
            socket.send_slice(b"across").unwrap();
            sent = true;
        }
        let socket = guests[1].tcp(server);
        socket.can_recv().then(|| socket.recv(|bytes| (bytes.len(), bytes.to_vec())).unwrap())
    });
    assert_eq!(got, b"across");
    assert!(one.total("tunnel_frames_sent") >= 3);
    assert_eq!(one.total("dropped_tunnel_source") + two.total("dropped_tunnel_source"), 0);
    assert_eq!(one.client.counters().unwrap().ports["net-port-10"].dropped_ring_full, 0);
}

#[test]
fn security_groups_hold_across_hosts() {
    let (mut one, mut two, mut here, mut there) = two_hosts();
    there.listen(81);
    let client = here.connect(address(20), 81, 5000);
    until(&mut [&mut here, &mut there], |_| {
        (two.total("dropped_security_ingress") > 0).then_some(())
    });
    assert_eq!(here.tcp(client).state(), tcp::State::SynSent);
    assert_eq!(one.total("dropped_security_egress"), 0);
}

fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

fn forward(id: &str, listen: SocketAddr, internal_port: u16) -> Forward {
    Forward {
        id: id.to_owned(),
        listen,
        port_id: "net-port-10".to_owned(),
        internal: SocketAddrV4::new(address(10), internal_port),
        protocol: ForwardProtocol::Tcp,
    }
}

fn with_forwards(forwards: Vec<Forward>) -> Program {
    Program { forwards, ..program(vec![network("net", 7)], vec![port("net", 10)]) }
}

/// A switch with one guest that answers on ports 80 and 81, whose rules permit only 80.
fn forwarding() -> (TestSwitch, Guest, SocketAddr, SocketAddr) {
    let mut switch = TestSwitch::start("127.0.0.1");
    let guest = Guest::with_address(10);
    let (open, closed) = (free_address(), free_address());
    let forwards = vec![forward("open", open, 80), forward("closed", closed, 81)];
    switch.client.attach("net-port-10", 1, &guest.region).unwrap();
    assert_eq!(switch.client.program(&with_forwards(forwards)).unwrap(), []);
    (switch, guest, open, closed)
}

#[test]
fn a_forward_carries_much_both_ways_and_passes_each_end_on() {
    let (_switch, mut guest, open, _) = forwarding();
    let server = guest.listen(80);
    const BYTES: usize = 3_000_000;
    let client = std::thread::spawn(move || {
        let stream = TcpStream::connect(open).unwrap();
        let mut writing = stream.try_clone().unwrap();
        let writer = std::thread::spawn(move || {
            let body: Vec<u8> = (0..BYTES).map(|n| (n % 251) as u8).collect();
            writing.write_all(&body).unwrap();
            writing.shutdown(Shutdown::Write).unwrap();
        });
        let mut answer = Vec::new();
        (&stream).read_to_end(&mut answer).unwrap();
        writer.join().unwrap();
        answer
    });
    // The guest sends back what it gets, and ends when its peer has ended.
    let mut pending: Vec<u8> = Vec::new();
    let mut echoed = 0;
    until(&mut [&mut guest], |guests| {
        let socket = guests[0].tcp(server);
        while socket.can_recv() && pending.len() < 1 << 20 {
            let taken = socket.recv(|bytes| (bytes.len(), bytes.to_vec())).unwrap();
            pending.extend_from_slice(&taken);
        }
        if socket.can_send() {
            let sent = socket.send_slice(&pending).unwrap();
            pending.drain(..sent);
            echoed += sent;
        }
        if echoed == BYTES && !socket.may_recv() {
            socket.close();
        }
        client.is_finished().then_some(())
    });
    let answer = client.join().unwrap();
    assert_eq!(answer.len(), BYTES);
    assert!(answer.iter().enumerate().all(|(n, byte)| *byte == (n % 251) as u8));
}

#[test]
fn a_forward_needs_a_rule_and_a_listening_guest() {
    let (mut switch, mut guest, open, closed) = forwarding();
    guest.listen(81);
    for listen in [closed, open] {
        let client = std::thread::spawn(move || {
            let mut stream = TcpStream::connect(listen).unwrap();
            let mut answer = [0; 1];
            matches!(stream.read(&mut answer), Ok(0) | Err(_))
        });
        until(&mut [&mut guest], |_| client.is_finished().then_some(()));
        assert!(client.join().unwrap(), "{listen} answered");
    }
    assert_eq!(switch.total("dropped_security_ingress"), 1);
}

#[test]
fn a_forward_that_cannot_listen_is_reported_and_the_others_go_on() {
    let mut switch = TestSwitch::start("127.0.0.1");
    let mut guest = Guest::with_address(10);
    switch.client.attach("net-port-10", 1, &guest.region).unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken_at = taken.local_addr().unwrap();
    let good = free_address();
    let program = with_forwards(vec![
        forward("taken", taken_at, 80),
        forward("outside", "192.0.2.1:80".parse().unwrap(), 80),
        forward("good", good, 80),
    ]);
    let failed = switch.client.program(&program).unwrap();
    let ids: Vec<&str> = failed.iter().map(|failure| failure.id.as_str()).collect();
    assert_eq!(ids, ["taken", "outside"]);
    assert!(failed[0].message.contains(&taken_at.to_string()), "{}", failed[0].message);
    assert_eq!(switch.client.status().unwrap().forwards_failed, failed);

    guest.listen(80);
    let client = std::thread::spawn(move || TcpStream::connect(good).map(drop));
    until(&mut [&mut guest], |_| client.is_finished().then_some(()));
    client.join().unwrap().unwrap();
    // The next program tries again.
    drop(taken);
    let failed = switch.client.program(&program).unwrap();
    assert_eq!(failed.len(), 1, "{failed:?}");
}

#[test]
fn a_removed_forward_ends_its_connections() {
    let (mut switch, mut guest, open, _) = forwarding();
    let server = guest.listen(80);
    let mut stream = TcpStream::connect(open).unwrap();
    until(&mut [&mut guest], |guests| {
        (guests[0].tcp(server).state() == tcp::State::Established).then_some(())
    });
    assert_eq!(switch.total("forwarded_connections"), 1);
    switch.client.program(&with_forwards(Vec::new())).unwrap();
    assert!(stream.read(&mut [0; 1]).is_err(), "the client's connection went on");
    until(&mut [&mut guest], |guests| {
        (guests[0].tcp(server).state() != tcp::State::Established).then_some(())
    });
    assert!(TcpStream::connect(open).is_err());
}

#[test]
fn an_older_generation_is_refused() {
    let mut switch = TestSwitch::start("127.0.0.1");
    let (old, new) = (Guest::new(10), Guest::new(10));
    let attached = |generation| vec![AttachedPort { port_id: "p".to_owned(), generation }];
    switch.client.attach("p", 2, &old.region).unwrap();
    assert!(switch.client.attach("p", 1, &new.region).unwrap_err().is_stale());
    assert!(switch.client.detach("p", 1).unwrap_err().is_stale());
    assert_eq!(switch.client.status().unwrap().ports_attached, attached(2));
    switch.client.attach("p", 3, &new.region).unwrap();
    assert_eq!(switch.client.status().unwrap().ports_attached, attached(3));
    switch.client.detach("p", 3).unwrap();
    assert_eq!(switch.client.status().unwrap().ports_attached, []);
    assert!(switch.client.attach("p", 2, &old.region).unwrap_err().is_stale());
    switch.client.detach("p", 3).unwrap();
}

#[test]
fn a_program_with_an_error_changes_nothing() {
    let mut switch = TestSwitch::start("127.0.0.1");
    let good = program(vec![network("net", 7)], vec![port("net", 10)]);
    switch.client.program(&good).unwrap();
    let mut bad = Program { revision: 2, ..good.clone() };
    bad.networks[0].subnets[0].cidr = "nonsense".to_owned();
    let error = switch.client.program(&bad).unwrap_err();
    let ClientError::Refused { kind: ErrorKind::Invalid, message } = error else {
        panic!("{error:?}");
    };
    assert!(message.contains("net-subnet") && message.contains("nonsense"), "{message}");
    assert_eq!(switch.client.status().unwrap().revision, 1);
}

#[test]
fn a_port_with_an_error_is_listed_and_the_others_work() {
    let mut switch = TestSwitch::start("127.0.0.1");
    let mut guest = Guest::with_address(10);
    let mut bad = port("net", 11);
    bad.mac = "nonsense".to_owned();
    switch.client.program(&program(vec![network("net", 7)], vec![bad, port("net", 10)])).unwrap();
    switch.client.attach("net-port-10", 1, &guest.region).unwrap();
    let rejected = switch.client.status().unwrap().ports_rejected;
    assert_eq!(rejected.len(), 1);
    assert_eq!(rejected[0].port_id, "net-port-11");
    assert!(rejected[0].message.contains("nonsense"), "{}", rejected[0].message);
    ping(&mut [&mut guest], GATEWAY);
}

#[test]
fn a_guest_that_breaks_its_ring_loses_only_its_own_port() {
    let mut switch = TestSwitch::start("127.0.0.1");
    let (bad, mut good) = (Guest::new(10), Guest::with_address(11));
    let ports = vec![port("net", 10), port("net", 11)];
    switch.client.program(&program(vec![network("net", 7)], ports)).unwrap();
    switch.client.attach("net-port-10", 1, &bad.region).unwrap();
    switch.client.attach("net-port-11", 1, &good.region).unwrap();

    // An index that claims more frames than the ring has slots, and a wake-up.
    let [memory, from_guest, _] = bad.region.descriptors().unwrap();
    std::fs::File::from(memory).write_all_at(&100_000u32.to_le_bytes(), 0).unwrap();
    rustix::io::write(&from_guest, &1u64.to_ne_bytes()).unwrap();
    until(&mut [&mut good], |_| {
        let attached = switch.client.status().unwrap().ports_attached;
        (attached.len() == 1 && attached[0].port_id == "net-port-11").then_some(())
    });
    ping(&mut [&mut good], GATEWAY);
}

#[test]
fn a_new_switch_takes_over_the_rings_of_the_one_before() {
    let mut first = TestSwitch::start("127.0.0.1");
    let mut guest = Guest::with_address(10);
    let program = program(vec![network("net", 7)], vec![port("net", 10)]);
    first.client.program(&program).unwrap();
    first.client.attach("net-port-10", 1, &guest.region).unwrap();
    ping(&mut [&mut guest], GATEWAY);
    let before = first.client.status().unwrap();
    first.client.detach("net-port-10", 1).unwrap();

    let mut second = TestSwitch::start("127.0.0.1");
    let after = second.client.status().unwrap();
    assert_ne!(before.instance, after.instance);
    assert_eq!((after.revision, after.ports_attached), (0, Vec::new()));
    second.client.attach("net-port-10", 1, &guest.region).unwrap();
    second.client.program(&program).unwrap();
    let answer = guest.get(METADATA, "/openstack", 5000);
    assert!(answer.ends_with("latest"), "{answer}");
}

#[test]
fn the_control_socket_is_private_and_taken_once() {
    let switch = TestSwitch::start("127.0.0.1");
    let mode = std::fs::metadata(&switch.control).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let config = SwitchConfig { control: switch.control.clone(), vtep: switch.vtep };
    assert!(Switch::bind(&config).is_err(), "the same tunnel endpoint was bound twice");
    let config = SwitchConfig { vtep: "127.0.0.1:0".parse().unwrap(), ..config };
    assert!(Switch::bind(&config).is_err(), "the same control socket was bound twice");
    let config = SwitchConfig { vtep: "0.0.0.0:0".parse().unwrap(), ..config };
    assert!(Switch::bind(&config).is_err(), "a wildcard was bound");
    Client::connect(&switch.control).unwrap().status().unwrap();
}

#[test]
fn nonsense_on_the_control_socket_is_answered_with_an_error() {
    let switch = TestSwitch::start("127.0.0.1");
    let socket = std::os::unix::net::UnixStream::connect(&switch.control).unwrap();
    for message in [
        &b"{"[..],
        br#"{"version":99,"request":"status"}"#,
        br#"{"version":1,"request":{"attach":{"port_id":"p","generation":1}}}"#,
    ] {
        abi::control::send(&socket, message, &[]).unwrap();
        let (reply, _) = abi::control::receive(&socket).unwrap().unwrap();
        let reply = String::from_utf8(reply).unwrap();
        assert!(reply.contains(r#""kind":"invalid""#), "{reply}");
    }
}

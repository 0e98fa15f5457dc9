//! The vsock device as a driver sees it, with programs on the host behind real sockets.

mod rig;

use rig::{DEADLINE, Driver, Rig, rig, until};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use vmm::config::{Resource, VsockConfig};
use vmm::devices::vsock::connection::BUFFER_BYTES;
use vmm::devices::vsock::connections::CONNECTIONS_MAX;
use vmm::devices::vsock::packet::{
    HEADER_BYTES, HOST_CID, Header, Operation, PAYLOAD_BYTES_MAX, SHUTDOWN_RECEIVE, SHUTDOWN_SEND,
    STREAM,
};
use vmm::devices::vsock::{self, GREETINGS_MAX};
use vmm::process::resources::Supply;

const CID: u32 = 7;
const QUEUES: usize = 3;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// Where the test's guest has its packets.
const OUT: u64 = 0x80_0000;
const IN: u64 = 0x90_0000;
const IN_BYTES: u32 = 4096 + HEADER_BYTES as u32;
const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// A machine with a vsock device whose socket is in a directory of its own.
struct Place {
    rig: Rig,
    directory: tempfile::TempDir,
}

impl Place {
    fn new() -> Option<Place> {
        let directory = tempfile::tempdir().unwrap();
        let socket = Resource::Path(directory.path().join("vsock"));
        let config = VsockConfig { cid: CID, socket, connector: None };
        let (device, outside) = vsock::open(&config, &mut Supply::Paths).unwrap();
        let outside = outside.unwrap();
        std::thread::spawn(move || outside.serve());
        Some(Place { rig: rig(vec![device])?, directory })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn guest(&self) -> Guest<'_> {
        Guest {
            driver: Driver::start(&self.rig, 1, QUEUES, 0),
            buffer_bytes: 1 << 20,
            forwarded: 0,
        }
    }

    /// A program on the host that asks for a port of the guest's.
    fn connect(&self, greeting: &str) -> UnixStream {
        let mut stream = UnixStream::connect(self.path("vsock")).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream.write_all(greeting.as_bytes()).unwrap();
        stream
    }
}

/// The guest's driver.
struct Guest<'a> {
    driver: Driver<'a>,
    /// What it tells of itself.
    buffer_bytes: u32,
    forwarded: u32,
}

/// Ports: the host's, the guest's.
type Ports = (u32, u32);

impl Guest<'_> {
    fn header(&self, (host, guest): Ports, operation: Operation) -> Header {
        Header {
            from_cid: CID.into(),
            to_cid: HOST_CID,
            from_port: guest,
            to_port: host,
            len: 0,
            kind: STREAM,
            operation: Some(operation),
            flags: 0,
            buffer_bytes: self.buffer_bytes,
            forwarded: self.forwarded,
        }
    }

    fn send_raw(&mut self, bytes: &[u8]) {
        self.driver.write(OUT, bytes);
        self.driver.offer(TRANSMIT, &[(OUT, bytes.len() as u32, false)]);
        self.driver.finish(TRANSMIT);
    }

    fn send_header(&mut self, header: Header) {
        self.send_raw(&header.bytes());
    }

    fn send(&mut self, ports: Ports, operation: Operation) {
        self.send_header(self.header(ports, operation));
    }

    fn shutdown(&mut self, ports: Ports, flags: u32) {
        self.send_header(Header { flags, ..self.header(ports, Operation::Shutdown) });
    }

    fn data(&mut self, ports: Ports, payload: &[u8]) {
        let mut header = self.header(ports, Operation::Data);
        header.len = payload.len() as u32;
        let packet = [&header.bytes(), payload].concat();
        self.send_raw(&packet);
    }

    /// The next packet for the guest.
    fn receive(&mut self) -> (Header, Vec<u8>) {
        self.driver.offer(RECEIVE, &[(IN, IN_BYTES, true)]);
        let (_, len) = self.driver.finish(RECEIVE);
        let packet = self.driver.read(IN, len as usize);
        let (header, payload) = packet.split_at(HEADER_BYTES);
        let header = Header::parse(header.try_into().unwrap());
        assert_eq!((header.from_cid, header.to_cid, header.kind), (HOST_CID, CID.into(), STREAM));
        assert_eq!(header.len as usize, payload.len());
        (header, payload.to_vec())
    }

    #[track_caller]
    fn expect(&mut self, (host, guest): Ports, operation: Operation) -> Header {
        let (header, _) = self.receive();
        assert_eq!(
            (header.operation, header.from_port, header.to_port),
            (Some(operation), host, guest)
        );
        header
    }

    /// Receives as many bytes of payload.
    fn receive_bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        while bytes.len() < len {
            let (header, payload) = self.receive();
            assert_eq!(header.operation, Some(Operation::Data), "{header:?}");
            bytes.extend(payload);
        }
        bytes
    }

    /// Accepts what a program on the host asked for.
    fn accept(&mut self, guest_port: u32) -> Ports {
        let (header, _) = self.receive();
        assert_eq!((header.operation, header.to_port), (Some(Operation::Request), guest_port));
        let ports = (header.from_port, guest_port);
        self.send(ports, Operation::Response);
        ports
    }

    /// Connects to a port of the host's, where somebody listens.
    fn connect(&mut self, ports: Ports) {
        self.send(ports, Operation::Request);
        self.expect(ports, Operation::Response);
    }
}

fn line(stream: &mut UnixStream) -> String {
    let mut line = String::new();
    let mut byte = [0];
    while !line.ends_with('\n') && stream.read(&mut byte).unwrap() == 1 {
        line.push(byte[0].into());
    }
    line
}

fn is_closed(stream: &mut UnixStream) -> bool {
    matches!(stream.read(&mut [0]), Ok(0) | Err(_))
}

#[test]
fn a_program_on_the_host_reaches_a_port_of_the_guests() {
    let Some(place) = Place::new() else { return };
    let mut guest = place.guest();
    assert_eq!((guest.driver.field(0), guest.driver.field(4)), (CID, 0));
    let mut program = place.connect("CONNECT 1024\nfirst");
    let ports = guest.accept(1024);
    assert_eq!(line(&mut program), format!("OK {}\n", ports.0));
    assert_eq!(guest.receive_bytes(5), b"first");
    guest.data(ports, b"answer");
    let mut said = [0; 6];
    program.read_exact(&mut said).unwrap();
    assert_eq!(&said, b"answer");
    // What was sent before the end arrives before the end.
    program.write_all(&[7; 10_000]).unwrap();
    drop(program);
    assert_eq!(guest.receive_bytes(10_000), [7; 10_000]);
    let end = guest.expect(ports, Operation::Shutdown);
    assert_eq!(end.flags, SHUTDOWN_BOTH);
    guest.send(ports, Operation::Reset);
    // The other way round: the guest refuses.
    let mut refused = place.connect("CONNECT 1\n");
    let (request, _) = guest.receive();
    guest.send((request.from_port, 1), Operation::Reset);
    assert_eq!(line(&mut refused), "");
}

#[test]
fn a_guest_reaches_a_program_on_the_host() {
    let Some(place) = Place::new() else { return };
    let mut guest = place.guest();
    let listener = UnixListener::bind(place.path("vsock_52")).unwrap();
    let ports = (52, 3000);
    guest.connect(ports);
    let (mut program, _) = listener.accept().unwrap();
    guest.data(ports, b"question");
    let mut said = [0; 8];
    program.read_exact(&mut said).unwrap();
    assert_eq!(&said, b"question");
    program.write_all(b"answer").unwrap();
    assert_eq!(guest.receive_bytes(6), b"answer");
    // The guest closes: its last bytes arrive first.
    guest.data(ports, b"bye");
    guest.shutdown(ports, SHUTDOWN_BOTH);
    guest.expect(ports, Operation::Reset);
    let mut rest = Vec::new();
    program.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"bye");
    // The ports are free again.
    guest.connect(ports);
}

#[test]
fn where_nobody_listens_or_connects_the_guest_is_refused() {
    let Some(place) = Place::new() else { return };
    let mut guest = place.guest();
    guest.send((53, 3000), Operation::Request);
    guest.expect((53, 3000), Operation::Reset);

    let directory = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(directory.path().join("vsock")).unwrap();
    let _other = UnixListener::bind(directory.path().join("vsock_53")).unwrap();
    let config = VsockConfig { cid: CID, socket: Resource::Descriptor(0), connector: None };
    let mut supply = Supply::descriptors(vec![listener.into()]);
    let (device, outside) = vsock::open(&config, &mut supply).unwrap();
    assert!(outside.is_none());
    let Some(rig) = rig(vec![device]) else { return };
    let place = Place { rig, directory };
    let mut guest = place.guest();
    guest.send((53, 3000), Operation::Request);
    guest.expect((53, 3000), Operation::Reset);
    let _program = place.connect("CONNECT 9\n");
    guest.accept(9);
}

#[test]
fn either_side_may_end_one_direction_and_go_on_with_the_other() {
    let Some(place) = Place::new() else { return };
    let mut guest = place.guest();
    let mut program = place.connect("CONNECT 5\n");
    let ports = guest.accept(5);
    line(&mut program);
    program.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.expect(ports, Operation::Shutdown).flags, SHUTDOWN_SEND);
    guest.data(ports, b"still here");
    guest.shutdown(ports, SHUTDOWN_SEND);
    let mut rest = Vec::new();
    program.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"still here");
    // Now nobody says anything any more, which the guest is told.
    assert_eq!(guest.expect(ports, Operation::Shutdown).flags, SHUTDOWN_BOTH);
    guest.shutdown(ports, SHUTDOWN_BOTH);
    guest.expect(ports, Operation::Reset);
}

#[test]
fn a_megabyte_crosses_within_the_window_that_the_guest_is_given() {
    let Some(place) = Place::new() else { return };
    let mut guest = place.guest();
    let mut program = place.connect("CONNECT 5\n");
    let ports = guest.accept(5);
    line(&mut program);
    let sum = std::thread::spawn(move || {
        let mut all = vec![0; 1 << 20];
        program.read_exact(&mut all).unwrap();
        all.iter().map(|byte| u64::from(*byte)).sum::<u64>()
    });
    let (mut sent, mut forwarded, mut expected) = (0u32, 0u32, 0);
    while sent < 1 << 20 {
        if sent - forwarded + 4096 > BUFFER_BYTES {
            forwarded = guest.expect(ports, Operation::CreditUpdate).forwarded;
            continue;
        }
        let payload = [(sent >> 12) as u8; 4096];
        expected += u64::from(payload[0]) * 4096;
        guest.data(ports, &payload);
        sent += 4096;
    }
    assert_eq!(sum.join().unwrap(), expected);
}

#[test]
fn a_guest_that_sends_more_than_there_is_room_for_is_cut_off() {
    let Some(place) = Place::new() else { return };
    let mut guest = place.guest();
    let mut program = place.connect("CONNECT 5\n");
    let ports = guest.accept(5);
    let payload = vec![1; PAYLOAD_BYTES_MAX];
    let mut sent = 0;
    guest.driver.offer(RECEIVE, &[(IN, IN_BYTES, true)]);
    let operation = loop {
        guest.data(ports, &payload);
        sent += payload.len();
        // What a socket itself holds is the kernel's; it is far less than this.
        assert!(sent < 16 << 20, "{sent} bytes were taken without a reader");
        if let Some((_, len)) = guest.driver.used(RECEIVE) {
            let header = guest.driver.read(IN, len as usize);
            let header = Header::parse(header[..HEADER_BYTES].try_into().unwrap());
            if header.operation != Some(Operation::CreditUpdate) {
                break header.operation;
            }
            guest.driver.offer(RECEIVE, &[(IN, IN_BYTES, true)]);
        }
    };
    assert_eq!(operation, Some(Operation::Reset));
    line(&mut program);
    let mut rest = Vec::new();
    program.read_to_end(&mut rest).unwrap();
    assert!(rest.len() < sent);
}

#[test]
fn a_guest_gets_no_more_than_it_has_room_for() {
    let Some(place) = Place::new() else { return };
    let mut guest = place.guest();
    guest.buffer_bytes = 1000;
    let mut program = place.connect("CONNECT 5\n");
    let ports = guest.accept(5);
    line(&mut program);
    program.write_all(&[3; 2500]).unwrap();
    for more in [1000, 1000, 500] {
        assert_eq!(guest.receive_bytes(more).len(), more);
        if more == 1000 {
            guest.expect(ports, Operation::CreditRequest);
            guest.forwarded += 1000;
            guest.send(ports, Operation::CreditUpdate);
        }
    }
    guest.send(ports, Operation::CreditRequest);
    let update = guest.expect(ports, Operation::CreditUpdate);
    assert_eq!((update.buffer_bytes, update.forwarded), (BUFFER_BYTES, 0));
}

#[test]
fn packets_that_break_the_rules_are_reset() {
    let Some(place) = Place::new() else { return };
    let mut guest = place.guest();
    let _listener = UnixListener::bind(place.path("vsock_60")).unwrap();
    let ports = (60, 1);
    let stranger = |operation| guest.header(ports, operation);
    let request = stranger(Operation::Request);
    let bad = [
        stranger(Operation::Data),
        stranger(Operation::Response),
        stranger(Operation::Shutdown),
        stranger(Operation::CreditUpdate),
        stranger(Operation::CreditRequest),
        Header { operation: None, ..request },
        Header { kind: 2, ..request },
        Header { from_cid: 8, ..request },
        Header { to_cid: 9, ..request },
        Header { len: PAYLOAD_BYTES_MAX as u32 + 1, ..request },
        Header { len: 1, ..request },
        Header { len: u32::MAX, ..request },
    ];
    for header in bad {
        guest.send_header(header);
        guest.expect(ports, Operation::Reset);
    }
    // An open connection does not survive its guest's mistakes either.
    for mistake in [
        Header { operation: None, ..request },
        Header { operation: Some(Operation::Response), ..request },
        request,
        Header { operation: Some(Operation::Data), len: 9, ..request },
    ] {
        guest.connect(ports);
        guest.send_header(mistake);
        guest.expect(ports, Operation::Reset);
    }
    // A reset is not answered, and less than a header is dropped.
    guest.send(ports, Operation::Reset);
    guest.send_raw(&[1; HEADER_BYTES - 1]);
    guest.connect(ports);
    assert_eq!(guest.driver.status(), 15);
}

#[test]
fn receive_buffers_that_are_too_small_are_given_back_unused() {
    let Some(place) = Place::new() else { return };
    let mut guest = place.guest();
    guest.send((1, 1), Operation::Request);
    for piece in [(IN, HEADER_BYTES as u32, true), (1 << 40, 4096, true), (IN, 4096, false)] {
        guest.driver.offer(RECEIVE, &[piece]);
        assert_eq!(guest.driver.finish(RECEIVE).1, 0);
    }
    guest.expect((1, 1), Operation::Reset);
    for (queue, index) in [(RECEIVE, 1000), (TRANSMIT, 1000)] {
        if queue == RECEIVE {
            guest.send((1, 1), Operation::Data);
        }
        guest.driver.lie(queue, index);
        until("the device to ask for a reset", || guest.driver.status() & 0x40 != 0);
        guest.driver.set_up(QUEUES, 0);
    }
    guest.send((1, 1), Operation::Request);
    guest.expect((1, 1), Operation::Reset);
}

#[test]
fn one_connection_too_many_is_refused_and_one_that_is_left_gives_way() {
    let Some(place) = Place::new() else { return };
    let mut guest = place.guest();
    let listener = UnixListener::bind(place.path("vsock_52")).unwrap();
    let mut programs = Vec::new();
    for port in 0..CONNECTIONS_MAX as u32 {
        guest.connect((52, port));
        programs.push(listener.accept().unwrap().0);
    }
    let many = (52, CONNECTIONS_MAX as u32);
    guest.send(many, Operation::Request);
    guest.expect(many, Operation::Reset);
    let mut refused = place.connect("CONNECT 7\n");
    assert_eq!(line(&mut refused), "");
    // The guest never answers that a program has gone; its place is taken all the same.
    drop(programs.remove(100));
    guest.expect((52, 100), Operation::Shutdown);
    guest.send(many, Operation::Request);
    guest.expect((52, 100), Operation::Reset);
    guest.expect(many, Operation::Response);
}

#[test]
fn programs_that_say_nonsense_or_nothing_hold_nobody_up() {
    let Some(place) = Place::new() else { return };
    let mut guest = place.guest();
    for nonsense in ["HELLO\n", "CONNECT\n", "CONNECT x\n", "CONNECT 4294967296\n", "\n"] {
        assert!(is_closed(&mut place.connect(nonsense)), "{nonsense:?}");
    }
    assert!(is_closed(&mut place.connect(&"CONNECT 1".repeat(100))));
    let mut silent = place.connect("CONN");
    let others: Vec<_> = (0..GREETINGS_MAX).map(|_| place.connect("")).collect();
    assert!(is_closed(&mut silent));
    drop(others);
    let _program = place.connect("CONNECT 5\n");
    guest.accept(5);
    // One that goes before the guest has answered.
    drop(place.connect("CONNECT 6\n"));
    let (request, _) = guest.receive();
    assert_eq!(request.to_port, 6);
    guest.expect((request.from_port, 6), Operation::Reset);
}

#[test]
fn a_driver_that_starts_anew_has_no_connections() {
    let Some(place) = Place::new() else { return };
    let mut guest = place.guest();
    let mut program = place.connect("CONNECT 5\n");
    let ports = guest.accept(5);
    line(&mut program);
    guest.driver.set_up(QUEUES, 0);
    assert!(is_closed(&mut program));
    guest.send(ports, Operation::CreditUpdate);
    guest.expect(ports, Operation::Reset);
}

#[test]
fn any_packet_is_survived() {
    let Some(place) = Place::new() else { return };
    let mut guest = place.guest();
    let listener = UnixListener::bind(place.path("vsock_1")).unwrap();
    listener.set_nonblocking(true).unwrap();
    let mut random = 0xFEED_0000_1234_5678u64;
    let (mut programs, mut offered) = (Vec::new(), 0);
    for _ in 0..20_000 {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let bits = |at: u32, mask: u64| (random >> at & mask) as u32;
        let header = Header {
            from_cid: CID.into(),
            to_cid: HOST_CID,
            from_port: bits(0, 3),
            to_port: bits(2, 1),
            len: bits(3, 0x3FF),
            kind: STREAM,
            operation: [
                Some(Operation::Request),
                Some(Operation::Response),
                Some(Operation::Reset),
                Some(Operation::Shutdown),
                Some(Operation::Data),
                Some(Operation::CreditUpdate),
                Some(Operation::CreditRequest),
                None,
            ][bits(13, 7) as usize],
            flags: bits(16, 3),
            buffer_bytes: bits(18, 0xFFFF),
            forwarded: bits(34, 0xFFFF),
        };
        let packet = [&header.bytes()[..], &[5; 1024][..bits(50, 0x3FF) as usize]].concat();
        guest.driver.write(OUT, &packet);
        guest.driver.offer(TRANSMIT, &[(OUT, packet.len() as u32, false)]);
        until("the packet", || {
            while guest.driver.used(RECEIVE).is_some() {
                offered -= 1;
            }
            while offered < 8 {
                guest.driver.offer(RECEIVE, &[(IN, IN_BYTES, true)]);
                offered += 1;
            }
            guest.driver.used(TRANSMIT).is_some()
        });
        if let Ok((mut program, _)) = listener.accept() {
            let _ = program.write_all(&[6; 100]);
            programs.push(program);
            if programs.len() > 4 {
                programs.remove(0);
            }
        }
    }
    assert_eq!(guest.driver.status(), 15);
}

//! virtio-vsock (virtio 1.2, section 5.10): streams between programs on the host and in the guest.
//!
//! One Unix socket is the guest's, in the form that Firecracker uses. A program on the host connects
//! to it, writes `CONNECT PORT\n` and reads `OK HOST_PORT\n` once the guest has accepted; where it
//! has not, the socket is closed. A guest that connects to port `P` of the host reaches the Unix
//! socket `PATH_P`, which is connected outside of the sandbox ([`connector`]), or is refused.
//!
//! `packet` is the wire, [`connection`] one stream with its credit, [`connections`] all of them.

pub mod connection;
pub mod connections;
pub mod connector;
pub mod packet;

use super::chain::{Buffers, copy_in, copy_out, split_front, total};
use super::{Backend, Device, DeviceError, DeviceKind, Work};
use crate::config::{Resource, VsockConfig};
use crate::process::resources::{ResourceError, Supply};
use connections::Connections;
use connector::{Connector, Outside};
use packet::{HEADER_BYTES, Header, PAYLOAD_BYTES_MAX};
use rustix::event::PollFlags;
use rustix::net::{SocketFlags, accept_with};
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;

/// The device's id on the bus.
pub const ID: &str = "vsock";
const VIRTIO_TYPE: u16 = 19;
const QUEUE_SIZE: u16 = 128;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// Receive, transmit, and events, of which there are none.
const QUEUES: usize = 3;
/// Packets moved in one direction before the other has its turn.
const BATCH: usize = 128;
/// Programs on the host that have connected and not said what they want: the oldest gives way.
pub const GREETINGS_MAX: usize = 32;
/// Longest first line of such a program.
const GREETING_BYTES_MAX: usize = 32;
/// How long nobody is accepted where the process has no descriptor left.
const ACCEPT_REST: Duration = Duration::from_millis(100);

/// The backend.
struct Vsock {
    listener: UnixListener,
    greetings: Vec<Greeting>,
    connections: Connections,
    /// A receive buffer that was taken for nothing.
    spare: Option<(u16, Buffers)>,
    accept_after: Option<Instant>,
    /// A header and a payload.
    packet: Box<[u8; HEADER_BYTES + PAYLOAD_BYTES_MAX]>,
}

/// A program that has not said what it wants.
struct Greeting {
    stream: UnixStream,
    line: Vec<u8>,
}

/// What became of a greeting.
enum Said {
    /// Not all of it yet.
    Part,
    /// The port it wants.
    Port(u32),
    /// Nonsense, or the program has gone.
    Nonsense,
}

/// Opens the device, and for a path what must go on outside of the sandbox.
pub fn open(
    config: &VsockConfig,
    supply: &mut Supply,
) -> Result<(Device, Option<Outside>), ResourceError> {
    let listener = supply.listener(&config.socket, "vsock.socket")?;
    listener.set_nonblocking(true).map_err(|error| ResourceError::Unusable {
        what: "vsock.socket".into(),
        reason: error.to_string(),
    })?;
    let (connector, outside) = match (&config.socket, config.connector) {
        (Resource::Path(path), _) => {
            let (connector, outside) = connector::between(path)?;
            (Some(connector), Some(outside))
        }
        (_, Some(index)) => {
            (Some(Connector::new(supply.descriptor(index, "vsock.connector")?)), None)
        }
        (_, None) => (None, None),
    };
    let device = Device {
        id: ID.into(),
        kind: DeviceKind::Vsock,
        virtio_type: VIRTIO_TYPE,
        features: 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX,
        queue_sizes: vec![QUEUE_SIZE; QUEUES],
        queues_needed: 2,
        config: u64::from(config.cid).to_le_bytes().to_vec().into(),
        ring: None,
        link: None,
        balloon: None,
        rates: Vec::new(),
        backend: Box::new(Vsock {
            listener,
            greetings: Vec::new(),
            connections: Connections::new(config.cid.into(), connector),
            spare: None,
            accept_after: None,
            packet: Box::new([0; HEADER_BYTES + PAYLOAD_BYTES_MAX]),
        }),
    };
    Ok((device, outside))
}

impl Vsock {
    /// Guest to host; the number of chains taken.
    fn transmit(&mut self, work: &mut Work) -> Result<usize, DeviceError> {
        let ram = work.ram.clone();
        let mut taken = 0;
        while taken < BATCH && !self.connections.is_clogged() {
            let Some(chain) = work.queues[TRANSMIT].pop_descriptor_chain(&ram) else { break };
            let head = chain.head_index();
            if let Some(buffers) = Buffers::collect(chain, &ram) {
                self.take_packet(buffers, work);
            }
            work.queues[TRANSMIT].add_used(&ram, head, 0)?;
            taken += 1;
        }
        if taken > 0 {
            work.interrupt(TRANSMIT)?;
        }
        Ok(taken)
    }

    /// A packet of the guest's; one without a whole header is dropped.
    fn take_packet(&mut self, buffers: Buffers, work: &Work) {
        let mut rest = buffers.readable;
        let Some(front) = split_front(&mut rest, HEADER_BYTES) else { return };
        let mut header = [0; HEADER_BYTES];
        copy_out(&work.ram, &front, &mut header);
        let header = Header::parse(&header);
        let len = header.len as usize;
        let whole =
            len <= PAYLOAD_BYTES_MAX && copy_out(&work.ram, &rest, &mut self.packet[..len]) == len;
        self.connections.handle(&header, whole.then(|| &self.packet[..len]));
    }

    /// Host to guest; the number of chains taken.
    fn receive(&mut self, work: &mut Work) -> Result<usize, DeviceError> {
        let ram = work.ram.clone();
        let mut taken = 0;
        while taken < BATCH && self.connections.has_packet() {
            let (head, buffers) = match self.spare.take() {
                Some(spare) => spare,
                None => {
                    let Some(chain) = work.queues[RECEIVE].pop_descriptor_chain(&ram) else {
                        break;
                    };
                    let head = chain.head_index();
                    (head, Buffers::collect(chain, &ram).unwrap_or_default())
                }
            };
            taken += 1;
            let room = total(&buffers.writable).min(self.packet.len());
            let written = match room.checked_sub(HEADER_BYTES + 1) {
                // A buffer without room for a byte is of no use.
                None => 0,
                Some(_) => match self.connections.next_packet(&mut self.packet[HEADER_BYTES..room])
                {
                    None => {
                        self.spare = Some((head, buffers));
                        continue;
                    }
                    Some((header, len)) => {
                        self.packet[..HEADER_BYTES].copy_from_slice(&header.bytes());
                        copy_in(&ram, &buffers.writable, &self.packet[..HEADER_BYTES + len])
                    }
                },
            };
            work.queues[RECEIVE].add_used(&ram, head, written as u32)?;
        }
        if taken > 0 {
            work.interrupt(RECEIVE)?;
        }
        Ok(taken)
    }

    fn may_accept(&self) -> bool {
        self.accept_after.is_none() && !self.connections.is_clogged()
    }

    /// Sleeps until there is something to do, and does what concerns the host's sockets; `false`:
    /// stop.
    fn sleep(&mut self, work: &Work) -> Result<bool, DeviceError> {
        let now = Instant::now();
        self.accept_after = self.accept_after.filter(|after| *after > now);
        let patience = self.accept_after.map(|after| after - now);
        let accepting = self.may_accept();
        let mut watched = Vec::new();
        watched.extend(accepting.then(|| (self.listener.as_fd(), PollFlags::IN)));
        let answers = self.connections.answers();
        watched.extend(answers.map(|socket| (socket, PollFlags::IN)));
        let asks = answers.is_some();
        if accepting {
            let greetings = self.greetings.iter();
            watched.extend(greetings.map(|greeting| (greeting.stream.as_fd(), PollFlags::IN)));
        }
        let mut keys = Vec::new();
        for (key, socket, flags) in self.connections.interests() {
            keys.push(key);
            watched.push((socket, flags));
        }
        let Some(has) = work.wait_any(&watched, patience)? else { return Ok(false) };
        let mut has = has.into_iter();
        let newcomer = accepting && has.next().is_some_and(|it| !it.is_empty());
        if asks && has.next().is_some_and(|it| !it.is_empty()) {
            self.connections.take_answers();
        }
        if accepting {
            let count = self.greetings.len();
            let spoke: Vec<bool> = has.by_ref().take(count).map(|it| !it.is_empty()).collect();
            self.hear(&spoke);
        }
        for (key, has) in keys.into_iter().zip(has) {
            self.connections.ready(key, has);
        }
        if newcomer {
            self.accept();
        }
        Ok(true)
    }

    fn accept(&mut self) {
        for _ in 0..GREETINGS_MAX {
            match accept_with(&self.listener, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
                Ok(socket) => {
                    if self.greetings.len() >= GREETINGS_MAX {
                        self.greetings.remove(0);
                    }
                    let stream = UnixStream::from(socket);
                    self.greetings.push(Greeting { stream, line: Vec::new() });
                }
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return,
                Err(_) => {
                    self.accept_after = Some(Instant::now() + ACCEPT_REST);
                    return;
                }
            }
        }
    }

    /// Reads on from the programs that `spoke`.
    fn hear(&mut self, spoke: &[bool]) {
        let mut spoke = spoke.iter();
        for mut greeting in std::mem::take(&mut self.greetings) {
            let said = match spoke.next() {
                Some(true) => greeting.read(),
                _ => Said::Part,
            };
            match said {
                Said::Part => self.greetings.push(greeting),
                Said::Port(port) => self.connections.offer(greeting.stream, port),
                Said::Nonsense => {}
            }
        }
    }
}

impl Greeting {
    /// Reads the first line byte by byte: what follows it is the guest's.
    fn read(&mut self) -> Said {
        let mut byte = [0];
        loop {
            match (&self.stream).read(&mut byte) {
                Ok(1) if byte[0] == b'\n' => return self.port().map_or(Said::Nonsense, Said::Port),
                Ok(1) if self.line.len() < GREETING_BYTES_MAX => self.line.push(byte[0]),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Said::Part,
                _ => return Said::Nonsense,
            }
        }
    }

    fn port(&self) -> Option<u32> {
        let line = std::str::from_utf8(&self.line).ok()?;
        line.strip_prefix("CONNECT ")?.parse().ok()
    }
}

impl Backend for Vsock {
    fn run(&mut self, mut work: Work) -> Result<(), DeviceError> {
        self.connections.forget();
        self.greetings.clear();
        self.spare = None;
        let (mut more_sent, mut more_room) = (false, false);
        loop {
            work.busy(TRANSMIT)?;
            work.busy(RECEIVE)?;
            let sent = self.transmit(&mut work)?;
            let received = self.receive(&mut work)?;
            if more_sent && sent == 0 {
                return Err(DeviceError::Index(TRANSMIT));
            }
            if more_room && received == 0 && self.connections.has_packet() {
                return Err(DeviceError::Index(RECEIVE));
            }
            (more_sent, more_room) = (false, false);
            if sent == 0 && received == 0 {
                more_sent = !self.connections.is_clogged() && work.idle(TRANSMIT)?;
                let needs_room = self.spare.is_none() && self.connections.has_packet();
                more_room = needs_room && work.idle(RECEIVE)?;
                if !(more_sent || more_room) {
                    if !self.sleep(&work)? {
                        return Ok(());
                    }
                    continue;
                }
            }
            if work.stopping() {
                return Ok(());
            }
        }
    }
}

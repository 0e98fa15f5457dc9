//! ICMP echo.

use crate::world::World;
use alloc::string::String;
use runtime::clock::{self, Instant};
use runtime::cpu;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::socket::icmp::{Endpoint, PacketBuffer, PacketMetadata, Socket};
use smoltcp::wire::{Icmpv4Packet, Icmpv4Repr, IpAddress};

/// Without a reply the next request goes out after this.
const INTERVAL_MICROS: u64 = 250_000;
const PAYLOAD: &[u8] = b"trine guest echo";
const PACKETS: usize = 8;
const PACKET_BYTES: usize = 256;
/// Requests whose replies are still counted.
const WINDOW: usize = 64;

/// Sends requests until `count` were answered; the detail names replies and the best time.
pub(crate) fn ping(
    world: &mut World,
    address: [u8; 4],
    count: u16,
    deadline: Instant,
) -> Result<String, String> {
    let network = world.network.as_mut().ok_or("no network device")?;
    if !network.has_address() {
        return Err("the guest has no address".into());
    }
    let generation = network.generation();
    network.ask_for(address.into(), clock::now());
    let identifier = cpu::tsc() as u16 | 1;
    let mut socket = Socket::new(buffer(), buffer());
    socket
        .bind(Endpoint::Ident(identifier))
        .map_err(|error| alloc::format!("can't bind: {error}"))?;
    let socket = network.sockets.add(socket);
    let mut run = Run {
        identifier,
        address,
        sent: [None; WINDOW],
        next: 0,
        last: None,
        wanted: count,
        replies: 0,
        micros_min: u64::MAX,
    };
    while clock::now() < deadline && run.replies < count {
        let network = world.network_of(generation)?;
        run.exchange(network.sockets.get_mut::<Socket>(socket));
        let wake =
            run.last.map_or(deadline, |last| deadline.min(last.after_micros(INTERVAL_MICROS)));
        if run.replies < count {
            world.turn(Some(wake));
        }
    }
    if let Ok(network) = world.network_of(generation) {
        network.sockets.remove(socket);
    }
    let Run { replies, micros_min, .. } = run;
    if replies < count {
        return Err(alloc::format!("{replies}/{count} replies"));
    }
    Ok(alloc::format!(
        "{replies}/{count} replies, min {}.{:02} ms",
        micros_min / 1000,
        micros_min % 1000 / 10
    ))
}

fn buffer() -> PacketBuffer<'static> {
    PacketBuffer::new(
        alloc::vec![PacketMetadata::EMPTY; PACKETS],
        alloc::vec![0; PACKETS * PACKET_BYTES],
    )
}

struct Run {
    identifier: u16,
    address: [u8; 4],
    /// When each of the last requests was sent; `None` once it is answered.
    sent: [Option<(u16, Instant)>; WINDOW],
    next: u16,
    last: Option<Instant>,
    wanted: u16,
    replies: u16,
    micros_min: u64,
}

impl Run {
    fn exchange(&mut self, socket: &mut Socket<'static>) {
        let mut answered = false;
        while self.replies < self.wanted {
            let Ok((packet, from)) = socket.recv() else { break };
            answered |= self.take_reply(packet, from);
        }
        let due = self.last.is_none_or(|last| clock::now().micros_since(last) >= INTERVAL_MICROS);
        // A request that waits for its station's MAC is not followed by others: they would all
        // leave at once, and their times would be those of the wait.
        if (answered || due) && socket.send_queue() == 0 {
            self.send(socket);
        }
    }

    fn take_reply(&mut self, packet: &[u8], from: IpAddress) -> bool {
        let checksums = ChecksumCapabilities::default();
        let Ok(packet) = Icmpv4Packet::new_checked(packet) else { return false };
        let Ok(Icmpv4Repr::EchoReply { seq_no, .. }) = Icmpv4Repr::parse(&packet, &checksums)
        else {
            return false;
        };
        let slot = &mut self.sent[usize::from(seq_no) % WINDOW];
        let Some((_, at)) = slot.filter(|(sent, _)| *sent == seq_no) else { return false };
        if from != IpAddress::Ipv4(self.address.into()) {
            return false;
        }
        *slot = None;
        self.replies += 1;
        self.micros_min = self.micros_min.min(clock::now().micros_since(at));
        true
    }

    fn send(&mut self, socket: &mut Socket<'static>) {
        let request =
            Icmpv4Repr::EchoRequest { ident: self.identifier, seq_no: self.next, data: PAYLOAD };
        let Ok(bytes) = socket.send(request.buffer_len(), IpAddress::Ipv4(self.address.into()))
        else {
            return;
        };
        request.emit(&mut Icmpv4Packet::new_unchecked(bytes), &ChecksumCapabilities::default());
        let now = clock::now();
        self.sent[usize::from(self.next) % WINDOW] = Some((self.next, now));
        self.last = Some(now);
        self.next = self.next.wrapping_add(1);
    }
}

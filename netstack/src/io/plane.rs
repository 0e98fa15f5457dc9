//! The data-plane thread: one epoll loop over the guests' rings, the tunnel, the forwards and the
//! control thread's commands. It reads in batches, publishes once per batch, and sleeps when every
//! ring is empty.

use super::Error;
use super::forwards::Forwards;
use super::wires::{SLOTS_MAX, Slot, Wires};
use crate::compile::Tables;
use crate::control::{Counters, ErrorKind, RejectedPort, Reply, Status};
use crate::pipeline::Pipeline;
use crate::program::Forward;
use crate::service::{Accepted, PortStack};
use abi::packet_ring::{FRAME_BYTES_MAX, Region};
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};
use rustix::fd::{AsFd, OwnedFd};
use std::collections::HashMap;
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::Instant;

/// Frames taken from one ring, and datagrams from the tunnel, before others get their turn.
const BATCH: usize = 64;
/// Connections accepted from one listener before others get their turn.
const ACCEPTS: usize = 16;
/// Events taken from one wait.
const EVENTS: usize = 256;
/// Forwarded connections of the whole switch.
const SPLICES_MAX: usize = 1024;
/// Ports whose latest generation is remembered after a detach.
const GENERATIONS_MAX: usize = 65_536;
/// How often timed-out connections are looked for while there are any.
const SWEEP_MS: u64 = 10_000;

/// What the control thread asks for.
pub(super) enum Command {
    Status,
    Counters,
    Program(Arc<Tables>),
    Attach { port_id: String, generation: u64, region: Region },
    Detach { port_id: String, generation: u64 },
}

/// The control thread's way to the data plane.
pub(super) struct CommandSender {
    commands: Sender<(Command, Sender<Reply>)>,
    wake: OwnedFd,
}

impl CommandSender {
    pub(super) fn perform(&self, command: Command) -> Reply {
        let (reply, answer) = mpsc::channel();
        let gone = || Reply::Error {
            kind: ErrorKind::Internal,
            message: "the data plane has ended".to_owned(),
        };
        if self.commands.send((command, reply)).is_err() {
            return gone();
        }
        // A full eventfd wakes as well as one more count would.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        answer.recv().unwrap_or_else(|_| gone())
    }
}

/// Whose event it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Token {
    Command,
    Tunnel,
    Slot(u32),
    Listener(u32),
    /// Stack and splice.
    Stream(u16, u32),
}

impl Token {
    pub(super) fn pack(self) -> u64 {
        match self {
            Token::Command => 0,
            Token::Tunnel => 1 << 56,
            Token::Slot(slot) => 2 << 56 | u64::from(slot),
            Token::Listener(listener) => 3 << 56 | u64::from(listener),
            Token::Stream(stack, splice) => 4 << 56 | u64::from(stack) << 32 | u64::from(splice),
        }
    }

    fn unpack(packed: u64) -> Token {
        let low = packed as u32;
        match packed >> 56 {
            0 => Token::Command,
            1 => Token::Tunnel,
            2 => Token::Slot(low),
            3 => Token::Listener(low),
            _ => Token::Stream((packed >> 32) as u16, low),
        }
    }
}

pub(super) struct Plane {
    epoll: OwnedFd,
    wake: OwnedFd,
    commands: Receiver<(Command, Sender<Reply>)>,
    pipeline: Pipeline,
    wires: Wires,
    /// Slots that may hold frames.
    active: Vec<usize>,
    forwards: Forwards,
    /// A stack keeps its place for its life: splices' events name it.
    stacks: Vec<Option<PortStack>>,
    stack_of_port: HashMap<usize, usize>,
    next_splice: u32,
    seed: u64,
    /// Latest generation of each port seen in an attach or detach.
    generations: HashMap<String, u64>,
    instance: String,
    vtep: SocketAddr,
    started: Instant,
    swept_ms: u64,
    frame: Vec<u8>,
}

impl Plane {
    pub(super) fn new(
        udp: UdpSocket,
        vtep: SocketAddr,
        instance: &str,
    ) -> Result<(Plane, CommandSender), Error> {
        let epoll =
            epoll::create(CreateFlags::CLOEXEC).map_err(Error::event_loop("make an epoll"))?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(Error::event_loop("make an eventfd"))?;
        for (descriptor, token) in [(wake.as_fd(), Token::Command), (udp.as_fd(), Token::Tunnel)] {
            epoll::add(&epoll, descriptor, EventData::new_u64(token.pack()), EventFlags::IN)
                .map_err(Error::event_loop("watch a descriptor"))?;
        }
        let wake_here = rustix::io::fcntl_dupfd_cloexec(&wake, 0)
            .map_err(Error::event_loop("duplicate an eventfd"))?;
        let (sender, commands) = mpsc::channel();
        let plane = Plane {
            epoll,
            wake: wake_here,
            commands,
            pipeline: Pipeline::new(),
            wires: Wires::new(udp),
            active: Vec::new(),
            forwards: Forwards::new(),
            stacks: Vec::new(),
            stack_of_port: HashMap::new(),
            next_splice: 0,
            // Sixteen hexadecimal digits of the instance's randomness.
            seed: u64::from_str_radix(instance.get(..16).unwrap_or("1"), 16).unwrap_or(1),
            generations: HashMap::new(),
            instance: instance.to_owned(),
            vtep,
            started: Instant::now(),
            swept_ms: 0,
            frame: vec![0; FRAME_BYTES_MAX + crate::wire::VXLAN_BYTES + 1],
        };
        Ok((plane, CommandSender { commands: sender, wake }))
    }

    /// Runs until epoll itself fails.
    pub(super) fn run(mut self) -> Result<(), Error> {
        let mut events: Vec<Event> = Vec::with_capacity(EVENTS);
        loop {
            events.clear();
            let timeout = self.timeout();
            match epoll::wait(
                &self.epoll,
                rustix::buffer::spare_capacity(&mut events),
                timeout.as_ref(),
            ) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(Error::event_loop("wait for events")(errno)),
            }
            let now_ms = self.now_ms();
            for event in &events {
                self.event(Token::unpack(event.data.u64()), event.flags, now_ms);
            }
            self.read_rings(now_ms);
            self.run_services(now_ms);
            self.wires.publish();
            self.let_go_of_broken();
            self.sweep(now_ms);
        }
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// How long to sleep: not at all while rings hold frames, else until the next deadline.
    fn timeout(&self) -> Option<Timespec> {
        let wait_ms = if self.active.is_empty() {
            let stacks = self.stacks.iter().flatten().map(PortStack::deadline_ms);
            let sweep = (self.pipeline.connections() > 0).then_some(self.swept_ms + SWEEP_MS);
            stacks.chain(sweep).min()?.saturating_sub(self.now_ms())
        } else {
            0
        };
        let nanoseconds = (wait_ms % 1000) * 1_000_000;
        Some(Timespec { tv_sec: (wait_ms / 1000) as i64, tv_nsec: nanoseconds as i64 })
    }

    fn event(&mut self, token: Token, flags: EventFlags, now_ms: u64) {
        match token {
            Token::Command => self.take_commands(now_ms),
            Token::Tunnel => self.read_tunnel(now_ms),
            Token::Slot(at) => self.wake_slot(at as usize),
            Token::Listener(listener) => self.accept(listener, now_ms),
            Token::Stream(stack, splice) => {
                let end = flags.intersects(EventFlags::HUP | EventFlags::ERR | EventFlags::RDHUP);
                let readable = end || flags.contains(EventFlags::IN);
                let writable = end || flags.contains(EventFlags::OUT);
                if let Some(Some(stack)) = self.stacks.get_mut(usize::from(stack)) {
                    stack.stream_ready(splice, readable, writable);
                }
            }
        }
    }

    fn wake_slot(&mut self, at: usize) {
        if let Some(Some(slot)) = self.wires.slots.get_mut(at) {
            slot.consumer.clear_event();
            if !slot.active {
                slot.active = true;
                self.active.push(at);
            }
        }
    }

    /// A batch from every ring that holds frames; a ring found empty asks for its next wake-up.
    fn read_rings(&mut self, now_ms: u64) {
        let mut active = std::mem::take(&mut self.active);
        active.retain(|at| self.read_ring(*at, now_ms));
        self.active = active;
    }

    /// Whether the ring may hold more.
    fn read_ring(&mut self, at: usize, now_ms: u64) -> bool {
        for _ in 0..BATCH {
            let Some(Some(slot)) = self.wires.slots.get_mut(at) else { return false };
            match slot.consumer.pop(&mut self.frame) {
                Ok(Some(length)) => {
                    slot.counters.frames_from_guest += 1;
                    slot.counters.bytes_from_guest += length as u64;
                    // Until the program names the port, its frames have nowhere to go.
                    let Some(port) = slot.port else { continue };
                    self.pipeline.guest_frame(port, &self.frame[..length], now_ms, &mut self.wires);
                }
                Ok(None) => {
                    let sleeps = slot.consumer.prepare_sleep();
                    slot.active = !sleeps;
                    return !sleeps;
                }
                Err(error) => {
                    tracing::warn!(port_id = slot.port_id, %error, "ring broken; the port is let go of");
                    self.wires.broken.push(at);
                    return false;
                }
            }
        }
        true
    }

    fn read_tunnel(&mut self, now_ms: u64) {
        for _ in 0..BATCH {
            let Ok((length, source)) = self.wires.udp.recv_from(&mut self.frame) else { return };
            self.wires.tunnel.frames_received += 1;
            // The buffer is one byte longer than any datagram that fits a ring: one that fills it
            // was cut, and goes no further.
            if length < self.frame.len() {
                let datagram = &self.frame[..length];
                self.pipeline.tunnel_datagram(source, datagram, now_ms, &mut self.wires);
            }
        }
    }

    /// Hands packets to the local stacks and runs those that have something to do.
    fn run_services(&mut self, now_ms: u64) {
        for (port, packet) in std::mem::take(&mut self.wires.services) {
            if let Some(stack) = self.stack(port, now_ms) {
                self.stack_mut(stack).receive(&packet, now_ms);
            }
        }
        let Plane { stacks, pipeline, wires, stack_of_port, .. } = self;
        for place in stacks {
            let Some(stack) = place else { continue };
            if stack.deadline_ms() > now_ms {
                continue;
            }
            let port = stack.port;
            stack.run(now_ms, |packet| pipeline.service_packet(port, packet, now_ms, wires));
            if stack.is_idle(now_ms) {
                stack_of_port.remove(&port);
                *place = None;
            }
        }
    }

    /// The place of a port's stack, made if need be.
    fn stack(&mut self, port: usize, now_ms: u64) -> Option<usize> {
        if let Some(at) = self.stack_of_port.get(&port) {
            return Some(*at);
        }
        let tables = Arc::clone(self.pipeline.tables());
        let table = tables.ports.get(port)?;
        let mtu = tables.networks[table.network].mtu;
        // Splitmix64's step: each stack gets its own initial sequence numbers.
        self.seed = self.seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let stack = PortStack::new(port, table, mtu, self.seed, now_ms);
        let at = self.stacks.iter().position(Option::is_none).unwrap_or_else(|| {
            self.stacks.push(None);
            self.stacks.len() - 1
        });
        self.stacks[at] = Some(stack);
        self.stack_of_port.insert(port, at);
        Some(at)
    }

    fn stack_mut(&mut self, at: usize) -> &mut PortStack {
        self.stacks[at].as_mut().expect("stack_of_port names only places that hold a stack")
    }

    fn accept(&mut self, listener: u32, now_ms: u64) {
        for _ in 0..ACCEPTS {
            let Some((forward, socket)) = self.forwards.get(listener) else { return };
            let Ok((stream, client)) = socket.accept() else { return };
            let forward = forward.clone();
            if let Err(reason) = self.splice(listener, &forward, stream, client, now_ms) {
                tracing::debug!(forward_id = forward.id, reason, "forwarded connection refused");
            }
        }
    }

    /// Joins an accepted connection to the guest; dropping the stream closes it.
    fn splice(
        &mut self,
        listener: u32,
        forward: &Forward,
        stream: TcpStream,
        client: SocketAddr,
        now_ms: u64,
    ) -> Result<(), &'static str> {
        let tables = self.pipeline.tables();
        let port = *tables.port_by_id.get(&forward.port_id).ok_or("the port is not programmed")?;
        if self.wires.find(&forward.port_id).is_none() {
            return Err("the port is not attached");
        }
        let open: usize = self.stacks.iter().flatten().map(PortStack::splices).sum();
        let at = self.stack(port, now_ms).ok_or("the port is not programmed")?;
        let stack = self.stack_mut(at);
        if open >= SPLICES_MAX || !stack.has_room() {
            return Err("too many forwarded connections");
        }
        let service = stack.next_endpoint();
        if !self.pipeline.admit_forward(port, client.ip(), service, forward.internal, now_ms) {
            return Err("no security group rule permits it");
        }
        let id = self.next_splice;
        self.next_splice = self.next_splice.wrapping_add(1);
        let place = u16::try_from(at).map_err(|_| "too many local stacks")?;
        let watched = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        let token = EventData::new_u64(Token::Stream(place, id).pack());
        let prepared = stream.set_nonblocking(true).and_then(|()| stream.set_nodelay(true));
        let watching = epoll::add(&self.epoll, &stream, token, watched);
        if prepared.is_err() || watching.is_err() {
            return Err("the host refused to watch the connection");
        }
        let accepted = Accepted { id, listener, stream, guest: forward.internal };
        self.stack_mut(at).splice(accepted, now_ms);
        Ok(())
    }

    fn take_commands(&mut self, now_ms: u64) {
        let mut count = [0; 8];
        // An empty eventfd only means that the commands were taken already.
        let _ = rustix::io::read(&self.wake, &mut count);
        while let Ok((command, reply)) = self.commands.try_recv() {
            // A control thread that no longer waits has lost its node; the state stands.
            let _ = reply.send(self.perform(command, now_ms));
        }
    }

    fn perform(&mut self, command: Command, now_ms: u64) -> Reply {
        match command {
            Command::Status => Reply::Status(self.status()),
            Command::Counters => Reply::Counters(self.counters()),
            Command::Program(tables) => {
                self.program(tables, now_ms);
                Reply::Programmed { forwards_failed: self.forwards.failed().to_vec() }
            }
            Command::Attach { port_id, generation, region } => {
                match self.attach(port_id, generation, &region) {
                    Ok(()) => Reply::Done,
                    Err((kind, message)) => Reply::Error { kind, message },
                }
            }
            Command::Detach { port_id, generation } => match self.fence(&port_id, generation) {
                Ok(()) => {
                    if let Some(at) = self.wires.find(&port_id) {
                        self.let_go(at);
                    }
                    Reply::Done
                }
                Err((kind, message)) => Reply::Error { kind, message },
            },
        }
    }

    fn program(&mut self, tables: Arc<Tables>, now_ms: u64) {
        self.pipeline.swap(Arc::clone(&tables));
        self.wires.index(&tables);
        self.forwards.replace(&tables, &self.epoll);
        self.stack_of_port.clear();
        for (at, place) in self.stacks.iter_mut().enumerate() {
            let Some(stack) = place else { continue };
            let port = tables.port_by_id.get(&stack.port_id).copied();
            let kept = port.filter(|port| {
                let table = &tables.ports[*port];
                stack.adopt(*port, table, tables.networks[table.network].mtu)
            });
            match kept {
                Some(port) => {
                    stack.retain_listeners(|listener| self.forwards.get(listener).is_some());
                    self.stack_of_port.insert(port, at);
                }
                None => *place = None,
            }
        }
        for rejected in &tables.rejected {
            let RejectedPort { port_id, message } = rejected;
            tracing::error!(port_id, message, "port left out of the program");
        }
        tracing::debug!(revision = tables.revision, now_ms, "program in force");
    }

    fn attach(&mut self, port_id: String, generation: u64, region: &Region) -> Result<(), Refusal> {
        self.fence(&port_id, generation)?;
        if let Some(at) = self.wires.find(&port_id) {
            self.let_go(at);
        }
        let refused =
            |error: std::io::Error| (ErrorKind::Internal, format!("port {port_id}: {error}"));
        let slot = Slot::new(port_id.clone(), generation, region).map_err(refused)?;
        let Some(at) = self.wires.vacancy() else {
            return Err((
                ErrorKind::Limit,
                format!("{SLOTS_MAX} ports are attached; no more are taken"),
            ));
        };
        let token = EventData::new_u64(Token::Slot(at as u32).pack());
        epoll::add(&self.epoll, slot.consumer.event(), token, EventFlags::IN)
            .map_err(|errno| refused(errno.into()))?;
        self.wires.slots[at] = Some(slot);
        self.wires.index(self.pipeline.tables());
        // Frames may have come before the eventfd was watched, and no wake-up was asked for yet.
        self.wake_slot(at);
        Ok(())
    }

    /// Refuses a generation older than the port's latest, and remembers the latest.
    fn fence(&mut self, port_id: &str, generation: u64) -> Result<(), Refusal> {
        if let Some(latest) = self.generations.get_mut(port_id) {
            if generation < *latest {
                let message =
                    format!("port {port_id}: generation {generation} is older than {latest}");
                return Err((ErrorKind::Stale, message));
            }
            *latest = generation;
            return Ok(());
        }
        if self.generations.len() >= GENERATIONS_MAX {
            let Plane { generations, wires, pipeline, .. } = self;
            let tables = pipeline.tables();
            generations
                .retain(|id, _| tables.port_by_id.contains_key(id) || wires.find(id).is_some());
        }
        self.generations.insert(port_id.to_owned(), generation);
        Ok(())
    }

    /// Takes a slot's rings out of the loop. The guest's side may stay open: epoll would go on
    /// reporting its eventfd, so it is told.
    fn let_go(&mut self, at: usize) {
        if let Some(slot) = self.wires.slots.get_mut(at).and_then(Option::take) {
            // Not watched is what we want; that it already wasn't is no harm.
            let _ = epoll::delete(&self.epoll, slot.consumer.event());
        }
        self.active.retain(|active| *active != at);
        self.wires.broken.retain(|broken| *broken != at);
        self.wires.index(self.pipeline.tables());
    }

    fn let_go_of_broken(&mut self) {
        while let Some(at) = self.wires.broken.pop() {
            self.let_go(at);
        }
    }

    fn sweep(&mut self, now_ms: u64) {
        if now_ms >= self.swept_ms + SWEEP_MS {
            self.swept_ms = now_ms;
            self.pipeline.sweep(now_ms);
        }
    }

    fn status(&self) -> Status {
        Status {
            pid: std::process::id(),
            instance: self.instance.clone(),
            revision: self.pipeline.tables().revision,
            vtep: self.vtep.to_string(),
            ports_attached: self.wires.attached(),
            forwards_failed: self.forwards.failed().to_vec(),
            ports_rejected: self.pipeline.tables().rejected.clone(),
        }
    }

    fn counters(&self) -> Counters {
        let wires = &self.wires;
        let mut counters = Counters::default();
        let drops =
            self.pipeline.drops().map(|(reason, count)| (format!("dropped_{reason}"), count));
        counters.totals.extend(drops);
        let splices: usize = self.stacks.iter().flatten().map(PortStack::splices).sum();
        let totals = [
            ("dropped_not_attached", wires.dropped_not_attached),
            ("tunnel_frames_sent", wires.tunnel.frames_sent),
            ("tunnel_frames_received", wires.tunnel.frames_received),
            ("tunnel_send_failures", wires.tunnel.send_failures),
            ("connections", self.pipeline.connections() as u64),
            ("forwarded_connections", splices as u64),
        ];
        counters.totals.extend(totals.map(|(name, count)| (name.to_owned(), count)));
        let ports = wires.slots.iter().flatten();
        counters.ports.extend(ports.map(|slot| (slot.port_id.clone(), slot.counters)));
        counters
    }
}

/// A refused command: its kind and why.
type Refusal = (ErrorKind, String);

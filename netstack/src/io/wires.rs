//! The rings of attached guests and the tunnel socket: where the pipeline's frames really go.
//!
//! A ring that breaks its rules is noted and let go of after the batch; the other ports never notice.

use crate::compile::Tables;
use crate::control::{AttachedPort, PortCounters};
use crate::pipeline::Output;
use crate::wire;
use abi::packet_ring::{Consumer, Direction, Producer, Region};
use rustix::net::{SendAncillaryBuffer, SendFlags, sendmsg_addr};
use std::io::{self, IoSlice};
use std::net::{SocketAddr, UdpSocket};

/// Most rings attached at a time.
pub(super) const SLOTS_MAX: usize = 4096;
/// Packets queued for the local TCP stacks in one batch; TCP sends more again.
const SERVICE_PACKETS_MAX: usize = 1024;

/// One attached guest.
pub(super) struct Slot {
    pub(super) port_id: String,
    pub(super) generation: u64,
    pub(super) consumer: Consumer,
    producer: Producer,
    /// Index of the port in the tables in force, if they name it.
    pub(super) port: Option<usize>,
    pub(super) counters: PortCounters,
    /// Frames were pushed since the last publish.
    dirty: bool,
    /// On the list of slots to read.
    pub(super) active: bool,
}

impl Slot {
    pub(super) fn new(port_id: String, generation: u64, region: &Region) -> io::Result<Slot> {
        Ok(Slot {
            port_id,
            generation,
            consumer: region.consumer(Direction::FromGuest)?,
            producer: region.producer(Direction::ToGuest)?,
            port: None,
            counters: PortCounters::default(),
            dirty: false,
            active: false,
        })
    }
}

/// Frames and errors of the tunnel.
#[derive(Clone, Copy, Default)]
pub(super) struct TunnelCounters {
    pub(super) frames_sent: u64,
    pub(super) frames_received: u64,
    pub(super) send_failures: u64,
}

pub(super) struct Wires {
    pub(super) slots: Vec<Option<Slot>>,
    /// Slot of each port of the tables in force.
    slot_of_port: Vec<Option<usize>>,
    /// Slots with frames to publish.
    dirty: Vec<usize>,
    pub(super) udp: UdpSocket,
    pub(super) tunnel: TunnelCounters,
    /// Packets for the local stacks, with the port they came from.
    pub(super) services: Vec<(usize, Vec<u8>)>,
    pub(super) dropped_not_attached: u64,
    /// Slots whose peer broke the ring's rules.
    pub(super) broken: Vec<usize>,
}

impl Wires {
    pub(super) fn new(udp: UdpSocket) -> Wires {
        Wires {
            slots: Vec::new(),
            slot_of_port: Vec::new(),
            dirty: Vec::new(),
            udp,
            tunnel: TunnelCounters::default(),
            services: Vec::new(),
            dropped_not_attached: 0,
            broken: Vec::new(),
        }
    }

    /// Finds the slot of every port again: after new tables, an attach or a detach.
    pub(super) fn index(&mut self, tables: &Tables) {
        self.slot_of_port.clear();
        self.slot_of_port.resize(tables.ports.len(), None);
        for (at, slot) in self.slots.iter_mut().enumerate() {
            let Some(slot) = slot else { continue };
            slot.port = tables.port_by_id.get(&slot.port_id).copied();
            if let Some(port) = slot.port {
                self.slot_of_port[port] = Some(at);
            }
        }
    }

    pub(super) fn find(&self, port_id: &str) -> Option<usize> {
        self.slots.iter().position(|slot| slot.as_ref().is_some_and(|slot| slot.port_id == port_id))
    }

    /// A place for one more slot, or `None` at the limit.
    pub(super) fn vacancy(&mut self) -> Option<usize> {
        if let Some(at) = self.slots.iter().position(Option::is_none) {
            return Some(at);
        }
        if self.slots.len() == SLOTS_MAX {
            return None;
        }
        self.slots.push(None);
        Some(self.slots.len() - 1)
    }

    pub(super) fn attached(&self) -> Vec<AttachedPort> {
        let attached = |slot: &Slot| AttachedPort {
            port_id: slot.port_id.clone(),
            generation: slot.generation,
        };
        self.slots.iter().flatten().map(attached).collect()
    }

    /// Shows every guest what was pushed, with one wake-up at most each.
    pub(super) fn publish(&mut self) {
        for at in self.dirty.drain(..) {
            let Some(Some(slot)) = self.slots.get_mut(at) else { continue };
            slot.dirty = false;
            if slot.producer.publish().is_err() {
                self.broken.push(at);
            }
        }
    }
}

impl Output for Wires {
    fn port(&mut self, port: usize, frame: &[u8]) {
        let at = self.slot_of_port.get(port).copied().flatten();
        let Some((at, Some(slot))) = at.and_then(|at| Some((at, self.slots.get_mut(at)?))) else {
            self.dropped_not_attached += 1;
            return;
        };
        match slot.producer.push(frame) {
            Ok(true) => {
                slot.counters.frames_to_guest += 1;
                slot.counters.bytes_to_guest += frame.len() as u64;
                if !slot.dirty {
                    slot.dirty = true;
                    self.dirty.push(at);
                }
            }
            Ok(false) => slot.counters.dropped_ring_full += 1,
            Err(_) => self.broken.push(at),
        }
    }

    fn tunnel(&mut self, vtep: SocketAddr, vni: u32, frame: &[u8]) {
        let header = wire::vxlan_header(vni);
        let parts = [IoSlice::new(&header), IoSlice::new(frame)];
        let mut no_control = SendAncillaryBuffer::default();
        match sendmsg_addr(&self.udp, &vtep, &parts, &mut no_control, SendFlags::DONTWAIT) {
            Ok(_) => self.tunnel.frames_sent += 1,
            Err(_) => self.tunnel.send_failures += 1,
        }
    }

    fn service(&mut self, port: usize, packet: &[u8]) {
        if self.services.len() < SERVICE_PACKETS_MAX {
            self.services.push((port, packet.to_vec()));
        }
    }
}

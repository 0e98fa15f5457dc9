//! virtio-net (virtio 1.2, section 5.1): a receive and a transmit queue, one thread, no offloads.
//!
//! Frames are copied between virtqueues and the packet ring (or a TAP interface): the switch
//! never maps guest memory. A full ring drops the guest's frame, as a full switch does; frames
//! to a guest without receive buffers wait in the ring.

pub mod link;

use super::chain::{Buffers, copy_in, copy_out, total};
use super::rate::{Limiter, RateLink};
use super::{Backend, Device, DeviceError, DeviceKind, Work};
use crate::config::{NetBackend, NetConfig};
use crate::process::resources::{ResourceError, Supply};
use abi::packet_ring::{FRAME_BYTES_MAX, Region};
use link::Link;
use rustix::event::PollFlags;
use std::sync::Arc;
use std::time::Duration;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;

const QUEUE_SIZE: u16 = 256;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// `struct virtio_net_hdr_v1`.
const HEADER_BYTES: usize = 12;
/// Offset of `num_buffers` in it.
const NUM_BUFFERS: usize = 10;
/// Shortest frame: an Ethernet header.
const FRAME_BYTES_MIN: usize = 14;
/// Frames moved in one direction before the other has its turn.
const BATCH: usize = 256;

/// A network device's backend.
pub struct Nic {
    link: Link,
    /// A frame for the guest that found no receive buffer yet.
    waiting: Option<usize>,
    received: Box<[u8; HEADER_BYTES + FRAME_BYTES_MAX]>,
    sent: Box<[u8; HEADER_BYTES + FRAME_BYTES_MAX]>,
    from_guest: Lane,
    to_guest: Lane,
}

/// One direction's rate limits.
struct Lane {
    rate: Arc<RateLink>,
    limiter: Limiter,
}

impl Lane {
    fn new(rate: &Arc<RateLink>) -> Lane {
        Lane { rate: Arc::clone(rate), limiter: Limiter::default() }
    }

    fn passes(&mut self) -> bool {
        self.limiter.passes(&self.rate)
    }

    /// How long what is held back in this direction has to wait.
    fn wait(&self) -> Option<Duration> {
        self.limiter.wait()
    }
}

/// Opens a network device.
pub fn open(config: &NetConfig, supply: &mut Supply) -> Result<Device, ResourceError> {
    let what = format!("net {:?}", config.id);
    let unusable = |reason: String| ResourceError::Unusable { what: what.clone(), reason };
    let mac =
        config.mac_bytes().ok_or_else(|| unusable(format!("mac {:?} is not one", config.mac)))?;
    let (link, ring) = match &config.backend {
        NetBackend::Ring(indices) => {
            let [memory, from_guest, to_guest] =
                indices.map(|index| supply.descriptor(index, &what));
            let region = Region::map(memory?, from_guest?, to_guest?)
                .map_err(|error| unusable(error.to_string()))?;
            let link = Link::ring(&region).map_err(|error| unusable(error.to_string()))?;
            (link, Some(Arc::new(region)))
        }
        NetBackend::Tap(resource) => (Link::tap(resource, supply, &what)?, None),
    };
    let features = 1 << VIRTIO_NET_F_MAC
        | 1 << VIRTIO_NET_F_MTU
        | 1 << VIRTIO_NET_F_STATUS
        | 1 << VIRTIO_RING_F_INDIRECT_DESC
        | 1 << VIRTIO_RING_F_EVENT_IDX;
    let mut device_config = mac.to_vec();
    for half in [VIRTIO_NET_S_LINK_UP as u16, 1, config.mtu] {
        device_config.extend_from_slice(&half.to_le_bytes());
    }
    let rates = [config.from_guest, config.to_guest].map(|limits| Arc::new(RateLink::new(limits)));
    let nic = Nic::new(link, &rates);
    Ok(Device {
        id: config.id.clone(),
        kind: DeviceKind::Net,
        virtio_type: 1,
        features,
        queue_sizes: vec![QUEUE_SIZE; 2],
        queues_needed: 2,
        config: device_config.into(),
        ring,
        link: None,
        balloon: None,
        rates: rates.into(),
        backend: Box::new(nic),
    })
}

impl Nic {
    fn new(link: Link, [from_guest, to_guest]: &[Arc<RateLink>; 2]) -> Nic {
        let buffer = || Box::new([0; HEADER_BYTES + FRAME_BYTES_MAX]);
        let mut received = buffer();
        received[NUM_BUFFERS] = 1;
        Nic {
            link,
            waiting: None,
            received,
            sent: buffer(),
            from_guest: Lane::new(from_guest),
            to_guest: Lane::new(to_guest),
        }
    }

    /// Guest to switch; `true` where something moved.
    fn transmit(&mut self, work: &mut Work) -> Result<bool, DeviceError> {
        let ram = work.ram.clone();
        let mut moved = 0;
        while moved < BATCH && self.from_guest.passes() {
            let Some(chain) = work.queues[TRANSMIT].pop_descriptor_chain(&ram) else { break };
            let head = chain.head_index();
            let len = Buffers::collect(chain, &ram).map_or(0, |buffers| {
                let len = total(&buffers.readable);
                if len <= self.sent.len() {
                    copy_out(&ram, &buffers.readable, &mut self.sent[..])
                } else {
                    0
                }
            });
            self.from_guest.limiter.take(len.saturating_sub(HEADER_BYTES) as u64);
            let fits =
                (HEADER_BYTES + FRAME_BYTES_MIN..=HEADER_BYTES + FRAME_BYTES_MAX).contains(&len);
            if fits && self.link.send(&self.sent[HEADER_BYTES..len])? {
                work.counters.writes.add(1);
                work.counters.written_bytes.add((len - HEADER_BYTES) as u64);
            } else {
                work.counters.failures.add(1);
            }
            work.queues[TRANSMIT].add_used(&ram, head, 0)?;
            moved += 1;
        }
        if moved > 0 {
            self.link.flush()?;
            work.interrupt(TRANSMIT)?;
        }
        Ok(moved > 0)
    }

    /// Switch to guest; `true` where something moved.
    fn receive(&mut self, work: &mut Work) -> Result<bool, DeviceError> {
        let ram = work.ram.clone();
        let mut moved = 0;
        while moved < BATCH {
            if self.waiting.is_none() && self.to_guest.passes() {
                self.waiting = self.link.receive(&mut self.received[HEADER_BYTES..])?;
                if let Some(len) = self.waiting {
                    self.to_guest.limiter.take(len as u64);
                }
            }
            let Some(len) = self.waiting else { break };
            let Some(chain) = work.queues[RECEIVE].pop_descriptor_chain(&ram) else { break };
            let head = chain.head_index();
            let whole = HEADER_BYTES + len;
            let written = Buffers::collect(chain, &ram)
                .filter(|buffers| total(&buffers.writable) >= whole)
                .map_or(0, |buffers| copy_in(&ram, &buffers.writable, &self.received[..whole]));
            if written == whole {
                work.counters.reads.add(1);
                work.counters.read_bytes.add(len as u64);
            } else {
                work.counters.failures.add(1);
            }
            self.waiting = None;
            work.queues[RECEIVE].add_used(&ram, head, written as u32)?;
            moved += 1;
        }
        if moved > 0 {
            work.interrupt(RECEIVE)?;
        }
        Ok(moved > 0)
    }

    /// Asks to be woken; says what came meanwhile.
    fn prepare_sleep(&mut self, work: &mut Work) -> Result<Came, DeviceError> {
        // What a limit holds back is looked at again when its time has come.
        let transmit = self.from_guest.wait().is_none() && work.idle(TRANSMIT)?;
        let (receive, frame) = match self.waiting {
            Some(_) => (work.idle(RECEIVE)?, false),
            None => (false, self.to_guest.wait().is_none() && !self.link.prepare_sleep()),
        };
        Ok(Came { transmit, receive, frame })
    }
}

/// What came while the thread was about to sleep.
#[derive(Clone, Copy, Default)]
struct Came {
    /// The guest's index says there is something to send.
    transmit: bool,
    /// The guest's index says there is a buffer for the frame that waits.
    receive: bool,
    /// The switch has a frame.
    frame: bool,
}

impl Backend for Nic {
    fn run(&mut self, mut work: Work) -> Result<(), DeviceError> {
        let mut came = Came::default();
        loop {
            work.busy(TRANSMIT)?;
            work.busy(RECEIVE)?;
            let sent = self.transmit(&mut work)?;
            let received = self.receive(&mut work)?;
            if came.transmit && !sent {
                return Err(DeviceError::Index(TRANSMIT));
            }
            if came.receive && !received {
                return Err(DeviceError::Index(RECEIVE));
            }
            came = Came::default();
            if sent || received {
                if work.stopping() {
                    return Ok(());
                }
                continue;
            }
            came = self.prepare_sleep(&mut work)?;
            if !(came.transmit || came.receive || came.frame) {
                let listens = self.waiting.is_none() && self.to_guest.wait().is_none();
                let more = listens.then(|| (self.link.event(), PollFlags::IN));
                let waits = [self.from_guest.wait(), self.to_guest.wait()];
                let patience = waits.into_iter().flatten().min();
                if work.wait_any(more.as_slice(), patience)?.is_none() {
                    return Ok(());
                }
                self.link.woken();
            }
        }
    }
}

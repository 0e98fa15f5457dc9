//! virtio-rng (virtio 1.2, section 5.4): one queue, one thread, bytes from the host's kernel.
//!
//! It gives away at most `bytes_per_second`: a guest that asks without end keeps no host processor
//! busy. A request gets what there is of its budget; the driver asks again for the rest.

mod budget;

use super::chain::{Buffers, copy_in, total};
use super::{Backend, Device, DeviceError, DeviceKind, Work};
use crate::config::RngConfig;
use crate::machine::boot::random;
use budget::Budget;
use std::time::{Duration, Instant};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;

/// The device's id on the bus.
pub const ID: &str = "rng";
const VIRTIO_TYPE: u16 = 4;
const QUEUE_SIZE: u16 = 64;
/// Most bytes of one request that are filled.
pub const REQUEST_BYTES_MAX: usize = 64 << 10;
/// Bytes asked of the kernel at once.
const PIECE_BYTES: usize = 256;

/// The backend.
struct Rng {
    budget: Budget,
}

/// What became of a round of requests.
enum Round {
    /// Nothing more waits; the number that was served.
    Served(usize),
    /// A request waits until there is something to give.
    Exhausted(Duration),
}

/// Makes the device; it needs nothing of the host but its kernel.
pub fn open(config: &RngConfig) -> Device {
    let features = 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;
    Device {
        id: ID.into(),
        kind: DeviceKind::Rng,
        virtio_type: VIRTIO_TYPE,
        features,
        queue_sizes: vec![QUEUE_SIZE],
        queues_needed: 1,
        config: Vec::new().into(),
        ring: None,
        link: None,
        balloon: None,
        rates: Vec::new(),
        backend: Box::new(Rng { budget: Budget::new(config.bytes_per_second, Instant::now()) }),
    }
}

impl Rng {
    fn serve(&mut self, work: &mut Work) -> Result<Round, DeviceError> {
        let ram = work.ram.clone();
        let mut served = 0;
        loop {
            if self.budget.available(Instant::now()) == 0 {
                break;
            }
            let Some(chain) = work.queues[0].pop_descriptor_chain(&ram) else {
                return Ok(Round::Served(served));
            };
            let head = chain.head_index();
            let written = match Buffers::collect(chain, &ram) {
                Some(buffers) => self.fill(&buffers, work)?,
                None => 0,
            };
            work.queues[0].add_used(&ram, head, written as u32)?;
            work.interrupt(0)?;
            served += 1;
            if work.stopping() {
                return Ok(Round::Served(served));
            }
        }
        Ok(Round::Exhausted(self.budget.wait_for(PIECE_BYTES as u64)))
    }

    /// Fills what the request wants, the budget has and the limit allows.
    fn fill(&mut self, buffers: &Buffers, work: &Work) -> Result<usize, DeviceError> {
        let budget = self.budget.available(Instant::now());
        let wanted = total(&buffers.writable).min(REQUEST_BYTES_MAX);
        let wanted = wanted.min(usize::try_from(budget).unwrap_or(usize::MAX));
        let mut bytes = Vec::with_capacity(wanted.next_multiple_of(PIECE_BYTES));
        while bytes.len() < wanted {
            let piece: [u8; PIECE_BYTES] = random()
                .map_err(|error| DeviceError::Io(std::io::Error::other(error.to_string())))?;
            bytes.extend_from_slice(&piece);
        }
        let written = copy_in(&work.ram, &buffers.writable, &bytes[..wanted]);
        self.budget.take(written as u64);
        Ok(written)
    }
}

impl Backend for Rng {
    fn run(&mut self, mut work: Work) -> Result<(), DeviceError> {
        let mut promised = false;
        loop {
            work.busy(0)?;
            let round = self.serve(&mut work)?;
            if promised && matches!(round, Round::Served(0)) {
                return Err(DeviceError::Index(0));
            }
            promised = false;
            let patience = match round {
                Round::Exhausted(patience) => Some(patience),
                Round::Served(_) => {
                    promised = work.idle(0)?;
                    None
                }
            };
            if promised {
                if work.stopping() {
                    return Ok(());
                }
            } else if work.wait_any(&[], patience)?.is_none() {
                return Ok(());
            }
        }
    }
}

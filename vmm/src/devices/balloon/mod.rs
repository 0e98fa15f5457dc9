//! virtio-balloon (virtio 1.2, section 5.5): a guest gives memory back to the host.
//!
//! The host sets a target; the guest names pages that it does without ("inflates"), and takes
//! pages back when the target falls or, with `deflate_on_oom`, when it has no other memory. Beside
//! that it reports pages that happen to be free. Either way the host takes the page and nothing
//! else: when the guest touches it again it finds another one, of zeroes. So nothing a guest says
//! here is trusted: a page outside of its memory is counted and left alone.
//!
//! `link` is the host's end, `pages` turns page numbers into ranges, `statistics` reads the
//! guest's own figures.

pub mod link;
mod pages;
pub mod statistics;

use super::chain::{Buffers, Segment, copy_out, total};
use super::{Backend, Device, DeviceError, DeviceKind, Work, borrow};
use crate::config::BalloonConfig;
use crate::machine::memory::{PAGE_BYTES, Ram, give_back};
use crate::process::resources::ResourceError;
use link::BalloonLink;
use pages::{Range, ranges, whole_pages};
use rustix::event::PollFlags;
use statistics::{STATISTICS_BYTES_MAX, Statistics};
use std::sync::Arc;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;

/// The device's id on the bus.
pub const ID: &str = "balloon";
const VIRTIO_TYPE: u16 = 5;
const QUEUE_SIZE: u16 = 128;
// Feature bits (section 5.5.3).
const F_STATISTICS: u64 = 1 << 1;
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
const F_REPORTING: u64 = 1 << 5;
// Queues (section 5.5.2). The ones after the second are there as features are agreed on, and those
// that are not agreed on leave no gap: so Linux numbers them.
const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const OPTIONAL: usize = 2;
/// Bytes of one page number.
const NUMBER_BYTES: usize = 4;
/// Most page numbers of one chain; more are left alone.
pub const NUMBERS_MAX: usize = 1 << 16;

/// The backend.
struct Balloon {
    link: Arc<BalloonLink>,
    /// The buffer by which the guest is asked for statistics.
    question: Option<u16>,
}

/// Where the optional queues are.
struct Queues {
    statistics: Option<usize>,
    reporting: Option<usize>,
}

/// Makes the device.
pub fn open(config: &BalloonConfig) -> Result<Device, ResourceError> {
    let link = BalloonLink::new(config.target_mib)
        .map_err(|error| ResourceError::Unusable { what: ID.into(), reason: error.to_string() })?;
    let link = Arc::new(link);
    let mut features =
        F_STATISTICS | 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;
    if config.deflate_on_oom {
        features |= F_DEFLATE_ON_OOM;
    }
    if config.free_page_reporting {
        features |= F_REPORTING;
    }
    Ok(Device {
        id: ID.into(),
        kind: DeviceKind::Balloon,
        virtio_type: VIRTIO_TYPE,
        features,
        queue_sizes: vec![QUEUE_SIZE; if config.free_page_reporting { 4 } else { 3 }],
        queues_needed: OPTIONAL,
        config: link.fields(),
        ring: None,
        link: None,
        balloon: Some(Arc::clone(&link)),
        rates: Vec::new(),
        backend: Box::new(Balloon { link, question: None }),
    })
}

impl Queues {
    fn of(work: &Work) -> Queues {
        let mut next = OPTIONAL;
        let mut place = |feature: u64| {
            (work.features & feature != 0).then(|| {
                next += 1;
                next - 1
            })
        };
        let (statistics, reporting) = (place(F_STATISTICS), place(F_REPORTING));
        let set_up = |index: &usize| work.queues.get(*index).is_some_and(QueueT::ready);
        Queues { statistics: statistics.filter(set_up), reporting: reporting.filter(set_up) }
    }

    fn all(&self) -> impl Iterator<Item = usize> {
        [INFLATE, DEFLATE].into_iter().chain(self.statistics).chain(self.reporting)
    }
}

impl Balloon {
    /// Takes what waits in `queue`; the number of chains.
    fn serve(
        &mut self,
        queue: usize,
        queues: &Queues,
        work: &mut Work,
    ) -> Result<usize, DeviceError> {
        if queues.statistics == Some(queue) {
            return self.take_statistics(queue, work);
        }
        let (ram, link) = (work.ram.clone(), Arc::clone(&self.link));
        work.drain(queue, |buffers| {
            let Some(buffers) = buffers else {
                link.refused(1);
                return 0;
            };
            match queue {
                INFLATE => inflate(&buffers, &ram, &link),
                // A page that is taken back is there as soon as it is touched.
                DEFLATE => {}
                _ => report(&buffers.writable, &ram, &link),
            }
            0
        })
    }

    /// Reads statistics and keeps their buffer for the next question.
    fn take_statistics(&mut self, queue: usize, work: &mut Work) -> Result<usize, DeviceError> {
        let ram = work.ram.clone();
        let mut taken = 0;
        while let Some(chain) = work.queues[queue].pop_descriptor_chain(&ram) {
            let head = chain.head_index();
            if let Some(buffers) = Buffers::collect(chain, &ram) {
                let mut bytes = vec![0; total(&buffers.readable).min(STATISTICS_BYTES_MAX)];
                let len = copy_out(&ram, &buffers.readable, &mut bytes);
                self.link.answer(Statistics::parse(&bytes[..len]));
            }
            if let Some(older) = self.question.replace(head) {
                work.queues[queue].add_used(&ram, older, 0)?;
            }
            taken += 1;
            if work.stopping() {
                break;
            }
        }
        Ok(taken)
    }

    /// Gives the statistics' buffer back: the guest fills it anew.
    fn ask(&mut self, queues: &Queues, work: &mut Work) -> Result<(), DeviceError> {
        if let (Some(queue), Some(head)) = (queues.statistics, self.question.take()) {
            let ram = work.ram.clone();
            work.queues[queue].add_used(&ram, head, 0)?;
            work.interrupt(queue)?;
        }
        Ok(())
    }

    fn run_queues(&mut self, queues: &Queues, work: &mut Work) -> Result<(), DeviceError> {
        let mut promised = Vec::new();
        loop {
            for queue in queues.all() {
                work.busy(queue)?;
                if self.serve(queue, queues, work)? == 0 && promised.contains(&queue) {
                    return Err(DeviceError::Index(queue));
                }
            }
            if self.link.is_asked() {
                self.ask(queues, work)?;
            }
            promised.clear();
            for queue in queues.all() {
                if work.idle(queue)? {
                    promised.push(queue);
                }
            }
            if !promised.is_empty() {
                if work.stopping() {
                    return Ok(());
                }
                continue;
            }
            if work.wait_any(&[(borrow(self.link.wake()), PollFlags::IN)], None)?.is_none() {
                return Ok(());
            }
        }
    }
}

impl Backend for Balloon {
    fn run(&mut self, mut work: Work) -> Result<(), DeviceError> {
        self.question = None;
        let queues = Queues::of(&work);
        let result = self.run_queues(&queues, &mut work);
        // Whoever drives it next starts with all of its memory.
        self.link.forget();
        result
    }
}

/// Gives back the pages that a chain names.
fn inflate(buffers: &Buffers, ram: &Ram, link: &BalloonLink) {
    let named = total(&buffers.readable) / NUMBER_BYTES;
    let mut bytes = vec![0; named.min(NUMBERS_MAX) * NUMBER_BYTES];
    let len = copy_out(ram, &buffers.readable, &mut bytes);
    let numbers = bytes[..len]
        .chunks_exact(NUMBER_BYTES)
        .map(|bytes| u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]));
    for range in ranges(numbers) {
        take(range, ram, link);
    }
    link.refused((named.saturating_sub(NUMBERS_MAX)) as u64);
}

/// Gives back the whole pages of free memory that the guest reports.
fn report(segments: &[Segment], ram: &Ram, link: &BalloonLink) {
    for segment in segments {
        if let Some(range) = whole_pages(segment.address, segment.len as u64) {
            take(range, ram, link);
        }
    }
}

/// Gives back the pages of a range that are RAM; the others are counted.
fn take(range: Range, ram: &Ram, link: &BalloonLink) {
    if give_back(ram, range.start, range.bytes) {
        link.given_back(range.bytes);
        return;
    }
    // Some page of it is no RAM: one after another, the good ones are taken.
    for start in (range.start..range.start + range.bytes).step_by(PAGE_BYTES as usize) {
        if give_back(ram, start, PAGE_BYTES) {
            link.given_back(PAGE_BYTES);
        } else {
            link.refused(1);
        }
    }
}

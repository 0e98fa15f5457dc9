//! Many requests at once, for measurements: each one that ends is followed by another.

use super::{
    BlockDevice, BlockError, FEATURES, Frame, QUEUE_SIZE, SECTOR_BYTES, STATUS_PENDING, TYPE_IN,
    TYPE_OUT,
};
use crate::virtio::queue::{QUEUE_SIZE_MAX, Segment};
use crate::{clock, cpu, interrupts};
use alloc::boxed::Box;
use alloc::vec::Vec;

/// Most requests at once: each takes three descriptors.
pub const DEPTH_MAX: u16 = QUEUE_SIZE_MAX / SEGMENTS;
/// Most bytes of one request of a load.
pub const LOAD_BYTES_MAX: usize = 1 << 20;
const SEGMENTS: u16 = 3;
/// A device that ends no request for this long has failed.
const SILENCE_MICROS: u64 = 30_000_000;

/// What is asked of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// Writes (otherwise reads).
    pub write: bool,
    /// Anywhere (otherwise one after another from the start).
    pub random: bool,
    /// Bytes of each request.
    pub bytes: usize,
    /// Requests at once.
    pub depth: u16,
    /// How long.
    pub micros: u64,
}

/// What a load came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadFigures {
    /// Requests that ended.
    pub operations: u64,
    /// From the first one's start to the last one's end.
    pub nanos: u64,
}

/// One request's memory.
struct Slot {
    frame: Box<Frame>,
    data: Vec<u8>,
}

/// A load under way.
struct Run<'a> {
    device: &'a mut BlockDevice,
    load: Load,
    slots: Vec<Slot>,
    /// Which slot a chain's head belongs to.
    slot_of: Vec<usize>,
    places: Places,
}

impl BlockDevice {
    /// Keeps `depth` requests under way for a while; nothing else is served meanwhile.
    pub fn run_load(&mut self, load: Load) -> Result<LoadFigures, BlockError> {
        let bytes = load.bytes as u64;
        let whole = bytes > 0 && bytes.is_multiple_of(SECTOR_BYTES);
        let blocks = self.size_bytes().checked_div(bytes).unwrap_or(0);
        if !whole || load.bytes > LOAD_BYTES_MAX || blocks == 0 || load.depth == 0 {
            return Err(BlockError::Range);
        }
        if self.busy || load.depth > DEPTH_MAX {
            return Err(BlockError::Busy);
        }
        if load.write && self.read_only {
            return Err(BlockError::ReadOnly);
        }
        self.reopen((load.depth * SEGMENTS).next_power_of_two())?;
        let mut run = Run {
            slot_of: alloc::vec![0; usize::from(self.queue.size())],
            slots: (0..load.depth).map(|index| Slot::new(index, load.bytes)).collect(),
            places: Places { blocks, next: 0, random: load.random, state: cpu::tsc() | 1 },
            device: self,
            load,
        };
        let figures = run.drive();
        // What may still be under way ends before its memory is freed.
        let slots = core::mem::take(&mut run.slots);
        let reopened = self.reopen(QUEUE_SIZE);
        drop(slots);
        reopened.and(figures)
    }

    /// A reset, and another queue.
    fn reopen(&mut self, queue_size: u16) -> Result<(), BlockError> {
        self.transport.reset();
        let failed = |_| BlockError::Unsupported;
        let features = self.transport.negotiate(FEATURES).map_err(failed)?;
        let opened = self.transport.open_queue(0, queue_size, features).map_err(failed)?;
        (self.queue, self.doorbell) = opened;
        self.transport.start();
        if self.queue.size() < queue_size { Err(BlockError::Busy) } else { Ok(()) }
    }
}

impl Slot {
    fn new(index: u16, bytes: usize) -> Slot {
        let frame = Frame { kind: 0, reserved: 0, sector: 0, status: STATUS_PENDING };
        Slot { frame: Box::new(frame), data: alloc::vec![index as u8 + 1; bytes] }
    }
}

impl Run<'_> {
    fn drive(&mut self) -> Result<LoadFigures, BlockError> {
        let start = cpu::tsc();
        let end = clock::now().after_micros(self.load.micros);
        for slot in 0..self.slots.len() {
            self.submit(slot)?;
        }
        self.publish();
        let (mut operations, mut under_way) = (0, self.slots.len());
        while under_way > 0 {
            interrupts::clear();
            self.device.queue.disarm();
            let before = operations;
            while let Some(slot) = self.ended()? {
                operations += 1;
                if clock::now() < end {
                    self.submit(slot)?;
                } else {
                    under_way -= 1;
                }
            }
            self.publish();
            if operations == before && self.device.queue.arm() {
                let patience = clock::now().after_micros(SILENCE_MICROS);
                interrupts::halt_until(Some(patience));
                if clock::now() >= patience {
                    return Err(BlockError::Io);
                }
            }
        }
        Ok(LoadFigures { operations, nanos: clock::nanos_of(cpu::tsc() - start) })
    }

    fn publish(&mut self) {
        if self.device.queue.publish() {
            self.device.doorbell.ring();
        }
    }

    fn submit(&mut self, index: usize) -> Result<(), BlockError> {
        let sector = self.places.next() * (self.load.bytes as u64 / SECTOR_BYTES);
        let slot = &mut self.slots[index];
        let kind = if self.load.write { TYPE_OUT } else { TYPE_IN };
        *slot.frame = Frame { kind, reserved: 0, sector, status: STATUS_PENDING };
        let frame = (&raw mut *slot.frame) as u64;
        let chain = [
            Segment { address: frame, len: 16, device_writes: false },
            Segment {
                address: slot.data.as_mut_ptr() as u64,
                len: self.load.bytes as u32,
                device_writes: !self.load.write,
            },
            Segment {
                address: frame + core::mem::offset_of!(Frame, status) as u64,
                len: 1,
                device_writes: true,
            },
        ];
        // SAFETY: a slot's memory lives until the device was reset, and is not touched meanwhile.
        let head = unsafe { self.device.queue.add(&chain) }.map_err(|_| BlockError::Busy)?;
        self.slot_of[usize::from(head)] = index;
        Ok(())
    }

    /// A request that has ended, once.
    fn ended(&mut self) -> Result<Option<usize>, BlockError> {
        let Some((head, _)) = self.device.queue.pop_used() else { return Ok(None) };
        let index = self.slot_of[usize::from(head)];
        let status = &raw const self.slots[index].frame.status;
        // SAFETY: the device is done with the frame; it wrote the status behind the compiler.
        match unsafe { status.read_volatile() } {
            0 => Ok(Some(index)),
            _ => Err(BlockError::Io),
        }
    }
}

/// Which block is asked for next.
struct Places {
    blocks: u64,
    next: u64,
    random: bool,
    state: u64,
}

impl Places {
    fn next(&mut self) -> u64 {
        if !self.random {
            let block = self.next;
            self.next = (block + 1) % self.blocks;
            return block;
        }
        // xorshift64 (Marsaglia 2003).
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state % self.blocks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_stay_on_the_disk_and_sequences_start_again() {
        let mut sequence = Places { blocks: 3, next: 0, random: false, state: 1 };
        assert_eq!([0; 5].map(|_| sequence.next()), [0, 1, 2, 0, 1]);
        let mut random = Places { blocks: 7, next: 0, random: true, state: 1 };
        let mut seen = [0; 7];
        (0..7000).for_each(|_| seen[random.next() as usize] += 1);
        assert!(seen.iter().all(|count| (800..1200).contains(count)), "{seen:?}");
    }
}

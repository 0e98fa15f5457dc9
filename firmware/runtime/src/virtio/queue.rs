//! A split virtqueue (virtio 1.2, section 2.7), the driver's side.
//!
//! Suppression both ways: [`Queue::publish`] says whether the device wants to be told, and
//! [`Queue::arm`] asks it to interrupt at the next used buffer, which it otherwise does not.

use alloc::alloc::{alloc_zeroed, dealloc, handle_alloc_error};
use alloc::vec::Vec;
use core::alloc::Layout;
use core::sync::atomic::{AtomicU16, Ordering, fence};

/// Largest queue.
pub const QUEUE_SIZE_MAX: u16 = 256;

const DESCRIPTOR_BYTES: usize = 16;
const FLAG_NEXT: u16 = 1;
const FLAG_DEVICE_WRITES: u16 = 2;
const NO_INTERRUPT: u16 = 1;
const NO_NOTIFY: u16 = 1;

/// One buffer of a chain.
#[derive(Clone, Copy, Debug)]
pub struct Segment {
    /// Physical address.
    pub address: u64,
    /// Length in bytes.
    pub len: u32,
    /// The device writes it (otherwise reads).
    pub device_writes: bool,
}

/// The queue has too few free descriptors for a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

/// Driver's side of one virtqueue, with its memory.
pub struct Queue {
    memory: *mut u8,
    size: u16,
    event_idx: bool,
    /// Next free descriptor of each free descriptor.
    next_free: Vec<u16>,
    first_free: u16,
    free: u16,
    /// Descriptors of the chain that starts here; 0 where none does.
    chain_len: Vec<u16>,
    available: u16,
    told: u16,
    seen: u16,
}

impl Queue {
    /// An empty queue; `size` is a power of two up to [`QUEUE_SIZE_MAX`].
    pub(crate) fn new(size: u16, event_idx: bool) -> Queue {
        let layout = Self::layout(size);
        // SAFETY: the layout has a size above 0.
        let memory = unsafe { alloc_zeroed(layout) };
        if memory.is_null() {
            handle_alloc_error(layout);
        }
        let queue = Queue {
            memory,
            size,
            event_idx,
            next_free: (1..=size).collect(),
            first_free: 0,
            free: size,
            chain_len: alloc::vec![0; usize::from(size)],
            available: 0,
            told: 0,
            seen: 0,
        };
        if !event_idx {
            queue.word(queue.driver_offset()).store(NO_INTERRUPT, Ordering::Relaxed);
        }
        queue
    }

    fn layout(size: u16) -> Layout {
        let size = usize::from(size);
        let bytes = size * DESCRIPTOR_BYTES + (6 + 2 * size).next_multiple_of(4) + 6 + 8 * size;
        Layout::from_size_align(bytes, 16).expect("a queue has at most 256 entries")
    }

    fn driver_offset(&self) -> usize {
        usize::from(self.size) * DESCRIPTOR_BYTES
    }

    fn device_offset(&self) -> usize {
        self.driver_offset() + (6 + 2 * usize::from(self.size)).next_multiple_of(4)
    }

    pub(crate) fn descriptors_address(&self) -> u64 {
        self.memory as u64
    }

    pub(crate) fn driver_address(&self) -> u64 {
        self.memory as u64 + self.driver_offset() as u64
    }

    pub(crate) fn device_address(&self) -> u64 {
        self.memory as u64 + self.device_offset() as u64
    }

    fn word(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: offsets are even and below the layout's size; the memory lives as long as self.
        unsafe { AtomicU16::from_ptr(self.memory.add(offset).cast()) }
    }

    fn available_flags_index(&self) -> &AtomicU16 {
        self.word(self.driver_offset() + 2)
    }

    fn available_ring(&self, index: u16) -> &AtomicU16 {
        self.word(self.driver_offset() + 4 + 2 * usize::from(index % self.size))
    }

    fn used_event(&self) -> &AtomicU16 {
        self.word(self.driver_offset() + 4 + 2 * usize::from(self.size))
    }

    fn used_index(&self) -> u16 {
        self.word(self.device_offset() + 2).load(Ordering::Acquire)
    }

    fn available_event(&self) -> u16 {
        self.word(self.device_offset() + 4 + 8 * usize::from(self.size)).load(Ordering::Relaxed)
    }

    fn used_element(&self, index: u16) -> (u32, u32) {
        let at = self.device_offset() + 4 + 8 * usize::from(index % self.size);
        // SAFETY: inside the used ring; the device wrote it before its index.
        unsafe {
            let element = self.memory.add(at).cast::<u32>();
            (element.read_volatile(), element.add(1).read_volatile())
        }
    }

    /// Number of entries.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Number of free descriptors.
    #[must_use]
    pub fn free(&self) -> u16 {
        self.free
    }

    /// Adds a chain; returns its head, which [`Queue::pop_used`] gives back. The device sees it
    /// after [`Queue::publish`].
    ///
    /// # Safety
    /// The segments' memory stays valid, and is touched by nobody where the device writes, until
    /// the head comes back or the device is reset.
    pub unsafe fn add(&mut self, segments: &[Segment]) -> Result<u16, Full> {
        if segments.is_empty() || segments.len() > usize::from(self.free) {
            return Err(Full);
        }
        let head = self.first_free;
        let mut index = head;
        for (n, segment) in segments.iter().enumerate() {
            let next = self.next_free[usize::from(index)];
            let last = n + 1 == segments.len();
            let mut flags = if segment.device_writes { FLAG_DEVICE_WRITES } else { 0 };
            if !last {
                flags |= FLAG_NEXT;
            }
            self.write_descriptor(index, segment, flags, if last { 0 } else { next });
            self.first_free = next;
            index = next;
        }
        self.free -= segments.len() as u16;
        self.chain_len[usize::from(head)] = segments.len() as u16;
        self.available_ring(self.available).store(head, Ordering::Relaxed);
        self.available = self.available.wrapping_add(1);
        Ok(head)
    }

    fn write_descriptor(&mut self, index: u16, segment: &Segment, flags: u16, next: u16) {
        let low = u64::from(segment.len) | u64::from(flags) << 32 | u64::from(next) << 48;
        // SAFETY: `index` comes from the free list and is below `size`.
        unsafe {
            let descriptor = self.memory.add(usize::from(index) * DESCRIPTOR_BYTES).cast::<u64>();
            descriptor.write_volatile(segment.address);
            descriptor.add(1).write_volatile(low);
        }
    }

    /// Shows the added chains to the device. `true`: ring its doorbell.
    #[must_use]
    pub fn publish(&mut self) -> bool {
        if self.available == self.told {
            return false;
        }
        self.available_flags_index().store(self.available, Ordering::Release);
        fence(Ordering::SeqCst);
        let told = core::mem::replace(&mut self.told, self.available);
        if self.event_idx {
            // virtio 1.2, section 2.7.10: has the index passed the one the device waits for?
            self.available.wrapping_sub(self.available_event()).wrapping_sub(1)
                < self.available.wrapping_sub(told)
        } else {
            self.word(self.device_offset()).load(Ordering::Relaxed) & NO_NOTIFY == 0
        }
    }

    /// The next chain that the device is done with: its head and the bytes written into it.
    /// An element that names no chain of ours is skipped.
    pub fn pop_used(&mut self) -> Option<(u16, u32)> {
        while self.seen != self.used_index() {
            let (head, written) = self.used_element(self.seen);
            self.seen = self.seen.wrapping_add(1);
            if let Ok(head) = u16::try_from(head)
                && head < self.size
                && self.chain_len[usize::from(head)] > 0
            {
                self.release(head);
                return Some((head, written));
            }
        }
        None
    }

    /// The chain's descriptors still hang together in `next_free`: only the tail needs a link.
    fn release(&mut self, head: u16) {
        let len = core::mem::take(&mut self.chain_len[usize::from(head)]);
        let mut tail = head;
        for _ in 1..len {
            tail = self.next_free[usize::from(tail)];
        }
        self.next_free[usize::from(tail)] = self.first_free;
        self.first_free = head;
        self.free += len;
    }

    /// Asks for an interrupt at the next used buffer. `false`: there is one already, look first.
    #[must_use]
    pub fn arm(&mut self) -> bool {
        if self.event_idx {
            self.used_event().store(self.seen, Ordering::Relaxed);
        } else {
            self.word(self.driver_offset()).store(0, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
        self.used_index() == self.seen
    }

    /// No interrupts until the next [`Queue::arm`]. With event indices there is nothing to do:
    /// the index asked for has passed.
    pub fn disarm(&mut self) {
        if !self.event_idx {
            self.word(self.driver_offset()).store(NO_INTERRUPT, Ordering::Relaxed);
        }
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout; the device was reset before.
        unsafe { dealloc(self.memory, Self::layout(self.size)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a device does with a queue's memory.
    impl Queue {
        fn device_takes(&self, at: u16) -> u16 {
            self.available_ring(at).load(Ordering::Relaxed)
        }

        fn device_uses(&self, head: u32, written: u32) {
            let index = self.used_index();
            let at = self.device_offset() + 4 + 8 * usize::from(index % self.size);
            // SAFETY: inside the used ring.
            unsafe {
                let element = self.memory.add(at).cast::<u32>();
                element.write(head);
                element.add(1).write(written);
            }
            self.word(self.device_offset() + 2).store(index.wrapping_add(1), Ordering::Release);
        }

        fn device_waits_for(&self, index: u16) {
            self.word(self.device_offset() + 4 + 8 * usize::from(self.size))
                .store(index, Ordering::Relaxed);
        }

        fn add_chain(&mut self, len: usize) -> Result<u16, Full> {
            let segment = Segment { address: 0x1000, len: 64, device_writes: true };
            // SAFETY: no device touches the memory.
            unsafe { self.add(&alloc::vec![segment; len]) }
        }
    }

    #[test]
    fn chains_return_their_descriptors_in_any_order() {
        let mut queue = Queue::new(8, true);
        for round in 0..1000u16 {
            let a = queue.add_chain(3).unwrap();
            let b = queue.add_chain(1).unwrap();
            let c = queue.add_chain(4).unwrap();
            assert_eq!(queue.add_chain(1), Err(Full));
            let first = round.wrapping_mul(3);
            assert_eq!([0, 1, 2].map(|n| queue.device_takes(first.wrapping_add(n))), [a, b, c]);
            for head in [c, a, b] {
                queue.device_uses(u32::from(head), 5);
                assert_eq!(queue.pop_used(), Some((head, 5)));
            }
            assert_eq!(queue.free(), 8);
            assert_eq!(queue.pop_used(), None);
        }
    }

    #[test]
    fn used_elements_that_name_no_chain_are_skipped() {
        let mut queue = Queue::new(4, false);
        let head = queue.add_chain(1).unwrap();
        for wrong in [u32::from(head) + 1, 4, 70_000, u32::MAX] {
            queue.device_uses(wrong, 1);
        }
        queue.device_uses(u32::from(head), 9);
        queue.device_uses(u32::from(head), 9);
        assert_eq!(queue.pop_used(), Some((head, 9)));
        assert_eq!(queue.pop_used(), None);
        assert_eq!(queue.free(), 4);
    }

    #[test]
    fn the_doorbell_is_rung_only_past_the_index_the_device_waits_for() {
        let mut queue = Queue::new(8, true);
        assert!(!queue.publish());
        queue.add_chain(1).unwrap();
        assert!(queue.publish());
        queue.add_chain(1).unwrap();
        assert!(!queue.publish(), "the device still waits for index 0, which has passed");
        queue.device_waits_for(2);
        queue.add_chain(1).unwrap();
        assert!(queue.publish());
    }

    #[test]
    fn without_event_indices_flags_suppress() {
        let mut queue = Queue::new(8, false);
        queue.add_chain(1).unwrap();
        assert!(queue.publish());
        queue.word(queue.device_offset()).store(NO_NOTIFY, Ordering::Relaxed);
        queue.add_chain(1).unwrap();
        assert!(!queue.publish());
        let flags = |queue: &Queue| queue.word(queue.driver_offset()).load(Ordering::Relaxed);
        assert_eq!(flags(&queue), NO_INTERRUPT);
        assert!(queue.arm());
        assert_eq!(flags(&queue), 0);
        queue.disarm();
        assert_eq!(flags(&queue), NO_INTERRUPT);
    }

    #[test]
    fn arming_over_a_used_buffer_says_so() {
        let mut queue = Queue::new(8, true);
        let head = queue.add_chain(2).unwrap();
        assert!(queue.arm());
        queue.device_uses(u32::from(head), 0);
        assert!(!queue.arm());
    }
}

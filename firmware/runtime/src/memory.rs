//! The heap over the RAM after the image, and so also the guest's memory for devices: the
//! identity mapping makes every heap block physically contiguous at its own address.
//!
//! Blocks are powers of two; free ones wait in a list for each size, fresh ones are cut from
//! the rest. So nothing is touched that was not asked for: a page that is never touched costs
//! the host nothing.

use core::alloc::{GlobalAlloc, Layout};
use core::cell::UnsafeCell;
use core::ptr::null_mut;

const SMALLEST_BITS: u32 = 4;
const LARGEST_BITS: u32 = 32;
const PAGE_BYTES: usize = 4096;

/// Free lists and the rest of the region.
struct Heap(UnsafeCell<Region>);

struct Region {
    free: [*mut u8; (LARGEST_BITS + 1) as usize],
    next: usize,
    end: usize,
}

// SAFETY: one vCPU, no preemption, and no interrupt stub allocates.
unsafe impl Sync for Heap {}

impl Heap {
    const fn empty() -> Self {
        Heap(UnsafeCell::new(Region {
            free: [null_mut(); (LARGEST_BITS + 1) as usize],
            next: 0,
            end: 0,
        }))
    }
}

fn bits_of(layout: Layout) -> u32 {
    let bytes = layout.size().max(layout.align()).max(1 << SMALLEST_BITS);
    usize::BITS - (bytes - 1).leading_zeros()
}

impl Region {
    fn take(&mut self, layout: Layout) -> *mut u8 {
        let bits = bits_of(layout);
        if bits > LARGEST_BITS {
            return null_mut();
        }
        let first = self.free[bits as usize];
        if first.is_null() {
            return self.cut(1 << bits, layout.align());
        }
        // SAFETY: a free block's first word is the next free block of its size.
        self.free[bits as usize] = unsafe { first.cast::<*mut u8>().read() };
        first
    }

    fn cut(&mut self, bytes: usize, align: usize) -> *mut u8 {
        // A small block never crosses a page; a large one needs no more than a page's alignment.
        let align = align.max(bytes.min(PAGE_BYTES));
        let start = self.next.next_multiple_of(align);
        match start.checked_add(bytes) {
            Some(end) if end <= self.end => {
                self.next = end;
                start as *mut u8
            }
            _ => null_mut(),
        }
    }

    /// # Safety
    /// `block` came from `take` with this layout and is no longer used.
    unsafe fn give(&mut self, block: *mut u8, layout: Layout) {
        let list = &mut self.free[bits_of(layout) as usize];
        // SAFETY: the block has at least 16 bytes and is nobody's now.
        unsafe { block.cast::<*mut u8>().write(*list) };
        *list = block;
    }
}

// SAFETY: `take` returns disjoint blocks of at least the asked size and alignment.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the one thread, and no caller holds a reference to the region.
        unsafe { &mut *self.0.get() }.take(layout)
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: as above; the caller vouches for the block.
        unsafe { (*self.0.get()).give(block, layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        let Ok(wanted) = Layout::from_size_align(bytes, layout.align()) else { return null_mut() };
        if bits_of(wanted) == bits_of(layout) {
            return block;
        }
        // SAFETY: the caller vouches for the block; the copy fits both.
        unsafe {
            let fresh = self.alloc(wanted);
            if !fresh.is_null() {
                core::ptr::copy_nonoverlapping(block, fresh, layout.size().min(bytes));
                self.dealloc(block, layout);
            }
            fresh
        }
    }
}

#[cfg(not(test))]
#[global_allocator]
static HEAP: Heap = Heap::empty();

#[cfg(not(test))]
pub(crate) fn open() {
    let parameters = crate::boot::parameters();
    // SAFETY: before the first allocation; the VMM says that this RAM is free.
    let region = unsafe { &mut *HEAP.0.get() };
    region.next = parameters.free_start as usize;
    region.end = parameters.ram_low_bytes as usize;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heap_over(buffer: &mut [u128]) -> Heap {
        let heap = Heap::empty();
        // SAFETY: not shared yet.
        let region = unsafe { &mut *heap.0.get() };
        region.next = buffer.as_ptr() as usize;
        region.end = region.next + size_of_val(buffer);
        heap
    }

    #[test]
    fn blocks_are_disjoint_aligned_and_come_back() {
        let mut buffer = vec![0u128; 8192];
        let heap = heap_over(&mut buffer);
        let mut taken: Vec<(usize, Layout)> = Vec::new();
        for n in 0..200usize {
            let layout = Layout::from_size_align(1 + n * 3 % 300, 1 << (n % 7)).unwrap();
            // SAFETY: a block of at least the layout's size.
            let at = unsafe { heap.alloc(layout) } as usize;
            assert!(at != 0 && at.is_multiple_of(layout.align()));
            assert!(
                taken
                    .iter()
                    .all(|(other, l)| at + layout.size() <= *other || *other + l.size() <= at)
            );
            taken.push((at, layout));
        }
        let (at, layout) = taken[100];
        // SAFETY: taken above, given back once.
        unsafe { heap.dealloc(at as *mut u8, layout) };
        // SAFETY: as above.
        assert_eq!(unsafe { heap.alloc(layout) } as usize, at);
    }

    #[test]
    fn a_request_beyond_the_region_is_refused() {
        let mut buffer = vec![0u128; 64];
        let heap = heap_over(&mut buffer);
        // SAFETY: nothing is done with the blocks.
        unsafe {
            assert!(heap.alloc(Layout::from_size_align(4096, 8).unwrap()).is_null());
            assert!(heap.alloc(Layout::from_size_align(1 << 40, 8).unwrap()).is_null());
        }
    }
}

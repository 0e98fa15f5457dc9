//! The shared memory between a guest's network device (in the VMM) and the switch.
//!
//! One memfd of [`REGION_BYTES`] holds two single-producer single-consumer rings of fixed slots:
//! first guest → switch ([`Direction::FromGuest`]), then switch → guest ([`Direction::ToGuest`]).
//! Each ring has an eventfd that its producer writes when the consumer asked to be woken.
//! The switch never maps guest memory; a frame is copied between virtqueue and ring by the VMM.
//!
//! # Wake-ups without loss
//! A consumer that finds its ring empty stores `wake = 1`, fences, looks once more and only then
//! sleeps. A producer publishes `head`, fences, and where `wake` was 1 swaps it to 0 and writes
//! the eventfd.
//!
//! # Distrust
//! Both sides read indices and lengths as hostile: [`Consumer::pop`] and [`Producer::push`] check
//! them, copy each frame out before it is parsed, and report [`RingError`] for values that no
//! honest peer writes. The side that sees one closes the port.

/// Slots of each ring.
pub const SLOTS: u32 = 512;
/// Bytes of each slot: 4 of length, the rest frame.
pub const SLOT_BYTES: usize = 2048;
/// Longest frame: Ethernet header, MTU and a VLAN tag fit.
pub const FRAME_BYTES_MAX: usize = SLOT_BYTES - 4;
/// Bytes before a ring's slots.
pub const HEADER_BYTES: usize = 4096;
/// Bytes of one ring.
pub const RING_BYTES: usize = HEADER_BYTES + SLOTS as usize * SLOT_BYTES;
/// Bytes of the whole region.
pub const REGION_BYTES: usize = 2 * RING_BYTES;

#[cfg(feature = "std")]
const HEAD: usize = 0;
#[cfg(feature = "std")]
const TAIL: usize = 64;
#[cfg(feature = "std")]
const WAKE: usize = 128;

/// Which of the two rings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The VMM produces, the switch consumes.
    FromGuest,
    /// The switch produces, the VMM consumes.
    ToGuest,
}

/// The peer wrote something that no honest peer writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingError {
    /// More filled slots than the ring has.
    Index,
    /// A length of 0 or over [`FRAME_BYTES_MAX`].
    Length,
}

impl core::fmt::Display for RingError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            RingError::Index => "packet ring index beyond the ring's slots",
            RingError::Length => "packet ring frame length out of range",
        })
    }
}

impl core::error::Error for RingError {}

#[cfg(feature = "std")]
pub use shared::{Consumer, Producer, Region};

#[cfg(feature = "std")]
mod shared {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};
    use rustix::fd::{AsFd, OwnedFd};
    use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fstat, ftruncate, memfd_create};
    use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
    use std::io;
    use std::ptr::NonNull;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering, fence};

    struct Mapping(NonNull<u8>);

    // SAFETY: the mapping lives until drop; all access is by atomics or by the one owner of an end.
    unsafe impl Send for Mapping {}
    // SAFETY: as above.
    unsafe impl Sync for Mapping {}

    impl Drop for Mapping {
        fn drop(&mut self) {
            // SAFETY: mapped in `Region::map` with this length and unmapped only here.
            let _ = unsafe { munmap(self.0.as_ptr().cast(), REGION_BYTES) };
        }
    }

    /// The descriptors of one port's rings, mapped.
    pub struct Region {
        memory: OwnedFd,
        from_guest: Arc<OwnedFd>,
        to_guest: Arc<OwnedFd>,
        mapping: Arc<Mapping>,
    }

    impl Region {
        /// A fresh region, sealed against resizing.
        pub fn create() -> io::Result<Region> {
            let memory =
                memfd_create("packet-ring", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
            ftruncate(&memory, REGION_BYTES as u64)?;
            fcntl_add_seals(&memory, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
            let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
            Self::map(memory, eventfd(0, flags)?, eventfd(0, flags)?)
        }

        /// Maps received descriptors, in the order of [`Region::descriptors`].
        ///
        /// # Errors
        /// `InvalidInput` where the memory has another size or could be shrunk under us.
        pub fn map(memory: OwnedFd, from_guest: OwnedFd, to_guest: OwnedFd) -> io::Result<Region> {
            let size_bytes = fstat(&memory)?.st_size;
            let seals = rustix::fs::fcntl_get_seals(&memory)?;
            if size_bytes != REGION_BYTES as i64 || !seals.contains(SealFlags::SHRINK) {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    format!(
                        "packet ring of {size_bytes} bytes; it must have {REGION_BYTES} and be sealed against shrinking"
                    ),
                ));
            }
            // SAFETY: a fresh shared mapping, nothing else refers to the address.
            let address = unsafe {
                mmap(
                    std::ptr::null_mut(),
                    REGION_BYTES,
                    ProtFlags::READ | ProtFlags::WRITE,
                    MapFlags::SHARED,
                    &memory,
                    0,
                )?
            };
            let address = NonNull::new(address.cast()).expect("mmap never maps address 0");
            let (from_guest, to_guest) = (Arc::new(from_guest), Arc::new(to_guest));
            Ok(Region { memory, from_guest, to_guest, mapping: Arc::new(Mapping(address)) })
        }

        /// Memory, guest→switch eventfd, switch→guest eventfd: what the other side maps.
        pub fn descriptors(&self) -> io::Result<[OwnedFd; 3]> {
            Ok([
                self.memory.as_fd().try_clone_to_owned()?,
                self.from_guest.as_fd().try_clone_to_owned()?,
                self.to_guest.as_fd().try_clone_to_owned()?,
            ])
        }

        fn ring(&self, direction: Direction) -> io::Result<Ring> {
            let (offset, event) = match direction {
                Direction::FromGuest => (0, &self.from_guest),
                Direction::ToGuest => (RING_BYTES, &self.to_guest),
            };
            Ok(Ring { mapping: Arc::clone(&self.mapping), offset, event: Arc::clone(event) })
        }

        /// The writing end of a ring; a region has one producer a direction.
        pub fn producer(&self, direction: Direction) -> io::Result<Producer> {
            let ring = self.ring(direction)?;
            let head = ring.word(HEAD).load(Ordering::Acquire);
            Ok(Producer { ring, head })
        }

        /// The reading end of a ring; a region has one consumer a direction.
        pub fn consumer(&self, direction: Direction) -> io::Result<Consumer> {
            let ring = self.ring(direction)?;
            let tail = ring.word(TAIL).load(Ordering::Acquire);
            Ok(Consumer { ring, tail })
        }
    }

    struct Ring {
        mapping: Arc<Mapping>,
        offset: usize,
        event: Arc<OwnedFd>,
    }

    impl Ring {
        fn word(&self, at: usize) -> &AtomicU32 {
            // SAFETY: `offset + at` is a 4-aligned address inside the header of a live mapping.
            unsafe { AtomicU32::from_ptr(self.mapping.0.as_ptr().add(self.offset + at).cast()) }
        }

        fn slot(&self, index: u32) -> *mut u8 {
            let at = self.offset + HEADER_BYTES + (index % SLOTS) as usize * SLOT_BYTES;
            // SAFETY: `index % SLOTS` keeps the slot inside the mapping.
            unsafe { self.mapping.0.as_ptr().add(at) }
        }

        fn filled(&self, head: u32, tail: u32) -> Result<u32, RingError> {
            let filled = head.wrapping_sub(tail);
            if filled > SLOTS { Err(RingError::Index) } else { Ok(filled) }
        }
    }

    /// The writing end.
    pub struct Producer {
        ring: Ring,
        head: u32,
    }

    impl Producer {
        /// Copies one frame in. `Ok(false)`: the ring is full and the frame was not taken.
        /// The consumer sees it after [`Producer::publish`].
        pub fn push(&mut self, frame: &[u8]) -> Result<bool, RingError> {
            if frame.is_empty() || frame.len() > FRAME_BYTES_MAX {
                return Err(RingError::Length);
            }
            let tail = self.ring.word(TAIL).load(Ordering::Acquire);
            if self.ring.filled(self.head, tail)? == SLOTS {
                return Ok(false);
            }
            let slot = self.ring.slot(self.head);
            // SAFETY: the slot is ours until `head` passes it, and the length was checked.
            unsafe {
                slot.cast::<u32>().write_volatile(frame.len() as u32);
                std::ptr::copy_nonoverlapping(frame.as_ptr(), slot.add(4), frame.len());
            }
            self.head = self.head.wrapping_add(1);
            Ok(true)
        }

        /// Shows the pushed frames to the consumer and wakes it if it sleeps.
        pub fn publish(&mut self) -> io::Result<()> {
            self.ring.word(HEAD).store(self.head, Ordering::Release);
            fence(Ordering::SeqCst);
            let wake = self.ring.word(WAKE);
            if wake.load(Ordering::Relaxed) == 1 && wake.swap(0, Ordering::AcqRel) == 1 {
                ring_event(&self.ring.event)?;
            }
            Ok(())
        }
    }

    fn ring_event(event: &OwnedFd) -> io::Result<()> {
        match rustix::io::write(event, &1u64.to_ne_bytes()) {
            Ok(_) | Err(rustix::io::Errno::AGAIN) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// The reading end.
    pub struct Consumer {
        ring: Ring,
        tail: u32,
    }

    impl Consumer {
        /// Copies the next frame into `frame` (at least [`FRAME_BYTES_MAX`] bytes) and returns its
        /// length, or `None` where the ring is empty.
        pub fn pop(&mut self, frame: &mut [u8]) -> Result<Option<usize>, RingError> {
            let head = self.ring.word(HEAD).load(Ordering::Acquire);
            if self.ring.filled(head, self.tail)? == 0 {
                return Ok(None);
            }
            let slot = self.ring.slot(self.tail);
            // SAFETY: the slot lies in the mapping; the peer may change it, so the length is read once.
            let len = unsafe { slot.cast::<u32>().read_volatile() } as usize;
            if len == 0 || len > FRAME_BYTES_MAX || len > frame.len() {
                return Err(RingError::Length);
            }
            // SAFETY: `len` fits the slot and the destination.
            unsafe { std::ptr::copy_nonoverlapping(slot.add(4), frame.as_mut_ptr(), len) };
            self.tail = self.tail.wrapping_add(1);
            self.ring.word(TAIL).store(self.tail, Ordering::Release);
            Ok(Some(len))
        }

        /// Asks for a wake-up. `true`: the ring is still empty and the caller may sleep on
        /// [`Consumer::event`]; `false`: frames came meanwhile, pop first.
        pub fn prepare_sleep(&mut self) -> bool {
            self.ring.word(WAKE).store(1, Ordering::Relaxed);
            fence(Ordering::SeqCst);
            let empty = self.ring.word(HEAD).load(Ordering::Acquire) == self.tail;
            if !empty {
                self.ring.word(WAKE).store(0, Ordering::Relaxed);
            }
            empty
        }

        /// The eventfd to poll; read it (it does not block) after it woke.
        pub fn event(&self) -> &OwnedFd {
            &self.ring.event
        }

        /// Clears the eventfd after a wake-up.
        pub fn clear_event(&self) {
            let mut count = [0u8; 8];
            let _ = rustix::io::read(&self.ring.event, &mut count);
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn frames_cross_in_order_and_a_full_ring_refuses() {
            let vmm = Region::create().unwrap();
            let [memory, from_guest, to_guest] = vmm.descriptors().unwrap();
            let switch = Region::map(memory, from_guest, to_guest).unwrap();
            let mut tx = vmm.producer(Direction::FromGuest).unwrap();
            let mut rx = switch.consumer(Direction::FromGuest).unwrap();
            let mut frame = [0u8; FRAME_BYTES_MAX];

            assert_eq!(rx.pop(&mut frame), Ok(None));
            for n in 0..SLOTS {
                assert_eq!(tx.push(&n.to_le_bytes()), Ok(true));
            }
            assert_eq!(tx.push(&[1]), Ok(false));
            tx.publish().unwrap();
            for n in 0..SLOTS {
                assert_eq!(rx.pop(&mut frame), Ok(Some(4)));
                assert_eq!(frame[..4], n.to_le_bytes());
            }
            assert_eq!(rx.pop(&mut frame), Ok(None));
        }

        #[test]
        fn a_sleeping_consumer_is_woken_once() {
            let region = Region::create().unwrap();
            let mut tx = region.producer(Direction::ToGuest).unwrap();
            let mut rx = region.consumer(Direction::ToGuest).unwrap();
            assert!(rx.prepare_sleep());
            tx.push(&[7]).unwrap();
            tx.publish().unwrap();
            let mut count = [0u8; 8];
            assert_eq!(rustix::io::read(rx.event(), &mut count).unwrap(), 8);
            tx.push(&[8]).unwrap();
            tx.publish().unwrap();
            assert_eq!(rustix::io::read(rx.event(), &mut count), Err(rustix::io::Errno::AGAIN));
            assert!(!rx.prepare_sleep());
        }

        #[test]
        fn a_lying_peer_is_an_error() {
            let region = Region::create().unwrap();
            let mut tx = region.producer(Direction::FromGuest).unwrap();
            let mut rx = region.consumer(Direction::FromGuest).unwrap();
            let mut frame = [0u8; FRAME_BYTES_MAX];
            assert_eq!(tx.push(&[]), Err(RingError::Length));
            assert_eq!(tx.push(&[0; FRAME_BYTES_MAX + 1]), Err(RingError::Length));
            tx.ring.word(HEAD).store(SLOTS + 1, Ordering::Release);
            assert_eq!(rx.pop(&mut frame), Err(RingError::Index));
            tx.ring.word(HEAD).store(1, Ordering::Release);
            assert_eq!(rx.pop(&mut frame), Err(RingError::Length));
        }
    }
}

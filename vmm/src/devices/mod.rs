//! What a guest's devices do, each in a folder of its own. How they are reached is [`crate::pci`].
//!
//! A [`Device`] is its description for the bus and a [`Backend`] that does the work. While the
//! driver is ready, one thread owns the backend and all of the device's queues.

pub mod balloon;
pub mod blk;
pub mod chain;
pub mod console;
pub mod counters;
pub mod fields;
pub mod net;
pub mod orders;
pub mod rate;
pub mod rng;
pub mod serial;
pub mod vsock;

use crate::machine::memory::Ram;
use crate::pci::msix::{Msix, NO_VECTOR};
use abi::packet_ring::Region;
use chain::Buffers;
use counters::Counters;
use fields::Fields;
use orders::Orders;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::EventFd;

/// Which kind of device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    /// virtio-blk.
    Disk,
    /// virtio-net.
    Net,
    /// virtio-rng.
    Rng,
    /// virtio-balloon.
    Balloon,
    /// virtio-vsock.
    Vsock,
}

impl std::fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            DeviceKind::Disk => "disk",
            DeviceKind::Net => "network device",
            DeviceKind::Rng => "random number device",
            DeviceKind::Balloon => "balloon",
            DeviceKind::Vsock => "vsock device",
        })
    }
}

/// A device that may be plugged.
pub struct Device {
    /// Its id for control requests.
    pub id: String,
    /// Which kind.
    pub kind: DeviceKind,
    /// virtio device type.
    pub virtio_type: u16,
    /// Features offered, without VIRTIO_F_VERSION_1.
    pub features: u64,
    /// Largest size of each queue.
    pub queue_sizes: Vec<u16>,
    /// How many of them, from the first on, a driver must set up; it may leave out the others.
    pub queues_needed: usize,
    /// Device configuration.
    pub config: Fields,
    /// A network device's packet ring.
    pub ring: Option<Arc<Region>>,
    /// A remote disk's connection.
    pub link: Option<Arc<blk::link::DiskLink>>,
    /// The host's end of a balloon.
    pub balloon: Option<Arc<balloon::link::BalloonLink>>,
    /// Its rate limits: one of a disk; of a network device from the guest, then to it.
    pub rates: Vec<Arc<rate::RateLink>>,
    /// What does the work.
    pub backend: Box<dyn Backend>,
}

/// The device can't go on: the guest or the peer broke its protocol.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The guest's queue is unusable.
    #[error("virtqueue: {0}")]
    Queue(#[from] virtio_queue::Error),
    /// The guest's index says there is more, and there is nothing to take.
    #[error("virtqueue {0}: its available index is beyond its size")]
    Index(usize),
    /// The switch broke the packet ring.
    #[error("packet ring: {0}")]
    Ring(#[from] abi::packet_ring::RingError),
    /// The kernel refused to wait or to wake.
    #[error("device thread: {0}")]
    Io(#[from] std::io::Error),
}

/// What a device does between DRIVER_OK and reset.
pub trait Backend: Send {
    /// Serves the queues until its [`Orders`] say to end, and rests while they say so.
    fn run(&mut self, work: Work) -> Result<(), DeviceError>;
}

/// What a device's thread owns while it runs.
pub struct Work {
    /// Guest memory.
    pub ram: Ram,
    /// The queues, valid and ready.
    pub queues: Vec<Queue>,
    /// Written by the kernel when the guest notifies any queue.
    pub doorbell: EventFd,
    /// Whether the thread shall serve, rest or end.
    pub orders: Arc<Orders>,
    /// How to tell the guest.
    pub interrupt: QueueInterrupt,
    /// Features agreed on.
    pub features: u64,
    /// What the device did.
    pub counters: Arc<Counters>,
}

impl Work {
    /// Takes notifications of `queue` back while it is being served.
    pub fn busy(&mut self, queue: usize) -> Result<(), DeviceError> {
        Ok(self.queues[queue].disable_notification(&self.ram)?)
    }

    /// Asks for notifications of `queue`; `true`: something is there already.
    pub fn idle(&mut self, queue: usize) -> Result<bool, DeviceError> {
        Ok(self.queues[queue].enable_notification(&self.ram)?)
    }

    /// Interrupts the guest for `queue` if it wants that.
    pub fn interrupt(&mut self, queue: usize) -> Result<(), DeviceError> {
        if self.queues[queue].needs_notification(&self.ram)? {
            self.interrupt.signal(queue);
        }
        Ok(())
    }

    /// Sleeps until the guest rings or `more` has something; `false`: stop. Rests here while the
    /// thread shall, so nothing of it may be in flight.
    pub fn wait(&self, more: Option<BorrowedFd<'_>>) -> Result<bool, DeviceError> {
        let more: Vec<_> = more.into_iter().map(|fd| (fd, PollFlags::IN)).collect();
        Ok(self.wait_any(&more, None)?.is_some())
    }

    /// Sleeps until the guest rings, one of `more` has what is asked of it, or `patience` is over.
    /// `None`: stop; otherwise what each of `more` has. Rests here as [`Work::wait`] does.
    pub fn wait_any(
        &self,
        more: &[(BorrowedFd<'_>, PollFlags)],
        patience: Option<Duration>,
    ) -> Result<Option<Vec<PollFlags>>, DeviceError> {
        let has = self.poll_any(more, patience)?;
        Ok((!self.orders.obey()).then_some(has))
    }

    /// As [`Work::wait_any`], and returns for an order without following it.
    pub fn poll_any(
        &self,
        more: &[(BorrowedFd<'_>, PollFlags)],
        patience: Option<Duration>,
    ) -> Result<Vec<PollFlags>, DeviceError> {
        let (orders, doorbell) = (borrow(self.orders.wake()), borrow(&self.doorbell));
        let mut set =
            vec![PollFd::new(&orders, PollFlags::IN), PollFd::new(&doorbell, PollFlags::IN)];
        set.extend(more.iter().map(|(fd, wanted)| PollFd::from_borrowed_fd(*fd, *wanted)));
        // Rounded up, so that what is waited for has come then.
        let timeout =
            patience.map(|patience| patience + Duration::from_micros(1)).map(|patience| Timespec {
                tv_sec: patience.as_secs() as i64,
                tv_nsec: patience.subsec_nanos().into(),
            });
        match poll(&mut set, timeout.as_ref()) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok(vec![PollFlags::empty(); more.len()]),
            Err(error) => return Err(std::io::Error::from(error).into()),
        }
        if !set[1].revents().is_empty() {
            let _ = self.doorbell.read();
        }
        Ok(set[2..].iter().map(PollFd::revents).collect())
    }

    /// Takes every chain of `queue`; `each` says how many bytes it wrote (a chain that is malformed
    /// is `None`). Returns the number of chains.
    pub fn drain(
        &mut self,
        queue: usize,
        mut each: impl FnMut(Option<Buffers>) -> u32,
    ) -> Result<usize, DeviceError> {
        let ram = self.ram.clone();
        let mut taken = 0;
        while let Some(chain) = self.queues[queue].pop_descriptor_chain(&ram) {
            let head = chain.head_index();
            let written = each(Buffers::collect(chain, &ram));
            self.queues[queue].add_used(&ram, head, written)?;
            taken += 1;
            if self.stopping() {
                break;
            }
        }
        if taken > 0 {
            self.interrupt(queue)?;
        }
        Ok(taken)
    }

    /// Whether the thread shall end. Rests here while it shall, so nothing of it may be in flight.
    pub fn stopping(&self) -> bool {
        self.orders.obey()
    }
}

/// Borrows an eventfd for polling.
pub fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open as long as the EventFd it is borrowed from.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// Interrupts of a device's queues.
pub struct QueueInterrupt {
    /// The function's vectors.
    pub msix: Arc<Msix>,
    /// The function's ISR status.
    pub isr: Arc<AtomicU8>,
    /// Vector of each queue.
    pub vectors: Vec<u16>,
}

impl QueueInterrupt {
    fn signal(&self, queue: usize) {
        self.isr.fetch_or(1, Ordering::AcqRel);
        self.msix.signal(self.vectors.get(queue).copied().unwrap_or(NO_VECTOR));
    }
}

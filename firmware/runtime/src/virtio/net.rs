//! virtio-net, as a device of smoltcp: one receive and one transmit queue, no offloads.

use super::queue::{Queue, Segment};
use super::transport::{Doorbell, Transport, VirtioError};
use alloc::alloc::{alloc, dealloc, handle_alloc_error};
use alloc::vec::Vec;
use core::alloc::Layout;
use core::cell::RefCell;
use smoltcp::phy::{self, DeviceCapabilities, Medium};
use smoltcp::time::Instant;

const FEATURE_MTU: u64 = 1 << 3;
const FEATURE_MAC: u64 = 1 << 5;
const QUEUE_SIZE: u16 = 64;
/// virtio 1.2, section 5.1.6: the header before each frame, all zeros without offloads.
const HEADER_BYTES: usize = 12;
const BUFFER_BYTES: usize = 2048;
const ETHERNET_HEADER_BYTES: usize = 14;
const MTU_DEFAULT: u16 = 1500;
/// Least MTU of IPv4 (RFC 791: every host takes 576 bytes).
const MTU_MIN: u16 = 576;
const MTU_MAX: u16 = (BUFFER_BYTES - HEADER_BYTES - ETHERNET_HEADER_BYTES) as u16;

/// One direction: a queue and a buffer for each of its entries.
struct Ring {
    queue: Queue,
    doorbell: Doorbell,
    buffers: Buffers,
    /// Buffer of each chain that the device holds, by head.
    buffer_of: Vec<u16>,
}

impl Ring {
    fn open(transport: &Transport, index: u16, features: u64) -> Result<Ring, VirtioError> {
        let (queue, doorbell) = transport.open_queue(index, QUEUE_SIZE, features)?;
        let size = queue.size();
        Ok(Ring {
            queue,
            doorbell,
            buffers: Buffers::new(size),
            buffer_of: alloc::vec![0; usize::from(size)],
        })
    }

    fn hand_over(&mut self, buffer: u16, bytes: usize, device_writes: bool) {
        let address = self.buffers.get(buffer).as_mut_ptr() as u64;
        // SAFETY: each buffer is in the device's hands at most once, and nobody touches it then.
        let added =
            unsafe { self.queue.add(&[Segment { address, len: bytes as u32, device_writes }]) };
        if let Ok(head) = added {
            self.buffer_of[usize::from(head)] = buffer;
        }
    }

    fn publish(&mut self) {
        if self.queue.publish() {
            self.doorbell.ring();
        }
    }
}

/// The buffers of one direction. Not zeroed: touching them would cost the host a page for each.
struct Buffers {
    memory: *mut u8,
    layout: Layout,
}

impl Buffers {
    fn new(count: u16) -> Buffers {
        let layout = Layout::from_size_align(usize::from(count) * BUFFER_BYTES, BUFFER_BYTES)
            .expect("a queue has at most 256 entries");
        // SAFETY: a queue has entries, so the size is above 0.
        let memory = unsafe { alloc(layout) };
        if memory.is_null() {
            handle_alloc_error(layout);
        }
        Buffers { memory, layout }
    }

    fn get(&mut self, buffer: u16) -> &mut [u8] {
        let start = usize::from(buffer) * BUFFER_BYTES;
        assert!(start < self.layout.size(), "buffers are numbered by their queue's entries");
        // SAFETY: inside the allocation. It is guest RAM that a device we can't see also writes,
        // so the compiler may assume nothing about its content, and every value is a valid u8.
        unsafe { core::slice::from_raw_parts_mut(self.memory.add(start), BUFFER_BYTES) }
    }
}

impl Drop for Buffers {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout; the device was reset before.
        unsafe { dealloc(self.memory, self.layout) }
    }
}

/// One network device.
pub struct NetDevice {
    transport: Transport,
    receive: RefCell<Ring>,
    transmit: RefCell<Transmit>,
    mac: [u8; 6],
    mtu: u16,
}

struct Transmit {
    ring: Ring,
    free: Vec<u16>,
}

impl Transmit {
    fn reclaim(&mut self) {
        while let Some((head, _)) = self.ring.queue.pop_used() {
            self.free.push(self.ring.buffer_of[usize::from(head)]);
        }
    }
}

impl NetDevice {
    /// Starts the device.
    pub fn open(transport: Transport) -> Result<NetDevice, VirtioError> {
        let features = transport.negotiate(FEATURE_MTU | FEATURE_MAC)?;
        let mut receive = Ring::open(&transport, 0, features)?;
        let transmit = Ring::open(&transport, 1, features)?;
        let config = transport.config();
        let [a, b, c, d] = config.read32(0).to_le_bytes();
        let [e, f] = config.read16(4).to_le_bytes();
        let mtu = if features & FEATURE_MTU != 0 { config.read16(10) } else { MTU_DEFAULT };
        transport.start();
        for buffer in 0..receive.queue.size() {
            receive.hand_over(buffer, BUFFER_BYTES, true);
        }
        receive.publish();
        let free = (0..transmit.queue.size()).rev().collect();
        Ok(NetDevice {
            transport,
            receive: RefCell::new(receive),
            transmit: RefCell::new(Transmit { ring: transmit, free }),
            mac: [a, b, c, d, e, f],
            mtu: mtu.clamp(MTU_MIN, MTU_MAX),
        })
    }

    /// Slot on bus 0.
    #[must_use]
    pub fn slot(&self) -> u16 {
        self.transport.slot()
    }

    /// MAC address.
    #[must_use]
    pub fn mac(&self) -> [u8; 6] {
        self.mac
    }

    /// Largest IP packet, bytes.
    #[must_use]
    pub fn mtu(&self) -> u16 {
        self.mtu
    }

    /// Lowers the MTU to what DHCP said; values that IPv4 can't use are ignored.
    pub fn lower_mtu(&mut self, mtu: u16) {
        if mtu >= MTU_MIN {
            self.mtu = self.mtu.min(mtu);
        }
    }

    /// Shows new buffers and frames to the device: one doorbell for all of them.
    pub fn flush(&mut self) {
        self.receive.get_mut().publish();
        self.transmit.get_mut().ring.publish();
    }

    /// Asks for an interrupt at the next frame, or, where every transmit buffer is in use (no
    /// frame is received then), when one is free. `false`: look again first.
    #[must_use]
    pub fn arm(&mut self) -> bool {
        let transmit = self.transmit.get_mut();
        if transmit.free.is_empty() {
            transmit.ring.queue.arm()
        } else {
            self.receive.get_mut().queue.arm()
        }
    }

    /// No interrupts until the next [`NetDevice::arm`].
    pub fn disarm(&mut self) {
        self.receive.get_mut().queue.disarm();
        self.transmit.get_mut().ring.queue.disarm();
    }
}

impl Drop for NetDevice {
    /// The device lets go of the memory before it is freed.
    fn drop(&mut self) {
        self.transport.reset();
    }
}

impl phy::Device for NetDevice {
    type RxToken<'a> = ReceiveToken<'a>;
    type TxToken<'a> = TransmitToken<'a>;

    fn receive(&mut self, _now: Instant) -> Option<(ReceiveToken<'_>, TransmitToken<'_>)> {
        let transmit = self.transmit.get_mut();
        transmit.reclaim();
        if transmit.free.is_empty() {
            return None;
        }
        let ring = self.receive.get_mut();
        let (head, written) = ring.queue.pop_used()?;
        let buffer = ring.buffer_of[usize::from(head)];
        let frame_end = (written as usize).clamp(HEADER_BYTES, BUFFER_BYTES);
        Some((
            ReceiveToken { ring: &self.receive, buffer, frame_end },
            TransmitToken(&self.transmit),
        ))
    }

    fn transmit(&mut self, _now: Instant) -> Option<TransmitToken<'_>> {
        let transmit = self.transmit.get_mut();
        transmit.reclaim();
        (!transmit.free.is_empty()).then_some(TransmitToken(&self.transmit))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = usize::from(self.mtu) + ETHERNET_HEADER_BYTES;
        capabilities
    }
}

/// A received frame; its buffer goes back to the device when this is dropped.
pub struct ReceiveToken<'a> {
    ring: &'a RefCell<Ring>,
    buffer: u16,
    frame_end: usize,
}

impl phy::RxToken for ReceiveToken<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, read: F) -> R {
        let mut ring = self.ring.borrow_mut();
        read(&ring.buffers.get(self.buffer)[HEADER_BYTES..self.frame_end])
    }
}

impl Drop for ReceiveToken<'_> {
    fn drop(&mut self) {
        self.ring.borrow_mut().hand_over(self.buffer, BUFFER_BYTES, true);
    }
}

/// Room for one frame.
pub struct TransmitToken<'a>(&'a RefCell<Transmit>);

impl phy::TxToken for TransmitToken<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, bytes: usize, write: F) -> R {
        let mut transmit = self.0.borrow_mut();
        let buffer = transmit.free.pop().expect("a token exists only while a buffer is free");
        let area = transmit.ring.buffers.get(buffer);
        area[..HEADER_BYTES].fill(0);
        let result = write(&mut area[HEADER_BYTES..HEADER_BYTES + bytes]);
        transmit.ring.hand_over(buffer, HEADER_BYTES + bytes, false);
        result
    }
}

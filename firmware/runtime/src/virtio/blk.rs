//! virtio-blk: one request at a time, started and polled, so that the caller can serve its
//! network while a disk is slow.

mod load;

pub use load::{DEPTH_MAX, LOAD_BYTES_MAX, Load, LoadFigures};

use super::queue::{Queue, Segment};
use super::transport::{Doorbell, Transport, VirtioError};
use alloc::boxed::Box;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

/// Bytes of a sector.
pub const SECTOR_BYTES: u64 = 512;
/// Most bytes of one request.
pub const REQUEST_BYTES_MAX: usize = 64 << 10;
/// Bytes of a serial number.
pub const SERIAL_BYTES: usize = 20;

const FEATURE_READ_ONLY: u64 = 1 << 5;
const FEATURE_FLUSH: u64 = 1 << 9;
const FEATURES: u64 = FEATURE_READ_ONLY | FEATURE_FLUSH;
const QUEUE_SIZE: u16 = 4;
const TYPE_IN: u32 = 0;
const TYPE_OUT: u32 = 1;
const TYPE_FLUSH: u32 = 4;
const TYPE_GET_ID: u32 = 8;
const STATUS_UNSUPPORTED: u8 = 2;
const STATUS_PENDING: u8 = 0xFF;

/// Why a request failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockError {
    /// Beyond the disk's end, not whole sectors, or more than [`REQUEST_BYTES_MAX`].
    Range,
    /// The disk takes no writes.
    ReadOnly,
    /// A request is under way.
    Busy,
    /// The device said I/O error.
    Io,
    /// The device does not know the request.
    Unsupported,
}

impl fmt::Display for BlockError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            BlockError::Range => "outside the disk",
            BlockError::ReadOnly => "the disk is read-only",
            BlockError::Busy => "a request is under way",
            BlockError::Io => "I/O error",
            BlockError::Unsupported => "not supported by the device",
        })
    }
}

/// What the device reads and writes beside the data.
#[repr(C)]
struct Frame {
    kind: u32,
    reserved: u32,
    sector: u64,
    status: u8,
}

/// One disk.
pub struct BlockDevice {
    transport: Transport,
    queue: Queue,
    doorbell: Doorbell,
    capacity_sectors: u64,
    read_only: bool,
    flush: bool,
    frame: Box<Frame>,
    data: Vec<u8>,
    busy: bool,
}

impl BlockDevice {
    /// Starts the device.
    pub fn open(transport: Transport) -> Result<BlockDevice, VirtioError> {
        let features = transport.negotiate(FEATURES)?;
        let (queue, doorbell) = transport.open_queue(0, QUEUE_SIZE, features)?;
        if queue.size() < QUEUE_SIZE {
            return Err(VirtioError::Queue(0));
        }
        let config = transport.config();
        let capacity_sectors = u64::from(config.read32(0)) | u64::from(config.read32(4)) << 32;
        transport.start();
        Ok(BlockDevice {
            transport,
            queue,
            doorbell,
            capacity_sectors,
            read_only: features & FEATURE_READ_ONLY != 0,
            flush: features & FEATURE_FLUSH != 0,
            frame: Box::new(Frame { kind: 0, reserved: 0, sector: 0, status: STATUS_PENDING }),
            data: Vec::new(),
            busy: false,
        })
    }

    /// Slot on bus 0.
    #[must_use]
    pub fn slot(&self) -> u16 {
        self.transport.slot()
    }

    /// Size in bytes.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.capacity_sectors.saturating_mul(SECTOR_BYTES)
    }

    /// Is a request under way?
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.busy
    }

    fn check_range(&self, offset: u64, bytes: usize) -> Result<(), BlockError> {
        let whole =
            offset.is_multiple_of(SECTOR_BYTES) && (bytes as u64).is_multiple_of(SECTOR_BYTES);
        let end = offset.checked_add(bytes as u64).ok_or(BlockError::Range)?;
        if !whole || bytes == 0 || bytes > REQUEST_BYTES_MAX || end > self.size_bytes() {
            return Err(BlockError::Range);
        }
        Ok(())
    }

    /// Starts reading whole sectors.
    pub fn start_read(&mut self, offset: u64, bytes: usize) -> Result<(), BlockError> {
        self.check_range(offset, bytes)?;
        self.start(TYPE_IN, offset / SECTOR_BYTES, bytes)
    }

    /// Starts writing whole sectors; `fill` writes the data in place.
    pub fn start_write(
        &mut self,
        offset: u64,
        bytes: usize,
        fill: impl FnOnce(&mut [u8]),
    ) -> Result<(), BlockError> {
        self.check_range(offset, bytes)?;
        if self.read_only {
            return Err(BlockError::ReadOnly);
        }
        if self.busy {
            return Err(BlockError::Busy);
        }
        self.data.resize(bytes, 0);
        fill(&mut self.data);
        self.start(TYPE_OUT, offset / SECTOR_BYTES, bytes)
    }

    /// Starts making earlier writes durable. `Ok(false)`: the device has no cache, it is done.
    pub fn start_flush(&mut self) -> Result<bool, BlockError> {
        if !self.flush {
            return Ok(false);
        }
        self.start(TYPE_FLUSH, 0, 0)?;
        Ok(true)
    }

    /// Starts asking for the serial number.
    pub fn start_serial(&mut self) -> Result<(), BlockError> {
        self.start(TYPE_GET_ID, 0, SERIAL_BYTES)
    }

    fn start(&mut self, kind: u32, sector: u64, bytes: usize) -> Result<(), BlockError> {
        if self.busy {
            return Err(BlockError::Busy);
        }
        self.data.resize(bytes, 0);
        *self.frame = Frame { kind, reserved: 0, sector, status: STATUS_PENDING };
        let frame = (&raw mut *self.frame) as u64;
        let header = Segment { address: frame, len: 16, device_writes: false };
        let data = Segment {
            address: self.data.as_mut_ptr() as u64,
            len: bytes as u32,
            device_writes: kind != TYPE_OUT,
        };
        let status = Segment {
            address: frame + core::mem::offset_of!(Frame, status) as u64,
            len: 1,
            device_writes: true,
        };
        let with_data = [header, data, status];
        let without_data = [header, status];
        let chain: &[Segment] = if bytes > 0 { &with_data } else { &without_data };
        // SAFETY: frame and data live in self and are not touched while `busy`.
        unsafe { self.queue.add(chain) }.map_err(|_| BlockError::Busy)?;
        self.busy = true;
        if self.queue.publish() {
            self.doorbell.ring();
        }
        Ok(())
    }

    /// The outcome of the request under way, once; its data is then in [`BlockDevice::data`].
    pub fn poll(&mut self) -> Option<Result<(), BlockError>> {
        self.queue.disarm();
        self.queue.pop_used()?;
        self.busy = false;
        // SAFETY: the device is done with the frame; it wrote the status behind the compiler.
        match unsafe { (&raw const self.frame.status).read_volatile() } {
            0 => Some(Ok(())),
            STATUS_UNSUPPORTED => Some(Err(BlockError::Unsupported)),
            _ => Some(Err(BlockError::Io)),
        }
    }

    /// What the last read request delivered.
    #[must_use]
    pub fn data(&self) -> &[u8] {
        &self.data
    }

    /// The serial number, after [`BlockDevice::start_serial`] has ended well.
    #[must_use]
    pub fn serial(&self) -> String {
        let bytes = self.data.split(|byte| *byte == 0).next().unwrap_or(&[]);
        bytes.iter().filter(|byte| byte.is_ascii_graphic()).map(|byte| char::from(*byte)).collect()
    }

    /// Asks for an interrupt at the request's end. `false`: it has ended.
    #[must_use]
    pub fn arm(&mut self) -> bool {
        !self.busy || self.queue.arm()
    }
}

impl Drop for BlockDevice {
    /// The device lets go of the memory before it is freed.
    fn drop(&mut self) {
        self.transport.reset();
    }
}

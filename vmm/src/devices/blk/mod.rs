//! virtio-blk (virtio 1.2, section 5.2): one queue, one thread, requests one after another.
//!
//! `request` turns a descriptor chain into a plain request, `execute` carries it out on a
//! `source` (a raw file, or an NBD server over a socket).

pub mod execute;
pub mod nbd;
pub mod request;

use super::chain::Buffers;
use super::{Backend, Device, DeviceError, DeviceKind, Work};
use crate::config::{DiskConfig, DiskSource};
use crate::process::resources::{Access, ResourceError, Supply};
use nbd::NbdClient;
use request::Request;
use std::fs::File;
use std::io::{Seek, SeekFrom};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress};

/// Bytes of a sector, the unit of every address.
pub const SECTOR_BYTES: u64 = 512;
/// Size of the queue.
const QUEUE_SIZE: u16 = 256;
/// Most data pieces of one request.
const SEGMENTS: u32 = 254;
/// Most sectors of one discard or write-zeroes request.
pub const CLEAR_SECTORS_MAX: u32 = 1 << 22;
/// Length of a serial number.
pub const SERIAL_BYTES: usize = VIRTIO_BLK_ID_BYTES as usize;

/// Where a disk's bytes are.
#[derive(Debug)]
pub enum Source {
    /// A file or block device.
    Raw(File),
    /// An NBD server.
    Nbd(NbdClient),
}

/// A disk's backend.
#[derive(Debug)]
pub struct Disk {
    /// Where its bytes are.
    pub source: Source,
    /// Its size.
    pub sectors: u64,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Its serial number, zero padded.
    pub serial: [u8; SERIAL_BYTES],
    bad_requests: u64,
}

/// Opens a disk.
pub fn open(config: &DiskConfig, supply: &mut Supply) -> Result<Device, ResourceError> {
    let what = format!("disk {:?}", config.id);
    let unusable = |reason: String| ResourceError::Unusable { what: what.clone(), reason };
    let access = if config.read_only { Access::Read } else { Access::Write };
    let (source, size_bytes) = match &config.source {
        DiskSource::Raw(resource) => {
            let mut file = supply.file(resource, access, &what)?;
            let size = file
                .seek(SeekFrom::End(0))
                .map_err(|error| unusable(format!("find its size: {error}")))?;
            (Source::Raw(file), size)
        }
        DiskSource::Nbd { socket, size_bytes } => {
            let socket = supply.stream(socket, &what)?;
            let client = NbdClient::new(socket).map_err(|error| unusable(error.to_string()))?;
            (Source::Nbd(client), *size_bytes)
        }
    };
    if size_bytes < SECTOR_BYTES {
        return Err(unusable(format!(
            "{size_bytes} bytes; a disk has at least one sector of {SECTOR_BYTES}"
        )));
    }
    let mut serial = [0; SERIAL_BYTES];
    let shown = config.serial.len().min(SERIAL_BYTES);
    serial[..shown].copy_from_slice(&config.serial.as_bytes()[..shown]);
    let sectors = size_bytes / SECTOR_BYTES;
    let disk = Disk { source, sectors, read_only: config.read_only, serial, bad_requests: 0 };
    Ok(Device {
        id: config.id.clone(),
        kind: DeviceKind::Disk,
        virtio_type: 2,
        features: disk.features(),
        queue_sizes: vec![QUEUE_SIZE],
        config: disk.config(),
        ring: None,
        backend: Box::new(disk),
    })
}

impl Disk {
    fn features(&self) -> u64 {
        let mut features = 1 << VIRTIO_BLK_F_FLUSH
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << VIRTIO_RING_F_EVENT_IDX;
        if self.read_only {
            features |= 1 << VIRTIO_BLK_F_RO;
        } else if matches!(self.source, Source::Raw(_)) {
            features |= 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES;
        }
        features
    }

    /// `struct virtio_blk_config`.
    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; 60];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.sectors.to_le_bytes());
        put(12, &SEGMENTS.to_le_bytes());
        put(20, &(SECTOR_BYTES as u32).to_le_bytes());
        put(34, &1u16.to_le_bytes());
        for at in [36, 48] {
            put(at, &CLEAR_SECTORS_MAX.to_le_bytes());
            put(at + 4, &1u32.to_le_bytes());
        }
        put(44, &(4096 / SECTOR_BYTES as u32).to_le_bytes());
        put(56, &[1]);
        config
    }

    /// Serves every request that waits.
    fn serve(&mut self, work: &mut Work) -> Result<(), DeviceError> {
        let ram = work.ram.clone();
        let mut promised = false;
        loop {
            work.busy(0)?;
            let mut taken = 0;
            while let Some(chain) = work.queues[0].pop_descriptor_chain(&ram) {
                let head = chain.head_index();
                let written =
                    self.answer(Buffers::collect(chain, &ram).and_then(Request::parse), work);
                work.queues[0].add_used(&ram, head, written)?;
                work.interrupt(0)?;
                taken += 1;
                if work.stopping() {
                    return Ok(());
                }
            }
            if promised && taken == 0 {
                return Err(DeviceError::Index(0));
            }
            promised = work.idle(0)?;
            if !promised {
                return Ok(());
            }
        }
    }

    /// Carries a request out and stores its status; returns the bytes written to the guest.
    fn answer(&mut self, request: Option<Request>, work: &Work) -> u32 {
        let Some(request) = request else {
            self.bad_requests += 1;
            return 0;
        };
        let done = execute::execute(self, &request, work);
        let _ = work.ram.write_obj(done.status, GuestAddress(request.status));
        done.written + 1
    }
}

impl Backend for Disk {
    fn run(&mut self, mut work: Work) -> Result<(), DeviceError> {
        loop {
            self.serve(&mut work)?;
            if !work.wait(None)? {
                return Ok(());
            }
        }
    }
}

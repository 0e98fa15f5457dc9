//! Deciding what a request asks for, and carrying it out on a file.

use super::request::{HEADER_BYTES, Request};
use super::{CLEAR_SECTORS_MAX, Disk, SECTOR_BYTES, Source};
use crate::devices::Work;
use crate::devices::chain::{Segment, copy_out, total};
use crate::machine::memory::Ram;
use rustix::fs::{FallocateFlags, fallocate, fdatasync};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend};

/// Bytes of one range of a discard or write-zeroes request.
const RANGE_BYTES: usize = 16;
const FAILED: Act = Act::Refuse(VIRTIO_BLK_S_IOERR as u8);
const UNSUPPORTED: Act = Act::Refuse(VIRTIO_BLK_S_UNSUPP as u8);

/// What a request asks for, checked against the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// Read at a byte offset.
    Read(u64),
    /// Write at a byte offset.
    Write(u64),
    /// Make everything answered durable.
    Flush,
    /// Tell the serial number.
    GetId,
    /// Discard a range.
    Discard {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Make a range read as zeroes.
    Zero {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
        /// By giving its room back.
        unmap: bool,
    },
    /// Refuse, with this status.
    Refuse(u8),
}

impl Act {
    /// Whether it changes the disk.
    pub fn changes(self) -> bool {
        matches!(self, Act::Write(_) | Act::Discard { .. } | Act::Zero { .. })
    }
}

/// A request on its way.
#[derive(Debug)]
pub struct Job {
    /// The queue it came by.
    pub queue: usize,
    /// The chain's head, for the used ring.
    pub head: u16,
    /// Where its data is.
    pub request: Request,
    /// What it asks for.
    pub act: Act,
    /// Bytes of its data that are moved already.
    pub done: usize,
}

impl Job {
    /// The data that it moves.
    pub fn data(&self) -> &[Segment] {
        match self.act {
            Act::Write(_) => &self.request.from_guest,
            Act::Read(_) => &self.request.to_guest,
            _ => &[],
        }
    }
}

impl Disk {
    /// What a request asks for; its header is read here, once.
    pub(super) fn decide(&self, request: &Request, work: &Work) -> Act {
        let mut header = [0; HEADER_BYTES];
        if copy_out(&work.ram, &request.header, &mut header) != HEADER_BYTES {
            return FAILED;
        }
        let kind = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
        let mut sector = [0; 8];
        sector.copy_from_slice(&header[8..]);
        let sector = u64::from_le_bytes(sector);
        let at = |data: &[Segment]| self.offset(sector, total(data));
        match kind {
            VIRTIO_BLK_T_IN => at(&request.to_guest).map_or(FAILED, Act::Read),
            VIRTIO_BLK_T_FLUSH => Act::Flush,
            VIRTIO_BLK_T_GET_ID => Act::GetId,
            VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES
                if self.read_only =>
            {
                FAILED
            }
            VIRTIO_BLK_T_OUT => at(&request.from_guest).map_or(FAILED, Act::Write),
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
                self.decide_clear(kind, &request.from_guest, work)
            }
            _ => UNSUPPORTED,
        }
    }

    /// Byte offset of a transfer that lies on the disk in whole sectors.
    fn offset(&self, sector: u64, len: usize) -> Option<u64> {
        let sectors = len as u64 / SECTOR_BYTES;
        let whole = (len as u64).is_multiple_of(SECTOR_BYTES);
        let end = sector.checked_add(sectors)?;
        (whole && end <= self.sectors).then(|| sector * SECTOR_BYTES)
    }

    /// Discard and write-zeroes: one range (`max_*_seg` is 1).
    fn decide_clear(&self, kind: u32, ranges: &[Segment], work: &Work) -> Act {
        if matches!(self.source, Source::Nbd(_)) {
            return UNSUPPORTED;
        }
        let mut range = [0; RANGE_BYTES];
        if total(ranges) != RANGE_BYTES || copy_out(&work.ram, ranges, &mut range) != RANGE_BYTES {
            return FAILED;
        }
        let mut sector = [0; 8];
        sector.copy_from_slice(&range[..8]);
        let word = |at: usize| {
            u32::from_le_bytes([range[at], range[at + 1], range[at + 2], range[at + 3]])
        };
        let (sectors, flags) = (word(8), word(12));
        const UNMAP: u32 = 1;
        if flags & !UNMAP != 0 || (kind == VIRTIO_BLK_T_DISCARD && flags != 0) {
            return UNSUPPORTED;
        }
        let len = u64::from(sectors) * SECTOR_BYTES;
        let offset = self.offset(u64::from_le_bytes(sector), len as usize);
        match offset.filter(|_| sectors > 0 && sectors <= CLEAR_SECTORS_MAX) {
            None => FAILED,
            Some(offset) if kind == VIRTIO_BLK_T_DISCARD => Act::Discard { offset, len },
            Some(offset) => Act::Zero { offset, len, unmap: flags & UNMAP != 0 },
        }
    }
}

/// Carries out a request that moves or changes a file's bytes.
pub(super) fn perform(file: &File, job: &Job, work: &Work) -> io::Result<()> {
    const PUNCH: FallocateFlags = FallocateFlags::PUNCH_HOLE;
    const KEEP: FallocateFlags = FallocateFlags::KEEP_SIZE;
    let not_supported = |error: &rustix::io::Errno| *error == rustix::io::Errno::OPNOTSUPP;
    match job.act {
        Act::Read(at) => transfer(file, at, &job.request.to_guest, &work.ram, Direction::ToGuest),
        Act::Write(at) => {
            transfer(file, at, &job.request.from_guest, &work.ram, Direction::FromGuest)
        }
        Act::Flush => Ok(fdatasync(file)?),
        Act::Discard { offset, len } => match fallocate(file, PUNCH | KEEP, offset, len) {
            Err(error) if not_supported(&error) => Ok(()),
            other => Ok(other?),
        },
        Act::Zero { offset, len, unmap } => {
            let mode = if unmap { PUNCH } else { FallocateFlags::ZERO_RANGE };
            match fallocate(file, mode | KEEP, offset, len) {
                Err(error) if not_supported(&error) => zero(file, offset, len),
                other => Ok(other?),
            }
        }
        Act::GetId | Act::Refuse(_) => Ok(()),
    }
}

/// Writes zeroes where the file system has no better way.
fn zero(file: &File, offset: u64, len: u64) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    let zeroes = [0u8; 64 << 10];
    let mut done = 0;
    while done < len {
        let step = (len - done).min(zeroes.len() as u64);
        file.write_all_at(&zeroes[..step as usize], offset + done)?;
        done += step;
    }
    Ok(())
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    ToGuest,
    FromGuest,
}

/// Moves whole segments between a file and guest memory without a copy of our own.
fn transfer(
    file: &File,
    mut offset: u64,
    segments: &[Segment],
    ram: &Ram,
    direction: Direction,
) -> io::Result<()> {
    let mut vectors = io_vectors(segments, ram)?;
    let mut first = 0;
    while first < vectors.len() {
        let rest = &vectors[first..];
        let (fd, count) = (file.as_raw_fd(), rest.len() as libc::c_int);
        // SAFETY: each vector lies in mapped guest memory (checked by `io_vectors`), which stays
        // mapped as long as `ram`; nothing in this process holds references into guest memory.
        let moved = unsafe {
            match direction {
                Direction::ToGuest => libc::preadv64(fd, rest.as_ptr(), count, offset as i64),
                Direction::FromGuest => libc::pwritev64(fd, rest.as_ptr(), count, offset as i64),
            }
        };
        match moved {
            ..0 => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            _ => {
                offset += moved as u64;
                first += advance(&mut vectors[first..], moved as usize);
            }
        }
    }
    if direction == Direction::ToGuest {
        mark_dirty(segments, ram);
    }
    Ok(())
}

/// Tells the dirty bitmap that the kernel wrote guest memory.
pub(super) fn mark_dirty(segments: &[Segment], ram: &Ram) {
    for segment in segments {
        if let Ok(slice) = ram.get_slice(GuestAddress(segment.address), segment.len) {
            slice.bitmap().mark_dirty(0, segment.len);
        }
    }
}

/// Segments as the kernel's vectors.
pub(super) fn io_vectors(segments: &[Segment], ram: &Ram) -> io::Result<Vec<libc::iovec>> {
    segments
        .iter()
        .map(|segment| {
            let slice = ram
                .get_slice(GuestAddress(segment.address), segment.len)
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error.to_string()))?;
            Ok(libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: segment.len,
            })
        })
        .collect()
}

/// Moves vectors on by `len` bytes; returns how many are used up.
pub(super) fn advance(vectors: &mut [libc::iovec], mut len: usize) -> usize {
    let mut used = 0;
    for vector in vectors {
        if len < vector.iov_len {
            vector.iov_base = vector.iov_base.cast::<u8>().wrapping_add(len).cast();
            vector.iov_len -= len;
            break;
        }
        len -= vector.iov_len;
        used += 1;
    }
    used
}

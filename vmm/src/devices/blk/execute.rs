//! Carrying out a request.

use super::request::{HEADER_BYTES, Request};
use super::{CLEAR_SECTORS_MAX, Disk, SECTOR_BYTES, Source};
use crate::devices::Work;
use crate::devices::chain::{Segment, copy_in, copy_out, total};
use crate::machine::memory::Ram;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FallocateFlags, fallocate, fdatasync};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend};

/// Bytes of one range of a discard or write-zeroes request.
const RANGE_BYTES: usize = 16;
/// How long a write waits before it tries a full disk again.
const FULL_DISK_RETRY_S: i64 = 1;

/// The outcome of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done {
    /// VIRTIO_BLK_S_*.
    pub status: u8,
    /// Bytes of data written to the guest.
    pub written: u32,
}

const OK: Done = Done { status: VIRTIO_BLK_S_OK as u8, written: 0 };
const FAILED: Done = Done { status: VIRTIO_BLK_S_IOERR as u8, written: 0 };
const UNSUPPORTED: Done = Done { status: VIRTIO_BLK_S_UNSUPP as u8, written: 0 };

/// Carries out a request.
pub fn execute(disk: &mut Disk, request: &Request, work: &Work) -> Done {
    let mut header = [0; HEADER_BYTES];
    if copy_out(&work.ram, &request.header, &mut header) != HEADER_BYTES {
        return FAILED;
    }
    let kind = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
    let mut sector = [0; 8];
    sector.copy_from_slice(&header[8..]);
    let sector = u64::from_le_bytes(sector);
    let outcome = match kind {
        VIRTIO_BLK_T_IN => disk
            .offset(sector, total(&request.to_guest))
            .map(|at| disk.read(at, &request.to_guest, work)),
        VIRTIO_BLK_T_OUT if disk.read_only => None,
        VIRTIO_BLK_T_OUT => disk
            .offset(sector, total(&request.from_guest))
            .map(|at| disk.write(at, &request.from_guest, work)),
        VIRTIO_BLK_T_FLUSH => Some(disk.flush(work)),
        VIRTIO_BLK_T_GET_ID => {
            let written = copy_in(&work.ram, &request.to_guest, &disk.serial) as u32;
            return Done { written, ..OK };
        }
        VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES if disk.read_only => None,
        VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
            return disk.clear(kind, &request.from_guest, work);
        }
        _ => return UNSUPPORTED,
    };
    match outcome {
        Some(Ok(())) if kind == VIRTIO_BLK_T_IN => {
            Done { written: total(&request.to_guest) as u32, ..OK }
        }
        Some(Ok(())) => OK,
        Some(Err(_)) | None => FAILED,
    }
}

impl Disk {
    /// Byte offset of a transfer that lies on the disk in whole sectors.
    fn offset(&self, sector: u64, len: usize) -> Option<u64> {
        let sectors = len as u64 / SECTOR_BYTES;
        let whole = (len as u64).is_multiple_of(SECTOR_BYTES);
        let end = sector.checked_add(sectors)?;
        (whole && end <= self.sectors).then(|| sector * SECTOR_BYTES)
    }

    fn read(&mut self, offset: u64, to: &[Segment], work: &Work) -> io::Result<()> {
        match &mut self.source {
            Source::Raw(file) => transfer(file, offset, to, &work.ram, Direction::ToGuest),
            Source::Nbd(client) => client.read(offset, to, work),
        }
    }

    /// A full disk is not an error of the guest's: the write waits until there is room.
    fn write(&mut self, offset: u64, from: &[Segment], work: &Work) -> io::Result<()> {
        match &mut self.source {
            Source::Raw(file) => until_there_is_room(work, || {
                transfer(file, offset, from, &work.ram, Direction::FromGuest)
            }),
            Source::Nbd(client) => client.write(offset, from, work),
        }
    }

    fn flush(&mut self, work: &Work) -> io::Result<()> {
        match &mut self.source {
            Source::Raw(file) => Ok(fdatasync(&*file)?),
            Source::Nbd(client) => client.flush(work),
        }
    }

    /// Discard and write-zeroes: one range (`max_*_seg` is 1).
    fn clear(&mut self, kind: u32, ranges: &[Segment], work: &Work) -> Done {
        let Source::Raw(file) = &self.source else { return UNSUPPORTED };
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
        let Some(offset) = offset.filter(|_| sectors > 0 && sectors <= CLEAR_SECTORS_MAX) else {
            return FAILED;
        };
        let mode = if kind == VIRTIO_BLK_T_DISCARD || flags & UNMAP != 0 {
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE
        } else {
            FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE
        };
        let result = until_there_is_room(work, || match fallocate(file, mode, offset, len) {
            Err(rustix::io::Errno::OPNOTSUPP) if kind == VIRTIO_BLK_T_DISCARD => Ok(()),
            Err(rustix::io::Errno::OPNOTSUPP) => zero(file, offset, len),
            other => Ok(other?),
        });
        if result.is_ok() { OK } else { FAILED }
    }
}

fn until_there_is_room(work: &Work, mut act: impl FnMut() -> io::Result<()>) -> io::Result<()> {
    loop {
        match act() {
            Err(error) if error.kind() == io::ErrorKind::StorageFull => {
                let stop = crate::devices::borrow(&work.stop);
                let timeout = Timespec { tv_sec: FULL_DISK_RETRY_S, tv_nsec: 0 };
                if poll(&mut [PollFd::new(&stop, PollFlags::IN)], Some(&timeout))
                    .is_ok_and(|ready| ready > 0)
                {
                    return Err(error);
                }
            }
            other => return other,
        }
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

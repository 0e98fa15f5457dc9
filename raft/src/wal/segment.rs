//! Segment files: zeroed in advance, so that a write changes no metadata and `fdatasync` flushes
//! data only.
//!
//! ```text
//! 0   magic "TRINEWAL"   8  version u32   12 node id u64   20 cluster id   36 number u64
//! 44  incarnation        60 crc32c
//! 64  frames …           then zeros to the file's end
//! ```

use std::{
    io,
    path::{Path, PathBuf},
};

use super::WalError;
use crate::{
    codec::{DecodeError, Decoder, Encoder},
    disk::{Disk, DiskFile},
};

/// Where frames begin.
pub(super) const SEGMENT_HEADER_BYTES: usize = 64;
const CHECKED_BYTES: usize = 60;
const MAGIC: &[u8; 8] = b"TRINEWAL";
pub(super) const VERSION: u32 = 2;
const SUFFIX: &str = ".wal";
pub(super) const SUFFIX_NEW: &str = ".wal.new";
/// What zeroing writes at a time.
const ZEROS_BYTES: u64 = 1 << 20;

/// Whose log it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) cluster_id: [u8; 16],
    pub(crate) node_id: u64,
}

/// An identity and the directory's incarnation: what every segment says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Owner {
    pub(crate) identity: Identity,
    pub(crate) incarnation: [u8; 16],
}

/// An open segment.
pub(super) struct Segment<F> {
    pub(super) number: u64,
    pub(super) file: F,
    pub(super) path: PathBuf,
    pub(super) capacity: u64,
    /// Where the next frame goes.
    pub(super) offset: u64,
}

impl<F> Segment<F> {
    pub(super) fn fits(&self, length: usize) -> bool {
        self.offset + length as u64 <= self.capacity
    }
}

/// Zeroes a new segment's file under a name that recovery ignores. Slow: runs ahead of need. What
/// was begun is removed again when there is no space.
pub(super) fn prepare<D: Disk>(
    disk: &D,
    directory: &Path,
    owner: Owner,
    number: u64,
    capacity: u64,
) -> io::Result<Segment<D::File>> {
    let path = directory.join(format!("{number:016x}{SUFFIX_NEW}"));
    let fill = || {
        let file = disk.create(&path)?;
        let zeros = vec![0; capacity.min(ZEROS_BYTES) as usize];
        let mut offset = 0;
        while offset < capacity {
            let step = (capacity - offset).min(zeros.len() as u64);
            file.write_all_at(&zeros[..step as usize], offset)?;
            offset += step;
        }
        file.write_all_at(&header(owner, number), 0)?;
        file.sync_all()?;
        Ok(file)
    };
    match fill() {
        Ok(file) => {
            let offset = SEGMENT_HEADER_BYTES as u64;
            Ok(Segment { number, file, path, capacity, offset })
        }
        Err(error) => {
            // A half-made file would keep the space that others wait for.
            let _ = disk.remove(&path);
            Err(error)
        }
    }
}

/// Gives a prepared segment its name.
pub(super) fn activate<D: Disk>(
    disk: &D,
    directory: &Path,
    mut segment: Segment<D::File>,
) -> io::Result<Segment<D::File>> {
    let path = directory.join(format!("{:016x}{SUFFIX}", segment.number));
    disk.rename(&segment.path, &path)?;
    disk.sync_dir(directory)?;
    segment.path = path;
    Ok(segment)
}

/// Removes what an unfinished preparation left.
pub(super) fn remove_unfinished<D: Disk>(disk: &D, directory: &Path) -> io::Result<()> {
    for path in disk.list(directory)? {
        if path.to_str().is_some_and(|name| name.ends_with(SUFFIX_NEW)) {
            disk.remove(&path)?;
        }
    }
    Ok(())
}

/// The segments in a directory by number.
pub(super) fn list<D: Disk>(disk: &D, directory: &Path) -> io::Result<Vec<(u64, PathBuf)>> {
    let mut segments = Vec::new();
    for path in disk.list(directory)? {
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else {
            continue;
        };
        if let Some(stem) = name.strip_suffix(SUFFIX)
            && let Ok(number) = u64::from_str_radix(stem, 16)
        {
            segments.push((number, path));
        }
    }
    segments.sort_unstable();
    Ok(segments)
}

/// What a segment's first bytes are.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Header {
    Whole { owner: Owner, number: u64 },
    Version(u32),
    Damaged(&'static str),
}

/// Reads a header. A flipped bit in the version isn't taken for a newer version, because the rest
/// still matches its checksum with ours in place.
pub(super) fn read_header(bytes: &[u8]) -> Header {
    let Some(head) = bytes.get(..SEGMENT_HEADER_BYTES) else {
        return Header::Damaged("the file is shorter than a header");
    };
    let read = || {
        let mut decoder = Decoder(head);
        let magic = decoder.take(8)?;
        let version = decoder.u32()?;
        let identity = Identity { node_id: decoder.u64()?, cluster_id: decoder.id()? };
        let number = decoder.u64()?;
        let owner = Owner { identity, incarnation: decoder.id()? };
        Ok::<_, DecodeError>((magic, version, owner, number, decoder.u32()?))
    };
    let Ok((magic, version, owner, number, crc)) = read() else {
        return Header::Damaged("the header can't be read");
    };
    let mut ours = head[..CHECKED_BYTES].to_vec();
    ours[8..12].copy_from_slice(&VERSION.to_le_bytes());
    let whole = crc == crc32c::crc32c(&ours);
    if magic != MAGIC {
        Header::Damaged("it does not begin as a log segment")
    } else if version == VERSION && whole {
        Header::Whole { owner, number }
    } else if version == VERSION || whole {
        Header::Damaged("the header's checksum is wrong")
    } else {
        Header::Version(version)
    }
}

/// Refuses another's segment.
pub(super) fn check_owner(
    path: &Path,
    found: Identity,
    expected: Identity,
) -> Result<(), WalError> {
    if found == expected {
        return Ok(());
    }
    Err(WalError::WrongIdentity {
        path: path.to_owned(),
        found_node: found.node_id,
        expected_node: expected.node_id,
    })
}

fn header(owner: Owner, number: u64) -> Vec<u8> {
    let mut header = Encoder::default();
    header.raw(MAGIC);
    header.u32(VERSION);
    header.u64(owner.identity.node_id);
    header.raw(&owner.identity.cluster_id);
    header.u64(number);
    header.raw(&owner.incarnation);
    let crc = crc32c::crc32c(&header.0);
    header.u32(crc);
    header.0
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWNER: Owner =
        Owner { identity: Identity { cluster_id: [7; 16], node_id: 2 }, incarnation: [0x1c; 16] };

    #[test]
    fn the_header_has_the_bytes_it_had_in_version_2() {
        let header = header(OWNER, 1);
        let mut golden = b"TRINEWAL\x02\0\0\0\x02\0\0\0\0\0\0\0".to_vec();
        golden.extend_from_slice(&[7; 16]);
        golden.extend_from_slice(&[1, 0, 0, 0, 0, 0, 0, 0]);
        golden.extend_from_slice(&[0x1c; 16]);
        assert_eq!(header[..CHECKED_BYTES], golden);
        assert_eq!(header.len(), SEGMENT_HEADER_BYTES);
        assert_eq!(read_header(&header), Header::Whole { owner: OWNER, number: 1 });
    }

    #[test]
    fn every_flipped_bit_of_a_header_is_damage_and_another_version_is_not() {
        let whole = header(OWNER, 1);
        for bit in 0..whole.len() * 8 {
            let mut damaged = whole.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(matches!(read_header(&damaged), Header::Damaged(_)), "bit {bit}");
        }
        let mut newer = whole;
        newer[8] = 3;
        newer[50] = 77;
        assert_eq!(read_header(&newer), Header::Version(3));
    }
}

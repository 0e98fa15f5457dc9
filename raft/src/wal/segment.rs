//! Segment files: zeroed in advance, so that a write changes no metadata and `fdatasync` flushes
//! data only.
//!
//! ```text
//! 0   magic "TRINEWAL"   8  version u32   12 node id u64   20 cluster id   36 number u64   44 crc32c
//! 64  frames …           then zeros to the file's end
//! ```

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use super::WalError;
use crate::codec::{Decoder, Encoder};

/// Where frames begin.
pub(super) const SEGMENT_HEADER_BYTES: usize = 64;
const MAGIC: &[u8; 8] = b"TRINEWAL";
const VERSION: u32 = 1;
const SUFFIX: &str = ".wal";
const SUFFIX_NEW: &str = ".wal.new";

/// Whose log it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) cluster_id: [u8; 16],
    pub(crate) node_id: u64,
}

/// An open segment.
pub(super) struct Segment {
    pub(super) number: u64,
    pub(super) file: File,
    pub(super) path: PathBuf,
    pub(super) capacity: u64,
    /// Where the next frame goes.
    pub(super) offset: u64,
}

impl Segment {
    /// Writes a frame behind the last and makes it durable.
    pub(super) fn append(&mut self, frame: &[u8]) -> io::Result<()> {
        self.file.write_all_at(frame, self.offset)?;
        self.file.sync_data()?;
        self.offset += frame.len() as u64;
        Ok(())
    }

    pub(super) fn fits(&self, length: usize) -> bool {
        self.offset + length as u64 <= self.capacity
    }
}

/// Zeroes a new segment's file under a name that recovery ignores. Slow: runs ahead of need.
pub(super) fn prepare(
    directory: &Path,
    identity: Identity,
    number: u64,
    capacity: u64,
) -> io::Result<Segment> {
    let path = directory.join(format!("{number:016x}{SUFFIX_NEW}"));
    let mut file =
        OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path)?;
    let zeros = vec![0; 1 << 20];
    let mut left = capacity;
    while left > 0 {
        let step = left.min(zeros.len() as u64);
        file.write_all(&zeros[..step as usize])?;
        left -= step;
    }
    file.write_all_at(&header(identity, number), 0)?;
    file.sync_all()?;
    Ok(Segment { number, file, path, capacity, offset: SEGMENT_HEADER_BYTES as u64 })
}

/// Gives a prepared segment its name.
pub(super) fn activate(directory: &Path, mut segment: Segment) -> io::Result<Segment> {
    let path = directory.join(format!("{:016x}{SUFFIX}", segment.number));
    fs::rename(&segment.path, &path)?;
    File::open(directory)?.sync_all()?;
    segment.path = path;
    Ok(segment)
}

/// Removes what an unfinished preparation left.
pub(super) fn remove_unfinished(directory: &Path) -> io::Result<()> {
    for item in fs::read_dir(directory)? {
        let path = item?.path();
        if path.to_str().is_some_and(|name| name.ends_with(SUFFIX_NEW)) {
            fs::remove_file(&path)?;
        }
    }
    Ok(())
}

/// The segments in a directory by number.
pub(super) fn list(directory: &Path) -> io::Result<Vec<(u64, PathBuf)>> {
    let mut segments = Vec::new();
    for item in fs::read_dir(directory)? {
        let path = item?.path();
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

/// Checks a segment's header against whose it must be.
pub(super) fn check_header(
    path: &Path,
    bytes: &[u8],
    identity: Identity,
    number: u64,
) -> Result<(), WalError> {
    let corrupt = |reason| WalError::Corrupt { path: path.to_owned(), offset: 0, reason };
    let Some(head) = bytes.get(..SEGMENT_HEADER_BYTES) else {
        return Err(corrupt("the file is shorter than a header"));
    };
    let mut decoder = Decoder(head);
    let read = (|| {
        let magic = decoder.take(8)?;
        let version = decoder.u32()?;
        let found = Identity { node_id: decoder.u64()?, cluster_id: decoder.id()? };
        Ok::<_, crate::codec::DecodeError>((magic, version, found, decoder.u64()?, decoder.u32()?))
    })();
    let Ok((magic, version, found, found_number, crc)) = read else {
        return Err(corrupt("the header can't be read"));
    };
    if magic != MAGIC {
        return Err(corrupt("it is not a log segment"));
    }
    if version != VERSION {
        return Err(WalError::Version { path: path.to_owned(), version });
    }
    if crc != crc32c::crc32c(&head[..44]) || found_number != number {
        return Err(corrupt("the header's checksum or number is wrong"));
    }
    if found != identity {
        return Err(WalError::WrongIdentity {
            path: path.to_owned(),
            found_node: found.node_id,
            expected_node: identity.node_id,
        });
    }
    Ok(())
}

fn header(identity: Identity, number: u64) -> Vec<u8> {
    let mut header = Encoder::default();
    header.raw(MAGIC);
    header.u32(VERSION);
    header.u64(identity.node_id);
    header.raw(&identity.cluster_id);
    header.u64(number);
    let crc = crc32c::crc32c(&header.0);
    header.u32(crc);
    header.0.resize(SEGMENT_HEADER_BYTES, 0);
    header.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_has_the_bytes_it_had_in_version_1() {
        let identity = Identity { cluster_id: [7; 16], node_id: 2 };
        let header = header(identity, 1);
        let mut golden = b"TRINEWAL\x01\0\0\0\x02\0\0\0\0\0\0\0".to_vec();
        golden.extend_from_slice(&[7; 16]);
        golden.extend_from_slice(&[1, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(header[..44], golden);
        assert_eq!(header.len(), SEGMENT_HEADER_BYTES);
        check_header(Path::new("x"), &header, identity, 1).expect("valid");
    }
}

//! A small file beside the log: who the directory is, the vote twice more, and how far the log was
//! acknowledged.
//!
//! ```text
//! 0      magic "TRINESTA" | version u32 | node id u64 | cluster id | incarnation | crc32c
//! 4096   vote: present u8 | term u64 | node id u64 | committed u8 | crc32c
//! 8192   the same vote again
//! 12288  acknowledged frames u64 | crc32c                     16384 end
//! ```
//! A vote is answered for only when it lies in the log's flushed frame (or, on a full disk, in one
//! flushed slot) and then in both slots, so any one damaged place leaves it readable.
//!
//! The mark of acknowledged frames is written after each flush without a flush of its own. It says
//! that frames that are gone, or look torn, had been acknowledged. The kernel writes it back within
//! seconds, and a killed process loses nothing. What remains undetected is the loss of the very last
//! frame, or of a sector of it, by a power cut within these seconds: it looks like a write that was
//! never finished. (Any flipped bit of it is seen: `frame.rs`.)

use std::{
    io,
    path::{Path, PathBuf},
};

use super::{
    recovery::greater_vote,
    segment::{Identity, Owner},
};
use crate::{
    codec::{DecodeError, Decoder, Encoder},
    disk::{self, Disk, DiskFile},
    types::Vote,
};

const FILE: &str = "state";
const FILE_NEW: &str = "state.new";
const MAGIC: &[u8; 8] = b"TRINESTA";
const VERSION: u32 = 1;
const SLOTS: [usize; 2] = [4_096, 8_192];
const MARK: usize = 12_288;
const FILE_BYTES: usize = 16_384;
const HEADER_BYTES: usize = 52;
const SLOT_BYTES: usize = 18;
const MARK_BYTES: usize = 8;

/// What a state file held.
#[derive(Debug, Default, Clone, PartialEq)]
pub(crate) struct Found {
    /// There is a file of this name.
    pub(crate) exists: bool,
    pub(crate) owner: Option<Owner>,
    /// A format that this program doesn't know.
    pub(crate) version: Option<u32>,
    /// The readable slots' greatest vote.
    pub(crate) vote: Option<Vote>,
    pub(crate) slots_readable: usize,
    /// Frames that were acknowledged.
    pub(crate) acknowledged: Option<u64>,
}

/// The open state file.
pub(super) struct StateFile<F> {
    file: F,
    path: PathBuf,
}

impl<F: DiskFile> StateFile<F> {
    /// Makes the file anew, durably.
    pub(super) fn write<D: Disk<File = F>>(
        disk: &D,
        directory: &Path,
        owner: Owner,
        vote: Option<&Vote>,
        acknowledged: u64,
    ) -> io::Result<Self> {
        let path = directory.join(FILE);
        disk::replace(disk, &directory.join(FILE_NEW), &path, &encode(owner, vote, acknowledged))?;
        Ok(Self { file: disk.open(&path)?, path })
    }

    /// Opens the file that is there.
    pub(super) fn open<D: Disk<File = F>>(disk: &D, directory: &Path) -> io::Result<Self> {
        let path = directory.join(FILE);
        Ok(Self { file: disk.open(&path)?, path })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Puts a vote that the log holds already into both slots.
    pub(super) fn save_vote(&self, vote: &[u8]) -> io::Result<()> {
        for at in SLOTS {
            self.file.write_all_at(&checked(vote), at as u64)?;
        }
        self.file.sync_data()
    }

    /// Puts a vote into one slot after the other, for when the log has no room for it.
    pub(super) fn save_vote_alone(&self, vote: &[u8]) -> io::Result<()> {
        for at in SLOTS {
            self.file.write_all_at(&checked(vote), at as u64)?;
            self.file.sync_data()?;
        }
        Ok(())
    }

    /// Notes how many frames are durable; itself durable sooner or later.
    pub(super) fn note_acknowledged(&self, frames: u64) -> io::Result<()> {
        self.file.write_all_at(&checked(&frames.to_le_bytes()), MARK as u64)
    }

    pub(super) fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

/// Reads what can be read; a missing file is an answer too.
pub(crate) fn read<D: Disk>(disk: &D, directory: &Path) -> io::Result<Found> {
    let path = directory.join(FILE);
    let bytes = match disk.len(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Found::default()),
        Err(error) => return Err(error),
        Ok(length) if length > 16 * FILE_BYTES as u64 => Vec::new(),
        Ok(_) => disk.read(&path)?,
    };
    Ok(decode(&bytes))
}

/// The bytes of a slot.
pub(super) fn encode_vote(vote: Option<&Vote>) -> Vec<u8> {
    let mut slot = Encoder::default();
    slot.option(vote, |slot, vote| slot.vote(vote));
    slot.0.resize(SLOT_BYTES, 0);
    slot.0
}

fn encode(owner: Owner, vote: Option<&Vote>, acknowledged: u64) -> Vec<u8> {
    let mut header = Encoder::default();
    header.raw(MAGIC);
    header.u32(VERSION);
    header.u64(owner.identity.node_id);
    header.raw(&owner.identity.cluster_id);
    header.raw(&owner.incarnation);
    let mut file = checked(&header.0);
    for at in SLOTS {
        file.resize(at, 0);
        file.extend_from_slice(&checked(&encode_vote(vote)));
    }
    file.resize(MARK, 0);
    file.extend_from_slice(&checked(&acknowledged.to_le_bytes()));
    file.resize(FILE_BYTES, 0);
    file
}

fn decode(bytes: &[u8]) -> Found {
    let mut found = Found { exists: true, ..Found::default() };
    match part(bytes, 0, HEADER_BYTES).map(decode_header) {
        Some(Ok((VERSION, owner))) => found.owner = Some(owner),
        Some(Ok((version, _))) => found.version = Some(version),
        _ => {}
    }
    for at in SLOTS {
        let vote = part(bytes, at, SLOT_BYTES).map(|slot| Decoder(slot).option(Decoder::vote));
        if let Some(Ok(vote)) = vote {
            found.slots_readable += 1;
            found.vote = greater_vote(found.vote, vote);
        }
    }
    found.acknowledged = part(bytes, MARK, MARK_BYTES).and_then(|mark| Decoder(mark).u64().ok());
    found
}

fn decode_header(header: &[u8]) -> Result<(u32, Owner), DecodeError> {
    let mut decoder = Decoder(header);
    if decoder.take(8)? != MAGIC {
        return Err(DecodeError("a state file"));
    }
    let version = decoder.u32()?;
    let identity = Identity { node_id: decoder.u64()?, cluster_id: decoder.id()? };
    Ok((version, Owner { identity, incarnation: decoder.id()? }))
}

/// Bytes with their checksum.
fn checked(bytes: &[u8]) -> Vec<u8> {
    let mut checked = bytes.to_vec();
    checked.extend_from_slice(&crc32c::crc32c(bytes).to_le_bytes());
    checked
}

fn part(bytes: &[u8], at: usize, length: usize) -> Option<&[u8]> {
    let (part, crc) = bytes.get(at..at + length + 4)?.split_at(length);
    (crc == crc32c::crc32c(part).to_le_bytes()).then_some(part)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWNER: Owner =
        Owner { identity: Identity { cluster_id: [7; 16], node_id: 2 }, incarnation: [0x1c; 16] };

    #[test]
    fn the_file_has_the_bytes_it_had_in_version_1() {
        let file = encode(OWNER, Some(&Vote::new_committed(5, 3)), 9);
        let mut header = b"TRINESTA\x01\0\0\0\x02\0\0\0\0\0\0\0".to_vec();
        header.extend_from_slice(&[7; 16]);
        header.extend_from_slice(&[0x1c; 16]);
        assert_eq!(file[..HEADER_BYTES], header);
        let slot = [1, 5, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 1];
        assert_eq!(file[4_096..4_096 + SLOT_BYTES], slot);
        assert_eq!(file[8_192..8_192 + SLOT_BYTES], slot);
        assert_eq!(file[MARK..MARK + MARK_BYTES], [9, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(file.len(), FILE_BYTES);
    }

    #[test]
    fn any_one_flipped_bit_leaves_the_vote_readable() {
        let vote = Vote::new_committed(5, 3);
        let whole = encode(OWNER, Some(&vote), 9);
        for place in [0, SLOTS[0], SLOTS[1], MARK] {
            for bit in 0..24 * 8 {
                let mut damaged = whole.clone();
                damaged[place + bit / 8] ^= 1 << (bit % 8);
                assert_eq!(decode(&damaged).vote, Some(vote), "bit {bit} at {place}");
            }
        }
        assert_eq!(decode(&[]), Found { exists: true, ..Found::default() });
    }
}

//! Frames and records: how bytes lie in a segment.
//!
//! ```text
//! frame   = payload length u32 | crc32c u32 | sequence u64 | crc32c u32 | payload | end 0xe5
//!           (the first crc over sequence and payload, the second over the header before it)
//! payload = record*       record = kind u8 | length u32 | bytes
//! ```
//! A frame is what one write and one `fdatasync` made durable, so the log ends with at most one
//! torn frame: a bad frame that valid ones follow is damage, never a crash. And a torn frame lacks
//! something: a sector that is still zero, or its end. One that has all its parts and still can't
//! be read is damaged.

use crate::{
    codec::{DecodeError, Decoder, Encoder},
    types::{LogEntry, LogId, Vote},
};

/// Length, checksum, sequence and the header's own checksum.
const HEADER_BYTES: usize = 20;
/// What follows the payload.
const END: u8 = 0xe5;
/// What a frame has besides its payload.
pub(super) const FRAME_OVERHEAD_BYTES: usize = HEADER_BYTES + 1;
/// What a disk writes whole or not at all.
const SECTOR_BYTES: usize = 512;
/// How far ahead of the expected one a sequence may be when looking for frames behind a bad one.
const SEQUENCE_WINDOW: u64 = 1 << 24;

const KIND_VOTE: u8 = 1;
const KIND_ENTRY: u8 = 2;
const KIND_COMMITTED: u8 = 3;
const KIND_TRUNCATE: u8 = 4;
const KIND_PURGE: u8 = 5;

/// One change of the durable state.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Record {
    Vote(Vote),
    Entry(LogEntry),
    Committed(LogId),
    /// Entries after this one are gone; `None` means all.
    Truncate(Option<LogId>),
    /// Entries up to this one are gone.
    Purge(LogId),
}

impl Record {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut body = Encoder::default();
        let kind = match self {
            Self::Vote(vote) => {
                body.vote(vote);
                KIND_VOTE
            }
            Self::Entry(entry) => {
                body.entry(entry);
                KIND_ENTRY
            }
            Self::Committed(log_id) => {
                body.log_id(log_id);
                KIND_COMMITTED
            }
            Self::Truncate(log_id) => {
                body.option_log_id(log_id.as_ref());
                KIND_TRUNCATE
            }
            Self::Purge(log_id) => {
                body.log_id(log_id);
                KIND_PURGE
            }
        };
        let mut record = Encoder::default();
        record.u8(kind);
        record.bytes(&body.0);
        record.0
    }

    fn decode(decoder: &mut Decoder<'_>) -> Result<Self, DecodeError> {
        let kind = decoder.u8()?;
        let mut body = Decoder(decoder.bytes()?);
        let record = match kind {
            KIND_VOTE => Self::Vote(body.vote()?),
            KIND_ENTRY => Self::Entry(body.entry()?),
            KIND_COMMITTED => Self::Committed(body.log_id()?),
            KIND_TRUNCATE => Self::Truncate(body.option_log_id()?),
            KIND_PURGE => Self::Purge(body.log_id()?),
            _ => return Err(DecodeError("a log record of an unknown kind")),
        };
        body.end()?;
        Ok(record)
    }
}

/// A checked frame.
pub(super) struct Frame<'a> {
    pub(super) sequence: u64,
    pub(super) payload: &'a [u8],
    pub(super) size_bytes: usize,
}

/// Puts a header before a payload.
pub(super) fn encode_frame(sequence: u64, payload: &[u8]) -> Vec<u8> {
    let mut frame = Encoder(Vec::with_capacity(FRAME_OVERHEAD_BYTES + payload.len()));
    frame.u32(payload.len() as u32);
    frame.u32(checksum(sequence, payload));
    frame.u64(sequence);
    let header_crc = crc32c::crc32c(&frame.0);
    frame.u32(header_crc);
    frame.raw(payload);
    frame.u8(END);
    frame.0
}

/// The frame at the start of `bytes`, if one is whole there.
pub(super) fn decode_frame(bytes: &[u8]) -> Option<Frame<'_>> {
    let (length, crc, sequence) = decode_header(bytes)?;
    let mut decoder = Decoder(bytes.get(HEADER_BYTES..)?);
    let payload = decoder.take(length).ok()?;
    let whole = decoder.u8() == Ok(END) && checksum(sequence, payload) == crc;
    whole.then_some(Frame { sequence, payload, size_bytes: FRAME_OVERHEAD_BYTES + length })
}

/// Payload length, checksum and sequence, if the header is as it was written.
fn decode_header(bytes: &[u8]) -> Option<(usize, u32, u64)> {
    let header = bytes.get(..HEADER_BYTES)?;
    let mut decoder = Decoder(header);
    let length = decoder.u32().ok()? as usize;
    let crc = decoder.u32().ok()?;
    let sequence = decoder.u64().ok()?;
    let whole = decoder.u32() == Ok(crc32c::crc32c(&header[..HEADER_BYTES - 4]));
    (whole && length > 0).then_some((length, crc, sequence))
}

/// Whether an unreadable frame at `offset` of a segment was written to its end, so that it is
/// damaged and not torn. (A payload with a sector of zeros in it can pass for torn; the mark of
/// acknowledged frames tells then.)
pub(super) fn was_written_whole(bytes: &[u8], offset: usize) -> bool {
    let written = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    if written <= HEADER_BYTES {
        return false;
    }
    let Some((length, ..)) = decode_header(bytes) else {
        return has_all_sectors(&bytes[..HEADER_BYTES], offset);
    };
    let end = HEADER_BYTES + length;
    let has_end = bytes.get(end).is_some_and(|end| *end != 0);
    has_end && has_all_sectors(&bytes[..end], offset)
}

/// Whether no sector's part of these bytes is still zero.
fn has_all_sectors(mut bytes: &[u8], mut offset: usize) -> bool {
    while !bytes.is_empty() {
        let room = SECTOR_BYTES - offset % SECTOR_BYTES;
        let (part, rest) = bytes.split_at(room.min(bytes.len()));
        if part.iter().all(|byte| *byte == 0) {
            return false;
        }
        offset += part.len();
        bytes = rest;
    }
    true
}

/// The records of a frame's payload.
pub(super) fn decode_records(payload: &[u8]) -> Result<Vec<Record>, DecodeError> {
    let mut decoder = Decoder(payload);
    let mut records = Vec::new();
    while !decoder.0.is_empty() {
        records.push(Record::decode(&mut decoder)?);
    }
    Ok(records)
}

/// The whole frames written after `expected`, wherever in `bytes` they lie.
pub(super) fn later_frames(bytes: &[u8], expected: u64) -> impl Iterator<Item = Frame<'_>> {
    let last = bytes.len().saturating_sub(HEADER_BYTES);
    (1..=last).filter_map(move |at| {
        let sequence =
            u64::from_le_bytes(bytes[at + 8..at + 16].try_into().expect("a slice of eight bytes"));
        let later = sequence > expected && sequence - expected < SEQUENCE_WINDOW;
        if later { decode_frame(&bytes[at..]) } else { None }
    })
}

fn checksum(sequence: u64, payload: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&sequence.to_le_bytes()), payload)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vote_frame_has_the_bytes_it_had_in_version_2() {
        let record = Record::Vote(Vote::new(1, 2));
        let payload = record.encode();
        let mut golden = vec![1, 17, 0, 0, 0];
        golden.extend_from_slice(&1u64.to_le_bytes());
        golden.extend_from_slice(&2u64.to_le_bytes());
        golden.push(0);
        assert_eq!(payload, golden);
        let frame = encode_frame(9, &payload);
        assert_eq!(&frame[..4], &[22, 0, 0, 0]);
        assert_eq!(&frame[8..16], &9u64.to_le_bytes());
        assert_eq!(frame[HEADER_BYTES..frame.len() - 1], golden);
        assert_eq!(frame.last(), Some(&END));
        let decoded = decode_frame(&frame).expect("whole");
        assert_eq!(decode_records(decoded.payload), Ok(vec![record]));
    }

    #[test]
    fn a_whole_frame_with_any_flipped_bit_is_told_from_any_torn_one() {
        let data = std::sync::Arc::from(vec![9u8; 2_000]);
        let command = crate::types::Command { time_ms: 1, id: [2; 16], data };
        let log_id = LogId::new(crate::types::LeaderId { term: 1, node_id: 1 }, 1);
        let entry = LogEntry { log_id, payload: crate::types::Payload::Normal(command) };
        let frame = encode_frame(3, &Record::Entry(entry).encode());
        for offset in [64, 500, 505, 511, 1_024] {
            let mut tail = frame.clone();
            tail.resize(4_096, 0);
            for bit in 0..frame.len() * 8 {
                let mut damaged = tail.clone();
                damaged[bit / 8] ^= 1 << (bit % 8);
                assert!(was_written_whole(&damaged, offset), "bit {bit} at {offset}");
            }
            for kept in 0..frame.len() {
                let mut torn = tail.clone();
                torn[kept..].fill(0);
                assert!(!was_written_whole(&torn, offset), "{kept} bytes at {offset}");
            }
            let sectors = offset / SECTOR_BYTES..=(offset + frame.len() - 1) / SECTOR_BYTES;
            for sector in sectors {
                let mut torn = tail.clone();
                let start = (sector * SECTOR_BYTES).saturating_sub(offset);
                let end = ((sector + 1) * SECTOR_BYTES - offset).min(frame.len());
                torn[start..end].fill(0);
                assert!(!was_written_whole(&torn, offset), "sector {sector} at {offset}");
            }
        }
    }

    #[test]
    fn every_kind_of_record_has_the_bytes_it_had_in_version_2() {
        let id = |term: u64, node_id: u64, index: u64| {
            LogId::new(crate::types::LeaderId { term, node_id }, index)
        };
        let words = |words: &[u64]| -> Vec<u8> {
            words.iter().flat_map(|word| word.to_le_bytes()).collect()
        };
        let entry = LogEntry { log_id: id(1, 2, 3), payload: crate::types::Payload::Blank };
        let cases = [
            (Record::Entry(entry), [&[2, 25, 0, 0, 0][..], &words(&[1, 2, 3]), &[0]].concat()),
            (Record::Committed(id(1, 2, 3)), [&[3, 24, 0, 0, 0][..], &words(&[1, 2, 3])].concat()),
            (Record::Truncate(None), vec![4, 1, 0, 0, 0, 0]),
            (
                Record::Truncate(Some(id(1, 2, 3))),
                [&[4, 25, 0, 0, 0, 1][..], &words(&[1, 2, 3])].concat(),
            ),
            (Record::Purge(id(1, 2, 3)), [&[5, 24, 0, 0, 0][..], &words(&[1, 2, 3])].concat()),
        ];
        for (record, golden) in cases {
            assert_eq!(record.encode(), golden, "{record:?}");
            assert_eq!(decode_records(&golden), Ok(vec![record]));
        }
    }

    #[test]
    fn no_flipped_bit_of_a_frame_goes_unseen() {
        let frame = encode_frame(3, &Record::Vote(Vote::new(1, 2)).encode());
        for bit in 0..frame.len() * 8 {
            let mut damaged = frame.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(decode_frame(&damaged).is_none(), "bit {bit}");
        }
    }
}

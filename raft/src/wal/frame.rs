//! Frames and records: how bytes lie in a segment.
//!
//! ```text
//! frame  = payload length u32 | crc32c u32 | sequence u64 | payload        (crc over sequence, payload)
//! payload = record*       record = kind u8 | length u32 | bytes
//! ```
//! A frame is what one write and one `fdatasync` made durable, so the log ends with at most one
//! torn frame: a bad frame that valid ones follow is damage, never a crash.

use crate::{
    codec::{DecodeError, Decoder, Encoder},
    types::{LogEntry, LogId, Vote},
};

/// Length, checksum and sequence.
pub(super) const FRAME_HEADER_BYTES: usize = 16;
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
    let mut frame = Encoder(Vec::with_capacity(FRAME_HEADER_BYTES + payload.len()));
    frame.u32(payload.len() as u32);
    frame.u32(checksum(sequence, payload));
    frame.u64(sequence);
    frame.raw(payload);
    frame.0
}

/// The frame at the start of `bytes`, if one is whole there.
pub(super) fn decode_frame(bytes: &[u8]) -> Option<Frame<'_>> {
    let mut decoder = Decoder(bytes);
    let length = decoder.u32().ok()? as usize;
    let crc = decoder.u32().ok()?;
    let sequence = decoder.u64().ok()?;
    if length == 0 {
        return None;
    }
    let payload = decoder.take(length).ok()?;
    (checksum(sequence, payload) == crc).then_some(Frame {
        sequence,
        payload,
        size_bytes: FRAME_HEADER_BYTES + length,
    })
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

/// Whether a whole frame written after `expected` lies anywhere in `bytes`.
pub(super) fn later_frame_exists(bytes: &[u8], expected: u64) -> bool {
    let last = bytes.len().saturating_sub(FRAME_HEADER_BYTES);
    (1..=last).any(|at| {
        let sequence =
            u64::from_le_bytes(bytes[at + 8..at + 16].try_into().expect("a slice of eight bytes"));
        let later = sequence > expected && sequence - expected < SEQUENCE_WINDOW;
        later && decode_frame(&bytes[at..]).is_some()
    })
}

fn checksum(sequence: u64, payload: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&sequence.to_le_bytes()), payload)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vote_frame_has_the_bytes_it_had_in_version_1() {
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
        let decoded = decode_frame(&frame).expect("whole");
        assert_eq!(decode_records(decoded.payload), Ok(vec![record]));
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

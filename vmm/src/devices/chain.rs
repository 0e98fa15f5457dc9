//! Descriptor chains as plain lists: everything a guest says about a buffer is checked here, once.

use crate::machine::memory::Ram;
use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

/// Most pieces of one chain.
pub const SEGMENTS_MAX: usize = 1024;

/// One piece of guest memory; it lies in RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Its address.
    pub address: u64,
    /// Its length, bytes; never 0.
    pub len: usize,
}

/// The buffers of a chain.
#[derive(Debug, Default)]
pub struct Buffers {
    /// What the device may read, in order.
    pub readable: Vec<Segment>,
    /// What the device may write, in order.
    pub writable: Vec<Segment>,
}

impl Buffers {
    /// Takes a chain apart; `None` where it leaves RAM, has too many pieces, or mixes their order.
    pub fn collect(chain: DescriptorChain<&Ram>, ram: &Ram) -> Option<Buffers> {
        let mut buffers = Buffers::default();
        let mut pieces = 0;
        for descriptor in chain {
            pieces += 1;
            let segment = Segment { address: descriptor.addr().0, len: descriptor.len() as usize };
            if pieces > SEGMENTS_MAX || !ram.check_range(GuestAddress(segment.address), segment.len)
            {
                return None;
            }
            if segment.len == 0 {
                continue;
            }
            if descriptor.is_write_only() {
                buffers.writable.push(segment);
            } else if buffers.writable.is_empty() {
                buffers.readable.push(segment);
            } else {
                return None;
            }
        }
        Some(buffers)
    }
}

/// Total length.
pub fn total(segments: &[Segment]) -> usize {
    segments.iter().map(|segment| segment.len).sum()
}

/// Takes `len` bytes off the front; `None` where there are fewer.
pub fn split_front(segments: &mut Vec<Segment>, len: usize) -> Option<Vec<Segment>> {
    if total(segments) < len {
        return None;
    }
    let mut front = Vec::new();
    let mut rest = len;
    let mut whole = 0;
    for segment in segments.iter_mut() {
        if rest == 0 {
            break;
        }
        let take = rest.min(segment.len);
        front.push(Segment { address: segment.address, len: take });
        segment.address += take as u64;
        segment.len -= take;
        rest -= take;
        whole += usize::from(segment.len == 0);
    }
    segments.drain(..whole);
    Some(front)
}

/// Takes the last byte off; `None` where there is none.
pub fn split_last_byte(segments: &mut Vec<Segment>) -> Option<u64> {
    let last = segments.last_mut()?;
    last.len -= 1;
    let address = last.address + last.len as u64;
    if last.len == 0 {
        segments.pop();
    }
    Some(address)
}

/// Copies guest memory out, as much as fits; returns the number of bytes.
pub fn copy_out(ram: &Ram, segments: &[Segment], target: &mut [u8]) -> usize {
    let mut filled = 0;
    for segment in segments {
        let take = segment.len.min(target.len() - filled);
        if ram
            .read_slice(&mut target[filled..filled + take], GuestAddress(segment.address))
            .is_err()
        {
            break;
        }
        filled += take;
    }
    filled
}

/// Copies into guest memory; returns the number of bytes that fitted.
pub fn copy_in(ram: &Ram, segments: &[Segment], source: &[u8]) -> usize {
    let mut written = 0;
    for segment in segments {
        let take = segment.len.min(source.len() - written);
        if ram.write_slice(&source[written..written + take], GuestAddress(segment.address)).is_err()
        {
            break;
        }
        written += take;
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segments(list: &[(u64, usize)]) -> Vec<Segment> {
        list.iter().map(|&(address, len)| Segment { address, len }).collect()
    }

    #[test]
    fn a_header_may_be_spread_over_pieces() {
        let mut rest = segments(&[(0, 4), (100, 10), (200, 20)]);
        assert_eq!(split_front(&mut rest, 16), Some(segments(&[(0, 4), (100, 10), (200, 2)])));
        assert_eq!(rest, segments(&[(202, 18)]));
        assert_eq!(split_front(&mut rest, 19), None);
        assert_eq!(split_front(&mut rest, 18), Some(segments(&[(202, 18)])));
        assert!(rest.is_empty());
    }

    #[test]
    fn the_status_byte_is_the_last_one() {
        let mut rest = segments(&[(0, 4), (100, 1)]);
        assert_eq!(split_last_byte(&mut rest), Some(100));
        assert_eq!(split_last_byte(&mut rest), Some(3));
        assert_eq!(rest, segments(&[(0, 3)]));
    }
}

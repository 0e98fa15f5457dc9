//! What a guest says of its memory (virtio 1.2, section 5.5.6.3).

use serde::{Deserialize, Serialize};

/// Bytes of one figure: a tag and a value, packed.
const ENTRY_BYTES: usize = 10;
/// Bytes that are read of one answer: far more than there are tags.
pub const STATISTICS_BYTES_MAX: usize = 64 * ENTRY_BYTES;

/// A guest's own figures; one that it does not give is absent. They are its word, not a fact.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Statistics {
    /// Swapped in since it started, bytes.
    pub swapped_in_bytes: Option<u64>,
    /// Swapped out since it started, bytes.
    pub swapped_out_bytes: Option<u64>,
    /// Page faults that needed a disk.
    pub major_faults: Option<u64>,
    /// Page faults that needed none.
    pub minor_faults: Option<u64>,
    /// Memory nobody uses, bytes.
    pub free_bytes: Option<u64>,
    /// All its memory without the balloon's, bytes.
    pub total_bytes: Option<u64>,
    /// Memory that could be had without swapping, bytes.
    pub available_bytes: Option<u64>,
    /// Memory in caches of files, bytes.
    pub caches_bytes: Option<u64>,
    /// Huge pages it was given.
    pub huge_pages_given: Option<u64>,
    /// Huge pages it could not be given.
    pub huge_pages_failed: Option<u64>,
}

impl Statistics {
    /// Reads an answer; unknown tags and a last part that is too short are skipped.
    pub fn parse(bytes: &[u8]) -> Statistics {
        let mut statistics = Statistics::default();
        for entry in bytes.chunks_exact(ENTRY_BYTES) {
            let tag = u16::from_le_bytes([entry[0], entry[1]]);
            let mut value = [0; 8];
            value.copy_from_slice(&entry[2..]);
            if let Some(place) = statistics.place(tag) {
                *place = Some(u64::from_le_bytes(value));
            }
        }
        statistics
    }

    fn place(&mut self, tag: u16) -> Option<&mut Option<u64>> {
        Some(match tag {
            0 => &mut self.swapped_in_bytes,
            1 => &mut self.swapped_out_bytes,
            2 => &mut self.major_faults,
            3 => &mut self.minor_faults,
            4 => &mut self.free_bytes,
            5 => &mut self.total_bytes,
            6 => &mut self.available_bytes,
            7 => &mut self.caches_bytes,
            8 => &mut self.huge_pages_given,
            9 => &mut self.huge_pages_failed,
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_figures_are_read_and_the_rest_is_skipped() {
        let mut bytes = Vec::new();
        for (tag, value) in [(4u16, 7u64), (5, 9), (99, 1)] {
            bytes.extend(tag.to_le_bytes());
            bytes.extend(value.to_le_bytes());
        }
        bytes.extend([5, 0, 1]);
        let expected =
            Statistics { free_bytes: Some(7), total_bytes: Some(9), ..Default::default() };
        assert_eq!(Statistics::parse(&bytes), expected);
        assert_eq!(Statistics::parse(&[]), Statistics::default());
    }
}

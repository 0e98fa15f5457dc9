//! Page numbers as ranges: one call to the kernel for what lies together.

use crate::machine::memory::PAGE_BYTES;

/// Whole pages that lie together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    /// Address of the first one.
    pub(super) start: u64,
    /// Length, a multiple of [`PAGE_BYTES`].
    pub(super) bytes: u64,
}

/// The pages `numbers` as ranges, in order. Linux names them rising or falling.
pub(super) fn ranges(numbers: impl Iterator<Item = u32>) -> Vec<Range> {
    let mut ranges: Vec<Range> = Vec::new();
    for number in numbers {
        let start = u64::from(number) * PAGE_BYTES;
        match ranges.last_mut() {
            Some(last) if last.start + last.bytes == start => last.bytes += PAGE_BYTES,
            Some(last) if start + PAGE_BYTES == last.start => {
                last.start = start;
                last.bytes += PAGE_BYTES;
            }
            _ => ranges.push(Range { start, bytes: PAGE_BYTES }),
        }
    }
    ranges
}

/// The whole pages between two addresses.
pub(super) fn whole_pages(address: u64, bytes: u64) -> Option<Range> {
    let end = address.checked_add(bytes)? / PAGE_BYTES * PAGE_BYTES;
    let start = address.checked_next_multiple_of(PAGE_BYTES)?;
    (start < end).then(|| Range { start, bytes: end - start })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(numbers: &[u32], expected: &[(u64, u64)]) {
        let expected: Vec<_> = expected
            .iter()
            .map(|&(page, pages)| Range { start: page * PAGE_BYTES, bytes: pages * PAGE_BYTES })
            .collect();
        assert_eq!(ranges(numbers.iter().copied()), expected);
    }

    #[test]
    fn pages_that_lie_together_are_one_range() {
        check(&[], &[]);
        check(&[5, 6, 7, 9], &[(5, 3), (9, 1)]);
        check(&[7, 6, 5, 5], &[(5, 3), (5, 1)]);
        check(&[u32::MAX, 0], &[(u64::from(u32::MAX), 1), (0, 1)]);
    }

    #[test]
    fn a_part_of_a_page_is_no_page() {
        assert_eq!(whole_pages(1, 2 * PAGE_BYTES - 1), Some(Range { start: 4096, bytes: 4096 }));
        assert_eq!(whole_pages(1, PAGE_BYTES), None);
        assert_eq!(whole_pages(0, PAGE_BYTES - 1), None);
        assert_eq!(whole_pages(u64::MAX - 10, 5), None);
        assert_eq!(whole_pages(u64::MAX - 10, 50), None);
    }
}

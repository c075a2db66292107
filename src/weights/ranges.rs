//! Which bytes of a file are there: a set of byte ranges, its gaps, and the pieces that several connections take from
//! them. Pure.

use std::collections::VecDeque;
use std::ops::Range;

/// Disjoint, sorted, and never touching each other.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ranges(Vec<Range<u64>>);

impl Ranges {
    pub fn one(range: Range<u64>) -> Self {
        let mut ranges = Self::default();
        ranges.add(range);
        ranges
    }

    pub fn add(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        // The ranges that overlap or touch the new one become one with it.
        let first = self.0.partition_point(|r| r.end < range.start);
        let last = self.0.partition_point(|r| r.start <= range.end);
        let merged = match self.0.get(first..last) {
            Some([lowest, ..]) => range.start.min(lowest.start)..range.end.max(self.0[last - 1].end),
            _ => range,
        };
        self.0.splice(first..last, [merged]);
    }

    /// How many bytes are there from the file's first one on.
    pub fn prefix(&self) -> u64 {
        self.0.first().filter(|r| r.start == 0).map_or(0, |r| r.end)
    }

    pub fn total(&self) -> u64 {
        self.0.iter().map(|r| r.end - r.start).sum()
    }

    pub fn iter(&self) -> impl Iterator<Item = &Range<u64>> {
        self.0.iter()
    }

    /// What is missing of a file of `size` bytes.
    pub fn gaps(&self, size: u64) -> Vec<Range<u64>> {
        let mut gaps = Vec::new();
        let mut at = 0;
        for range in &self.0 {
            gaps.push(at..range.start.min(size));
            at = range.end;
        }
        gaps.push(at..size);
        gaps.retain(|gap| !gap.is_empty());
        gaps
    }
}

/// What nobody fetches yet. Lowest first, so that what is there stays close to one piece from the beginning: it can be
/// hashed while it is still in the page cache.
#[derive(Debug)]
pub struct Pieces {
    gaps: VecDeque<Range<u64>>,
    piece: u64,
}

impl Pieces {
    /// Of at most `piece` bytes each.
    pub fn new(gaps: Vec<Range<u64>>, piece: u64) -> Self {
        Self { gaps: gaps.into(), piece: piece.max(1) }
    }

    pub fn take(&mut self) -> Option<Range<u64>> {
        let gap = self.gaps.pop_front()?;
        // A small rest goes with the last piece: it is not worth a request.
        let whole = gap.end - gap.start <= self.piece + self.piece / 4;
        let end = if whole { gap.end } else { gap.start + self.piece };
        if end < gap.end {
            self.gaps.push_front(end..gap.end);
        }
        Some(gap.start..end)
    }

    pub fn is_empty(&self) -> bool {
        self.gaps.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_touches_becomes_one_and_what_is_missing_is_known() {
        let mut ranges = Ranges::default();
        ranges.add(10..20);
        ranges.add(30..40);
        assert_eq!((ranges.prefix(), ranges.total()), (0, 20));
        assert_eq!(ranges.gaps(50), [0..10, 20..30, 40..50]);
        ranges.add(20..30);
        assert_eq!(ranges, Ranges::one(10..40));
        ranges.add(0..10);
        assert_eq!((ranges.prefix(), ranges.gaps(40)), (40, vec![]));
    }

    #[test]
    fn pieces_come_from_the_beginning_and_a_small_rest_goes_along() {
        let mut pieces = Pieces::new(vec![0..10, 100..225], 100);
        let all: Vec<_> = std::iter::from_fn(|| pieces.take()).collect();
        assert_eq!(all, [0..10, 100..225]);
        let mut pieces = Pieces::new(vec![100..330, 400..401], 100);
        let all: Vec<_> = std::iter::from_fn(|| pieces.take()).collect();
        assert_eq!(all, [100..200, 200..300, 300..330, 400..401]);
    }

    proptest! {
        #[test]
        fn a_set_of_ranges_is_the_set_of_their_bytes(added in prop::collection::vec((0u64..60, 0u64..12), 0..20)) {
            let mut ranges = Ranges::default();
            let mut bytes = [false; 80];
            for (from, len) in added {
                ranges.add(from..from + len);
                (from..from + len).for_each(|at| bytes[at as usize] = true);
            }
            prop_assert_eq!(ranges.total(), bytes.iter().filter(|b| **b).count() as u64);
            prop_assert_eq!(ranges.prefix(), bytes.iter().take_while(|b| **b).count() as u64);
            prop_assert!(ranges.0.windows(2).all(|w| w[0].end < w[1].start), "{:?}", ranges);
            let missing: u64 = ranges.gaps(80).iter().map(|g| g.end - g.start).sum();
            prop_assert_eq!(missing + ranges.total(), 80);
            let taken: u64 = {
                let mut pieces = Pieces::new(ranges.gaps(80), 7);
                std::iter::from_fn(|| pieces.take()).map(|p| p.end - p.start).sum()
            };
            prop_assert_eq!(taken, missing);
        }
    }
}

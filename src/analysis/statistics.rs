//! [`Statistics`]: how much was allocated, by what, in which sizes, where, live or not.

use super::site::SiteTotals;
use crate::capture::Totals;
use crate::capture::{Allocation, AllocatorKind, FrameId, SiteState, StackId, StackTable};
use foldhash::fast::RandomState;
use std::collections::HashMap;

/// The most bins that a histogram has.
const BINS: u32 = 10;

/// Sizes between two bounds, both included.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct SizeBin {
    /// Smallest size, in bytes.
    pub min_bytes: u64,
    /// Largest size, in bytes.
    pub max_bytes: u64,
    /// Allocations of such a size.
    pub totals: Totals,
}

/// What one allocator gave.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct AllocatorTotals {
    /// The function.
    pub allocator: AllocatorKind,
    /// Its allocations.
    pub totals: Totals,
}

/// What one code location asked for itself.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct LocationTotals {
    /// The location; `None` for allocations without a Python stack.
    pub frame: Option<FrameId>,
    /// Its allocations.
    pub totals: Totals,
}

/// Sums over all allocations of a capture.
#[derive(Clone, Debug)]
pub struct Statistics {
    /// Every allocation.
    pub allocated: Totals,
    /// Allocations with a size of `n` bits are at index `n` (0 is at 0).
    by_bits: [Totals; 65],
    by_allocator: [Totals; AllocatorKind::ALL.len()],
    by_stack: HashMap<StackId, Totals, RandomState>,
}

impl Default for Statistics {
    fn default() -> Self {
        Self {
            allocated: Totals::default(),
            by_bits: [Totals::default(); 65],
            by_allocator: [Totals::default(); AllocatorKind::ALL.len()],
            by_stack: HashMap::default(),
        }
    }
}

impl Statistics {
    pub(super) fn allocated(&mut self, event: &Allocation) {
        let one = Totals::one(event.size, event.interval);
        self.allocated.add(one);
        self.by_bits[(64 - event.size.leading_zeros()) as usize].add(one);
        self.by_allocator[usize::from(event.allocator.id())].add(one);
        self.by_stack.entry(event.stack).or_default().add(one);
    }

    /// What came at a site; in which sizes is not known.
    pub(super) fn came(&mut self, row: &SiteState) {
        if row.allocated.is_empty() {
            return;
        }
        self.allocated.add(row.allocated);
        self.by_allocator[usize::from(row.allocator.id())].add(row.allocated);
        self.by_stack.entry(row.stack).or_default().add(row.allocated);
    }

    /// Adds those of another capture, whose stacks are here what `stack` says.
    pub(super) fn merge(&mut self, other: &Self, stack: impl Fn(StackId) -> StackId) {
        self.allocated.add(other.allocated);
        let (bits, allocators) = (self.by_bits.iter_mut(), self.by_allocator.iter_mut());
        bits.zip(other.by_bits).for_each(|(sum, more)| sum.add(more));
        allocators.zip(other.by_allocator).for_each(|(sum, more)| sum.add(more));
        for (id, totals) in &other.by_stack {
            self.by_stack.entry(stack(*id)).or_default().add(*totals);
        }
    }

    /// Ten bins at most, growing by powers of two, from the smallest size to the largest.
    pub fn size_histogram(&self) -> Vec<SizeBin> {
        let used = |bits: &u32| !self.by_bits[*bits as usize].is_empty();
        let (Some(low), Some(high)) = ((0..65).find(used), (0..65).rev().find(used)) else {
            return Vec::new();
        };
        let width = (high - low + 1).div_ceil(BINS);
        (low..=high)
            .step_by(width as usize)
            .map(|first| {
                let last = (first + width - 1).min(64);
                let mut totals = Totals::default();
                (first..=last).for_each(|bits| totals.add(self.by_bits[bits as usize]));
                let min_bytes = if first == 0 { 0 } else { 1 << (first - 1) };
                let max_bytes = if last == 0 { 0 } else { u64::MAX >> (64 - last) };
                SizeBin { min_bytes, max_bytes, totals }
            })
            .collect()
    }

    /// The allocators that were used, most bytes first.
    pub fn allocators(&self) -> Vec<AllocatorTotals> {
        let all = AllocatorKind::ALL.into_iter().zip(self.by_allocator);
        let mut rows: Vec<AllocatorTotals> = all
            .filter(|(_, totals)| !totals.is_empty())
            .map(|(allocator, totals)| AllocatorTotals { allocator, totals })
            .collect();
        rows.sort_by(|a, b| b.totals.compare(&a.totals));
        rows
    }

    /// The innermost frames of all allocations, in no order.
    pub fn locations(&self, stacks: &StackTable) -> Vec<LocationTotals> {
        by_location(self.by_stack.iter().map(|(stack, totals)| (*stack, *totals)), stacks)
    }

    /// Distinct stacks that allocated.
    pub fn distinct_stacks(&self) -> usize {
        self.by_stack.len()
    }
}

/// The innermost frames of `sites`, in no order.
pub fn locations(sites: &[SiteTotals], stacks: &StackTable) -> Vec<LocationTotals> {
    by_location(sites.iter().map(|row| (row.site.stack, row.totals)), stacks)
}

fn by_location(parts: impl Iterator<Item = (StackId, Totals)>, stacks: &StackTable) -> Vec<LocationTotals> {
    let mut sums: HashMap<Option<FrameId>, Totals, RandomState> = HashMap::default();
    for (stack, totals) in parts {
        sums.entry(stacks.node(stack).map(|(frame, _)| frame)).or_default().add(totals);
    }
    sums.into_iter().map(|(frame, totals)| LocationTotals { frame, totals }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::RemoteAddr;
    use proptest::prelude::*;

    fn statistics(sizes: &[u64]) -> Statistics {
        let mut statistics = Statistics::default();
        for &size in sizes {
            statistics.allocated(&Allocation {
                allocator: AllocatorKind::Malloc,
                tid: 1,
                address: RemoteAddr(0),
                size,
                stack: StackId::EMPTY,
                interval: 0,
            });
        }
        statistics
    }

    proptest! {
        #[test]
        fn every_size_is_in_exactly_one_bin(sizes in prop::collection::vec(prop_oneof![0u64..5000, any::<u64>()], 1..50)) {
            let bins = statistics(&sizes).size_histogram();
            prop_assert!(bins.len() <= 10);
            for bin in &bins {
                let expected = sizes.iter().filter(|size| (bin.min_bytes..=bin.max_bytes).contains(size)).count();
                prop_assert_eq!(bin.totals.count(), expected as u64);
            }
            prop_assert_eq!(bins.iter().map(|bin| bin.totals.count()).sum::<u64>(), sizes.len() as u64);
        }
    }

    #[test]
    fn nothing_has_no_bins() {
        assert!(statistics(&[]).size_histogram().is_empty());
        let one = statistics(&[512]).size_histogram();
        assert_eq!(one, [SizeBin { min_bytes: 512, max_bytes: 1023, totals: Totals::certain(512, 1) }]);
    }
}

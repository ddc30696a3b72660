//! [`Temporary`]: blocks freed before more than N other allocations were made on their thread.
//!
//! Memory: N + 1 blocks per thread that allocates.
//!
//! Of a sampled capture the other allocations that are counted are the recorded ones: what was made between two samples is
//! not known.

use super::site::{SiteTotals, sorted};
use crate::addr::RemoteAddr;
use crate::capture::{Allocation, Site, Totals};
use foldhash::fast::RandomState;
use std::collections::{HashMap, VecDeque};

/// A block that may still turn out temporary.
#[derive(Clone, Copy)]
struct Candidate {
    site: Site,
    size: u64,
    interval: u64,
    /// Which allocation of the whole capture it was: tells it from a later one at its address.
    number: u64,
}

/// Finds temporary allocations as events pass.
pub struct Temporary {
    window: usize,
    candidates: HashMap<RemoteAddr, Candidate, RandomState>,
    /// The last allocations of each thread: address and number.
    recent: HashMap<u32, VecDeque<(RemoteAddr, u64)>, RandomState>,
    found: HashMap<Site, Totals, RandomState>,
    allocations: u64,
}

impl Temporary {
    /// `threshold`: how many other allocations the thread may make before the free.
    pub fn new(threshold: u32) -> Self {
        Self {
            window: threshold as usize + 1,
            candidates: HashMap::default(),
            recent: HashMap::default(),
            found: HashMap::default(),
            allocations: 0,
        }
    }

    /// A block or mapping was allocated.
    pub fn allocated(&mut self, event: &Allocation) {
        let Allocation { address, size, interval, .. } = *event;
        let site = Site::of(event);
        self.allocations += 1;
        let number = self.allocations;
        self.candidates.insert(address, Candidate { site, size, interval, number });
        let recent = self.recent.entry(site.tid).or_default();
        recent.push_back((address, number));
        if recent.len() > self.window
            && let Some((old, number)) = recent.pop_front()
            && self.candidates.get(&old).is_some_and(|candidate| candidate.number == number)
        {
            self.candidates.remove(&old);
        }
    }

    /// The block was freed by any thread, or the mapping that begins here unmapped wholly.
    pub fn freed(&mut self, address: RemoteAddr) {
        if let Some(Candidate { site, size, interval, .. }) = self.candidates.remove(&address) {
            self.found.entry(site).or_default().add(Totals::one(size, interval));
        }
    }

    /// What each site allocated only to free it soon, biggest first.
    pub fn sites(&self) -> Vec<SiteTotals> {
        sorted(self.found.iter().map(|(site, totals)| (*site, *totals)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capture::{AllocatorKind, StackId};

    fn block(tid: u32, address: u64, size: u64) -> Allocation {
        let (allocator, stack) = (AllocatorKind::Malloc, StackId(1));
        Allocation { allocator, tid, address: RemoteAddr(address), size, stack, interval: 0 }
    }

    fn count(threshold: u32, between: u64, other_thread: bool) -> u64 {
        let mut temporary = Temporary::new(threshold);
        temporary.allocated(&block(1, 16, 8));
        for n in 0..between {
            temporary.allocated(&block(if other_thread { 2 } else { 1 }, 100 + n, 1));
        }
        temporary.freed(RemoteAddr(16));
        temporary.sites().iter().map(|row| row.totals.count()).sum()
    }

    #[test]
    fn the_threshold_counts_other_allocations_of_the_thread() {
        assert_eq!((count(0, 0, false), count(0, 1, false)), (1, 0));
        assert_eq!((count(1, 1, false), count(1, 2, false)), (1, 0));
        assert_eq!((count(5, 5, false), count(5, 6, false)), (1, 0));
        assert_eq!(count(0, 50, true), 1);
    }

    #[test]
    fn an_address_used_again_is_a_new_block() {
        let mut temporary = Temporary::new(1);
        temporary.allocated(&block(1, 16, 8));
        temporary.freed(RemoteAddr(16));
        temporary.allocated(&block(1, 16, 10));
        temporary.allocated(&block(1, 32, 1));
        temporary.freed(RemoteAddr(16));
        temporary.freed(RemoteAddr(16));
        assert_eq!(temporary.sites()[0].totals, Totals::certain(18, 2));
    }
}

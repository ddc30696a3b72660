//! [`Flows`]: what came and went at each site since the last snapshot, and the rows of the next one.
//!
//! Knows sites and sums; when a snapshot is taken is [`super::snapshots`]' business, and whether it was written the ledger's.

use crate::capture::{
    AGES, Age, Allocation, BYTES_FRACTION, Block, COUNT_FRACTION, LiveSet, Part, Site, SiteState, Totals,
    Weight, age_class,
};
use foldhash::fast::RandomState;
use std::collections::{HashMap, HashSet};

/// Sites between two snapshots at which threads are no longer told apart.
const MANY_SITES: usize = 1 << 16;
/// Threads that have ended and have rows in one snapshot; if there are more, they are no longer told apart.
const MANY_ENDED: usize = 256;
/// Stands for threads that are not told apart.
const ANY_THREAD: u32 = 0;

#[derive(Clone, Copy, Default)]
struct Flow {
    allocated: Totals,
    freed: Totals,
}

/// See the module.
pub struct Flows {
    sites: HashMap<Site, Flow, RandomState>,
    /// Sites at which they are folded the next time.
    fold_at: usize,
    /// There were too many threads that have ended.
    folds_ended: bool,
}

impl Default for Flows {
    fn default() -> Self {
        Self { sites: HashMap::default(), fold_at: MANY_SITES, folds_ended: false }
    }
}

impl Flows {
    /// A block or a mapping was given out.
    pub fn allocated(&mut self, event: &Allocation) {
        let one = if event.allocator.is_ranged() {
            // As much of it as the address space holds.
            match event.size.min(u64::MAX - event.address.0) {
                0 => return,
                bytes => Totals::certain(bytes, 1),
            }
        } else {
            Totals::one(event.size, event.interval)
        };
        self.flow(Site::of(event)).allocated.add(one);
    }

    /// A block was given back.
    pub fn freed(&mut self, block: &Block) {
        self.flow(block.site()).freed.add(Totals::one(block.size, block.interval));
    }

    /// Parts of mappings were given back.
    pub fn unmapped(&mut self, parts: &[Part]) {
        for part in parts {
            let gone = Totals::certain(part.bytes, u64::from(part.ended));
            self.flow(part.mapping.site()).freed.add(gone);
        }
    }

    /// A snapshot has them.
    pub fn clear(&mut self) {
        *self = Self { folds_ended: self.folds_ended, ..Self::default() };
    }

    /// The rows of a snapshot taken at `now_ns`, in order: what lives, by age, and what came and went. `alive` are the target's
    /// threads.
    pub fn rows(&mut self, live: &LiveSet, now_ns: u64, alive: &HashSet<u32>) -> Vec<SiteState> {
        let now_ms = now_ns / 1_000_000;
        let mut rows = Rows::default();
        for (site, Flow { allocated, freed }) in &self.sites {
            let row = rows.of(*site);
            (row.allocated, row.freed) = (*allocated, *freed);
        }
        for (block, bytes) in live.iter() {
            let row = rows.of(block.site());
            let interval = if block.allocator.is_ranged() { 0 } else { block.interval };
            row.live.add(Totals::one(bytes, interval));
            // In fixed point until all are added.
            let weight = Weight::of(bytes, interval);
            let age = &mut row.ages[age_class(now_ms.saturating_sub(u64::from(block.time_ms)))];
            age.bytes = age.bytes.saturating_add(weight.bytes);
            age.blocks = age.blocks.saturating_add(weight.count);
        }
        let mut rows = rows.rows;
        rows.iter_mut().for_each(|row| row.ages = row.ages.map(rounded));
        self.fold_ended(&mut rows, alive);
        rows
    }

    /// Threads that have ended are told apart while they are few: a server may have one for each request.
    fn fold_ended(&mut self, rows: &mut [SiteState], alive: &HashSet<u32>) {
        let has_ended = |row: &SiteState| row.tid != ANY_THREAD && !alive.contains(&row.tid);
        if !self.folds_ended {
            let ended: HashSet<u32> = rows.iter().filter(|row| has_ended(row)).map(|row| row.tid).collect();
            self.folds_ended = ended.len() > MANY_ENDED;
        }
        if self.folds_ended {
            rows.iter_mut().filter(|row| has_ended(row)).for_each(|row| row.tid = ANY_THREAD);
        }
    }

    fn flow(&mut self, site: Site) -> &mut Flow {
        if self.sites.len() >= self.fold_at && !self.sites.contains_key(&site) {
            self.fold();
        }
        self.sites.entry(site).or_default()
    }

    /// Adds up threads, lest the table grow with every one that ever was.
    fn fold(&mut self) {
        for (site, flow) in std::mem::take(&mut self.sites) {
            let sum = self.sites.entry(Site { tid: ANY_THREAD, ..site }).or_default();
            sum.allocated.add(flow.allocated);
            sum.freed.add(flow.freed);
        }
        self.fold_at = MANY_SITES.max(2 * self.sites.len());
    }
}

/// Rows in the order in which their sites were met.
#[derive(Default)]
struct Rows {
    at: HashMap<Site, u32, RandomState>,
    rows: Vec<SiteState>,
}

impl Rows {
    fn of(&mut self, site: Site) -> &mut SiteState {
        let next = self.rows.len() as u32;
        let at = *self.at.entry(site).or_insert(next);
        if at == next {
            let Site { stack, allocator, tid } = site;
            self.rows.push(SiteState {
                stack,
                allocator,
                tid,
                ages: [Age::default(); AGES],
                ..SiteState::default()
            });
        }
        &mut self.rows[at as usize]
    }
}

/// Out of fixed point, to the nearest.
fn rounded(age: Age) -> Age {
    let nearest = |sum: u64, fraction: u32| sum.saturating_add(1 << (fraction - 1)) >> fraction;
    Age { bytes: nearest(age.bytes, BYTES_FRACTION), blocks: nearest(age.blocks, COUNT_FRACTION) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::RemoteAddr;
    use crate::capture::{AllocatorKind, Displaced, Snapshot, StackId, Unmap};
    use proptest::prelude::*;

    const MS: u64 = 1_000_000;

    fn event(allocator: AllocatorKind, tid: u32, address: u64, size: u64) -> Allocation {
        let interval = if allocator.is_ranged() || size.is_multiple_of(2) { 0 } else { 1000 };
        Allocation { allocator, tid, address: RemoteAddr(address), size, stack: StackId(tid % 3), interval }
    }

    /// What the ledger does.
    #[derive(Default)]
    struct Books {
        live: Option<LiveSet>,
        flows: Flows,
    }

    impl Books {
        fn live(&mut self) -> &mut LiveSet {
            self.live.get_or_insert_with(|| LiveSet::new(4096))
        }

        fn allocate(&mut self, event: Allocation, now_ns: u64) {
            let displaced = self.live().allocate(&event, now_ns);
            self.flows.allocated(&event);
            match displaced {
                Displaced::Block(block) => self.flows.freed(&block),
                Displaced::Mappings(parts) => self.flows.unmapped(&parts),
                Displaced::Nothing => {}
            }
        }

        fn free(&mut self, address: u64) {
            if let Some(block) = self.live().free(RemoteAddr(address)) {
                self.flows.freed(&block);
            }
        }

        fn unmap(&mut self, address: u64, len: u64) {
            let parts = self.live().unmap(&Unmap { tid: 1, address: RemoteAddr(address), len });
            self.flows.unmapped(&parts);
        }

        fn rows(&mut self, now_ns: u64, alive: &[u32]) -> Vec<SiteState> {
            let alive = alive.iter().copied().collect();
            self.live();
            let rows = self.flows.rows(self.live.as_ref().unwrap(), now_ns, &alive);
            let mut snapshot = Snapshot { rows, ..Snapshot::default() };
            snapshot.settle();
            snapshot.rows
        }
    }

    proptest! {
        #[test]
        fn what_came_less_what_went_is_what_lives(
            steps in prop::collection::vec((0u8..4, 1u32..9, 0u64..20, 1u64..5000), 0..200),
        ) {
            let mut books = Books::default();
            for (what, tid, at, size) in steps {
                match what {
                    0 => books.allocate(event(AllocatorKind::Malloc, tid, 0x1000 + at * 16, size), 0),
                    1 => books.free(0x1000 + at * 16),
                    2 => books.allocate(event(AllocatorKind::Mmap, tid, 0x10_0000 + at * 4096, size), 0),
                    _ => books.unmap(0x10_0000 + at * 4096, size),
                }
            }
            let live = books.live().live_bytes();
            let rows = books.rows(0, &[]);
            for row in &rows {
                let mut left = row.allocated;
                left.remove(row.freed);
                prop_assert_eq!((left.bytes(), left.count(), left.samples()), (row.live.bytes(), row.live.count(), row.live.samples()));
                prop_assert_eq!(row.ages.iter().map(|age| age.bytes).sum::<u64>(), row.live.bytes());
                prop_assert_eq!(row.ages.iter().map(|age| age.blocks).sum::<u64>(), row.live.count());
            }
            let mut sum = Totals::default();
            rows.iter().for_each(|row| sum.add(row.live));
            prop_assert_eq!(sum.bytes(), live);
            books.flows.clear();
            prop_assert!(books.rows(0, &[]).iter().all(|row| row.allocated.is_empty() && row.freed.is_empty() && !row.live.is_empty()));
        }
    }

    #[test]
    fn blocks_are_counted_by_their_age() {
        let mut books = Books::default();
        for (n, ms) in [0, 500, 6_000, 9_500, 9_999].into_iter().enumerate() {
            books.allocate(event(AllocatorKind::Malloc, 3, n as u64 * 16, 10 << n), ms * MS);
        }
        let ages = books.rows(10_000 * MS, &[])[0].ages;
        // Under 1 s, 5 s, 15 s.
        assert_eq!(
            ages[..3].iter().map(|age| (age.bytes, age.blocks)).collect::<Vec<_>>(),
            [(240, 2), (40, 1), (30, 2)]
        );
    }

    #[test]
    fn many_threads_that_ended_are_one_and_the_living_are_not() {
        let mut books = Books::default();
        for tid in 1..=1000 {
            books.allocate(event(AllocatorKind::Malloc, tid, u64::from(tid) * 16, 10), 0);
        }
        let rows = books.rows(0, &[5, 6]);
        let tids: HashSet<u32> = rows.iter().map(|row| row.tid).collect();
        assert_eq!(tids, HashSet::from([0, 5, 6]));
        assert_eq!(rows.iter().map(|row| row.live.count()).sum::<u64>(), 1000);
        // Nor are they told apart later, when there are few.
        books.flows.clear();
        (1..=990_u32).for_each(|tid| books.free(u64::from(tid) * 16));
        assert!(books.rows(0, &[]).iter().all(|row| row.tid == 0));
        let few = Books::default().rows(0, &[]);
        assert!(few.is_empty());
    }

    #[test]
    fn the_table_does_not_grow_with_every_thread_that_was() {
        let mut books = Books::default();
        for tid in 1..=300_000 {
            books.allocate(event(AllocatorKind::Malloc, tid, 0x1000, 10), 0);
            books.free(0x1000);
        }
        assert!(books.flows.sites.len() <= MANY_SITES + 1, "{}", books.flows.sites.len());
        let rows = books.rows(0, &[]);
        assert_eq!(
            rows.iter()
                .map(|row| (row.allocated.count(), row.freed.count()))
                .fold((0, 0), |a, b| (a.0 + b.0, a.1 + b.1)),
            (300_000, 300_000)
        );
    }
}

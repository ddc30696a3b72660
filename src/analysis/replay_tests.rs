//! High-water mark and leaks against recounts that copy everything at every event.

use super::*;
use crate::addr::RemoteAddr;
use crate::capture::{AllocatorKind, StackId};
use proptest::prelude::*;
use std::collections::BTreeMap;

type Recount = BTreeMap<Site, Totals>;

fn record() -> impl Strategy<Value = Record> {
    static ALLOCATORS: [AllocatorKind; 3] =
        [AllocatorKind::Malloc, AllocatorKind::Calloc, AllocatorKind::Mmap];
    prop_oneof![
        3 => (prop::sample::select(&ALLOCATORS[..]), 1u32..3, 0u64..12, 0u64..40, 0u32..4).prop_map(
            |(allocator, tid, address, size, stack)| Record::Allocation(Allocation {
                allocator,
                tid,
                address: RemoteAddr(address),
                size,
                stack: StackId(stack),
                interval: 0
            })
        ),
        2 => (1u32..3, 0u64..12).prop_map(|(tid, address)| Record::Free(Free {
            deallocator: AllocatorKind::Free,
            tid,
            address: RemoteAddr(address)
        })),
        1 => (0u64..40, 0u64..30).prop_map(|(address, len)| Record::Unmap(Unmap {
            tid: 1,
            address: RemoteAddr(address),
            len
        })),
        1 => (0u64..100).prop_map(Record::Time),
    ]
}

/// Everything live, byte by byte for mappings.
#[derive(Default)]
struct Naive {
    blocks: BTreeMap<u64, (Site, u64)>,
    bytes: BTreeMap<u64, (Site, usize)>,
}

impl Naive {
    fn apply(&mut self, number: usize, record: &Record) {
        match record {
            Record::Allocation(event) => {
                let site = Site { stack: event.stack, allocator: event.allocator, tid: event.tid };
                let at = event.address.0;
                if event.allocator.is_ranged() {
                    self.bytes.extend((at..at + event.size).map(|byte| (byte, (site, number))));
                } else {
                    self.blocks.insert(at, (site, event.size));
                }
            }
            Record::Free(event) => {
                self.blocks.remove(&event.address.0);
            }
            Record::Unmap(event) => {
                let at = event.address.0;
                self.bytes.retain(|byte, _| !(at..at + event.len).contains(byte));
            }
            _ => {}
        }
    }

    fn recount(&self) -> Recount {
        let mut recount = Recount::new();
        for (site, size) in self.blocks.values() {
            recount.entry(*site).or_default().add(Totals { bytes: *size, count: 1 });
        }
        let mut mappings: BTreeMap<(Site, usize), u64> = BTreeMap::new();
        for owner in self.bytes.values() {
            *mappings.entry(*owner).or_default() += 1;
        }
        for ((site, _), bytes) in mappings {
            recount.entry(site).or_default().add(Totals { bytes, count: 1 });
        }
        recount
    }
}

fn as_map(rows: &[SiteTotals]) -> Recount {
    rows.iter().map(|row| (row.site, row.totals)).collect()
}

proptest! {
    #[test]
    fn high_water_mark_and_leaks_equal_a_naive_recount(records in prop::collection::vec(record(), 0..120)) {
        let mut peak = Replay::new(View::HighWaterMark, 1);
        let mut leaks = Replay::new(View::Leaks, 1);
        let mut naive = Naive::default();
        let (mut most, mut at_most, mut time, mut time_at_most) = (0, Recount::new(), 0, 0);
        for (number, record) in records.iter().enumerate() {
            peak.observe(record);
            leaks.observe(record);
            naive.apply(number, record);
            if let Record::Time(ns) = record {
                time = time.max(*ns);
            }
            let recount = naive.recount();
            let live = recount.values().map(|totals| totals.bytes).sum::<u64>();
            if live > most {
                (most, at_most, time_at_most) = (live, recount, time);
            }
        }
        prop_assert_eq!(peak.peak.peak_bytes(), most);
        prop_assert_eq!(peak.peak.peak_time_ns(), time_at_most);
        prop_assert_eq!(peak.live.peak_bytes(), most);
        prop_assert_eq!(as_map(&peak.sites()), at_most);
        prop_assert_eq!(as_map(&leaks.sites()), naive.recount());
    }

    #[test]
    fn any_numbers_are_survived(raw in prop::collection::vec((any::<u64>(), any::<u64>(), 0usize..24), 0..40)) {
        for view in [View::HighWaterMark, View::Leaks, View::Temporary(2)] {
            let mut replay = Replay::new(view, 4096);
            for &(address, size, kind) in &raw {
                let (address, allocator) = (RemoteAddr(address), AllocatorKind::ALL[kind]);
                replay.observe(&Record::Allocation(Allocation { allocator, tid: 1, address, size, stack: StackId(1), interval: 0 }));
                replay.observe(&Record::Unmap(Unmap { tid: 1, address: address.offset(size / 2), len: size }));
            }
            replay.sites();
        }
    }
}

#[test]
fn a_block_freed_before_the_end_is_at_the_peak_but_no_leak() {
    let allocation = Allocation {
        allocator: AllocatorKind::Malloc,
        tid: 1,
        address: RemoteAddr(16),
        size: 100,
        stack: StackId(1),
        interval: 0,
    };
    let free = Free { deallocator: AllocatorKind::Free, tid: 1, address: RemoteAddr(16) };
    for (view, expected) in [(View::HighWaterMark, 100), (View::Leaks, 0), (View::Temporary(0), 100)] {
        let mut replay = Replay::new(view, 4096);
        replay.observe(&Record::Allocation(allocation));
        replay.observe(&Record::Free(free));
        replay.observe(&Record::Free(free));
        assert_eq!(replay.sites().iter().map(|row| row.totals.bytes).sum::<u64>(), expected);
        assert_eq!(replay.missing.missed_allocations, 1);
    }
}

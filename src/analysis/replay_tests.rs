//! High-water mark and leaks against recounts that copy everything at every event.

use super::*;
use crate::addr::RemoteAddr;
use crate::capture::{AllocatorKind, StackId};
use proptest::prelude::*;
use std::collections::BTreeMap;

type Recount = BTreeMap<Site, Totals>;

/// Of a capture that has samples drawn with these intervals (and 0).
fn record(intervals: &'static [u64]) -> impl Strategy<Value = Record> {
    let interval = prop::sample::select(intervals);
    static ALLOCATORS: [AllocatorKind; 3] =
        [AllocatorKind::Malloc, AllocatorKind::Calloc, AllocatorKind::Mmap];
    prop_oneof![
        3 => (prop::sample::select(&ALLOCATORS[..]), 1u32..3, 0u64..12, 0u64..40, 0u32..4, interval).prop_map(
            |(allocator, tid, address, size, stack, interval)| Record::Allocation(Allocation {
                allocator,
                tid,
                address: RemoteAddr(address),
                size,
                stack: StackId(stack),
                interval: if allocator == AllocatorKind::Mmap { 0 } else { interval },
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
    blocks: BTreeMap<u64, (Site, Totals)>,
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
                    self.blocks.insert(at, (site, Totals::one(event.size, event.interval)));
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
        for (site, block) in self.blocks.values() {
            recount.entry(*site).or_default().add(*block);
        }
        let mut mappings: BTreeMap<(Site, usize), u64> = BTreeMap::new();
        for owner in self.bytes.values() {
            *mappings.entry(*owner).or_default() += 1;
        }
        for ((site, _), bytes) in mappings {
            recount.entry(site).or_default().add(Totals::certain(bytes, 1));
        }
        recount
    }
}

/// Sums that don't depend on the order they were made in; errors to the digits that do not either.
fn comparable(recount: &Recount) -> BTreeMap<Site, (u64, u64, u64, String)> {
    let shown = |totals: &Totals| {
        let errors = format!("{:.3} {:.3}", totals.bytes_error(), totals.count_error());
        (totals.bytes(), totals.count(), totals.samples(), errors)
    };
    recount.iter().map(|(site, totals)| (*site, shown(totals))).collect()
}

fn as_map(rows: &[SiteTotals]) -> Recount {
    rows.iter().map(|row| (row.site, row.totals)).collect()
}

fn whole(recount: &Recount) -> Totals {
    let mut whole = Totals::default();
    recount.values().for_each(|totals| whole.add(*totals));
    whole
}

fn equals_a_naive_recount(records: &[Record]) -> Result<(), TestCaseError> {
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
        let live = whole(&recount).bytes();
        if live > most {
            (most, at_most, time_at_most) = (live, recount, time);
        }
    }
    prop_assert_eq!(peak.peak.peak().bytes(), most);
    prop_assert_eq!(peak.peak.peak().count(), whole(&at_most).count());
    prop_assert_eq!(peak.peak.peak_time_ns(), time_at_most);
    prop_assert_eq!(peak.live.peak_bytes(), most);
    prop_assert_eq!(peak.live().bytes(), peak.live.live_bytes());
    prop_assert_eq!(peak.live().count(), peak.live.live_blocks() as u64);
    prop_assert_eq!(comparable(&as_map(&peak.sites())), comparable(&at_most));
    prop_assert_eq!(comparable(&as_map(&leaks.sites())), comparable(&naive.recount()));
    Ok(())
}

proptest! {
    #[test]
    fn high_water_mark_and_leaks_equal_a_naive_recount(records in prop::collection::vec(record(&[0]), 0..120)) {
        equals_a_naive_recount(&records)?;
    }

    #[test]
    fn and_so_do_those_of_samples(records in prop::collection::vec(record(&[0, 30, 1000]), 0..120)) {
        equals_a_naive_recount(&records)?;
    }

    #[test]
    fn any_numbers_are_survived(raw in prop::collection::vec((any::<u64>(), any::<u64>(), any::<u64>(), 0usize..24), 0..40)) {
        for view in [View::HighWaterMark, View::Leaks, View::Temporary(2)] {
            let mut replay = Replay::new(view, 4096);
            for &(address, size, interval, kind) in &raw {
                let (address, allocator) = (RemoteAddr(address), AllocatorKind::ALL[kind]);
                replay.observe(&Record::Allocation(Allocation { allocator, tid: 1, address, size, stack: StackId(1), interval }));
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
        assert_eq!(replay.sites().iter().map(|row| row.totals.bytes()).sum::<u64>(), expected);
        assert_eq!(replay.missing.missed_allocations, 1);
    }
}

#[test]
fn samples_count_for_what_they_stand_for() {
    let sample = |address: u64, size, interval| {
        let (allocator, address) = (AllocatorKind::Malloc, RemoteAddr(address));
        Record::Allocation(Allocation { allocator, tid: 1, address, size, stack: StackId(1), interval })
    };
    let free = |address: u64| {
        Record::Free(Free { deallocator: AllocatorKind::Free, tid: 1, address: RemoteAddr(address) })
    };
    let mut replay = Replay::new(View::Leaks, 4096);
    for record in [sample(16, 1000, 1 << 19), sample(32, 1000, 1 << 20), free(32), free(48)] {
        replay.observe(&record);
    }
    let [row] = replay.sites()[..] else { panic!("one site") };
    assert_eq!((row.totals.bytes(), row.totals.count(), row.totals.samples()), ((1 << 19) + 500, 525, 1));
    // One sample of few bytes: an interval, give or take what three of them have as their standard error.
    let expected = 1.959964 * 3f64.sqrt() * f64::from(1 << 19);
    assert!((row.totals.bytes_error() / expected - 1.0).abs() < 1e-5, "{}", row.totals.bytes_error());
    assert_eq!(replay.peak.peak().samples(), 2);
    // Of the block freed last nothing is known but that it was one.
    assert_eq!((replay.freed.bytes(), replay.freed.count()), ((1 << 20) + 500, 1049 + 1));
    let expected = Samples { count: 2, least_interval: 1 << 19, largest_interval: 1 << 20 };
    assert_eq!(replay.samples, expected);
}

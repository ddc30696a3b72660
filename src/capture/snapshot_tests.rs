//! Snapshots there and back, and what is no snapshot.

use super::*;
use crate::capture::snapshot_columns::Wanted;
use crate::capture::snapshot_parts::{Assembler, Taken};
use proptest::prelude::*;

fn totals() -> impl Strategy<Value = Totals> {
    prop::collection::vec((1u64..10_000_000, prop::sample::select(vec![0, 512 << 10])), 0..4).prop_map(
        |blocks| {
            let mut sum = Totals::default();
            blocks.iter().for_each(|(size, interval)| sum.add(Totals::one(*size, *interval)));
            // As a file keeps it.
            Totals::from_numbers(sum.to_numbers())
        },
    )
}

fn row() -> impl Strategy<Value = SiteState> {
    let age = (0u64..1 << 40, 0u64..1000).prop_map(|(bytes, blocks)| Age { bytes, blocks });
    let ages = prop::collection::vec(age, AGES).prop_map(|ages| <[Age; AGES]>::try_from(ages).unwrap());
    let allocator = prop::sample::select(AllocatorKind::ALL.to_vec());
    (0u32..50, allocator, 0u32..5, (totals(), totals(), totals()), ages).prop_map(
        |(stack, allocator, tid, (live, allocated, freed), ages)| SiteState {
            stack: StackId(stack),
            allocator,
            tid,
            live,
            allocated,
            freed,
            ages,
        },
    )
}

fn parts(snapshot: &Snapshot) -> Vec<Vec<u8>> {
    let mut parts = Vec::new();
    let written: Result<(), ()> = snapshot.encode(|part| {
        parts.push(part.to_vec());
        Ok(())
    });
    written.unwrap();
    parts
}

fn head() -> SnapshotHead {
    SnapshotHead { index: 3, time_ns: 7_000_000_000, unix_ns: 1 << 60, reason: SnapshotReason::Asked }
}

/// What is left of a figure if it is wanted, and if its blocks are.
fn only(totals: Totals, wanted: bool, counts: bool) -> Totals {
    let mut numbers = if wanted { totals.to_numbers() } else { [0; 9] };
    if !counts {
        [1, 4, 7, 8].into_iter().for_each(|of_blocks| numbers[of_blocks] = 0);
    }
    Totals::from_numbers(numbers)
}

proptest! {
    #[test]
    fn a_snapshot_goes_there_and_back(rows in prop::collection::vec(row(), 0..40)) {
        let snapshot = Snapshot { head: head(), rows };
        let mut assembler = Assembler::default();
        let parts = parts(&snapshot);
        prop_assert_eq!(parts.len(), 1);
        prop_assert_eq!(assembler.take(&parts[0], 50), Ok(Taken::Whole(snapshot)));
    }

    #[test]
    fn a_part_has_what_is_wanted_of_the_rows(rows in prop::collection::vec(row(), 1..40), live: bool, flows: bool, ages: bool, counts: bool) {
        let snapshot = Snapshot { head: head(), rows };
        let wanted = Wanted { live, flows, ages, counts };
        let mut assembler = Assembler::default();
        assembler.give_parts();
        // Nothing of a part before may show.
        prop_assert_eq!(assembler.take(&parts(&snapshot)[0], 50), Ok(Taken::Part));
        prop_assert_eq!(assembler.part().rows().collect::<Vec<_>>(), snapshot.rows.clone());
        assembler.want(wanted);
        prop_assert_eq!(assembler.take(&parts(&snapshot)[0], 50), Ok(Taken::Part));
        let expected = snapshot.rows.iter().map(|row| SiteState {
            live: only(row.live, live, counts),
            allocated: only(row.allocated, flows, counts),
            freed: only(row.freed, flows, counts),
            ages: if ages { row.ages } else { [Age::default(); AGES] },
            ..row.clone()
        });
        let expected = if !wanted.any() { Vec::new() } else { expected.collect::<Vec<_>>() };
        prop_assert_eq!(assembler.part().rows().collect::<Vec<_>>(), expected);
        prop_assert!(assembler.part().is_last && assembler.part().head == snapshot.head);
    }

    #[test]
    fn any_bytes_are_survived(raw in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = Assembler::default().take(&raw, 50);
    }

    #[test]
    fn a_cut_part_is_an_error(rows in prop::collection::vec(row(), 1..5), cut: prop::sample::Index) {
        let part = &parts(&Snapshot { head: head(), rows })[0];
        prop_assert!(Assembler::default().take(&part[..cut.index(part.len())], 50).is_err());
    }
}

#[test]
fn a_large_snapshot_has_parts_and_each_fits_a_chunk() {
    let most = Totals::from_numbers([u64::MAX; 9]);
    let ages = [Age { bytes: u64::MAX, blocks: u64::MAX }; AGES];
    let row = SiteState { live: most, allocated: most, freed: most, ages, ..SiteState::default() };
    let snapshot = Snapshot { head: head(), rows: vec![row; 2 * ROWS_PER_PART + 1] };
    let parts = parts(&snapshot);
    assert!(parts.len() == 3 && parts.iter().all(|part| part.len() <= crate::capture::format::MAX_RAW_LEN));
    let mut assembler = Assembler::default();
    assert_eq!(assembler.take(&parts[0], 0), Ok(Taken::More));
    assert_eq!(assembler.take(&parts[1], 0), Ok(Taken::More));
    let Ok(Taken::Whole(whole)) = assembler.take(&parts[2], 0) else { panic!("not whole") };
    assert_eq!(whole.rows.len(), 2 * ROWS_PER_PART + 1);
    // The second part was lost: the third says nothing.
    assert_eq!(assembler.take(&parts[0], 0), Ok(Taken::More));
    assert!(assembler.take(&parts[2], 0).is_err());
}

#[test]
fn a_stack_that_nobody_defined_is_an_error() {
    let row = SiteState { stack: StackId(9), ..SiteState::default() };
    let part = &parts(&Snapshot { head: head(), rows: vec![row] })[0];
    assert!(Assembler::default().take(part, 8).is_err() && Assembler::default().take(part, 9).is_ok());
}

proptest! {
    #[test]
    fn summing_up_small_sites_loses_nothing(rows in prop::collection::vec(row(), 0..200), most in 25usize..100) {
        let whole = Snapshot { head: head(), rows };
        let mut limited = whole.clone();
        limited.limit_rows(most, StackId(77));
        prop_assert!(limited.rows.len() <= most.max(whole.rows.len().min(most)));
        prop_assert_eq!(limited.live().bytes(), whole.live().bytes());
        let flows = |of: &Snapshot| of.rows.iter().map(|row| row.allocated.bytes() + row.freed.count()).sum::<u64>();
        // Numbers of samples are rounded once for each sum.
        prop_assert!(flows(&limited).abs_diff(flows(&whole)) <= 2 * whole.rows.len() as u64);
        if whole.rows.len() > most {
            prop_assert!(limited.rows.is_sorted_by_key(SiteState::site));
            let largest = whole.rows.iter().map(|row| row.live.bytes()).max();
            prop_assert!(limited.rows.iter().map(|row| row.live.bytes()).max() >= largest);
        }
    }
}

#[test]
fn rows_of_one_site_become_one() {
    let row = |stack, bytes| SiteState {
        stack: StackId(stack),
        live: Totals::certain(bytes, 1),
        ..SiteState::default()
    };
    let mut snapshot = Snapshot { head: head(), rows: vec![row(2, 5), row(1, 7), row(2, 1)] };
    snapshot.settle();
    let rows: Vec<_> =
        snapshot.rows.iter().map(|row| (row.stack.0, row.live.bytes(), row.live.count())).collect();
    assert_eq!(rows, [(1, 7, 1), (2, 6, 2)]);
}

#[test]
fn classes_of_age_begin_where_the_last_ended() {
    assert_eq!([0, 999, 1000, 4999, 5000].map(age_class), [0, 0, 1, 1, 2]);
    assert_eq!((age_class(345_599_999), age_class(345_600_000), age_class(u64::MAX)), (10, 11, 11));
}

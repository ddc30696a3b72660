//! Caller tree and functions against sums that walk every stack.

use super::*;
use crate::analysis::SiteTotals;
use crate::capture::Site;
use crate::capture::{AllocatorKind, CaptureReader, CaptureWriter, Header, Trailer};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

/// A table with these stacks (frames are `f<n>`, outermost first, line = position), and their ids.
fn table(stacks: &[Vec<u32>]) -> (StackTable, Vec<StackId>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.heaptap");
    let mut writer = CaptureWriter::create(&path, false, &Header::default()).unwrap();
    let mut ids = Vec::new();
    for stack in stacks {
        let mut frames = Vec::new();
        for (line, function) in stack.iter().enumerate() {
            frames.push(writer.intern_frame(&format!("f{function}"), "a.py", line as u32).unwrap());
        }
        frames.reverse();
        ids.push(writer.intern_stack(&frames).unwrap());
    }
    writer.finish(Trailer::default()).unwrap();
    let mut reader = CaptureReader::open(&path).unwrap();
    assert!(reader.by_ref().all(|record| record.is_ok()));
    (reader.into_stacks(), ids)
}

fn sites(ids: &[StackId]) -> Vec<SiteTotals> {
    let row = |(n, stack): (usize, &StackId)| SiteTotals {
        site: Site { stack: *stack, allocator: AllocatorKind::Malloc, tid: n as u32 },
        totals: Totals::certain(10 + n as u64, 1),
    };
    ids.iter().enumerate().map(row).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn sums_equal_those_of_a_walk_of_every_stack(
        stacks in prop::collection::vec(prop::collection::vec(0u32..4, 0..7), 1..12),
    ) {
        let (table, ids) = table(&stacks);
        let sites = sites(&ids);
        let tree = CallTree::new(&sites, &table);
        let mut own: BTreeMap<String, u64> = BTreeMap::new();
        let mut total: BTreeMap<String, u64> = BTreeMap::new();
        for (stack, row) in stacks.iter().zip(&sites) {
            if let Some(function) = stack.last() {
                *own.entry(format!("f{function}")).or_default() += row.totals.bytes();
            }
            for function in stack.iter().collect::<BTreeSet<_>>() {
                *total.entry(format!("f{function}")).or_default() += row.totals.bytes();
            }
        }
        let mut seen = BTreeSet::new();
        for row in functions(&tree, &table) {
            let Some(frame) = row.frame else { continue };
            let name = table.frame(frame).function.to_owned();
            prop_assert_eq!(row.own.bytes(), own.get(&name).copied().unwrap_or(0));
            prop_assert_eq!(row.total.bytes(), total[&name]);
            prop_assert!(seen.insert(name), "a function has two rows");
        }
        prop_assert_eq!(seen.len(), total.len());
        let all: u64 = sites.iter().map(|row| row.totals.bytes()).sum();
        prop_assert_eq!(tree.totals(StackId::EMPTY).total.bytes(), all);
        for id in (0..=table.stack_count() as u32).map(StackId) {
            let children: u64 = tree.children(id).iter().map(|child| tree.totals(*child).total.bytes()).sum();
            let node = tree.totals(id);
            prop_assert_eq!(node.total.bytes(), node.own.bytes() + children);
            prop_assert!(tree.children(id).is_sorted_by(|a, b| tree.totals(*a).total.compare(&tree.totals(*b).total).is_ge()));
        }
    }
}

#[test]
fn allocations_without_a_stack_are_a_row_of_their_own() {
    let (table, _) = table(&[]);
    let tree = CallTree::new(&sites(&[StackId::EMPTY, StackId(99)]), &table);
    let rows = functions(&tree, &table);
    assert_eq!(rows.iter().find(|row| row.frame.is_none()).unwrap().own.bytes(), 10);
    // A stack that no table has was lost, and is not passed off as an empty one.
    assert_eq!(rows.iter().find(|row| row.frame.is_some()).unwrap().own.bytes(), 11);
}

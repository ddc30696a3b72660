//! Merging held against sums by text that are made from the events themselves.

use super::*;
use crate::addr::RemoteAddr;
use crate::analysis::analyse;
use crate::capture::{Allocation, AllocatorKind, CaptureReader, CaptureWriter, Free, PythonFacts};
use proptest::prelude::*;
use std::collections::BTreeMap;

/// One allocation: stack (names, outermost first), thread, whether it is an mmap, size, whether it is freed.
type Event = (Vec<u8>, u8, bool, u32, bool);
/// Stack as text, thread name, allocator.
type Key = (Vec<String>, String, AllocatorKind);

const INTERVAL: u64 = 64 << 10;

fn events() -> impl Strategy<Value = Vec<Event>> {
    let stack = prop::collection::vec(0u8..4, 0..4);
    prop::collection::vec((stack, 0u8..3, any::<bool>(), 1u32..1_000_000, any::<bool>()), 0..30)
}

fn frame(name: u8) -> (String, String, u32) {
    (format!("f{name}"), format!("{}.py", name % 2), u32::from(name) + 1)
}

/// Threads 0 and 1 have the same name.
fn thread_name(thread: u8) -> String {
    format!("worker-{}", thread / 2)
}

/// Mappings are of whole pages.
fn size_of_event(size: u32, is_map: bool) -> u64 {
    if is_map { u64::from(size).next_multiple_of(4096) } else { size.into() }
}

fn tid(process: usize, thread: u8) -> u32 {
    100 * process as u32 + u32::from(thread) + 1
}

/// Writes and reads a process's capture.
fn findings(folder: &Path, process: usize, events: &[Event], sampled: bool, view: View) -> Findings {
    let path = folder.join(format!("{process}-{sampled}.heaptap"));
    let header = Header {
        pid: process as u32 + 1,
        command_line: vec!["python".into(), format!("{process}")],
        page_size: 4096,
        start_unix_ns: 1_000_000 * process as u64,
        python: PythonFacts {
            version: "3.11.7".into(),
            flavour: "default build".into(),
            ..PythonFacts::default()
        },
        sampling_mean_bytes: sampled.then_some(INTERVAL),
        ..Header::default()
    };
    let mut writer = CaptureWriter::create(&path, true, &header).unwrap();
    for thread in 0..3 {
        writer.define_thread(tid(process, thread), "python", &thread_name(thread)).unwrap();
    }
    for (at, (stack, thread, is_map, size, freed)) in events.iter().enumerate() {
        let frames: Vec<_> = stack
            .iter()
            .rev()
            .map(|name| {
                let (function, file, line) = frame(*name);
                writer.intern_frame(&function, &file, line).unwrap()
            })
            .collect();
        let stack = writer.intern_stack(&frames).unwrap();
        let allocator = if *is_map { AllocatorKind::Mmap } else { AllocatorKind::Malloc };
        let address = RemoteAddr((at as u64 + 1) << 32);
        let interval = if sampled && !is_map { INTERVAL } else { 0 };
        let size = size_of_event(*size, *is_map);
        let tid = tid(process, *thread);
        writer.allocation(Allocation { allocator, tid, address, size, stack, interval }).unwrap();
        if *freed && !is_map {
            writer.free(Free { deallocator: AllocatorKind::Free, tid, address }).unwrap();
        }
    }
    let duration_ns = 5_000_000;
    writer.finish(Trailer { duration_ns, ..Trailer::default() }).unwrap();
    analyse(CaptureReader::open(&path).unwrap(), view).unwrap()
}

/// What is left of each process's events, by text.
fn by_hand(processes: &[Vec<Event>], sampled: bool, split: bool) -> BTreeMap<Key, (u64, u64)> {
    let mut sums: BTreeMap<Key, Totals> = BTreeMap::new();
    for (process, events) in processes.iter().enumerate() {
        for (stack, thread, is_map, size, freed) in events {
            if *freed && !is_map {
                continue;
            }
            let text = |name: &u8| {
                let (function, file, line) = frame(*name);
                format!("{function} {file} {line}")
            };
            let mut stack: Vec<String> = stack.iter().map(text).collect();
            let mut thread_name = thread_name(*thread);
            if split {
                stack.insert(0, format!("process {} python {process}  0", process + 1));
                thread_name = format!("{} {} {thread_name}", process + 1, tid(process, *thread));
            }
            let allocator = if *is_map { AllocatorKind::Mmap } else { AllocatorKind::Malloc };
            let size = size_of_event(*size, *is_map);
            let interval = if sampled && !is_map { INTERVAL } else { 0 };
            sums.entry((stack, thread_name, allocator)).or_default().add(Totals::one(size, interval));
        }
    }
    sums.into_iter().map(|(key, totals)| (key, (totals.bytes(), totals.count()))).collect()
}

fn by_text(findings: &Findings) -> BTreeMap<Key, (u64, u64)> {
    let merged = findings.merged.as_ref().unwrap();
    let rows = findings.sites.iter().map(|row| {
        let mut stack: Vec<String> = findings
            .stacks
            .frames(row.site.stack)
            .map(|id| findings.stacks.frame(id))
            .map(|frame| format!("{} {} {}", frame.function, frame.file, frame.line))
            .collect();
        stack.reverse();
        let mut name = findings.stacks.thread(row.site.tid).unwrap().python.clone();
        if merged.split {
            let (pid, tid) = merged.threads[row.site.tid as usize - 1];
            name = format!("{pid} {tid} {name}");
        }
        ((stack, name, row.site.allocator), (row.totals.bytes(), row.totals.count()))
    });
    let count = findings.sites.len();
    let map: BTreeMap<Key, (u64, u64)> = rows.collect();
    assert_eq!(map.len(), count, "two sites have the same names");
    map
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn merged_sites_are_the_sums_by_text(
        processes in prop::collection::vec(events(), 1..4), sampled: bool, split: bool
    ) {
        let folder = tempfile::tempdir().unwrap();
        let mut merge = Merge::new(View::Leaks, split);
        let each: Vec<Findings> = (processes.iter().enumerate())
            .map(|(number, events)| findings(folder.path(), number, events, sampled, View::Leaks))
            .collect();
        for one in &each {
            merge.add(folder.path(), one).unwrap();
        }
        let all = merge.finish(7).unwrap();
        prop_assert_eq!(by_text(&all), by_hand(&processes, sampled, split));

        // What has no names is a plain sum, but for the rounding of each.
        let near = |a: u64, b: u64| a.abs_diff(b) <= each.len() as u64;
        let sum = |of: &dyn Fn(&Findings) -> u64| each.iter().map(of).sum::<u64>();
        prop_assert_eq!(all.events, sum(&|f| f.events));
        prop_assert_eq!(all.frees, sum(&|f| f.frees));
        prop_assert!(near(all.live.bytes(), sum(&|f| f.live.bytes())));
        prop_assert!(near(all.peak.bytes(), sum(&|f| f.peak.bytes())));
        prop_assert!(near(all.statistics.allocated.bytes(), sum(&|f| f.statistics.allocated.bytes())));
        prop_assert_eq!(all.samples.count, sum(&|f| f.samples.count));
        let own: u64 = all.statistics.allocators().iter().map(|row| row.totals.samples()).sum();
        prop_assert_eq!(own, all.samples.count);
        let merged = all.merged.as_ref().unwrap();
        prop_assert_eq!((merged.processes.len(), merged.not_recorded), (processes.len(), 7));
        // The first begins at 0, the last ends 5 ms after its own beginning.
        prop_assert_eq!(all.trailer.unwrap().duration_ns, 5_000_000 + 1_000_000 * (processes.len() as u64 - 1));
    }
}

#[test]
fn no_capture_is_no_findings_and_one_without_an_end_makes_the_whole_incomplete() {
    assert!(Merge::new(View::Leaks, false).finish(3).is_none());
    let folder = tempfile::tempdir().unwrap();
    let event = (vec![1], 0, false, 10, false);
    let whole = findings(folder.path(), 0, &[event], false, View::Leaks);
    let cut = Findings { trailer: None, ..findings(folder.path(), 1, &[], false, View::Leaks) };
    let mut merge = Merge::new(View::Leaks, false);
    merge.add(folder.path(), &whole).unwrap();
    merge.add(folder.path(), &cut).unwrap();
    let all = merge.finish(0).unwrap();
    assert!(all.trailer.is_none());
    let reasons: Vec<bool> = all.merged.unwrap().processes.iter().map(|p| p.end_reason.is_some()).collect();
    assert_eq!(reasons, [true, false]);
}

//! Groups of two captures with other ids for the same code; filters.

use super::*;
use crate::capture::{CaptureReader, CaptureWriter, Header, Trailer};

/// A table that has these frames first, so that ids differ, then one stack, outermost first; and a thread 7.
fn table(before: &[&str], stack: &[(&str, &str, u32)], thread: &str) -> (StackTable, StackId) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.heaptap");
    let mut writer = CaptureWriter::create(&path, false, &Header::default()).unwrap();
    for function in before {
        let frame = writer.intern_frame(function, "other.py", 1).unwrap();
        writer.intern_stack(&[frame]).unwrap();
    }
    let mut frames = Vec::new();
    for (function, file, line) in stack {
        frames.insert(0, writer.intern_frame(function, file, *line).unwrap());
    }
    let id = writer.intern_stack(&frames).unwrap();
    writer.define_thread(7, "python", thread).unwrap();
    writer.finish(Trailer::default()).unwrap();
    let mut reader = CaptureReader::open(&path).unwrap();
    assert!(reader.by_ref().all(|record| record.is_ok()));
    (reader.into_stacks(), id)
}

const STACK: [(&str, &str, u32); 4] = [
    ("main", "/srv/a/shop.py", 9),
    ("walk", "/srv/a/shop.py", 5),
    ("walk", "/srv/a/shop.py", 5),
    ("loads", "/usr/lib/python3.11/json/__init__.py", 346),
];

fn row(stack: StackId) -> Site {
    Site { stack, tid: 7, ..Site::default() }
}

#[test]
fn the_same_code_is_one_group_whatever_its_ids() {
    let one = table(&[], &STACK, "Thread-1 (serve)");
    let two = table(&["f", "g", "h"], &STACK, "Thread-94 (serve)");
    assert_ne!(one.1, two.1);
    let all = [
        Grouping::Lineno,
        Grouping::Filename,
        Grouping::Function,
        Grouping::Traceback,
        Grouping::Module,
        Grouping::Allocator,
        Grouping::Thread,
    ];
    for grouping in all {
        for cumulative in [false, true] {
            let mut groups = Groups::new(grouping, cumulative, Filter::default());
            let first = groups.of(&row(one.1), &one.0, &mut Remembered::default()).to_vec();
            let second = groups.of(&row(two.1), &two.0, &mut Remembered::default()).to_vec();
            assert_eq!(first, second, "{grouping:?}");
            // Recursion counts once.
            let frames = if grouping == Grouping::Lineno || grouping == Grouping::Function { 3 } else { 2 };
            let expected = if cumulative && grouping.is_by_frame() { frames } else { 1 };
            assert_eq!(first.len(), expected, "{grouping:?}");
        }
    }
}

#[test]
fn groups_are_named_in_words() {
    let (stacks, stack) = table(&[], &STACK, "Thread-3");
    let name = |grouping| {
        let mut groups = Groups::new(grouping, false, Filter::default());
        let ids = groups.of(&row(stack), &stacks, &mut Remembered::default()).to_vec();
        groups.name(ids[0])
    };
    let line = name(Grouping::Lineno);
    assert_eq!((line.function.as_deref(), line.line), (Some("loads"), Some(346)));
    assert_eq!(name(Grouping::Module).module.as_deref(), Some("<stdlib>"));
    assert_eq!(name(Grouping::Thread).thread.as_deref(), Some("Thread-*"));
    let traceback = name(Grouping::Traceback).traceback.unwrap();
    assert_eq!(
        traceback.iter().map(|frame| &*frame.function).collect::<Vec<_>>(),
        ["loads", "walk", "walk", "main"]
    );
}

#[test]
fn filters_take_and_leave_as_they_say() {
    let (stacks, stack) = table(&[], &STACK, "worker-1");
    let pattern = |subject, text: &str| Pattern { subject, glob: glob::Pattern::new(text).unwrap() };
    let takes = |include: &[(Subject, &str)], exclude: &[(Subject, &str)], all_frames| {
        let list = |list: &[(Subject, &str)]| list.iter().map(|(s, text)| pattern(*s, text)).collect();
        let filter = Filter { include: list(include), exclude: list(exclude), all_frames };
        !Groups::new(Grouping::Lineno, false, filter)
            .of(&row(stack), &stacks, &mut Remembered::default())
            .is_empty()
    };
    assert!(takes(&[], &[], false));
    assert!(takes(&[(Subject::File, "*/json/*")], &[], false));
    assert!(!takes(&[(Subject::File, "*/shop.py")], &[], false));
    assert!(takes(&[(Subject::File, "*/shop.py")], &[], true));
    assert!(takes(&[(Subject::Function, "nobody"), (Subject::Function, "l?ads")], &[], false));
    assert!(!takes(&[], &[(Subject::Module, "<stdlib>")], false));
    assert!(!takes(&[(Subject::Thread, "worker-*")], &[(Subject::Module, "<app*>")], true));
}

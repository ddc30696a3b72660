//! Every fixture on every interpreter, attached to by pid and recorded by both kinds of breakpoints: what the capture holds is what the fixture
//! did, to the record, and nothing is left in the process afterwards.

mod common;

use common::snapshot::assert_left_no_trace;
use common::truth::Truth;
use common::{Kind, Python, Recording, Snapshot, Target, for_each_kind};

/// One attach by one kind of breakpoint: start, record one "go", stop, compare.
fn records_of(python: &Python, kind: Kind, program: &str, arguments: &[&str]) {
    let mut target = Target::start(python, program);
    let before = Snapshot::take(target.pid());
    let recording = Recording::attach(&target, &kind.with(arguments));
    assert_recorded_by(kind, &before, &target);
    let truth = Truth::from_json(target.go());
    let capture = recording.stop();
    capture.assert_code(0);
    assert_left_no_trace(&before, &mut target);
    truth.assert_matches(&capture.dump());
    assert!(target.exit().success(), "{program} does not end well after the detach");
}

/// The look for traces is no use unless it sees what there is while it is recorded. And nothing of ours can be written to and
/// executed.
fn assert_recorded_by(kind: Kind, before: &Snapshot, target: &Target) {
    let seen = before.differences(target.pid());
    let signs: &[&str] = match kind {
        Kind::Jump => {
            &["text differs", "new executable", "memfd:heaptap", "children do not get", "pointed to code"]
        }
        Kind::Trap => &["text differs", "new executable", "is traced by"],
    };
    for sign in signs {
        assert!(seen.iter().any(|line| line.contains(sign)), "{sign} is not in {seen:#?}");
    }
    assert_eq!(Snapshot::take(target.pid()).writable_code(), before.writable_code());
}

fn on_all(program: &str, arguments: &[&str]) {
    // Traps on Debian's builds of older versions add nothing to those on others of these versions, and are slow.
    let chosen = |python: &Python, kind| {
        let is_like_others = kind == Kind::Trap && python.name.starts_with("debian-") && python.minor() < 14;
        python.records_promised(kind) && (common::soak() || !is_like_others)
    };
    for_each_kind(chosen, |python, kind| records_of(python, kind, program, arguments));
}

#[test]
fn blocks_of_the_c_library() {
    on_all("libc_blocks.py", &[]);
}

#[test]
fn aligned_blocks() {
    on_all("libc_aligned.py", &[]);
}

#[test]
fn mappings_whole_moved_and_partly_given_back() {
    on_all("mappings.py", &[]);
}

#[test]
fn failed_requests_are_no_records() {
    on_all("failing.py", &[]);
}

#[test]
fn blocks_from_before_the_attach_are_called_unknown() {
    on_all("before_attach.py", &[]);
}

#[test]
fn the_high_water_mark() {
    on_all("high_water.py", &[]);
}

#[test]
fn every_shape_of_python_frame() {
    on_all("call_shapes.py", &[]);
}

#[test]
fn threads_with_and_without_a_python_state() {
    on_all("threads.py", &[]);
}

#[test]
fn two_hundred_threads_being_born_and_dying() {
    on_all("thread_churn.py", &[]);
}

#[test]
fn large_python_objects() {
    on_all("large_objects.py", &[]);
}

#[test]
fn small_python_objects() {
    on_all("small_objects.py", &["--python-allocators"]);
}

#[test]
fn forks_are_not_followed_and_not_harmed() {
    on_all("forking.py", &[]);
}

/// The preloaded allocator answers instead of libc; only interpreters of this machine can load this machine's file.
#[test]
fn a_preloaded_allocator() {
    for library in ["libjemalloc.so.2", "libtcmalloc_minimal.so.4"] {
        let path = common::pythons::cache().join("allocators").join(library);
        if !path.exists() {
            common::missing(&format!("{library}: not in the cache (scripts/fetch-interpreters allocators)"));
            continue;
        }
        let here = |python: &Python, kind| python.records_promised(kind) && python.root.is_none();
        for_each_kind(here, |python, kind| {
            for program in ["libc_blocks.py", "libc_aligned.py", "threads.py"] {
                let mut target = Target::builder(python, program).preload(path.to_str().unwrap()).start();
                let maps = std::fs::read_to_string(format!("/proc/{}/maps", target.pid())).unwrap();
                assert!(maps.contains(library), "{library} was not preloaded");
                let before = Snapshot::take(target.pid());
                let recording = Recording::attach(&target, &kind.with(&[]));
                let truth = Truth::from_json(target.go());
                let capture = recording.stop();
                capture.assert_code(0);
                assert_left_no_trace(&before, &mut target);
                truth.assert_matches(&capture.dump());
            }
        });
    }
}

#[test]
fn a_second_recording_after_the_first() {
    for_each_kind(Python::records_promised, |python, kind| {
        let mut target = Target::start(python, "libc_blocks.py");
        let before = Snapshot::take(target.pid());
        for _ in 0..3 {
            let recording = Recording::attach(&target, &kind.with(&[]));
            let truth = Truth::from_json(target.go());
            let capture = recording.stop();
            truth.assert_matches(&capture.assert_code(0).dump());
            assert_left_no_trace(&before, &mut target);
        }
        // Work between and after recordings is nobody's business and goes on.
        target.go();
    });
}

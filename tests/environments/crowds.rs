//! Many threads, threads that leave by the back door, and a leader that goes first.

use std::fs;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::a_few;
use crate::common::heaptap::heaptap_says;
use crate::common::snapshot::assert_left_no_trace;
use crate::common::truth::Truth;
use crate::common::{Python, Recording, Snapshot, Target, for_each_kind};

fn stacks(target: &Target) -> Vec<Value> {
    let output = heaptap_says(0, &["stacks", "--json", "--pid", &target.pid().to_string()]);
    let look: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    look["threads"].as_array().expect("threads").clone()
}

/// Threads with this function among their frames.
fn in_function(threads: &[Value], function: &str) -> usize {
    let has = |thread: &&Value| {
        thread["frames"].as_array().expect("frames").iter().any(|frame| frame["function"] == function)
    };
    threads.iter().filter(has).count()
}

#[test]
fn two_hundred_blocked_threads_and_some_that_leave() {
    for_each_kind(a_few, |python, kind| {
        let mut target = Target::start(python, "crowd.py");
        // What a thread that ends leaves mapped for the next one is the C library's; have it there before.
        target.go();
        let before = Snapshot::take(target.pid());
        assert_eq!(in_function(&stacks(&target), "blocked"), 200);
        let recording = Recording::attach(&target, &kind.with(&[]));
        let truth = target.go();
        let capture = recording.stop();
        assert_eq!(
            (&truth["alive"], &truth["woken"]),
            (&json!(200), &json!(0)),
            "a blocked thread was disturbed"
        );
        Truth::from_json(truth).assert_matches(&capture.assert_code(0).dump());
        assert_eq!(in_function(&stacks(&target), "blocked"), 200);
        assert_left_no_trace(&before, &mut target);
    });
}

/// What the states of such threads lead to is no sign of a wrong layout.
#[test]
fn states_of_threads_that_left_without_cpythons_knowledge() {
    for_each_kind(Python::records_promised, |python, kind| {
        let mut target = Target::start(python, "left_behind.py");
        let before = Snapshot::take(target.pid());
        let threads = stacks(&target);
        assert_eq!((threads.len(), in_function(&threads, "<module>")), (1, 1), "{threads:?}");
        let recording = Recording::attach(&target, &kind.with(&[]));
        let truth = target.go();
        let capture = recording.stop();
        assert!(python.libc != "glibc" || truth["burnt"] == 5, "nothing is shown: {truth}");
        Truth::from_json(truth).assert_matches(&capture.assert_code(0).dump());
        assert_left_no_trace(&before, &mut target);
    });
}

/// The target's leader is gone: its memory is seen through another thread.
fn assert_no_trace_by(survivor: i32, before: &Snapshot, target: &mut Target) {
    target.assert_alive();
    let found = before.differences(survivor);
    assert!(found.is_empty(), "carries traces:\n  {}", found.join("\n  "));
    target.ping();
}

fn survivor_of(target: &mut Target) -> i32 {
    target.send("bye");
    let survivor = target.expect("leaving")["survivor"].as_i64().expect("a thread id") as i32;
    let stat = format!("/proc/{0}/task/{0}/stat", target.pid());
    let started = Instant::now();
    while !fs::read_to_string(&stat).expect("a zombie's state").contains(") Z ") {
        assert!(started.elapsed() < Duration::from_secs(20), "the leader does not end");
        std::thread::sleep(Duration::from_millis(2));
    }
    survivor
}

#[test]
fn a_process_without_its_leader() {
    for_each_kind(Python::records_promised, |python, kind| {
        let mut target = Target::start(python, "leaderless.py");
        let survivor = survivor_of(&mut target);
        let before = Snapshot::take(survivor);
        assert_eq!(in_function(&stacks(&target), "serve"), 1);
        let recording = Recording::attach(&target, &kind.with(&[]));
        let truth = Truth::from_json(target.go());
        let capture = recording.stop();
        truth.assert_matches(&capture.assert_code(0).dump());
        assert_no_trace_by(survivor, &before, &mut target);
    });
}

#[test]
fn a_leader_that_goes_in_mid_recording() {
    for_each_kind(Python::records_promised, |python, kind| {
        let mut target = Target::start(python, "leaderless.py");
        let before = Snapshot::take(target.pid());
        let recording = Recording::attach(&target, &kind.with(&[]));
        let survivor = survivor_of(&mut target);
        let truth = Truth::from_json(target.go());
        let capture = recording.stop();
        truth.assert_matches(&capture.assert_code(0).dump());
        assert_no_trace_by(survivor, &before, &mut target);
        assert!(target.exit().success());
    });
}

#[test]
fn the_end_of_a_process_without_its_leader_closes_the_capture() {
    for_each_kind(a_few, |python, kind| {
        let mut target = Target::start(python, "leaderless.py");
        survivor_of(&mut target);
        let recording = Recording::attach(&target, &kind.with(&[]));
        let truth = Truth::from_json(target.go());
        assert!(target.exit().success());
        truth.assert_matches(&recording.finish().assert_code(0).dump());
    });
}

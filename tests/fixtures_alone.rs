//! The fixtures and the harness without heaptap: every program does its work on every interpreter, and the look from
//! outside finds nothing when nobody was there, and something when somebody was.

mod common;

use common::{Python, Snapshot, Target, for_each_python, truth::Truth};
use nix::sys::signal::Signal;

/// Programs that answer "go" with a truth and go on living.
const ORDINARY: &[&str] = &[
    "libc_blocks.py",
    "libc_aligned.py",
    "mappings.py",
    "failing.py",
    "before_attach.py",
    "high_water.py",
    "call_shapes.py",
    "threads.py",
    "thread_churn.py",
    "large_objects.py",
    "small_objects.py",
    "forking.py",
];

fn any(_: &Python) -> bool {
    true
}

#[test]
fn every_program_tells_its_truth_on_every_interpreter() {
    // What is recorded of them is held against their truth on every interpreter, too.
    let some =
        |python: &Python| common::soak() || !python.name.starts_with("debian-") && python.minor() != 12;
    for_each_python(some, |python| {
        for program in ORDINARY {
            let mut target = Target::start(python, program);
            target.ping();
            Truth::from_json(target.go());
            Truth::from_json(target.go());
            assert!(target.exit().success(), "{program} on {python}");
        }
    });
}

#[test]
fn a_process_nobody_visited_carries_no_trace() {
    for_each_python(any, |python| {
        for program in ["call_shapes.py", "threads.py"] {
            let mut target = Target::start(python, program);
            let before = Snapshot::take(target.pid());
            target.go();
            common::snapshot::assert_left_no_trace(&before, &mut target);
        }
    });
}

#[test]
fn a_stopped_process_is_seen_as_stopped() {
    let python = &common::pythons()[0];
    let target = Target::start(python, "libc_blocks.py");
    let before = Snapshot::take(target.pid());
    target.signal(Signal::SIGSTOP);
    let stopped = wait_for_state(&target, 'T');
    assert!(stopped.differences(target.pid()).is_empty());
    assert_eq!(before.differences(target.pid()), ["was stopped: false, is stopped: true"]);
    target.signal(Signal::SIGCONT);
}

fn wait_for_state(target: &Target, state: char) -> Snapshot {
    while !std::fs::read_to_string(format!("/proc/{}/stat", target.pid()))
        .unwrap()
        .contains(&format!(") {state} "))
    {
        std::thread::yield_now();
    }
    Snapshot::take(target.pid())
}

#[test]
fn a_changed_byte_of_text_is_seen() {
    use std::os::unix::fs::FileExt;
    let python = &common::pythons()[0];
    let target = Target::start(python, "libc_blocks.py");
    let before = Snapshot::take(target.pid());
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", target.pid())).unwrap();
    // The last byte of the C library's text: padding, so that the change harms nobody.
    let line =
        maps.lines().find(|line| line.contains("r-xp") && line.contains("libc.so")).expect("a C library");
    let end = u64::from_str_radix(line.split(['-', ' ']).nth(1).unwrap(), 16).unwrap();
    let memory = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(format!("/proc/{}/mem", target.pid()))
        .unwrap();
    let mut byte = [0];
    memory.read_exact_at(&mut byte, end - 1).unwrap();
    memory.write_all_at(&[byte[0] ^ 0xcc], end - 1).unwrap();
    let found = before.differences(target.pid());
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].starts_with("text differs from its file"), "{found:?}");
    memory.write_all_at(&byte, end - 1).unwrap();
    assert!(before.differences(target.pid()).is_empty());
}

#[test]
fn programs_about_signals_and_blocking_are_right_when_left_alone() {
    for_each_python(any, |python| {
        let truth = Target::builder(python, "signals.py").env("HEAPTAP_FIXTURE_SIGNALS", "300").start().go();
        assert_eq!((&truth["lost"], &truth["doubled"]), (&serde_json::json!([]), &serde_json::json!([])));
        let mut blocked = Target::builder(python, "blocked.py").env("HEAPTAP_FIXTURE_SECONDS", "1").start();
        assert_eq!(blocked.go()["still_blocked"].as_array().map(Vec::len), Some(8));
        for how in ["handled", "blocked", "ignored"] {
            let truth = Target::builder(python, "sigtrap.py").arg(how).start().go();
            let reached = truth["handled"].as_u64().unwrap() + truth["waited"].as_u64().unwrap();
            assert_eq!(reached, if how == "ignored" { 0 } else { 20 });
        }
        let mut verifying = Target::start(python, "verifying.py");
        verifying.send("check");
        let checked = verifying.expect("checked");
        assert_eq!((&checked["errors"], &checked["alive"]), (&serde_json::json!([]), &serde_json::json!(8)));
    });
}

#[test]
fn programs_that_end_or_start_others_do_so() {
    for_each_python(any, |python| {
        assert_eq!(Target::start(python, "spawning.py").go()["wrong_children"], serde_json::json!([]));
        let mut replacing = Target::start(python, "replacing.py");
        replacing.go();
        assert_eq!(replacing.expect("second life")["pid"], i64::from(replacing.pid()));
        replacing.ping();
        let mut exiting = Target::builder(python, "exiting.py").arg("thread").start();
        exiting.go();
        assert_eq!(exiting.wait().code(), Some(9));
    });
}

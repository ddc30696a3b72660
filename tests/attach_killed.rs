//! SIGKILL of the recorder at any instant: the target must live, compute, and give right results every time.

mod common;

use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use common::{Kind, Python, Recording, Snapshot, Target, for_each_kind, heaptap};
use serde_json::json;

/// Rounds per interpreter; a soak makes ten times as many.
const ROUNDS: u64 = 100;

fn one_of_each_linking(python: &Python, kind: Kind) -> bool {
    let named = std::env::var_os("HEAPTAP_TEST_PYTHON").is_some();
    python.records_promised(kind)
        && (named || ["pyenv-3.11", "debian-3.14"].iter().any(|name| python.name.starts_with(name)))
}

/// All eight threads checked themselves again since the last look, and none found an error.
fn assert_right(target: &mut Target, last: &mut u64) {
    target.assert_alive();
    let started = Instant::now();
    loop {
        target.send("check");
        let checked = target.expect("checked");
        assert_eq!(checked["errors"], json!([]), "a thread computed something wrong");
        assert_eq!(checked["alive"], 8, "a thread died");
        let rounds = checked["rounds"].as_array().unwrap().iter().filter_map(|rounds| rounds.as_u64()).sum();
        if rounds > *last {
            *last = rounds;
            return;
        }
        assert!(started.elapsed() < Duration::from_secs(30), "the threads no longer make progress");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn killing_the_recorder_at_any_instant_spares_the_target() {
    for_each_kind(one_of_each_linking, |python, kind| {
        let mut target = Target::start(python, "verifying.py");
        let before = Snapshot::take(target.pid());
        let mut rounds = 0;
        assert_right(&mut target, &mut rounds);
        let folder = tempfile::tempdir().unwrap();
        for round in 0..if common::soak() { ROUNDS * 10 } else { ROUNDS } {
            let complaints = tempfile::tempfile().unwrap();
            let mut child = heaptap()
                .args(["attach", "--pid", &target.pid().to_string(), "-o"])
                .arg(folder.path().join(format!("{round}.heaptap")))
                .args(kind.with(&[]))
                .stdout(std::process::Stdio::null())
                .stderr(complaints.try_clone().unwrap())
                .spawn()
                .unwrap();
            // Instants spread over the start, the attach and the recording; the low rounds hit the first milliseconds.
            std::thread::sleep(Duration::from_micros(round * round * 37 % 400_000));
            // One that has ended by itself was refused (by what an earlier one left, say): then nothing is shown here.
            if let Some(status) = child.try_wait().unwrap() {
                let mut said = [0; 4096];
                let length = complaints.read_at(&mut said, 0).unwrap();
                panic!(
                    "round {round}: {status} before it was killed: {}",
                    String::from_utf8_lossy(&said[..length])
                );
            }
            child.kill().unwrap();
            child.wait().unwrap();
            assert_right(&mut target, &mut rounds);
        }
        common::heaptap::detach_in_the_end(target.pid());
        common::snapshot::assert_left_no_trace(&before, &mut target);
    });
}

#[test]
fn a_recorder_comes_back_after_one_that_was_killed() {
    for_each_kind(one_of_each_linking, |python, kind| {
        let mut target = Target::start(python, "libc_blocks.py");
        let before = Snapshot::take(target.pid());
        Recording::attach(&target, &kind.with(&[])).kill();
        target.go();
        let recording = Recording::attach(&target, &kind.with(&[]));
        let truth = common::truth::Truth::from_json(target.go());
        let capture = recording.stop();
        truth.assert_matches(&capture.assert_code(0).dump());
        common::snapshot::assert_left_no_trace(&before, &mut target);
    });
}

/// The one that was killed left its breakpoints: nothing was allocated since, and nothing took them out.
#[test]
fn a_recorder_comes_back_before_the_target_has_healed() {
    for_each_kind(one_of_each_linking, |python, kind| {
        let mut target = Target::start(python, "libc_blocks.py");
        let before = Snapshot::take(target.pid());
        for _ in 0..3 {
            Recording::attach(&target, &kind.with(&["--python-allocators"])).kill();
            assert!(
                !Snapshot::take(target.pid()).changed_text().is_empty(),
                "the breakpoints are still there"
            );
        }
        let recording = Recording::attach(&target, &kind.with(&["--python-allocators"]));
        let truth = common::truth::Truth::from_json(target.go());
        let capture = recording.stop();
        truth.assert_matches(&capture.assert_code(0).dump());
        common::snapshot::assert_left_no_trace(&before, &mut target);
    });
}

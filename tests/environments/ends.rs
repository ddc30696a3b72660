//! Ends that nobody announced: of the target by a signal, of heaptap by one that asks it to go.

use std::os::unix::process::ExitStatusExt;

use nix::sys::signal::Signal;
use serde_json::Value;

use super::a_few;
use crate::common::heaptap::Capture;
use crate::common::snapshot::assert_left_no_trace;
use crate::common::truth::Truth;
use crate::common::{Recording, Snapshot, Target, for_each_kind};

fn reason(capture: &Capture) -> String {
    let stats: Value = serde_json::from_str(&capture.report("stats", &["--json"])).expect("JSON");
    stats.to_string()
}

#[test]
fn a_target_that_is_killed_closes_its_capture() {
    for_each_kind(a_few, |python, kind| {
        for signal in [Signal::SIGKILL, Signal::SIGSEGV, Signal::SIGTERM] {
            let mut target = Target::start(python, "libc_blocks.py");
            let recording = Recording::attach(&target, &kind.with(&[]));
            let truth = Truth::from_json(target.go());
            target.signal(signal);
            let capture = recording.finish();
            assert_eq!(target.wait().signal(), Some(signal as i32), "the target's own end changed");
            truth.assert_matches(&capture.assert_code(0).dump());
            assert!(reason(&capture).contains(signal.as_str()), "{signal}: {}", reason(&capture));
            assert!(capture.stderr.contains(signal.as_str()), "{}", capture.stderr);
        }
    });
}

#[test]
fn a_target_killed_while_busy_closes_its_capture() {
    for_each_kind(a_few, |python, kind| {
        let mut target = Target::start(python, "verifying.py");
        let recording = Recording::attach(&target, &kind.with(&[]));
        std::thread::sleep(std::time::Duration::from_millis(100));
        target.signal(Signal::SIGKILL);
        let capture = recording.finish();
        assert_eq!(target.wait().signal(), Some(Signal::SIGKILL as i32));
        assert!(!capture.assert_code(0).dump().allocations.is_empty());
        assert!(reason(&capture).contains("SIGKILL"), "{}", reason(&capture));
    });
}

#[test]
fn heaptap_asked_to_go_lets_go() {
    for_each_kind(a_few, |python, kind| {
        for signal in [Signal::SIGTERM, Signal::SIGINT] {
            let mut target = Target::start(python, "libc_blocks.py");
            let before = Snapshot::take(target.pid());
            let recording = Recording::attach(&target, &kind.with(&[]));
            let truth = Truth::from_json(target.go());
            let capture = recording.stop_by(signal);
            truth.assert_matches(&capture.assert_code(0).dump());
            assert!(reason(&capture).contains(signal.as_str()), "{signal}: {}", reason(&capture));
            assert_left_no_trace(&before, &mut target);
        }
    });
}

//! Targets under seccomp filters: recorded with the filters at rest for our own calls alone, and as confined afterwards.

use nix::sys::signal::Signal;
use std::os::unix::process::ExitStatusExt;

use super::{a_few, is_root};
use crate::common::dump::Dump;
use crate::common::snapshot::assert_left_no_trace;
use crate::common::truth::Truth;
use crate::common::{Kind, Python, Recording, Snapshot, Target, for_each_kind, skipped};

const EPERM: i64 = 1;

/// A recording of the program under its filter; `None` where this kernel cannot rest filters (then it is refused).
fn record(python: &Python, kind: Kind, how: &str) -> Option<Target> {
    let mut target = Target::builder(python, "restricted.py").arg(how).start();
    let before = Snapshot::take(target.pid());
    let recording = match Recording::try_attach(target.pid(), &kind.with(&[])) {
        Ok(recording) => recording,
        Err(said) if said.contains("can't be suspended") => {
            super::assert_refused(&said, &["seccomp"]);
            assert_left_no_trace(&before, &mut target);
            skipped(&format!("a target under seccomp: {said}"));
            return None;
        }
        Err(said) => panic!("{how}: {said}"),
    };
    let truth = Truth::from_json(target.go());
    if how != "kill" {
        target.send("forbidden");
        assert_eq!(
            target.expect("forbidden")["errno"],
            EPERM,
            "{how}: the filter rests while it is recorded"
        );
    }
    let capture = recording.stop();
    truth.assert_matches(&capture.assert_code(0).dump());
    assert_left_no_trace(&before, &mut target);
    Some(target)
}

#[test]
fn a_filter_that_refuses_our_calls_rests_for_them_alone() {
    if !is_root("resting a seccomp filter") {
        return;
    }
    for_each_kind(a_few, |python, kind| {
        for how in ["errno", "thread"] {
            let Some(mut target) = record(python, kind, how) else { return };
            target.send("forbidden");
            assert_eq!(target.expect("forbidden")["errno"], EPERM, "{how}: the filter is gone");
        }
    });
}

#[test]
fn a_filter_that_kills_does_not() {
    if !is_root("resting a seccomp filter") {
        return;
    }
    for_each_kind(a_few, |python, kind| {
        let Some(mut target) = record(python, kind, "kill") else { return };
        target.send("forbidden");
        assert_eq!(target.wait().signal(), Some(Signal::SIGSYS as i32), "the filter is gone");
    });
}

/// Its filter may refuse what our handler would do for it: it must still live, and be cleaned by a later heaptap.
#[test]
fn a_confined_target_survives_the_death_of_heaptap() {
    if !is_root("resting a seccomp filter") {
        return;
    }
    for_each_kind(a_few, |python, kind| {
        let mut target = Target::builder(python, "restricted.py").arg("errno").start();
        let before = Snapshot::take(target.pid());
        match Recording::try_attach(target.pid(), &kind.with(&[])) {
            Ok(recording) => recording.kill(),
            Err(said) => return skipped(&format!("a target under seccomp: {said}")),
        }
        target.go();
        target.ping();
        let output = super::detach(&target);
        assert!(output.status.success(), "{}", super::said(&output));
        assert_left_no_trace(&before, &mut target);
    });
}

/// In the target native stacks take a system call that a filter may forbid; from outside they don't.
#[test]
fn native_stacks_of_a_filtered_process_are_walked_from_outside() {
    if !is_root("resting a seccomp filter") {
        return;
    }
    for_each_kind(a_few, |python, kind| {
        let mut target = Target::builder(python, "restricted.py").arg("errno").start();
        let before = Snapshot::take(target.pid());
        match (kind, Recording::try_attach(target.pid(), &kind.with(&["--native"]))) {
            (Kind::Jump, Err(said)) => super::assert_refused(&said, &["seccomp", "--breakpoints trap"]),
            (Kind::Jump, Ok(_)) => panic!("recorded"),
            (Kind::Trap, Ok(recording)) => {
                let truth = Truth::from_json(target.go());
                let capture = recording.stop();
                let dump = capture.assert_code(0).report("dump", &["--json", "--only", "python"]);
                truth.assert_matches(&Dump::parse(&dump));
            }
            (Kind::Trap, Err(said)) => skipped(&format!("a target under seccomp: {said}")),
        }
        assert_left_no_trace(&before, &mut target);
    });
}

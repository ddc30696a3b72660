//! Programs whose libraries switch stacks (greenlets) or allocate in C for them (arrays), from PyPI in throwaway
//! environments.

use crate::common::snapshot::assert_left_no_trace;
use crate::common::truth::Truth;
use crate::common::{Kind, Python, Recording, Snapshot, Target, environment, for_each_kind, skipped};

/// Wheels are for released default builds; these minors are what every package here has one for.
fn has_wheels(python: &Python, _: Kind) -> bool {
    python.name.starts_with("pyenv-") && (10..=13).contains(&python.minor())
}

fn records_with(program: &str, packages: &[&str]) {
    for_each_kind(has_wheels, |python, kind| {
        let command = match environment(python, packages) {
            Ok(command) => command,
            Err(why) => return skipped(&format!("{program} on {python}: {why}")),
        };
        let python = Python { command, ..python.clone() };
        let mut target = Target::start(&python, program);
        let before = Snapshot::take(target.pid());
        let recording = Recording::attach(&target, &kind.with(&[]));
        let truth = Truth::from_json(target.go());
        let capture = recording.stop();
        truth.assert_matches(&capture.assert_code(0).dump());
        assert_left_no_trace(&before, &mut target);
        target.go();
    });
}

#[test]
fn greenlets_have_their_own_stacks() {
    records_with("greenlets.py", &["gevent==24.11.1", "greenlet==3.1.1"]);
}

#[test]
fn arrays_and_their_temporaries() {
    records_with("arrays.py", &["numpy==2.1.3"]);
}

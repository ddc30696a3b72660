//! An error in heaptap itself, as a panic in the middle of a recording: the target is let go like at any other end. A
//! binary of its own, for the recorder waits for every child of its process.

mod common;

use common::snapshot::assert_left_no_trace;
use common::{Snapshot, Target};
use heaptap::recorder::examine::Examined;
use heaptap::recorder::plant::JumpOptions;
use heaptap::recorder::record::{Observer, Progress, RecordOptions, record};

struct Panics;

impl Observer for Panics {
    fn recording(&mut self, _: &Examined) {}

    fn progress(&mut self, progress: Progress) {
        assert!(progress.counters.events < 100, "an observer that has had enough");
    }
}

#[test]
fn a_panic_while_recording_lets_the_target_go() {
    // One after the other: the trap kind waits for every child of this process.
    for jump in [Some(JumpOptions::every_event()), None] {
        panics_with(jump);
    }
}

fn panics_with(jump: Option<JumpOptions>) {
    let python = common::pythons().iter().find(|python| python.name.starts_with("pyenv-3.11"));
    let Some(python) = python else { return common::missing("pyenv's 3.11") };
    let mut target = Target::start(python, "verifying.py");
    let before = Snapshot::take(target.pid());
    let folder = tempfile::tempdir().unwrap();
    let options = RecordOptions {
        pid: target.pid(),
        output: folder.path().join("c.heaptap"),
        force: false,
        duration: None,
        python_allocators: false,
        native: false,
        bundle_symbols: true,
        unsafe_trap: false,
        jump,
        snapshots: None,
    };
    let summary = record(&options, &mut Panics).unwrap();
    assert!(summary.failed.unwrap().contains("an observer that has had enough"));
    assert!(summary.counters.events >= 100);
    assert_left_no_trace(&before, &mut target);
}

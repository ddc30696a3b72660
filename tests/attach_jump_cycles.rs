//! Attach and detach, over and over, on a process that is never quiet.

mod common;
mod hostile;

use common::heaptap::{detach_in_the_end, heaptap_says};
use common::snapshot::assert_left_no_trace;
use common::{Recording, Snapshot, Target, for_each_python};
use hostile::storm::{Storm, belongings};
use hostile::{SAMPLED, of_this_machine};
use std::time::Duration;

/// Cycles; a soak makes twenty times as many.
const CYCLES: u64 = 50;

#[test]
fn attaching_and_leaving_again_and_again() {
    for_each_python(of_this_machine, |python| {
        let mut storm = Storm::start(python);
        storm.assert_right();
        let (descriptors, _) = storm.belongings();
        let mut left = 0;
        for cycle in 0..if common::soak() { CYCLES * 20 } else { CYCLES } {
            let how: &[&str] = match cycle % 4 {
                0 => SAMPLED,
                1 => &["--exact"],
                2 => &["--python-allocators", "--sample", "512KiB"],
                _ => &["--exact", "--python-allocators"],
            };
            let recording = Recording::attach(&storm.target, how);
            std::thread::sleep(Duration::from_micros(cycle * 7919 % 30_000));
            let capture = recording.stop();
            capture.assert_code(0);
            let changed = Snapshot::take(storm.pid());
            assert!(changed.changed_text().is_empty(), "cycle {cycle}: {:?}", changed.changed_text());
            if capture.stderr.contains("left in the target") {
                left += 1;
                detach_in_the_end(storm.pid());
            }
            assert_eq!(storm.belongings(), (descriptors, vec![]), "cycle {cycle}: {}", capture.stderr);
            storm.assert_right();
        }
        assert!(left <= 2, "code was left in the target {left} times");
        storm.assert_no_signal_lost_or_doubled();
        storm.assert_right();
    });
}

fn living_child(target: &mut Target) -> i32 {
    target.send("fork");
    target.expect("forked")["child"].as_i64().unwrap() as i32
}

/// A child inherits the jumps, but not the recording: it passes everything through, and can be recorded by itself.
#[test]
fn a_forked_child_is_a_process_of_its_own() {
    for_each_python(of_this_machine, |python| {
        for how in [SAMPLED, &["--exact"]] {
            let mut storm = Storm::start(python);
            let recording = Recording::attach(&storm.target, how);
            let (one, other) = (living_child(&mut storm.target), living_child(&mut storm.target));
            for child in [one, other] {
                assert!(!Snapshot::take(child).changed_text().is_empty(), "the child has the jumps");
                let ring = belongings(child).1.into_iter().find(|line| line.contains("memfd"));
                assert_eq!(ring, None, "the child has the rings");
            }
            heaptap_says(0, &["detach", "--pid", &one.to_string()]);
            let inner = Recording::try_attach(other, &["--exact"]).unwrap();
            std::thread::sleep(Duration::from_millis(200));
            let inner = inner.stop();
            inner.assert_code(0);
            assert!(blocks_of(&inner.dump()) > 100, "the child's own blocks are recorded");
            for child in [one, other] {
                assert!(Snapshot::take(child).changed_text().is_empty());
                assert_eq!(belongings(child).1, Vec::<String>::new());
            }
            storm.assert_right();
            let outer = recording.stop();
            outer.assert_code(0);
            assert_eq!(blocks_of(&outer.dump()), 0, "the parent's recording has a child's blocks");
            storm.assert_right();
            assert!(Snapshot::take(storm.pid()).changed_text().is_empty());
        }
    });
}

/// What came of a child is the child's: the parent is as it was.
#[test]
fn a_target_that_spawns_and_forks_is_left_without_a_trace() {
    for_each_python(of_this_machine, |python| {
        for program in ["forking.py", "spawning.py"] {
            let mut target = Target::start(python, program);
            target.go();
            let before = Snapshot::take(target.pid());
            for how in [SAMPLED, &["--exact"]] {
                let recording = Recording::attach(&target, how);
                let truth = target.go();
                recording.stop().assert_code(0);
                assert_eq!(truth["wrong_children"], serde_json::json!([]));
                assert_left_no_trace(&before, &mut target);
            }
        }
    });
}

/// Blocks of the size that only the living children allocate.
fn blocks_of(dump: &common::dump::Dump) -> usize {
    dump.allocations.iter().filter(|a| a.size == 1433).count()
}

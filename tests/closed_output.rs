//! A reader of heaptap's output that goes away, or a disk that is full: the target is let go all the same, and what was
//! asked for is done.

mod common;

use std::fs::File;
use std::io::Read;
use std::process::Stdio;

use common::heaptap::report;
use common::snapshot::assert_left_no_trace;
use common::{Kind, Python, Snapshot, Target, for_each_kind, for_each_python, heaptap};

fn one(python: &Python, kind: Kind) -> bool {
    let named = std::env::var_os("HEAPTAP_TEST_PYTHON").is_some();
    python.records_promised(kind) && (named || python.name.starts_with("pyenv-3.11"))
}

#[test]
fn a_recording_goes_on_when_nobody_reads_what_it_says() {
    for_each_kind(one, |python, kind| {
        let mut target = Target::start(python, "verifying.py");
        let before = Snapshot::take(target.pid());
        let folder = tempfile::tempdir().unwrap();
        let capture = folder.path().join("capture.heaptap");
        let mut child = heaptap()
            .args(["attach", "--pid", &target.pid().to_string(), "--duration", "500ms", "-o"])
            .arg(&capture)
            .args(kind.with(&[]))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        drop(child.stdout.take());
        let mut said = String::new();
        child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        let status = child.wait().unwrap();
        assert_eq!((status.code(), said.as_str()), (Some(0), ""));
        assert_left_no_trace(&before, &mut target);
        assert!(report(&capture, "stats", &[]).contains("ended: the duration was over"));
    });
}

#[test]
fn verbs_end_quietly_at_a_closed_pipe_and_tell_of_a_full_disk() {
    for_each_python(
        |python| one(python, Kind::Jump),
        |python| {
            let target = Target::start(python, "verifying.py");
            let pid = target.pid().to_string();
            for verb in ["doctor", "detach", "stacks"] {
                let (reader, writer) = std::io::pipe().unwrap();
                drop(reader);
                let ended = heaptap().args([verb, "--pid", &pid]).stdout(writer).output().unwrap();
                let said = String::from_utf8_lossy(&ended.stderr).into_owned();
                assert_eq!((ended.status.code(), said.as_str()), (Some(0), ""), "{verb}");

                let full = File::options().write(true).open("/dev/full").unwrap();
                let ended = heaptap().args([verb, "--pid", &pid]).stdout(full).output().unwrap();
                let said = String::from_utf8_lossy(&ended.stderr).into_owned();
                assert_eq!(ended.status.code(), Some(1), "{verb}: {said}");
                assert!(said.contains("No space left"), "{verb}: {said}");
            }
        },
    );
}

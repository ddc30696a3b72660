//! A thread that sleeps in the kernel where no tracer can stop it (here: in a slow vfork). It must never make heaptap hold the
//! other threads, nor leave breakpoints behind.

mod common;

use common::heaptap::heaptap_says;
use common::snapshot::assert_left_no_trace;
use common::{Kind, Python, Recording, Snapshot, Target, for_each_kind};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// Interpreters of this machine: a library compiled here is not one for another root.
fn of_this_machine(python: &Python, kind: Kind) -> bool {
    python.records_promised(kind) && python.name.starts_with("pyenv-3.11")
}

fn native(folder: &Path) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/native/slow_vfork.c");
    let library = folder.join("slow_vfork.so");
    let compiled = Command::new("cc")
        .args(["-O1", "-shared", "-fPIC", "-o"])
        .arg(&library)
        .arg(source)
        .status()
        .unwrap();
    assert!(compiled.success());
    library
}

fn start(python: &Python, milliseconds: u32, folder: &Path) -> Target {
    Target::builder(python, "vforking.py")
        .arg(&milliseconds.to_string())
        .env("HEAPTAP_NATIVE", native(folder).to_str().unwrap())
        .start()
}

#[test]
fn attaching_is_refused_in_time_and_works_later() {
    for_each_kind(of_this_machine, |python, kind| {
        let folder = tempfile::tempdir().unwrap();
        let mut target = start(python, 3_000, folder.path());
        let before = Snapshot::take(target.pid());
        target.send("go");
        target.expect("asleep");
        let started = Instant::now();
        let refusal =
            Recording::try_attach(target.pid(), &kind.with(&[])).err().expect("a thread does not stop");
        assert!(refusal.contains("does not stop") && refusal.contains("hint"), "{refusal}");
        assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
        target.ping();
        target.send("wait");
        assert_eq!(target.expect("woken")["results"], json!([3]));
        Recording::attach(&target, &kind.with(&[])).stop().assert_code(0);
        assert_left_no_trace(&before, &mut target);
    });
}

#[test]
fn leaving_takes_the_breakpoints_out_and_the_rest_later() {
    for_each_kind(of_this_machine, |python, kind| {
        let folder = tempfile::tempdir().unwrap();
        let mut target = start(python, 5_000, folder.path());
        let before = Snapshot::take(target.pid());
        let recording = Recording::attach(&target, &kind.with(&[]));
        target.send("go");
        target.expect("asleep");
        let started = Instant::now();
        recording.stop().assert_code(0);
        assert!(started.elapsed() < Duration::from_secs(4), "{:?}", started.elapsed());
        assert!(Snapshot::take(target.pid()).changed_text().is_empty(), "breakpoints were left");
        target.ping();
        target.send("wait");
        assert_eq!(target.expect("woken")["results"], json!([3]));
        heaptap_says(0, &["detach", "--pid", &target.pid().to_string()]);
        assert_left_no_trace(&before, &mut target);
    });
}

//! Web applications that answer requests while they are recorded: every answer is right, every record, and nothing stays.
//! Frameworks from PyPI, in throwaway environments.

mod common;

use common::snapshot::assert_left_no_trace;
use common::truth::Truth;
use common::{FamilyRecording, Python, Recording, Snapshot, Target, environment, for_each_python, skipped};
use nix::sys::signal::Signal;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

fn serves(framework: &str, packages: &[&str]) {
    let has_wheels =
        |python: &Python| python.name.starts_with("pyenv-") && [11, 13].contains(&python.minor());
    for_each_python(has_wheels, |python| {
        let command = match environment(python, packages) {
            Ok(command) => command,
            Err(why) => return skipped(&format!("{framework} on {python}: {why}")),
        };
        let python = Python { command, ..python.clone() };
        let mut target = Target::builder(&python, "serving.py").arg(framework).start();
        let kinds: [&[&str]; 4] = [
            &["--exact", "--max-wait", "20s"],
            &["--exact", "--max-wait", "20s", "--python-allocators"],
            &["--sample", "8KiB"],
            &["--sample", "8KiB", "--python-allocators"],
        ];
        for arguments in kinds {
            let before = Snapshot::take(target.pid());
            let recording = Recording::attach(&target, arguments);
            let truth = Truth::from_json(target.go());
            let capture = recording.stop();
            assert_left_no_trace(&before, &mut target);
            let dump = capture.assert_code(0).dump();
            if arguments.contains(&"--exact") {
                truth.assert_matches(&dump);
            } else {
                truth.assert_estimated(&dump, capture.drops());
            }
        }
        target.go();
    });
}

#[test]
fn uvicorn_answers() {
    serves("uvicorn", &["uvicorn==0.32.1", "h11==0.14.0"]);
}

#[test]
fn flask_answers() {
    serves("flask", &["flask==3.1.0"]);
}

#[test]
fn django_answers() {
    serves("django", &["django==4.2.17"]);
}

/// One request; the worker that answered, and the truth of all that it was asked.
fn request(socket: &Path) -> (i32, serde_json::Value) {
    let mut stream = UnixStream::connect(socket).expect("gunicorn listens");
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").expect("it reads");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("it answers");
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {answer}"));
    assert!(head.contains(" 200 "), "{answer}");
    let mut body: serde_json::Value = serde_json::from_str(body).expect("JSON");
    (body["pid"].as_i64().expect("a pid") as i32, body["truth"].take())
}

#[test]
fn gunicorns_workers_are_followed_as_they_are_replaced() {
    const REQUESTS: u32 = 5;
    let has_wheels =
        |python: &Python| python.name.starts_with("pyenv-") && [11, 13].contains(&python.minor());
    for_each_python(has_wheels, |python| {
        let command = match environment(python, &["gunicorn==23.0.0", "packaging==24.2"]) {
            Ok(command) => command,
            Err(why) => return skipped(&format!("gunicorn on {python}: {why}")),
        };
        let python = Python { command, ..python.clone() };
        let folder = tempfile::tempdir().expect("a temporary folder");
        let socket = folder.path().join("socket");
        let mut target = Target::builder(&python, "prefork.py")
            .arg(socket.to_str().expect("a temporary path is text"))
            .arg(&REQUESTS.to_string())
            .start();
        let born = |target: &mut Target| target.expect("born")["pid"].as_i64().expect("a pid") as i32;
        let mut worker = born(&mut target);
        let mut recording = FamilyRecording::of(&target, &["--children", "--follow-forks"]);
        recording.wait_for(&[target.pid()]);
        let mut truths = Vec::new();
        for _ in 0..3 {
            recording.wait_for(&[worker]);
            let mut last = None;
            for _ in 0..REQUESTS {
                let (pid, truth) = request(&socket);
                assert_eq!(pid, worker);
                last = Some(truth);
            }
            truths.push((worker, Truth::from_json(last.expect("it was asked"))));
            recording.wait_for_line(&format!("recorded process {worker} "), 1);
            worker = born(&mut target);
        }
        recording.wait_for(&[worker]);
        target.signal(Signal::SIGTERM);
        target.wait();
        let captures = recording.finish();
        captures.assert_code(0);
        for (worker, truth) in truths {
            let entry = captures.entry(worker);
            let kind = entry["end_reason"]["kind"].as_str().unwrap_or_default();
            assert!(["target_exited", "target_gone"].contains(&kind), "{entry:#}");
            truth.assert_matches(&captures.dump(entry));
        }
        let merged: serde_json::Value =
            serde_json::from_str(&captures.report("table", &["--json", "--leaks"])).expect("JSON");
        let rows = merged["allocations"].as_array().expect("rows");
        let kept = rows.iter().find(|row| row["function"] == "handle").expect("all workers' in one row");
        assert_eq!(kept["count"], 3 * 3 * REQUESTS);
    });
}

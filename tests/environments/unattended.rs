//! Recordings that nobody watches: their terminal goes, their output is closed, the target is stopped for a while; and what they
//! log for a machine to read.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::a_few;
use crate::common::dump::Dump;
use crate::common::heaptap::{detach_in_the_end, report};
use crate::common::snapshot::assert_left_no_trace;
use crate::common::target::last_descendant;
use crate::common::truth::Truth;
use crate::common::{Kind, Python, Recording, Snapshot, Target, for_each_kind, heaptap};

/// Runs what its arguments say on a terminal of its own, and shows what appears there.
const TERMINAL: &str = "import pty, sys; sys.exit(pty.spawn(sys.argv[1:]) >> 8)";

fn wait_until_gone(pid: i32) {
    let started = Instant::now();
    // Nobody here is its parent; a zombie has ended.
    while std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z ")) {
        assert!(started.elapsed() < Duration::from_secs(60), "heaptap ({pid}) does not end");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn truth_of(capture: &Path) -> Dump {
    Dump::parse(&report(capture, "dump", &["--json"]))
}

#[test]
fn a_recording_outlives_its_terminal() {
    for_each_kind(a_few, |python, kind| {
        let mut target = Target::start(python, "libc_blocks.py");
        let before = Snapshot::take(target.pid());
        let folder = tempfile::tempdir().unwrap();
        let capture = folder.path().join("capture.heaptap");
        let mut terminal = Command::new("python3")
            .args(["-c", TERMINAL])
            .arg(heaptap().get_program())
            .args(["attach", "--pid", &target.pid().to_string(), "-o"])
            .arg(&capture)
            .args(kind.with(&[]))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3 starts");
        let mut shown = BufReader::new(terminal.stdout.take().unwrap());
        let mut line = String::new();
        while !line.contains("recording process") {
            line.clear();
            assert_ne!(shown.read_line(&mut line).unwrap(), 0, "the terminal shows no recording");
        }
        let recorder = last_descendant(i32::try_from(terminal.id()).unwrap());
        terminal.kill().unwrap();
        terminal.wait().unwrap();
        // Some ticks of its clock, with its progress to be drawn on a terminal that answers EIO.
        std::thread::sleep(Duration::from_millis(400));
        let truth = Truth::from_json(target.go());
        kill(Pid::from_raw(recorder), Signal::SIGINT).expect("it records on");
        wait_until_gone(recorder);
        truth.assert_matches(&truth_of(&capture));
        let stats = report(&capture, "stats", &[]);
        assert!(stats.contains("interrupted by SIGINT"), "{stats}");
        assert_left_no_trace(&before, &mut target);
    });
}

#[test]
fn a_hang_up_is_no_reason_to_end() {
    for_each_kind(a_few, |python, kind| {
        for outer in [&["env"][..], &["nohup"]] {
            let mut target = Target::start(python, "libc_blocks.py");
            let before = Snapshot::take(target.pid());
            let recording = Recording::attach_under(outer, &target, &kind.with(&[]));
            kill(Pid::from_raw(recording.pid()), Signal::SIGHUP).unwrap();
            // Three ticks of its clock.
            std::thread::sleep(Duration::from_millis(300));
            let truth = Truth::from_json(target.go());
            let capture = recording.stop();
            truth.assert_matches(&capture.assert_code(0).dump());
            assert_left_no_trace(&before, &mut target);
        }
    });
}

#[test]
fn a_recording_goes_on_when_both_its_outputs_are_closed() {
    for_each_kind(a_few, |python, kind| {
        let mut target = Target::start(python, "libc_blocks.py");
        let before = Snapshot::take(target.pid());
        let folder = tempfile::tempdir().unwrap();
        let capture = folder.path().join("capture.heaptap");
        let mut child = heaptap()
            .args(["-vv", "attach", "--pid", &target.pid().to_string(), "-o"])
            .arg(&capture)
            .args(kind.with(&[]))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut first = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut first).unwrap();
        assert!(first.starts_with("recording"), "{first}");
        drop(child.stderr.take());
        let truth = Truth::from_json(target.go());
        kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), Signal::SIGTERM).unwrap();
        let status = child.wait().unwrap();
        assert_eq!((status.code(), status.signal()), (Some(0), None));
        truth.assert_matches(&truth_of(&capture));
        assert_left_no_trace(&before, &mut target);
    });
}

/// A program that job control stops neither ends its recording nor is woken by the end of it.
#[test]
fn a_target_that_is_stopped_for_a_while() {
    for_each_kind(a_few, |python, kind| {
        let mut target = Target::start(python, "libc_blocks.py");
        let before = Snapshot::take(target.pid());
        let recording = Recording::attach(&target, &kind.with(&[]));
        let mut truth = Truth::from_json(target.go());
        target.signal(Signal::SIGSTOP);
        // Longer than a heaptap that is silent is believed to live.
        std::thread::sleep(Duration::from_millis(3500));
        target.signal(Signal::SIGCONT);
        target.ping();
        let capture = recording.stop();
        truth.assert_matches(&capture.assert_code(0).dump());
        assert_left_no_trace(&before, &mut target);

        let recording = Recording::attach(&target, &kind.with(&[]));
        truth = Truth::from_json(target.go());
        target.signal(Signal::SIGSTOP);
        let capture = recording.stop();
        truth.assert_matches(&capture.assert_code(0).dump());
        let state = std::fs::read_to_string(format!("/proc/{}/stat", target.pid())).unwrap();
        assert!(state.contains(") T "), "the stopped target was woken: {state}");
        target.signal(Signal::SIGCONT);
        // Nobody who is stopped comes out of a thunk, and what looks like a way back into one keeps it: then that is said.
        if kind == Kind::Trap && capture.stderr.contains("left in the target") {
            target.ping();
            detach_in_the_end(target.pid());
        }
        assert_left_no_trace(&before, &mut target);
    });
}

fn a_json_log(arguments: &[&str]) -> (Option<i32>, String, Vec<Value>) {
    let output = heaptap().args(["--log-format", "json"]).args(arguments).output().expect("heaptap starts");
    let log = String::from_utf8(output.stderr).expect("JSON is UTF-8");
    let parse = |line: &str| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    (output.status.code(), said, log.lines().map(parse).collect())
}

#[test]
fn a_log_for_machines_tells_everything_in_json() {
    for_each_kind(
        |python: &Python, kind| a_few(python, kind) && kind == Kind::Jump,
        |python, _| {
            let mut target = Target::start(python, "libc_blocks.py");
            let before = Snapshot::take(target.pid());
            let folder = tempfile::tempdir().unwrap();
            let capture = folder.path().join("capture.heaptap");
            let (pid, path) = (target.pid().to_string(), capture.to_str().unwrap());
            // Long enough for one line of progress.
            let attach = ["attach", "--pid", &pid, "-o", path, "--duration", "10500ms"];
            let (code, said, log) = a_json_log(&attach);
            assert_eq!((code, said.as_str()), (Some(0), ""));
            let events: Vec<_> = log.iter().filter_map(|line| line["event"].as_str()).collect();
            assert_eq!(events, ["recording", "progress", "ended"]);
            let ended = log.last().unwrap();
            assert_eq!(ended["reason"], "the duration was over");
            assert_eq!((&ended["kind"], &ended["capture"]), (&"duration".into(), &path.into()));
            assert!(ended["elapsed_seconds"].as_f64().is_some_and(|s| (10.5..30.0).contains(&s)), "{ended}");
            assert!(ended["timestamp"].is_string() && ended["allocations"].is_u64(), "{ended}");
            assert_left_no_trace(&before, &mut target);

            // The capture is there already.
            let (code, said, log) = a_json_log(&attach);
            let last = log.last().expect("a last word");
            assert_eq!((code, said.as_str(), &last["event"]), (Some(1), "", &"failed".into()));
            let (code, _, log) = a_json_log(&["attach", "--pid", "1000000000"]);
            let last = log.last().expect("a last word");
            assert_eq!((code, &last["event"], &last["exit"]), (Some(3), &"refused".into(), &3.into()));
            assert!(
                last["reason"].as_str().is_some_and(|reason| reason.contains("no such process")),
                "{last}"
            );
            assert!(last["hint"].as_str().is_some_and(|hint| !hint.is_empty()), "{last}");
        },
    );
}

#[test]
fn more_is_told_where_it_is_asked_for() {
    let mut target = Target::start(&crate::common::pythons()[0], "libc_blocks.py");
    let pid = target.pid().to_string();
    let before = Snapshot::take(target.pid());
    let told = |arguments: &[&str]| {
        let folder = tempfile::tempdir().unwrap();
        let mut child = heaptap()
            .args(arguments)
            .args(["attach", "--quiet", "--duration", "100ms", "--pid", &pid, "-o"])
            .arg(folder.path().join("c"))
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = String::new();
        child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        assert!(child.wait().unwrap().success(), "{said}");
        said
    };
    assert_eq!(told(&[]), "");
    let info = told(&["-v"]);
    assert!(info.contains("INFO") && !info.contains("DEBUG"), "{info}");
    assert!(told(&["-vv"]).contains("DEBUG"));
    assert_left_no_trace(&before, &mut target);
}

//! Attaching to processes that are busy with something a tracer can spoil: blocked in system calls, stopped, full of
//! signals, starting others, replacing themselves, ending. After each: no trace, and the program noticed nothing.

mod common;

use std::time::{Duration, Instant};

use common::snapshot::assert_left_no_trace;
use common::truth::Truth;
use common::{Kind, Python, Recording, Snapshot, Target, for_each_kind};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

/// Two interpreters stand for all where the behaviour is the kernel's rather than Python's; all of them in a soak.
fn a_few(python: &Python, kind: Kind) -> bool {
    let chosen = common::soak() || std::env::var_os("HEAPTAP_TEST_PYTHON").is_some();
    python.records_promised(kind)
        && (chosen || ["pyenv-3.11", "debian-3.14"].iter().any(|name| python.name.starts_with(name)))
}

fn state(pid: i32) -> char {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("the process exists");
    stat.rsplit(") ").next().and_then(|rest| rest.chars().next()).expect("a state")
}

#[test]
fn signals_at_a_kilohertz_arrive_exactly_once() {
    for_each_kind(a_few, |python, kind| {
        let mut target = Target::start(python, "signals.py");
        let before = Snapshot::take(target.pid());
        let recording = Recording::attach(&target, &kind.with(&[]));
        let truth = target.go();
        recording.stop().assert_code(0);
        assert_eq!(truth["lost"], json!([]), "of {} signals", truth["sent"]);
        assert_eq!(truth["doubled"], json!([]), "of {} signals", truth["sent"]);
        let (ticks, expected) = (truth["ticks"].as_f64().unwrap(), truth["expected_ticks"].as_f64().unwrap());
        assert!((ticks - expected).abs() <= 3.0, "{ticks} timer expirations were counted in {expected} ms");
        assert_left_no_trace(&before, &mut target);
    });
}

#[test]
fn threads_blocked_in_system_calls_stay_blocked() {
    for_each_kind(a_few, |python, kind| {
        let mut target = Target::start(python, "blocked.py");
        let before = Snapshot::take(target.pid());
        for _ in 0..3 {
            let recording = Recording::attach(&target, &kind.with(&[]));
            recording.stop().assert_code(0);
        }
        assert_left_no_trace(&before, &mut target);
        let truth = target.go();
        // The kernel itself ends a raw epoll_wait with EINTR when a tracer stops the thread (signal(7)); Python retries.
        let early: Vec<&String> = truth["returned_early"]
            .as_object()
            .unwrap()
            .keys()
            .filter(|name| *name != "epoll_wait")
            .collect();
        assert_eq!(early, Vec::<&String>::new(), "{truth:#}");
        for (name, result) in truth["results"].as_object().unwrap() {
            assert!(name == "epoll_wait" || result["errno"] == 0, "{name}: {result}");
        }
    });
}

#[test]
fn a_sleep_lasts_as_long_as_it_was_asked_to() {
    for_each_kind(a_few, |python, kind| {
        let mut target = Target::builder(python, "blocked.py").env("HEAPTAP_FIXTURE_SECONDS", "5").start();
        let before = Snapshot::take(target.pid());
        let recording = Recording::attach(&target, &kind.with(&[]));
        std::thread::sleep(Duration::from_millis(300));
        recording.stop().assert_code(0);
        assert_left_no_trace(&before, &mut target);
        let truth = target.go();
        for name in ["nanosleep", "time.sleep"] {
            let seconds = truth["results"][name]["seconds"].as_f64().unwrap();
            assert!((4.99..7.0).contains(&seconds), "{name} of 5 s took {seconds} s");
        }
    });
}

#[test]
fn a_stopped_process_is_recorded_and_stays_stopped() {
    for_each_kind(a_few, |python, kind| {
        let mut target = Target::start(python, "libc_blocks.py");
        target.signal(Signal::SIGSTOP);
        wait_until(|| state(target.pid()) == 'T', "the target stops");
        let before = Snapshot::take(target.pid());
        let recording = Recording::attach(&target, &kind.with(&[]));
        recording.stop().assert_code(0);
        wait_until(|| state(target.pid()) == 'T', "the target is stopped again");
        assert_left_no_trace(&before, &mut target);
        target.signal(Signal::SIGCONT);
        target.ping();
        target.go();
    });
}

#[test]
fn a_stop_and_a_continue_in_the_middle_work_as_ever() {
    for_each_kind(a_few, |python, kind| {
        let mut target = Target::start(python, "libc_blocks.py");
        let before = Snapshot::take(target.pid());
        let recording = Recording::attach(&target, &kind.with(&[]));
        target.signal(Signal::SIGSTOP);
        // While traced the stop shows as T or t; either way nothing is computed.
        wait_until(|| matches!(state(target.pid()), 'T' | 't'), "the target stops under the tracer");
        target.send("go");
        std::thread::sleep(Duration::from_millis(200));
        assert!(matches!(state(target.pid()), 'T' | 't'), "a stopped target ran");
        target.signal(Signal::SIGCONT);
        let truth = Truth::from_json(target.expect("done")["truth"].take());
        let capture = recording.stop();
        truth.assert_matches(&capture.assert_code(0).dump());
        assert_left_no_trace(&before, &mut target);
    });
}

fn wait_until(done: impl Fn() -> bool, what: &str) {
    let started = Instant::now();
    while !done() {
        assert!(started.elapsed() < Duration::from_secs(20), "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn programs_started_by_the_target_run_untouched() {
    for_each_kind(Python::records_promised, |python, kind| {
        let mut target = Target::start(python, "spawning.py");
        let before = Snapshot::take(target.pid());
        let recording = Recording::attach(&target, &kind.with(&[]));
        let truth = target.go();
        let capture = recording.stop();
        assert_eq!(truth["wrong_children"], json!([]));
        Truth::from_json(truth).assert_matches(&capture.assert_code(0).dump());
        assert_left_no_trace(&before, &mut target);
    });
}

#[test]
fn exec_ends_the_recording_and_spares_the_new_program() {
    for_each_kind(Python::records_promised, |python, kind| {
        let mut target = Target::start(python, "replacing.py");
        let recording = Recording::attach(&target, &kind.with(&[]));
        let truth = Truth::from_json(target.go());
        let capture = recording.finish();
        target.expect("second life");
        target.ping();
        truth.assert_matches(&capture.assert_code(0).dump());
        let said = capture.report("stats", &[]);
        assert!(said.contains("exec"), "the capture does not say that it ended with an exec:\n{said}");
        let now = Snapshot::take(target.pid());
        assert!(now.changed_text().is_empty() && now.is_untraced(), "{now:#?}");
    });
}

#[test]
fn every_way_to_end_is_passed_on_and_closes_the_capture() {
    for_each_kind(a_few, |python, kind| {
        for (how, code, signal) in [
            ("code", Some(7), None),
            ("os-exit", Some(8), None),
            ("thread", Some(9), None),
            ("signal", None, Some(Signal::SIGKILL as i32)),
            ("abort", None, Some(Signal::SIGABRT as i32)),
        ] {
            use std::os::unix::process::ExitStatusExt;
            let mut target = Target::builder(python, "exiting.py").arg(how).start();
            let recording = Recording::attach(&target, &kind.with(&[]));
            let truth = Truth::from_json(target.go());
            let capture = recording.finish();
            let status = target.wait();
            assert_eq!(
                (status.code(), status.signal()),
                (code, signal),
                "{how}: the target's own end changed"
            );
            truth.assert_matches(&capture.assert_code(0).dump());
        }
    });
}

#[test]
fn an_application_that_uses_sigtrap_keeps_it() {
    for_each_kind(a_few, |python, kind| {
        for how in ["handled", "blocked", "ignored"] {
            let mut target = Target::builder(python, "sigtrap.py").arg(how).start();
            let before = Snapshot::take(target.pid());
            // Refused: then nothing was written and everything works as before. Or recorded, and all the same.
            let recording = Recording::try_attach(target.pid(), &kind.with(&[]));
            let refused = recording.is_err();
            let truth = target.go();
            match recording {
                Ok(recording) => recording.stop().assert_code(0).dump(),
                Err(refusal) => {
                    assert!(refusal.contains("SIGTRAP") && refusal.contains("exit status: 3"), "{refusal}");
                    Default::default()
                }
            };
            match kind {
                Kind::Trap => {
                    assert!(refused || how == "ignored", "{how}: the trap kind must refuse this process")
                }
                Kind::Jump => assert!(!refused, "{how}: jumps have no use for SIGTRAP"),
            }
            let reached: u64 =
                [&truth["handled"], &truth["waited"]].iter().filter_map(|v: &&Value| v.as_u64()).sum();
            assert_eq!(
                reached,
                if how == "ignored" { 0 } else { truth["rounds"].as_u64().unwrap() },
                "{how}"
            );
            assert_left_no_trace(&before, &mut target);
        }
    });
}

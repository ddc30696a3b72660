//! Others at work on a process that is recorded by jumps: a second heaptap, a debugger, a uprobe, seccomp; and a heaptap that is stopped
//! itself.

mod common;
mod hostile;

use common::heaptap::heaptap;
use common::snapshot::assert_left_no_trace;
use common::{Recording, Snapshot, Target, for_each_python, skipped};
use hostile::{SAMPLED, Stepped, call, of_this_machine, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, Uid};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

#[test]
fn a_second_heaptap_is_refused_and_the_first_goes_on() {
    for_each_python(of_this_machine, |python| {
        let mut target = Target::start(python, "libc_blocks.py");
        let before = Snapshot::take(target.pid());
        for first in [SAMPLED, &["--exact"]] {
            let recording = Recording::attach(&target, first);
            for second in [SAMPLED, &["--exact"], &["--breakpoints", "trap"]] {
                let said = Recording::try_attach(target.pid(), second).err().expect("one is there");
                assert!(
                    said.contains("exit status: 3") && said.contains(&recording.pid().to_string()),
                    "{said}"
                );
            }
            let output = heaptap().args(["detach", "--pid", &target.pid().to_string()]).output().unwrap();
            assert_eq!(output.status.code(), Some(3), "{}", String::from_utf8_lossy(&output.stderr));
            target.go();
            recording.stop().assert_code(0);
            assert_left_no_trace(&before, &mut target);
        }
    });
}

#[test]
fn of_two_that_come_at_the_same_instant_one_records() {
    for_each_python(of_this_machine, |python| {
        let mut target = Target::start(python, "libc_blocks.py");
        let before = Snapshot::take(target.pid());
        let mut recorded = 0;
        let rounds = if common::soak() { 200 } else { 20 };
        for round in 0..rounds {
            let pid = target.pid();
            let other = std::thread::spawn(move || {
                std::thread::sleep(Duration::from_micros(round * 613 % 40_000));
                Recording::try_attach(pid, &["--exact"])
            });
            let (one, other) = (Recording::try_attach(pid, SAMPLED), other.join().unwrap());
            for said in [one.as_ref().err(), other.as_ref().err()].into_iter().flatten() {
                assert!(said.contains("exit status: 3"), "round {round}: {said}");
            }
            let mut both = 0;
            for recording in [one, other].into_iter().flatten() {
                recording.stop().assert_code(0);
                both += 1;
            }
            assert!(both < 2, "round {round}: both record");
            recorded += both;
            assert_left_no_trace(&before, &mut target);
        }
        assert!(recorded * 2 > rounds, "only {recorded} of {rounds} recorded anything");
    });
}

#[test]
fn a_debugger_that_stays_keeps_the_capture_from_nothing() {
    for_each_python(of_this_machine, |python| {
        let folder = tempfile::tempdir().unwrap();
        let mut target = hostile::start(python, folder.path());
        let tid = call(&mut target, "start_churning");
        let before = Snapshot::take(target.pid());
        let recording = Recording::attach(&target, &["--exact"]);
        let debugger = Stepped::seize(i64::from(target.pid()));
        let started = Instant::now();
        let capture = recording.stop();
        capture.assert_code(0);
        assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
        assert!(capture.stderr.contains("already traced"), "{}", capture.stderr);
        capture.report("stats", &[]);
        debugger.let_go_on();
        let _ = tid;
        common::heaptap::detach_in_the_end(target.pid());
        assert_left_no_trace(&before, &mut target);
        call(&mut target, "end_churning");
    });
}

fn signal(recording: &Recording, signal: Signal) {
    kill(Pid::from_raw(recording.pid()), signal).unwrap();
}

#[test]
fn a_heaptap_stopped_for_a_second_costs_the_target_little() {
    for_each_python(of_this_machine, |python| {
        let folder = tempfile::tempdir().unwrap();
        // So many samples that a ring is full in a second on a machine with much else to do, too.
        for how in [&["--sample", "32KiB"][..], &["--exact"]] {
            let mut target = hostile::start(python, folder.path());
            let before = Snapshot::take(target.pid());
            call(&mut target, "start_churning");
            let recording = Recording::attach(&target, how);
            signal(&recording, Signal::SIGSTOP);
            let (from, started) = (call(&mut target, "turns"), Instant::now());
            let mut longest = Duration::ZERO;
            let (mut turns, mut seen) = (from, Instant::now());
            while started.elapsed() < Duration::from_secs(1) {
                let now = call(&mut target, "turns");
                if now != turns {
                    longest = longest.max(seen.elapsed());
                    (turns, seen) = (now, Instant::now());
                }
            }
            signal(&recording, Signal::SIGCONT);
            eprintln!("{how:?}: {} turns in the second, longest wait {longest:?}", turns - from);
            assert!(turns - from > 100_000, "{how:?}: {} turns in a second", turns - from);
            assert!(longest < Duration::from_millis(400), "{how:?}: it waited for {longest:?}");
            std::thread::sleep(Duration::from_millis(100));
            call(&mut target, "end_churning");
            let capture = recording.stop();
            capture.assert_code(0);
            // At tens of GB a second a second's samples are more than a ring holds, too.
            assert!(!capture.stderr.contains(", 0 drops"), "{}", capture.stderr);
            for report in ["stats", "summary"] {
                let said = capture.report(report, &[]).to_lowercase();
                assert!(said.contains("drop") || said.contains("missing"), "{report} does not tell:\n{said}");
            }
            assert_left_no_trace(&before, &mut target);
        }
    });
}

#[test]
fn a_heaptap_stopped_for_long_says_so_when_it_comes_back() {
    for_each_python(of_this_machine, |python| {
        let folder = tempfile::tempdir().unwrap();
        for how in [SAMPLED, &["--exact"]] {
            let mut target = hostile::start(python, folder.path());
            let before = Snapshot::take(target.pid());
            call(&mut target, "start_churning");
            let recording = Recording::attach(&target, how);
            std::thread::sleep(Duration::from_millis(100));
            signal(&recording, Signal::SIGSTOP);
            std::thread::sleep(Duration::from_millis(if common::soak() { 10_000 } else { 4_000 }));
            signal(&recording, Signal::SIGCONT);
            let capture = recording.finish();
            capture.assert_code(1);
            assert!(capture.stderr.contains("took it for dead"), "{}", capture.stderr);
            let stats = capture.report("stats", &[]);
            assert!(stats.contains("switched itself off"), "the reason of the end:\n{stats}");
            call(&mut target, "end_churning");
            assert_left_no_trace(&before, &mut target);
        }
    });
}

#[test]
fn filters_rest_for_root_and_refuse_the_rest_before_anything_is_done() {
    if !Uid::effective().is_root() {
        return skipped("resting a seccomp filter: needs root");
    }
    for_each_python(of_this_machine, |python| {
        for filter in ["errno", "thread", "kill"] {
            let mut target = Target::builder(python, "restricted.py").arg(filter).start();
            let before = Snapshot::take(target.pid());
            // Root without the right that suspending takes.
            let output = Command::new("setpriv")
                .args(["--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin"])
                .arg(heaptap().get_program())
                .args(["attach", "--pid", &target.pid().to_string(), "-o", "/dev/null", "--duration", "1s"])
                .stdin(Stdio::null())
                .output()
                .unwrap();
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert_eq!(output.status.code(), Some(3), "{filter}: {said}");
            assert!(said.contains("seccomp") && said.contains("hint"), "{filter}: {said}");
            assert_left_no_trace(&before, &mut target);
            for how in [SAMPLED, &["--exact"]] {
                match Recording::try_attach(target.pid(), how) {
                    Ok(recording) => {
                        target.go();
                        recording.stop().assert_code(0);
                        assert_left_no_trace(&before, &mut target);
                    }
                    Err(said) if said.contains("can't be suspended") => skipped(&said),
                    Err(said) => panic!("{filter}: {said}"),
                }
            }
        }
    });
}

#[test]
fn a_debugger_may_come_and_go() {
    for_each_python(of_this_machine, |python| {
        let folder = tempfile::tempdir().unwrap();
        let mut target = hostile::start(python, folder.path());
        let tid = call(&mut target, "start_churning");
        let before = Snapshot::take(target.pid());
        let recording = Recording::attach(&target, SAMPLED);
        let debugger = Stepped::seize(tid);
        for _ in 0..2000 {
            debugger.step();
        }
        debugger.let_go(Signal::SIGCONT);
        let from = call(&mut target, "turns");
        wait_until("more turns", || call(&mut target, "turns") > from + 1000);
        recording.stop().assert_code(0);
        assert_left_no_trace(&before, &mut target);
        call(&mut target, "end_churning");
    });
}

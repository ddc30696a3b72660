//! Others at work on the same target: a second heaptap, debuggers, uprobes; and what a killed heaptap left.

use std::fs;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{a_few, assert_refused, detach, refusal, said};
use crate::common::heaptap::detach_in_the_end;
use crate::common::snapshot::assert_left_no_trace;
use crate::common::truth::Truth;
use crate::common::{Kind, Recording, Snapshot, Target, for_each_kind, for_each_python, missing};

#[test]
fn a_second_heaptap_is_refused_and_the_first_goes_on() {
    for_each_kind(a_few, |python, kind| {
        let mut target = Target::start(python, "libc_blocks.py");
        let before = Snapshot::take(target.pid());
        let recording = Recording::attach(&target, &kind.with(&[]));
        // While jumps record, nobody traces.
        let why = match kind {
            Kind::Jump => "holds probes",
            Kind::Trap => "already traced",
        };
        for other in Kind::all() {
            assert_refused(
                &refusal(target.pid(), &other.with(&[])),
                &[why, &recording.pid().to_string(), "heaptap"],
            );
        }
        let output = detach(&target);
        assert_eq!(output.status.code(), Some(3), "detach while a heaptap records: {}", said(&output));
        assert!(said(&output).contains(&recording.pid().to_string()), "{}", said(&output));
        let truth = Truth::from_json(target.go());
        let capture = recording.stop();
        truth.assert_matches(&capture.assert_code(0).dump());
        assert_left_no_trace(&before, &mut target);
    });
}

/// A debugger at work; ended by SIGTERM, by pid, when dropped.
struct Debugger(Child);

impl Debugger {
    fn start(command: &mut Command, pid: i32) -> std::io::Result<Debugger> {
        let child = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        let debugger = Debugger(child);
        let started = Instant::now();
        while tracer(pid) == 0 {
            assert!(started.elapsed() < Duration::from_secs(20), "{command:?} never attached");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(debugger)
    }
}

impl Drop for Debugger {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.0.id() as i32), Signal::SIGTERM);
        let _ = self.0.wait();
    }
}

fn tracer(pid: i32) -> i32 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the target lives");
    let line = status.lines().find_map(|line| line.strip_prefix("TracerPid:")).expect("a tracer");
    line.trim().parse().expect("a pid")
}

#[test]
fn a_debugger_is_left_alone() {
    for_each_kind(a_few, |python, kind| {
        let mut target = Target::start(python, "libc_blocks.py");
        let before = Snapshot::take(target.pid());
        let pid = target.pid().to_string();
        for (name, words) in
            [("strace", vec!["-o", "/dev/null", "-p", &pid]), ("gdb", vec!["-q", "-nx", "-p", &pid])]
        {
            let debugger = match Debugger::start(Command::new(name).args(words), target.pid()) {
                Ok(debugger) => debugger,
                Err(error) => {
                    missing(&format!("{name}: {error}"));
                    continue;
                }
            };
            let words = ["already traced", name, &tracer(target.pid()).to_string()];
            assert_refused(&refusal(target.pid(), &kind.with(&[])), &words);
            let output = detach(&target);
            assert_eq!(output.status.code(), Some(3), "{}", said(&output));
            drop(debugger);
            assert_left_no_trace(&before, &mut target);
        }
        let recording = Recording::attach(&target, &kind.with(&[]));
        let truth = Truth::from_json(target.go());
        truth.assert_matches(&recording.stop().assert_code(0).dump());
        assert_left_no_trace(&before, &mut target);
    });
}

#[test]
fn detach_finds_nothing_where_nothing_is() {
    for_each_python(
        |python| a_few(python, Kind::Trap),
        |python| {
            let mut target = Target::start(python, "libc_blocks.py");
            let before = Snapshot::take(target.pid());
            let output = detach(&target);
            assert!(output.status.success() && said(&output).contains("nothing"), "{}", said(&output));
            assert_left_no_trace(&before, &mut target);
        },
    );
}

#[test]
fn detach_removes_what_a_killed_heaptap_left() {
    for_each_kind(a_few, |python, kind| {
        for (program, arguments) in [
            ("libc_blocks.py", &[][..]),
            ("small_objects.py", &["--python-allocators"]),
            ("verifying.py", &[]),
        ] {
            for worked in [false, true] {
                let mut target = Target::start(python, program);
                let before = Snapshot::take(target.pid());
                Recording::attach(&target, &kind.with(arguments)).kill();
                if program == "verifying.py" {
                    std::thread::sleep(Duration::from_millis(50 * u64::from(worked)));
                } else if worked {
                    target.go();
                }
                assert!(!before.differences(target.pid()).is_empty(), "the test shows nothing");
                detach_in_the_end(target.pid());
                assert_left_no_trace(&before, &mut target);
                let again = detach(&target);
                assert!(again.status.success() && said(&again).contains("nothing"), "{}", said(&again));
            }
        }
    });
}

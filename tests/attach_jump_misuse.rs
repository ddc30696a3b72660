//! Threads that leave the allocator without a return, handlers that come in the middle of it, and more of them than there is room for.

mod common;
mod hostile;

use common::snapshot::assert_left_no_trace;
use common::{Recording, Snapshot, for_each_python};
use hostile::{SAMPLED, call, of_this_machine};
use nix::sys::signal::Signal;
use std::time::{Duration, Instant};

fn blocks(dump: &common::dump::Dump, size: u64) -> usize {
    dump.allocations.iter().filter(|a| a.size == size).count()
}

#[test]
fn a_call_left_without_a_return_does_not_count_as_under_way() {
    for_each_python(of_this_machine, |python| {
        let folder = tempfile::tempdir().unwrap();
        for how in [&["--exact"][..], SAMPLED] {
            let mut target = hostile::start(python, folder.path());
            call(&mut target, "leave_by_exit 2");
            call(&mut target, "leave_by_cancel 1");
            let before = Snapshot::take(target.pid());
            let recording = Recording::attach(&target, how);
            for (function, times) in [("longjmp", 200), ("exit", 50), ("cancel", 100)] {
                assert_eq!(call(&mut target, &format!("leave_by_{function} {times}")), times, "{function}");
            }
            let started = Instant::now();
            let capture = recording.stop();
            capture.assert_code(0);
            assert!(!capture.stderr.contains("left in the target"), "{}", capture.stderr);
            assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
            if how != SAMPLED {
                let dump = capture.dump();
                assert_eq!(
                    blocks(&dump, 1429),
                    200,
                    "each malloc after a jump out of posix_memalign is seen"
                );
                assert!(blocks(&dump, 100) > 1000);
            }
            assert_left_no_trace(&before, &mut target);
        }
    });
}

#[test]
fn handlers_in_the_middle_of_the_agent_are_passed_through_and_counted() {
    for_each_python(of_this_machine, |python| {
        let folder = tempfile::tempdir().unwrap();
        for on_stack in [0, 1] {
            let mut target = hostile::start(python, folder.path());
            call(&mut target, &format!("map_on {} {on_stack}", Signal::SIGUSR1 as i32));
            let before = Snapshot::take(target.pid());
            let recording = Recording::attach(&target, &["--exact"]);
            let start = if on_stack == 1 { "start_churning_with_stack" } else { "start_churning" };
            let tid = call(&mut target, start) as i32;
            let started = Instant::now();
            let (mut sent, mut handled) = (0, 0);
            // Signals that come while one is pending are one: how many are handled is up to the machine.
            while sent < 1000 || handled <= 1000 {
                assert!(started.elapsed() < Duration::from_secs(60), "{handled} of {sent} are handled");
                if sent % 500 == 0 {
                    handled = call(&mut target, "mapped_in_handlers");
                }
                // To the churner alone.
                let answer = tgkill(target.pid(), tid, Signal::SIGUSR1);
                assert!(answer, "the churner is gone");
                sent += 1;
                std::thread::sleep(Duration::from_micros(20));
            }
            call(&mut target, "end_churning");
            let handled = call(&mut target, "mapped_in_handlers");
            let capture = recording.stop();
            capture.assert_code(0);
            eprintln!("{sent} sent, {handled} handled: {}", capture.stderr);
            // Each mapping of a handler is recorded, or counted as missing.
            let dump = capture.dump();
            let recorded = blocks(&dump, 8192) as i64;
            assert!(recorded <= handled, "{recorded} of {handled}");
            assert!(recorded > 0, "none was recorded");
            if recorded < handled {
                assert!(!capture.stderr.contains(", 0 drops"), "{recorded} of {handled}: {}", capture.stderr);
            }
            assert_left_no_trace(&before, &mut target);
        }
    });
}

#[allow(unsafe_code, reason = "nix sends signals to processes only")]
fn tgkill(pid: i32, tid: i32, signal: Signal) -> bool {
    // SAFETY: numbers go in, a number comes out.
    unsafe { libc::syscall(libc::SYS_tgkill, pid, tid, signal as i32) == 0 }
}

#[test]
fn more_threads_than_rings_and_than_slots() {
    for_each_python(of_this_machine, |python| {
        let folder = tempfile::tempdir().unwrap();
        let many: usize = if common::soak() { 3000 } else { 400 };
        for how in [&["--exact"][..], SAMPLED] {
            let mut target = hostile::start(python, folder.path());
            let before = Snapshot::take(target.pid());
            let recording = Recording::attach(&target, how);
            assert_eq!(call(&mut target, &format!("crowd {many}")), many as i64);
            let capture = recording.stop();
            capture.assert_code(0);
            if how != SAMPLED {
                let recorded = blocks(&capture.dump(), 1511);
                eprintln!("{recorded} of {many}: {}", capture.stderr);
                assert!(recorded <= many);
                assert!(recorded == many || !capture.stderr.contains(", 0 drops"), "{}", capture.stderr);
                assert!(recorded >= many.min(1500), "{recorded} of {many}");
            }
            let found: Vec<_> =
                before.differences(target.pid()).into_iter().filter(|d| !is_stack(d)).collect();
            assert!(found.is_empty(), "{found:?}");
            target.ping();
        }
    });
}

/// glibc keeps stacks of threads that ended for others to come.
fn is_stack(difference: &str) -> bool {
    difference.contains("rw-p") || difference.contains("---p")
}

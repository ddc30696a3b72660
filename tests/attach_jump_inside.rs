//! Threads that stand inside the bytes that a jump overwrites when heaptap attaches, and inside its own code when it leaves:
//! led there by single steps, so that no luck is needed.

mod common;
mod hostile;

use common::heaptap::detach_in_the_end;
use common::snapshot::assert_left_no_trace;
use common::{Recording, Snapshot, Target, for_each_python};
use hostile::{SAMPLED, Stepped, call, malloc_jump, of_this_machine, region, wait_until, wait_until_stopped};
use nix::sys::signal::Signal;

const CONT: Signal = Signal::SIGCONT;
const SIGUSR2: i32 = Signal::SIGUSR2 as i32;

/// The churner goes on: it allocates for a while yet.
fn assert_churns(target: &mut Target) {
    let before = call(target, "turns");
    wait_until("more turns", || call(target, "turns") > before + 1000);
}

/// Offsets of instructions behind the first that the jump at malloc covers, as a thread steps through them.
fn covered(target: &Target, tid: i64) -> Vec<u64> {
    let jump = malloc_jump(target);
    let stepped = Stepped::seize(tid);
    stepped.step_until(|_, now| now == jump.at);
    let mut inside = Vec::new();
    loop {
        let now = stepped.step();
        if now <= jump.at || now >= jump.rest {
            break;
        }
        inside.push(now);
    }
    // A signal that the process is already getting is none that stops it.
    stepped.let_go(CONT);
    inside
}

#[test]
fn a_thread_inside_the_overwritten_bytes_is_moved() {
    for_each_python(of_this_machine, |python| {
        let folder = tempfile::tempdir().unwrap();
        let mut target = hostile::start(python, folder.path());
        let tid = call(&mut target, "start_churning");
        let inside = covered(&target, tid);
        assert!(!inside.is_empty(), "the jump covers one instruction only: the test shows nothing");
        let before = Snapshot::take(target.pid());
        for place in inside {
            for how in [&["--exact"][..], SAMPLED] {
                let stepped = Stepped::seize(tid);
                stepped.step_until(|_, now| now == place);
                stepped.let_go(Signal::SIGSTOP);
                wait_until_stopped(target.pid());
                let recording = Recording::attach_logging(&target, how);
                target.signal(CONT);
                assert_churns(&mut target);
                let capture = recording.stop();
                capture.assert_code(0);
                assert!(
                    capture.stderr.contains(&format!("thread {tid} moved from {place:#x}")),
                    "{}",
                    capture.stderr
                );
                assert_churns(&mut target);
                assert_left_no_trace(&before, &mut target);
            }
        }
        call(&mut target, "end_churning");
    });
}

#[test]
fn a_thread_inside_the_trampoline_is_moved_back() {
    for_each_python(of_this_machine, |python| {
        let folder = tempfile::tempdir().unwrap();
        let mut target = hostile::start(python, folder.path());
        let tid = call(&mut target, "start_churning");
        let before = Snapshot::take(target.pid());
        let mut moved = 0;
        // Every instruction of our region that a malloc and a free pass: thunks, from which nobody can be moved, and trampolines.
        for nth in 1..=16 {
            let recording = Recording::attach_logging(&target, SAMPLED);
            let ours = region(&target);
            let stepped = Stepped::seize(tid);
            let mut count = 0;
            let place = stepped.step_until(|_, now| {
                count += i32::from(ours.contains(&now));
                count == nth
            });
            stepped.let_go(Signal::SIGSTOP);
            wait_until_stopped(target.pid());
            let capture = recording.stop();
            capture.assert_code(0);
            assert!(Snapshot::take(target.pid()).changed_text().is_empty(), "the jumps are still in");
            let was_moved = capture.stderr.contains(&format!("thread {tid} moved from {place:#x}"));
            moved += i32::from(was_moved);
            // A stopped thread does not come out of a thunk, nor back to the agent that waits for the answer to a sampled call: then
            // the code stays, and the user is told.
            let comes_back = capture.stderr.contains(&format!("thread {tid} will come back to our code"));
            let stays = capture.stderr.contains("left in the target");
            assert_eq!(stays, !was_moved || comes_back, "{}", capture.stderr);
            target.signal(CONT);
            assert_churns(&mut target);
            if stays {
                detach_in_the_end(target.pid());
            }
            assert_left_no_trace(&before, &mut target);
        }
        assert!(moved >= 4, "only {moved} of the places were in a trampoline");
        call(&mut target, "end_churning");
    });
}

/// A handler stays over a thread that stands inside the bytes: nothing can move that thread.
fn handler_over_the_bytes(target: &mut Target, on_stack: bool) {
    let start = if on_stack { "start_churning_with_stack" } else { "start_churning" };
    let tid = call(target, start);
    let inside = covered(target, tid);
    call(target, &format!("stay_on {SIGUSR2} {}", i32::from(on_stack)));
    let before = Snapshot::take(target.pid());
    let stepped = Stepped::seize(tid);
    stepped.step_until(|_, now| now == inside[0]);
    stepped.let_go(Signal::SIGUSR2);
    wait_until("the handler", || call(target, "stays") == 1);
    let text = Snapshot::take(target.pid());
    let said = Recording::try_attach(target.pid(), SAMPLED).err().expect("a handler is over the bytes");
    assert!(said.contains("signal handler") && said.contains("hint"), "{said}");
    assert!(text.differences(target.pid()).is_empty(), "{:?}", text.differences(target.pid()));
    call(target, "release");
    wait_until("the handler's end", || call(target, "stays") == 0);
    Recording::attach(target, &["--exact"]).stop().assert_code(0);
    assert_churns(target);
    assert_left_no_trace(&before, target);
    call(target, "end_churning");
}

#[test]
fn a_handler_over_the_bytes_is_waited_for_or_refused() {
    for_each_python(of_this_machine, |python| {
        let folder = tempfile::tempdir().unwrap();
        for on_stack in [false, true] {
            let mut target = hostile::start(python, folder.path());
            handler_over_the_bytes(&mut target, on_stack);
        }
    });
}

/// A handler stays over a thread in our own code: nothing may be unmapped under it.
fn handler_over_our_code(target: &mut Target, on_stack: bool, nth: i32) {
    let start = if on_stack { "start_churning_with_stack" } else { "start_churning" };
    let tid = call(target, start);
    call(target, &format!("stay_on {SIGUSR2} {}", i32::from(on_stack)));
    let before = Snapshot::take(target.pid());
    let recording = Recording::attach(target, &["--exact"]);
    let ours = region(target);
    let stepped = Stepped::seize(tid);
    let mut count = 0;
    stepped.step_until(|_, now| {
        count += i32::from(ours.contains(&now));
        count == nth
    });
    stepped.let_go(Signal::SIGUSR2);
    wait_until("the handler", || call(target, "stays") == 1);
    let capture = recording.stop();
    capture.assert_code(0);
    assert!(capture.stderr.contains("left in the target"), "{}", capture.stderr);
    assert!(Snapshot::take(target.pid()).changed_text().is_empty(), "the jumps are still in");
    call(target, "release");
    assert_churns(target);
    detach_in_the_end(target.pid());
    assert_left_no_trace(&before, target);
    call(target, "end_churning");
}

#[test]
fn nothing_is_unmapped_under_a_handler() {
    for_each_python(of_this_machine, |python| {
        let folder = tempfile::tempdir().unwrap();
        for on_stack in [false, true] {
            for nth in [2, 4, 6] {
                let mut target = hostile::start(python, folder.path());
                handler_over_our_code(&mut target, on_stack, nth);
            }
        }
    });
}

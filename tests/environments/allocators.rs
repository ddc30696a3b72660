//! CPython's allocators in other states than the ordinary: checked, replaced by libc's, wrapped by the application while
//! it is recorded, used by several interpreters.

use super::{a_few, detach, said};
use crate::common::dump::Allocation;
use crate::common::pythons::Flavour;
use crate::common::snapshot::assert_left_no_trace;
use crate::common::truth::Truth;
use crate::common::{Kind, Python, Recording, Snapshot, Target, for_each_kind};

const PYTHON_ALLOCATORS: &[&str] = &["--python-allocators"];

#[test]
fn the_sizes_that_were_asked_for_under_every_pythonmalloc() {
    // Which word of a table is hooked is the same for both kinds: a few interpreters stand for all with traps.
    let chosen = |python: &Python, kind| match kind {
        Kind::Jump => python.records_promised(kind),
        Kind::Trap => a_few(python, kind),
    };
    for_each_kind(chosen, |python, kind| {
        for setting in ["debug", "malloc", "malloc_debug"] {
            for (program, arguments) in [("small_objects.py", PYTHON_ALLOCATORS), ("libc_blocks.py", &[])] {
                // A free-threaded build takes no other allocator than its own.
                if python.flavour == Flavour::FreeThreaded && setting.starts_with("malloc") {
                    continue;
                }
                let mut target = Target::builder(python, program).env("PYTHONMALLOC", setting).start();
                let before = Snapshot::take(target.pid());
                let recording = Recording::attach(&target, &kind.with(arguments));
                let truth = Truth::from_json(target.go());
                let capture = recording.stop();
                assert_left_no_trace(&before, &mut target);
                truth.assert_matches(&capture.assert_code(0).dump());
            }
        }
    });
}

/// tracemalloc keeps what it found in the tables when it was started. Once it is stopped it uses that only when it is started again:
/// the first block comes by it, then it saves what the tables hold now.
fn look(target: &Target) -> Snapshot {
    Snapshot::take(target.pid()).without_pointers()
}

fn tell(target: &mut Target, command: &str, answer: &str) {
    target.send(command);
    target.expect(answer);
}

/// Asks for a detach, which must succeed and say `word`; the target works on.
fn detach_says(target: &mut Target, word: &str) {
    let output = detach(target);
    assert!(output.status.success() && said(&output).contains(word), "{}", said(&output));
    target.go();
    target.ping();
}

#[test]
fn an_application_that_traces_its_memory_for_a_while() {
    for_each_kind(Python::records_promised, |python, kind| {
        let mut target = Target::start(python, "traced_memory.py");
        let before = look(&target);
        let recording = Recording::attach(&target, &kind.with(PYTHON_ALLOCATORS));
        tell(&mut target, "trace", "traced");
        let truth = Truth::from_json(target.go());
        tell(&mut target, "untrace", "untraced");
        let capture = recording.stop();
        truth.assert_matches(&capture.assert_code(0).dump());
        assert_kept_until_traced_again(&capture, &mut target);
        assert_left_no_trace(&before, &mut target);
    });
}

/// What was there before the attach is put back by the application itself: nothing of CPython's own is recorded from then on,
/// and that is told.
#[test]
fn an_application_that_traced_its_memory_before_and_stops() {
    let jumps = |python: &Python, kind| python.records_promised(kind) && kind == Kind::Jump;
    for_each_kind(jumps, |python, kind| {
        let mut target = Target::start(python, "traced_memory.py");
        tell(&mut target, "trace", "traced");
        let before = look(&target);
        let recording = Recording::attach(&target, &kind.with(PYTHON_ALLOCATORS));
        let truth = Truth::from_json(target.go());
        tell(&mut target, "untrace", "untraced");
        target.go();
        let capture = recording.stop();
        assert!(capture.assert_code(0).stderr.contains("allocator tables"), "{}", capture.stderr);
        let stats = capture.report("stats", &[]);
        assert!(stats.contains("the program replaced CPython's allocator tables"), "{stats}");
        // What it did before is all there.
        let found = truth.differences(&capture.dump());
        assert!(found.is_empty(), "{found:?}");
        assert_left_no_trace(&before, &mut target);
    });
}

/// What tracemalloc has saved stays there for it to call, and goes once it has saved something else.
fn assert_kept_until_traced_again(capture: &crate::common::heaptap::Capture, target: &mut Target) {
    assert!(capture.stderr.contains("left in the target"), "{}", capture.stderr);
    detach_says(target, "stay");
    trace_again(target);
    detach_says(target, "removed");
}

fn trace_again(target: &mut Target) {
    tell(target, "trace", "traced");
    target.go();
    tell(target, "untrace", "untraced");
    target.go();
}

#[test]
fn an_application_that_traces_its_memory_when_heaptap_goes() {
    for_each_kind(Python::records_promised, |python, kind| {
        let mut target = Target::start(python, "traced_memory.py");
        let before = look(&target);
        let recording = Recording::attach(&target, &kind.with(PYTHON_ALLOCATORS));
        tell(&mut target, "trace", "traced");
        let truth = Truth::from_json(target.go());
        let capture = recording.stop();
        truth.assert_matches(&capture.assert_code(0).dump());
        assert!(capture.stderr.contains("left in the target"), "{}", capture.stderr);
        target.go();
        // While the application calls through what is left, it can't go.
        detach_says(&mut target, "stay");
        let again = Recording::attach(&target, &kind.with(PYTHON_ALLOCATORS));
        let truth = Truth::from_json(target.go());
        truth.assert_matches(&again.stop().assert_code(0).dump());
        tell(&mut target, "untrace", "untraced");
        // The tables are as they were before the recording; what was saved is not.
        detach_says(&mut target, "stay");
        trace_again(&mut target);
        detach_says(&mut target, "removed");
        assert_left_no_trace(&before, &mut target);
    });
}

/// A dead word on a stack may look like a way back for a while; nothing may for ever.
fn detach_in_the_end(target: &mut Target) {
    let stays = |target: &Target| {
        let output = detach(target);
        assert!(output.status.success(), "{}", said(&output));
        said(&output).contains("stay")
    };
    for _ in 0..20 {
        if !stays(target) {
            return;
        }
        target.go();
    }
    panic!("what was left stays for ever");
}

#[test]
fn an_application_that_stops_tracing_in_mid_recording() {
    for_each_kind(Python::records_promised, |python, kind| {
        let mut target = Target::start(python, "traced_memory.py");
        let before = look(&target);
        tell(&mut target, "trace", "traced");
        let recording = Recording::attach(&target, &kind.with(PYTHON_ALLOCATORS));
        let truth = Truth::from_json(target.go());
        tell(&mut target, "untrace", "untraced");
        target.go();
        let capture = recording.stop();
        assert!(truth_is_in(&truth, &capture), "what was made before the tables changed is recorded");
        target.go();
        detach_in_the_end(&mut target);
        assert_left_no_trace(&before, &mut target);
    });
}

/// The first round of the work is there; the second may be, or not.
fn truth_is_in(_: &Truth, capture: &crate::common::heaptap::Capture) -> bool {
    let dump = capture.assert_code(0).dump();
    dump.allocations.iter().filter(|a| a.stack.first().is_some_and(|f| f.function == "make_objects")).count()
        >= 300
}

#[test]
fn an_application_that_traces_its_memory_when_heaptap_is_killed() {
    for_each_kind(a_few, |python, kind| {
        for worked in [false, true] {
            let mut target = Target::start(python, "traced_memory.py");
            let before = look(&target);
            let recording = Recording::attach(&target, &kind.with(PYTHON_ALLOCATORS));
            tell(&mut target, "trace", "traced");
            recording.kill();
            if worked {
                target.go();
            }
            detach_says(&mut target, "stay");
            tell(&mut target, "untrace", "untraced");
            detach_says(&mut target, "stay");
            trace_again(&mut target);
            detach_says(&mut target, "removed");
            assert_left_no_trace(&before, &mut target);
        }
    });
}

#[test]
fn frames_of_a_subinterpreter_are_its_own() {
    // Sizes are exact: no guard bytes.
    let exact = |python: &Python, kind| python.records_promised(kind) && python.flavour == Flavour::Default;
    for_each_kind(exact, |python, kind| {
        let mut target = Target::start(python, "subinterpreters.py");
        let before = Snapshot::take(target.pid());
        let recording = Recording::attach(&target, &kind.with(&[]));
        let truth = target.go();
        let capture = recording.stop();
        assert_left_no_trace(&before, &mut target);
        let dump = capture.assert_code(0).dump();
        if truth["absent"] == true {
            return crate::common::skipped(&format!("subinterpreters: {python} has no module for them"));
        }
        let (count, size) = (truth["count"].as_u64().unwrap() as usize, truth["size"].as_u64().unwrap());
        let made_by = |size: u64| -> Vec<Option<(&str, u32)>> {
            dump.allocations.iter().filter(|a| a.size == size).map(innermost).collect()
        };
        assert_eq!(made_by(size + 100), vec![Some(("outside", 41)); count], "{python}");
        let inside = made_by(size);
        assert_eq!(inside.len(), 2 * count, "{python}: once by each of two threads");
        for made in inside {
            // Before 3.13 a thread that enters a subinterpreter is not bound to its thread state there (Python/pystate.c,
            // `bind_gilstate_tstate`): then it is seen as the caller's doing, or as nobody's, but never as a stranger's.
            let callers = ["in_main_thread", "Thread.run", "run"];
            let older = python.minor() < 13 && made.is_none_or(|(function, _)| callers.contains(&function));
            assert!(made == Some(("inside", 4)) || older, "{python}: {made:?}");
        }
    });
}

fn innermost(allocation: &Allocation) -> Option<(&str, u32)> {
    allocation.stack.first().map(|frame| (frame.function.as_str(), frame.line))
}

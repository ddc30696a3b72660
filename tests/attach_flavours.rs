//! Jump breakpoints on every build of CPython and with every state of its allocators: what is recorded whole is what the fixture did,
//! what is sampled stands for it, and nothing is left in the process afterwards.

mod common;

use common::snapshot::assert_left_no_trace;
use common::truth::Truth;
use common::{Flavour, Kind, Python, Recording, Snapshot, Target, for_each_python};

/// On a machine that is busy with tests heaptap may be kept from its work for a while.
const EXACT: &[&str] = &["--exact", "--max-wait", "20s"];
const EXACT_PYTHON: &[&str] = &["--exact", "--max-wait", "20s", "--python-allocators"];

/// Every interpreter records by jumps. Debian's builds of older versions have the allocators of the others, and `tests/attach_records.rs` has them all.
fn all(python: &Python) -> bool {
    let is_like_others = python.name.starts_with("debian-") && python.minor() < 14;
    python.records_promised(Kind::Jump) && (common::soak() || !is_like_others)
}

/// One attach and one "go" of a target that is up; what was recorded, what is true, and how many events were
/// dropped.
fn recorded(target: &mut Target, arguments: &[&str]) -> (common::dump::Dump, Truth, usize) {
    let before = Snapshot::take(target.pid());
    let recording = Recording::attach(target, arguments);
    let truth = Truth::from_json(target.go());
    let capture = recording.stop();
    assert_left_no_trace(&before, target);
    (capture.assert_code(0).dump(), truth, capture.drops())
}

fn records_of(python: &Python, program: &str, arguments: &[&str]) {
    let mut target = Target::start(python, program);
    let (dump, truth, _) = recorded(&mut target, arguments);
    truth.assert_matches(&dump);
    assert!(target.exit().success(), "{program} does not end well after the detach");
}

fn estimates_of(python: &Python, program: &str, arguments: &[&str]) {
    let mut target = Target::start(python, program);
    let (dump, truth, drops) = recorded(&mut target, arguments);
    truth.assert_estimated(&dump, drops);
    assert!(target.exit().success(), "{program} does not end well after the detach");
}

/// Where there is no GIL they run at once, and every block is there exactly once, in an order that replays.
#[test]
fn eight_threads_hand_blocks_over() {
    for_each_python(all, |python| records_of(python, "handing.py", EXACT));
}

/// More threads in turn than the agent tells apart at a time (2048). Where each has a thread pointer of its own (musl maps every
/// stack anew) the slots of those that ended are given back.
#[test]
fn more_threads_in_turn_than_slots() {
    // One for each C library's way with stacks; the interpreter makes no difference.
    let chosen = |python: &Python| {
        python.records_promised(Kind::Jump)
            && (python.name.starts_with("musl-") || python.name == "debian-3.13")
    };
    for_each_python(chosen, |python| {
        for arguments in [EXACT, &["--sample", "512KiB"]] {
            let mut target = Target::start(python, "many_threads.py");
            let (dump, truth, drops) = recorded(&mut target, arguments);
            assert_eq!(drops, 0, "{arguments:?}");
            if arguments == EXACT {
                truth.assert_matches(&dump);
            }
            assert!(target.exit().success());
        }
    });
}

#[test]
fn what_mimalloc_reserves_is_no_use_of_memory() {
    for_each_python(all, |python| {
        for arguments in [EXACT, &["--sample", "512KiB"]] {
            let mut target = Target::start(python, "reserving.py");
            let (dump, truth, drops) = recorded(&mut target, arguments);
            if arguments == EXACT {
                truth.assert_matches(&dump);
            } else {
                truth.assert_estimated(&dump, drops);
            }
            let large: Vec<_> = dump.allocations.iter().filter(|a| a.size >= 512 << 20).collect();
            assert!(large.is_empty(), "{large:#?}");
        }
    });
}

#[test]
fn a_free_threaded_build_is_always_recorded_by_its_own_allocators() {
    for_each_python(all, |python| {
        let target = Target::start(python, "libc_blocks.py");
        let capture = Recording::attach(&target, EXACT).stop();
        let header = capture.report("dump", &["--json"]);
        let says = |word: &str| header.lines().next().is_some_and(|line| line.contains(word));
        let free_threaded = python.flavour == Flavour::FreeThreaded;
        assert!(says(&format!("\"python_allocators\":{free_threaded}")), "{:?}", header.lines().next());
    });
}

/// With every event, only the program's own mapping is one; in samples, where malloc is not known to be under way, too.
#[test]
fn what_malloc_maps_for_itself_is_no_mapping() {
    for_each_python(all, |python| {
        records_of(python, "thresholds.py", EXACT);
        // The fewest, 6 of 100,003 bytes, are missed altogether once in two million recordings.
        estimates_of(python, "thresholds.py", &["--sample", "40KiB"]);
    });
}

#[test]
fn every_function_of_every_domain() {
    for_each_python(all, |python| records_of(python, "domains.py", EXACT_PYTHON));
}

/// A debug build's own allocators are debug ones.
#[test]
fn samples_of_every_domain_count_a_block_once() {
    for_each_python(all, |python| {
        estimates_of(python, "domains.py", &["--python-allocators", "--sample", "4KiB"])
    });
}

#[test]
fn samples_of_blocks_of_libc() {
    for_each_python(all, |python| {
        estimates_of(python, "handing.py", &["--sample", "16KiB"]);
        estimates_of(python, "libc_aligned.py", &["--sample", "1"]);
        estimates_of(python, "libc_blocks.py", &["--sample", "1"]);
    });
}

/// `PYTHONMALLOC` and tracemalloc put others between the tables and pymalloc, or leave pymalloc out.
#[test]
fn samples_under_every_state_of_the_allocators() {
    let states = [
        ("PYTHONMALLOC", "debug"),
        ("PYTHONMALLOC", "malloc"),
        ("PYTHONMALLOC", "malloc_debug"),
        ("PYTHONTRACEMALLOC", "1"),
    ];
    // Debian's builds have the allocators of the others.
    let all = |python: &Python| all(python) && (!python.name.starts_with("debian-") || python.minor() >= 14);
    for_each_python(all, |python| {
        for (name, value) in states {
            // A free-threaded build takes no other allocator than its own.
            if python.flavour == Flavour::FreeThreaded && value.starts_with("malloc") {
                continue;
            }
            let mut target = Target::builder(python, "domains.py").env(name, value).start();
            let (dump, truth, drops) = recorded(&mut target, &["--python-allocators", "--sample", "4KiB"]);
            let checked = std::panic::catch_unwind(|| truth.assert_estimated(&dump, drops));
            assert!(checked.is_ok(), "{name}={value}: {:?}", checked.unwrap_err().downcast_ref::<String>());
        }
    });
}

/// Debian's builds have a JIT, off by default. Loops that run a thousand times are compiled.
#[test]
fn stacks_and_records_of_compiled_code() {
    let has_jit = |python: &Python| python.name.starts_with("debian-") && python.minor() >= 14;
    for_each_python(has_jit, |python| {
        for (program, arguments) in [
            ("call_shapes.py", EXACT),
            ("domains.py", EXACT_PYTHON),
            ("handing.py", EXACT),
            ("high_water.py", EXACT),
        ] {
            let mut target = Target::builder(python, program).env("PYTHON_JIT", "1").start();
            for _ in 0..3 {
                target.go();
            }
            let maps = std::fs::read_to_string(format!("/proc/{}/maps", target.pid())).unwrap();
            let compiled = maps
                .lines()
                .filter(|l| l.contains(" r-xp ") && l.split_ascii_whitespace().nth(4) == Some("0"));
            // Beside the kernel's own page.
            let compiled = compiled.filter(|l| !l.contains('[')).count() > 0;
            assert!(compiled || program != "domains.py", "nothing was compiled");
            let (dump, truth, _) = recorded(&mut target, arguments);
            truth.assert_matches(&dump);
        }
    });
}

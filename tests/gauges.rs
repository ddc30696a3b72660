//! Gauges against what the target's own allocators, its collector and the kernel say while it stands still.

mod common;

use common::snapshot::assert_left_no_trace;
use common::{Flavour, Kind, Python, Recording, Snapshot, Target, for_each_python, pythons};
use serde_json::Value;
use std::fs;
use std::time::{Duration, Instant};

const PROGRAM: &str = "standing.py";
const MIB: u64 = 1 << 20;

/// A target that stands still in a system call.
fn standing(python: &Python) -> Target {
    let mut target = Target::start(python, PROGRAM);
    stand(&mut target);
    target
}

fn stand(target: &mut Target) {
    target.send("stand");
    target.expect("standing");
    // readv (19) of descriptor 0: nothing allocates any more.
    let started = Instant::now();
    while !fs::read_to_string(format!("/proc/{}/syscall", target.pid())).unwrap().starts_with("19 0x0 ") {
        assert!(started.elapsed() < Duration::from_secs(60), "the target does not come to a stand");
        std::thread::yield_now();
    }
}

/// The moments of a recording made while the target stands, by `gauges --json`, and the report.
fn recorded(target: &Target, kind: Kind) -> (Vec<Value>, Value) {
    let recording = Recording::attach(target, &kind.with(&[]));
    let capture = recording.stop();
    let report: Value = serde_json::from_str(&capture.assert_code(0).report("gauges", &["--json"])).unwrap();
    let moments = report["moments"].as_array().unwrap().clone();
    assert!(moments.len() >= 2, "one at the start and one at the end: {report}");
    (moments, report)
}

fn status(pid: i32, name: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find(|line| line.starts_with(name)).unwrap();
    1024 * line.split_ascii_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
}

fn assert_near(found: &Value, expected: u64, tolerance: u64, what: &str) {
    let found = found.as_u64().unwrap_or_else(|| panic!("{what} is unknown"));
    assert!(found.abs_diff(expected) <= tolerance, "{what}: {found}, expected {expected} ± {tolerance}");
}

fn assert_heap(python: &Python, moment: &Value, heap: &Value) {
    if heap.is_null() {
        assert_eq!(python.libc, "musl");
        assert!(moment["heap_held"].is_null() && moment["heap_free"].is_null());
        return;
    }
    let said = |name: &str| heap[name].as_u64().unwrap();
    assert!(said("fordblks") > MIB && said("hblkhd") > 3 * MIB, "the heap is no test: {heap}");
    assert_eq!(moment["heap_held"], said("arena") + said("hblkhd"), "{moment} {heap}");
    // Python may free what the question was asked with.
    assert_near(&moment["heap_free"], said("fordblks"), 2 << 10, "heap_free");
    assert_near(&moment["heap_in_use"], said("uordblks") + said("hblkhd"), 2 << 10, "heap_in_use");
}

/// Up to 3.9 arenas are of 256 KiB and pools of 4 KiB, later of 1 MiB and 16 KiB.
fn assert_pymalloc(python: &Python, moment: &Value, said: &Value) {
    if python.flavour == Flavour::FreeThreaded {
        assert!(moment["arenas"].is_null() && moment["arenas_in_use"].is_null());
        return;
    }
    let pool = if python.minor() <= 9 { 4 << 10 } else { 16 << 10 };
    let arena = if python.minor() <= 9 { MIB / 4 } else { MIB };
    let number = |name: &str| said[name].as_u64().unwrap_or_else(|| panic!("no {name} in {said}"));
    let arenas = number("arenas allocated current");
    assert!(arenas >= 5, "pymalloc is no test: {said}");
    assert_eq!(moment["arenas"], arenas * arena, "{moment} {said}");
    // Between its words and its stand the program makes and frees some objects.
    assert_near(&moment["arenas_in_use"], number("bytes in allocated blocks"), 16 << 10, "arenas_in_use");
    // An arena that is not aligned to pools has one less.
    let most = (arenas * (arena / pool) - number("unused pools")) * pool;
    assert_near(&moment["pools"], most, (arenas + 2) * pool, "pools");
}

/// Every interpreter of which the allocators tell of themselves.
#[test]
fn gauges_are_what_the_standing_target_says() {
    for_each_python(
        |_| true,
        |python| {
            let mut target = standing(python);
            let before = Snapshot::take(target.pid());
            let (moments, report) = recorded(&target, Kind::Jump);
            let (resident, anonymous) = (status(target.pid(), "VmRSS"), status(target.pid(), "RssAnon"));
            target.send("on");
            let said = target.expect("stood");
            assert_left_no_trace(&before, &mut target);
            // What takes long on a busy machine is not read again so soon.
            assert_heap(python, &moments[0], &said["heap"]);
            assert_pymalloc(python, &moments[0], &said["pymalloc"]);
            for moment in &moments {
                assert_eq!(moment["heap_held"], moments[0]["heap_held"]);
                assert_eq!(moment["arenas"], moments[0]["arenas"]);
                // The agent and its rings come and go.
                assert_near(&moment["resident"], resident, 4 * MIB, "resident");
                assert_near(&moment["anonymous"], anonymous, 4 * MIB, "anonymous");
                assert_eq!(moment["descriptors"], said["descriptors"], "{moment} {said}");
                // The system's own threads are not Python's; the program starts none.
                assert_eq!(moment["threads"], said["threads"], "{moment} {said}");
                assert_eq!(moment["live"], 0);
                let collections = [0, 1, 2].map(|i| moment[format!("collections_{i}")].clone());
                if python.minor() < 15 && python.flavour != Flavour::FreeThreaded {
                    assert_eq!(said["collections"], Value::from(collections.to_vec()), "{moment}");
                } else {
                    assert!(collections.iter().all(Value::is_null), "{moment}");
                }
            }
            assert!(moments[0]["proportional"].as_u64().is_some_and(|pss| pss <= resident + 4 * MIB));
            let verdict = report["verdict"].as_str().unwrap();
            assert!(verdict.starts_with("RSS ") && verdict.contains(": "), "{verdict}");
            target.exit();
        },
    );
}

/// One that is there anyhow.
fn any_python() -> Option<&'static Python> {
    pythons().iter().find(|python| python.flavour == Flavour::Default && python.root.is_none())
}

#[test]
fn traps_have_gauges_too_and_every_form_of_the_report_shows_them() {
    let Some(python) = any_python() else { return common::missing("any interpreter") };
    let mut target = standing(python);
    let before = Snapshot::take(target.pid());
    let recording = Recording::attach(&target, &Kind::Trap.with(&[]));
    let capture = recording.stop();
    target.send("on");
    target.expect("stood");
    assert_left_no_trace(&before, &mut target);
    capture.assert_code(0);
    let table = capture.report("gauges", &[]);
    assert!(table.contains("RSS") && table.contains("Heap in use"), "{table}");
    let last = table.trim_end().lines().last().unwrap();
    assert!(last.starts_with("RSS ") && last.contains("held free by the allocator"), "{table}");
    let csv = capture.report("gauges", &["--csv"]);
    let widths: Vec<_> = csv.lines().map(|line| line.split(',').count()).collect();
    assert!(csv.starts_with("time_s,resident,") && widths.len() >= 3, "{csv}");
    assert!(widths.iter().all(|width| *width == widths[0]), "{csv}");
    // `dump` has them beside the events.
    assert!(capture.report("dump", &["--json"]).contains("\"heap_in_use\""));
}

#[test]
fn a_capture_without_gauges_says_so() {
    let old = concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/captures/v2.heaptap");
    let output = common::heaptap::heaptap_says(1, &["gauges", old]);
    assert!(String::from_utf8_lossy(&output.stderr).contains("no gauges"));
    let output = common::heaptap::heaptap_says(0, &["gauges", "--json", old]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&report["moments"], &report["verdict"]), (&Value::from(Vec::<Value>::new()), &Value::Null));
}

/// A cgroup of our own with this limit, version 1 or 2; `None` where none can be made.
struct Group(std::path::PathBuf);

impl Group {
    fn new(limit: u64) -> Option<Self> {
        let name = format!("heaptap-test-{}", std::process::id());
        for (root, file) in
            [("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")]
        {
            let folder = std::path::Path::new(root).join(&name);
            if fs::create_dir(&folder).is_ok() {
                let group = Self(folder);
                if fs::write(group.0.join(file), limit.to_string()).is_ok() {
                    return Some(group);
                }
            }
        }
        None
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

#[test]
fn the_limit_of_its_cgroup_is_told() {
    let Some(python) = any_python() else { return common::missing("any interpreter") };
    let limit = 3 << 30;
    let Some(group) = Group::new(limit) else {
        return common::skipped("no cgroup with a memory limit can be made here");
    };
    let mut target = Target::start(python, PROGRAM);
    fs::write(group.0.join("cgroup.procs"), target.pid().to_string()).unwrap();
    let before = Snapshot::take(target.pid());
    stand(&mut target);
    let (moments, _) = recorded(&target, Kind::Jump);
    target.send("on");
    target.expect("stood");
    assert_left_no_trace(&before, &mut target);
    for moment in &moments {
        assert_eq!(moment["limit"], limit);
        assert!(moment["limit_used"].as_u64().is_some_and(|used| used < limit), "{moment}");
    }
    target.exit();
}

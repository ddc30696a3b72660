//! Memray as a second opinion: the same program, once under `memray run` and once attached to by heaptap with each kind
//! of breakpoint: three recordings that tell the same.
//!
//! Compared is everything below the program's `performance` that both can see: records by allocator, function, file,
//! line and size with their numbers and how many were freed, what was live at the peak, and what leaked.
//!
//! What differs by construction, and is left out or translated here:
//! - memray names functions by `co_name`, heaptap by qualified name: compared is the last part.
//! - memray patches import tables, so it sees no call made through a looked-up pointer (ctypes) and none that libc
//!   makes itself; the program makes none of either.
//! - both see pymalloc's arenas and the interpreter's frame stack chunks whenever these happen to be needed: left out.
//! - below 513 bytes pymalloc serves, without asking the C library.

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::dump::{Allocation, Dump, Frame};
use common::{Kind, Python, Recording, Target, for_each_python};
use serde::Deserialize;

const PROGRAM: &str = "python_objects.py";
const SMALLEST: u64 = 513;

/// allocator, function, file, line, size
type Site = (String, String, String, u32, u64);

fn script() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/memray-oracle")
}

/// memray's wheels are for released default builds; these three minors are what the comparison is promised for.
fn compared(python: &Python) -> bool {
    python.name.starts_with("pyenv-") && (11..=13).contains(&python.minor())
}

/// The python of an environment with memray in it, or why there is none.
fn prepare(python: &Python) -> Result<PathBuf, String> {
    let output = Command::new(script())
        .arg("prepare")
        .arg(&python.command)
        .output()
        .map_err(|error| error.to_string())?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    Ok(PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()))
}

fn memray_says(python: &Path, capture: &Path, view: &[&str]) -> String {
    let output = Command::new(python).arg(script()).arg("records").args(view).arg(capture).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn site(allocator: &str, stack: &[Frame], size: u64) -> Option<Site> {
    let performed = stack.iter().any(|frame| frame.base() == PROGRAM && frame.function == "performance");
    let arena = allocator == "mmap" && size.is_power_of_two() && size >= 0x4000;
    if !performed || arena || size < SMALLEST {
        return None;
    }
    let inner = &stack[0];
    let function = inner.function.rsplit('.').next().unwrap_or_default().to_owned();
    Some((allocator.to_owned(), function, inner.base().to_owned(), inner.line, size))
}

/// Number and number freed per site.
fn records(dump: &Dump) -> BTreeMap<Site, (usize, usize)> {
    let mut sites: BTreeMap<Site, (usize, usize)> = BTreeMap::new();
    for Allocation { allocator, size, stack, live, .. } in &dump.allocations {
        if let Some(site) = site(allocator, stack, *size) {
            let sums = sites.entry(site).or_default();
            *sums = (sums.0 + 1, sums.1 + usize::from(*live == 0));
        }
    }
    sites
}

/// Bytes and number per site without the size, as an aggregated view has them.
type Summed = BTreeMap<(String, String, String, u32), (u64, usize)>;

fn summed<'a>(allocations: impl Iterator<Item = &'a Allocation>) -> Summed {
    let mut sums = Summed::new();
    for allocation in allocations {
        if let Some((allocator, function, file, line, _)) =
            site(&allocation.allocator, &allocation.stack, allocation.size)
        {
            let sum = sums.entry((allocator, function, file, line)).or_default();
            *sum = (sum.0 + allocation.live.max(allocation.size), sum.1 + 1);
        }
    }
    sums
}

#[derive(Deserialize)]
struct Live {
    allocator: String,
    size: u64,
    count: usize,
    stack: Vec<Frame>,
}

fn memray_summed(text: &str) -> Summed {
    let mut sums = Summed::new();
    for line in text.lines() {
        let Live { allocator, size, count, stack } = serde_json::from_str(line).unwrap();
        // One aggregated line may sum several sizes: its average decides whether pymalloc's limit was passed.
        let average = size / count.max(1) as u64;
        if let Some((allocator, function, file, line, _)) = site(&allocator, &stack, average) {
            let sum = sums.entry((allocator, function, file, line)).or_default();
            *sum = (sum.0 + size, sum.1 + count);
        }
    }
    sums
}

fn run_memray(python: &Python, venv: &Path, folder: &Path) -> PathBuf {
    let capture = folder.join("memray.bin");
    let with_memray = Python { command: venv.to_owned(), ..python.clone() };
    let arguments = ["-m", "memray", "run", "-q", "-o", capture.to_str().unwrap()];
    let mut target = Target::builder(&with_memray, PROGRAM).interpreter_args(&arguments).start();
    target.go();
    assert!(target.exit().success());
    capture
}

/// The program attached to by heaptap.
fn recorded(python: &Python, kind: Kind) -> Dump {
    let mut target = Target::start(python, PROGRAM);
    let before = common::Snapshot::take(target.pid());
    let recording = Recording::attach(&target, &kind.with(&[]));
    target.go();
    let dump = recording.stop().assert_code(0).dump();
    common::snapshot::assert_left_no_trace(&before, &mut target);
    dump
}

/// Both columns of every site that is not the same in both.
fn differing<K: Ord + std::fmt::Debug, V: PartialEq + std::fmt::Debug>(
    ours: &BTreeMap<K, V>,
    theirs: &BTreeMap<K, V>,
) -> Vec<String> {
    let keys: std::collections::BTreeSet<&K> = ours.keys().chain(theirs.keys()).collect();
    let different = keys.into_iter().filter(|key| ours.get(*key) != theirs.get(*key));
    different
        .map(|key| format!("{key:?}: heaptap {:?}, memray {:?}", ours.get(key), theirs.get(key)))
        .collect()
}

#[test]
fn heaptap_and_memray_agree() {
    for_each_python(compared, |python| {
        let venv = match prepare(python) {
            Ok(venv) => venv,
            Err(why) => return common::missing(&format!("memray for {python}: {why}")),
        };
        let folder = tempfile::tempdir().unwrap();
        let capture = run_memray(python, &venv, folder.path());
        let memray = Dump::parse(&memray_says(&venv, &capture, &[]));
        let expected = records(&memray);
        assert!(expected.len() > 100, "memray saw only {} sites", expected.len());

        let expected_peak = memray_summed(&memray_says(&venv, &capture, &["--high-water"]));
        let expected_leaks = memray_summed(&memray_says(&venv, &capture, &["--leaks"]));
        for kind in Kind::all() {
            let dump = recorded(python, kind);
            let found = differing(&records(&dump), &expected);
            assert!(found.is_empty(), "{kind}: records:\n  {}", found.join("\n  "));
            let peak = summed(dump.high_water.iter().map(|&index| &dump.allocations[index]));
            let found = differing(&peak, &expected_peak);
            assert!(found.is_empty(), "{kind}: live at the peak:\n  {}", found.join("\n  "));
            let leaked = summed(dump.allocations.iter().filter(|allocation| allocation.live > 0));
            let found = differing(&leaked, &expected_leaks);
            assert!(found.is_empty(), "{kind}: leaks:\n  {}", found.join("\n  "));
        }
    });
}

/// The fixtures' own claims, and the replay the comparison stands on, held against memray alone.
#[test]
fn memray_confirms_the_fixtures() {
    for_each_python(compared, |python| {
        let venv = match prepare(python) {
            Ok(venv) => venv,
            Err(why) => return common::missing(&format!("memray for {python}: {why}")),
        };
        let folder = tempfile::tempdir().unwrap();
        let capture = run_memray(python, &venv, folder.path());
        let dump = Dump::parse(&memray_says(&venv, &capture, &[]));
        let peak = summed(dump.high_water.iter().map(|&index| &dump.allocations[index]));
        let theirs = memray_summed(&memray_says(&venv, &capture, &["--high-water"]));
        assert_eq!(differing(&peak, &theirs), Vec::<String>::new());
        assert!(
            peak.values().any(|(bytes, count)| (*bytes, *count) == (16 * ((3 << 20) + 33), 16)),
            "{peak:#?}"
        );

        let with_memray = Python { command: venv.clone(), ..python.clone() };
        for (program, view) in
            [("large_objects.py", None), ("small_objects.py", Some("--trace-python-allocators"))]
        {
            let capture = folder.path().join(format!("{program}.bin"));
            let mut arguments = vec!["-m", "memray", "run", "-q", "-o", capture.to_str().unwrap()];
            arguments.extend(view);
            let mut target = Target::builder(&with_memray, program).interpreter_args(&arguments).start();
            let truth = common::truth::Truth::from_json(target.go());
            assert!(target.exit().success());
            truth.assert_matches(&Dump::parse(&memray_says(&venv, &capture, &[])));
        }
    });
}

/// Bytes and blocks that are kept, by the line of the library's source that asked for them.
type Kept = BTreeMap<(String, u32), (u64, usize)>;

fn keep<'a>(kept: impl Iterator<Item = (u64, usize, &'a [Frame])>) -> Kept {
    let mut sums = Kept::new();
    for (size, count, stack) in kept {
        let line = stack.iter().find(|frame| frame.base() == "allocates.cpp");
        let caller = stack.iter().find(|frame| frame.base() == "native_keeps.py");
        if let (Some(line), Some(caller)) = (line, caller) {
            let function = caller.function.rsplit('.').next().unwrap_or_default().to_owned();
            let sum = sums.entry((function, line.line)).or_default();
            *sum = (sum.0 + size, sum.1 + count);
        }
    }
    sums
}

/// `memray run --native`: the same lines of C++ below the same functions of Python, with the same sizes.
#[test]
fn heaptap_and_memray_agree_about_native_frames() {
    for_each_python(compared, |python| {
        let venv = match prepare(python) {
            Ok(venv) => venv,
            Err(why) => return common::missing(&format!("memray for {python}: {why}")),
        };
        let folder = tempfile::tempdir().unwrap();
        let library = common::native::allocates(folder.path());
        let library = library.to_str().unwrap();
        let capture = folder.path().join("memray.bin");
        let with_memray = Python { command: venv.clone(), ..python.clone() };
        let arguments = ["-m", "memray", "run", "--native", "-q", "-o", capture.to_str().unwrap()];
        let target = Target::builder(&with_memray, "native_keeps.py").env("HEAPTAP_NATIVE", library);
        let mut target = target.interpreter_args(&arguments).start();
        target.go();
        assert!(target.exit().success());
        let leaked = memray_says(&venv, &capture, &["--leaks", "--native"]);
        let leaked: Vec<Live> = leaked.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let expected = keep(leaked.iter().map(|live| (live.size, live.count, &live.stack[..])));
        assert!(
            expected.len() >= 4 && expected.values().any(|(bytes, _)| *bytes >= 8 * 600_000),
            "{expected:#?}"
        );

        for kind in Kind::all() {
            let mut target =
                Target::builder(python, "native_keeps.py").env("HEAPTAP_NATIVE", library).start();
            let before = common::Snapshot::take(target.pid());
            let recording = Recording::attach(&target, &kind.with(&["--native"]));
            target.go();
            let dump = recording.stop().assert_code(0).dump();
            common::snapshot::assert_left_no_trace(&before, &mut target);
            let kept = dump.allocations.iter().filter(|allocation| allocation.live > 0);
            let found = keep(kept.map(|allocation| (allocation.size, 1, &allocation.stack[..])));
            assert_eq!(differing(&found, &expected), Vec::<String>::new(), "{kind}");
        }
    });
}

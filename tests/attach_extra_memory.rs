//! What recording takes of memory, heaptap's own and what it adds to the target's: bounded, told at the end of an attach and in the
//! capture, and the same as the kernel tells from outside.

mod common;

use common::heaptap::{Capture, heaptap_says};
use common::snapshot::assert_left_no_trace;
use common::{Kind, Python, Recording, Snapshot, Target, for_each_python};
use serde_json::Value;

const MIB: u64 = 1 << 20;
/// Each of the program's eight threads has come round so often before memory is looked at.
const ROUNDS: u64 = 300;

/// One mapping in /proc/PID/smaps.
#[derive(Default)]
struct Mapping {
    permissions: String,
    name: String,
    flags: String,
    resident: u64,
    dirty: u64,
}

fn mappings(pid: i32) -> Vec<Mapping> {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).expect("the target is alive");
    let mut found: Vec<Mapping> = Vec::new();
    for line in smaps.lines() {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let kilobytes = || words[1].parse::<u64>().expect("a number") << 10;
        match (words[0], found.last_mut()) {
            ("Rss:", Some(mapping)) => mapping.resident = kilobytes(),
            ("Private_Dirty:", Some(mapping)) => mapping.dirty = kilobytes(),
            ("VmFlags:", Some(mapping)) => mapping.flags = words[1..].join(" "),
            (first, _) if !first.ends_with(':') => found.push(Mapping {
                permissions: words[1].into(),
                name: words.get(5..).unwrap_or_default().join(" "),
                ..Mapping::default()
            }),
            _ => {}
        }
    }
    found
}

/// Resident bytes of a process that an attach may be the reason of: buffers, memory that forked children get wiped, code that shows
/// no file, and pages of code that are no longer their file's.
fn by_attaching(pid: i32) -> u64 {
    let resident = |mapping: &Mapping| {
        let is_code = mapping.permissions.starts_with("r-x");
        let is_wiped = mapping.flags.split(' ').any(|flag| flag == "wf");
        if mapping.name.contains("memfd:heaptap") || is_wiped || is_code && mapping.name.is_empty() {
            mapping.resident
        } else if is_code {
            mapping.dirty
        } else {
            0
        }
    };
    mappings(pid).iter().map(resident).sum()
}

/// All threads have come round [`ROUNDS`] times.
fn work(target: &mut Target) {
    let rounds = |target: &mut Target| -> Vec<u64> {
        target.send("check");
        let checked = target.expect("checked");
        checked["rounds"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).collect()
    };
    let first = rounds(target);
    assert_eq!(first.len(), 8);
    while rounds(target).iter().zip(&first).any(|(now, first)| now - first < ROUNDS) {}
}

/// The counters in the capture's last words.
fn counters(capture: &Capture) -> Value {
    let dump = heaptap_says(0, &["dump", "--json", capture.path.to_str().unwrap()]).stdout;
    let last = String::from_utf8(dump).unwrap().lines().last().expect("an end").to_owned();
    serde_json::from_str::<Value>(&last).unwrap()["trailer"]["counters"].clone()
}

/// A size as heaptap prints those from 1 KiB on.
fn in_words(bytes: u64) -> String {
    let (unit, name) = if bytes >= MIB { (MIB, "MiB") } else { (1 << 10, "KiB") };
    format!("{:.1} {name}", bytes as f64 / unit as f64)
}

/// Records the program at work; what is added to it is at most `most` and what the kernel says.
fn takes_at_most(python: &Python, arguments: &[&str], most: u64) {
    let mut target = Target::start(python, "verifying.py");
    work(&mut target);
    let (before, untouched) = (Snapshot::take(target.pid()), by_attaching(target.pid()));
    let recording = Recording::attach(&target, arguments);
    work(&mut target);
    let seen = by_attaching(target.pid()) - untouched;
    let capture = recording.stop();
    capture.assert_code(0);
    let counters = counters(&capture);
    let told = counters["target_extra_bytes"].as_u64().expect("what was added is told");
    eprintln!("{python} {arguments:?}: told {told}, seen {seen}, {counters}");
    assert!(told > 0 && told <= most, "{arguments:?}: {told} bytes were added to the target");
    assert!(seen > 0 && seen <= most, "{arguments:?}: {seen} bytes were added to the target by the kernel");
    // Between the two looks its threads go on: each may touch a part of its buffer anew.
    assert!(told.abs_diff(seen) <= MIB, "{arguments:?}: {told} bytes were told, {seen} seen");
    let own = counters["controller_peak_bytes"].as_u64().expect("heaptap's own memory is told");
    assert!(own > MIB && own <= 64 * MIB, "{arguments:?}: heaptap had {own} bytes");
    let line =
        format!("  heaptap had at most {} resident; the target had {} more", in_words(own), in_words(told));
    assert!(capture.stderr.contains(&line), "no line {line:?} in:\n{}", capture.stderr);
    assert_left_no_trace(&before, &mut target);
}

#[test]
fn samples_of_eight_busy_threads() {
    for_each_python(
        |python| python.records_promised(Kind::Jump),
        |python| takes_at_most(python, &["--sample", "16KiB"], 4 * MIB),
    );
}

/// A buffer of 1 MiB for each thread that allocates.
#[test]
fn every_event_of_eight_busy_threads() {
    for_each_python(
        |python| python.records_promised(Kind::Jump) && python.name.starts_with("pyenv-"),
        |python| takes_at_most(python, &["--exact"], 12 * MIB),
    );
}

#[test]
fn traps_need_no_buffers() {
    for_each_python(
        |python| python.records_promised(Kind::Trap) && python.name.starts_with("pyenv-"),
        |python| takes_at_most(python, &["--breakpoints", "trap"], MIB),
    );
}

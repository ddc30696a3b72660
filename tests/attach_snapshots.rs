//! Long attaches: snapshots when they are due, asked for, or everything ends, and that they are right.

mod common;

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use common::heaptap::{detach_in_the_end, heaptap_says, report};
use common::sites::{Moment, moments, over_all};
use common::snapshot::assert_left_no_trace;
use common::{Kind, Python, Recording, Snapshot, Target, for_each_kind, heaptap, pythons};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

fn a_few(python: &Python, kind: Kind) -> bool {
    let named = std::env::var_os("HEAPTAP_TEST_PYTHON").is_some();
    python.records_promised(kind)
        && (named
            || ["pyenv-3.9", "pyenv-3.11", "pyenv-3.13."].iter().any(|name| python.name.starts_with(name)))
}

/// Every site that the fixture tells of has what `times` runs of it come to.
fn assert_sums(truth: &Value, found: &[Moment], times: u64) {
    let mut wrong = Vec::new();
    for claim in truth["records"].as_array().unwrap() {
        let number = |name: &str| claim[name].as_u64().unwrap() * times;
        let (size, line) = (claim["size"].as_u64().unwrap(), claim["line"].as_u64().unwrap());
        let (count, freed) = (number("count"), number("freed"));
        let expected = [count - freed, count, freed].map(|blocks| (blocks * size, blocks));
        let got = over_all(found, claim["function"].as_str().unwrap(), line);
        if got != expected {
            wrong.push(format!("{} line {line}: {expected:?}, found {got:?}", claim["function"]));
        }
    }
    assert!(wrong.is_empty(), "live, allocated, freed:\n  {}", wrong.join("\n  "));
}

/// Waits until the capture has what is wanted; it is being written meanwhile.
fn until(path: &Path, wanted: impl Fn(&[Moment]) -> bool) -> Vec<Moment> {
    let started = Instant::now();
    loop {
        let found = moments(path);
        if wanted(&found) {
            return found;
        }
        let reasons: Vec<&str> = found.iter().map(|moment| moment.reason.as_str()).collect();
        assert!(started.elapsed() < Duration::from_secs(60), "only {reasons:?}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn asked(target: &Target) -> String {
    let said = heaptap_says(0, &["snapshot", "--pid", &target.pid().to_string()]);
    String::from_utf8(said.stdout).unwrap()
}

fn has(found: &[Moment], reason: &str) -> bool {
    found.iter().any(|moment| moment.reason == reason)
}

#[test]
fn snapshots_of_every_event_are_the_truth_whenever_they_are_taken() {
    for_each_kind(a_few, |python, kind| {
        let mut target = Target::start(python, "libc_blocks.py");
        let before = Snapshot::take(target.pid());
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("c.heaptap");
        let recording =
            Recording::try_attach_to(target.pid(), &path, &kind.with(&["--snapshot-every", "1s"])).unwrap();
        let truth = target.go();
        let said = asked(&target);
        let found = moments(&path);
        assert_eq!((found[0].reason.as_str(), found[0].index), ("start", 0));
        let last = found.last().unwrap();
        assert_eq!(last.reason, "asked");
        assert!(
            said.contains(&format!("snapshot {} of", last.index)) && said.contains(path.to_str().unwrap()),
            "{said}"
        );
        assert_sums(&truth, &found, 1);

        let ticks = found.iter().filter(|moment| moment.reason == "tick").count();
        until(&path, |found| found.iter().filter(|moment| moment.reason == "tick").count() >= ticks + 2);
        target.go();
        kill(Pid::from_raw(recording.pid()), Signal::SIGUSR1).unwrap();
        until(&path, |found| has(found, "signal"));
        target.go();
        recording.stop().assert_code(0);
        let found = moments(&path);
        assert_eq!(found.last().unwrap().reason, "end");
        assert!(found.windows(2).all(|pair| pair[1].index == pair[0].index + 1));
        assert_sums(&truth, &found, 3);
        assert_left_no_trace(&before, &mut target);
        // Nobody records it any more.
        let pid = target.pid().to_string();
        let refused = heaptap().args(["snapshot", "--pid", &pid]).output().unwrap();
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(refused.status.code() == Some(1) && said.contains(&pid) && said.contains("hint"), "{said}");
    });
}

#[test]
fn reports_of_snapshots_say_which_they_are_of() {
    let mut target = Target::start(&pythons()[0], "libc_blocks.py");
    let before = Snapshot::take(target.pid());
    let recording = Recording::attach(&target, &["--snapshot-every", "1h"]);
    let truth = target.go();
    let capture = recording.stop();
    assert_left_no_trace(&before, &mut target);
    capture.assert_code(0);
    assert!(capture.stderr.contains("2 snapshots, 2 of them kept"), "{}", capture.stderr);
    for verb in ["summary", "table", "tree"] {
        let text = capture.report(verb, &["--leaks"]);
        assert!(text.contains("the last of 2 snapshots") && text.contains("leaking"), "{text}");
        assert!(capture.report(verb, &[]).contains("the highest of 2 snapshots"));
        let refused = heaptap_says(1, &[verb, "--temporary", capture.path.to_str().unwrap()]);
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(said.contains("no event log") && said.contains("--events"), "{said}");
    }
    let stats: Value = serde_json::from_str(&capture.report("stats", &["--json"])).unwrap();
    let live = moments(&capture.path).last().unwrap().total[0];
    assert_eq!(
        (stats["live_bytes_at_end"].as_u64(), stats["live_blocks_at_end"].as_u64()),
        (Some(live.0), Some(live.1))
    );
    assert!(stats["total_bytes"].as_u64().unwrap() > 50_000_017);
    let folder = tempfile::tempdir().unwrap();
    let svg = folder.path().join("a.svg");
    heaptap_says(0, &["flamegraph", "-o", svg.to_str().unwrap(), capture.path.to_str().unwrap()]);
    assert!(truth["records"].is_array());
}

#[test]
fn with_an_event_log_snapshots_and_replay_agree() {
    for_each_kind(a_few, |python, kind| {
        let mut target = Target::start(python, "libc_blocks.py");
        let before = Snapshot::take(target.pid());
        let recording = Recording::attach(&target, &kind.with(&["--events", "--snapshot-every", "1h"]));
        let truth = target.go();
        let capture = recording.stop();
        capture.assert_code(0);
        common::truth::Truth::from_json(truth.clone()).assert_matches(&capture.dump());
        let found = moments(&capture.path);
        assert_sums(&truth, &found, 1);
        // Not only of the fixture's sites: of all.
        let stats: Value = serde_json::from_str(&capture.report("stats", &["--json"])).unwrap();
        let live = found.last().unwrap().total[0];
        assert_eq!(stats["live_bytes_at_end"].as_u64(), Some(live.0));
        assert_eq!(stats["live_blocks_at_end"].as_u64(), Some(live.1));
        assert!(!capture.report("summary", &["--leaks"]).contains("snapshot"));
        assert_left_no_trace(&before, &mut target);
    });
}

#[test]
fn when_the_target_is_killed_the_last_snapshot_is_there_and_right() {
    for_each_kind(a_few, |python, kind| {
        let mut target = Target::start(python, "libc_blocks.py");
        let recording = Recording::attach(&target, &kind.with(&["--at-peak"]));
        let truth = target.go();
        kill(Pid::from_raw(target.pid()), Signal::SIGKILL).unwrap();
        let capture = recording.finish();
        capture.assert_code(0);
        assert!(capture.stderr.contains("ended"), "{}", capture.stderr);
        let found = moments(&capture.path);
        assert_eq!(found.last().unwrap().reason, "end");
        assert_sums(&truth, &found, 1);
    });
}

#[test]
fn when_heaptap_is_killed_what_was_written_can_be_read() {
    let python = &pythons()[0];
    let mut target = Target::start(python, "libc_blocks.py");
    let before = Snapshot::take(target.pid());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("c.heaptap");
    let recording =
        Recording::try_attach_to(target.pid(), &path, &Kind::Jump.with(&["--snapshot-every", "1h"])).unwrap();
    let truth = target.go();
    asked(&target);
    recording.kill();
    let found = moments(&path);
    assert_sums(&truth, &found, 1);
    assert!(report(&path, "summary", &["--leaks"]).contains("cut short"));
    // Its socket is left; nobody answers there, and the next heaptap takes it over.
    heaptap_says(1, &["snapshot", "--pid", &target.pid().to_string()]);
    let again = folder.path().join("again.heaptap");
    let recording = Recording::try_attach_to(target.pid(), &again, &["--keep", "5"]).unwrap();
    asked(&target);
    recording.stop().assert_code(0);
    assert!(has(&moments(&again), "asked"));
    detach_in_the_end(target.pid());
    assert_left_no_trace(&before, &mut target);
}

#[test]
fn the_resident_set_passing_its_limit_is_an_occasion() {
    let mut target = Target::start(&pythons()[0], "libc_blocks.py");
    let before = Snapshot::take(target.pid());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("c.heaptap");
    // It is far above from the first look on: once, not once a second.
    let recording =
        Recording::try_attach_to(target.pid(), &path, &["--at-rss", "1MiB", "--snapshot-every", "1s"])
            .unwrap();
    let found = until(&path, |found| found.iter().filter(|moment| moment.reason == "tick").count() >= 3);
    assert_eq!(found.iter().filter(|moment| moment.reason == "resident").count(), 1);
    target.go();
    recording.stop().assert_code(0);
    assert_left_no_trace(&before, &mut target);
}

#[test]
fn many_snapshots_are_thinned_while_it_goes_on_and_lose_no_flow() {
    let mut target = Target::start(&pythons()[0], "libc_blocks.py");
    let before = Snapshot::take(target.pid());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("c.heaptap");
    let recording = Recording::try_attach_to(target.pid(), &path, &["--keep", "4"]).unwrap();
    let mut truth = Value::Null;
    for _ in 0..20 {
        truth = target.go();
        asked(&target);
        assert!(moments(&path).len() <= 5);
    }
    recording.stop().assert_code(0);
    let found = moments(&path);
    assert!(found.len() <= 5 && found[0].index == 0 && found.last().unwrap().index == 21, "{}", found.len());
    assert_sums(&truth, &found, 20);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    assert_left_no_trace(&before, &mut target);
}

#[test]
fn a_flood_of_stacks_does_not_make_the_file_larger_than_it_may_be() {
    const MOST: u64 = 4 << 20;
    let mut target = Target::start(&pythons()[0], "many_stacks.py");
    let before = Snapshot::take(target.pid());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("c.heaptap");
    let arguments = ["--exact", "--snapshot-every", "100ms", "--max-file", "4MiB", "--max-wait", "10s"];
    let recording = Recording::try_attach_to(target.pid(), &path, &arguments).unwrap();
    let mut truth = Value::Null;
    for _ in 0..4 {
        truth = target.go();
        asked(&target);
        let size = std::fs::metadata(&path).unwrap().len();
        assert!(size <= MOST, "{size}");
    }
    let capture = recording.stop();
    capture.assert_code(0);
    assert!(std::fs::metadata(&path).unwrap().len() <= MOST);
    // However little of it has a name by then, nothing is lost: blocks of this size are the fixture's alone, but for some.
    let found = moments(&path);
    let (bytes, blocks) = found.last().unwrap().total[0];
    let (leaked, made) = (truth["leaked"].as_u64().unwrap(), truth["blocks"].as_u64().unwrap());
    assert!(bytes >= leaked && blocks >= made, "{bytes} in {blocks} of {leaked} in {made}");
    let not_kept =
        found.last().unwrap().sites.iter().find(|((function, _), _)| function == "<stack not kept>");
    assert!(not_kept.is_some_and(|(_, sums)| sums[0].0 > 0), "it was no flood");
    assert!(found.len() >= 3 && found[0].index == 0, "{}", found.len());
    assert_left_no_trace(&before, &mut target);
}

#[test]
fn threads_that_ended_are_summed_up_and_lose_nothing() {
    let mut target = Target::start(&pythons()[0], "thread_churn.py");
    let before = Snapshot::take(target.pid());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("c.heaptap");
    let recording = Recording::try_attach_to(target.pid(), &path, &["--keep", "10"]).unwrap();
    let mut truth = Value::Null;
    // 200 threads each: after the second time there are too many to be told apart.
    for _ in 0..3 {
        truth = target.go();
        asked(&target);
    }
    recording.stop().assert_code(0);
    let found = moments(&path);
    assert_sums(&truth, &found, 3);
    assert!(found.last().unwrap().threads < 50, "{}", found.last().unwrap().threads);
    assert!(found[1].threads > 150, "{}", found[1].threads);
    assert_left_no_trace(&before, &mut target);
}

/// `fixtures/native/set_clock.c`, compiled into `folder`.
fn set_clock(folder: &Path) -> std::path::PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/native/set_clock.c");
    let library = folder.join("set_clock.so");
    let compiled =
        Command::new("cc").args(["-O1", "-shared", "-fPIC", "-o"]).args([&library, &source]).status();
    assert!(compiled.expect("cc is needed").success());
    library
}

#[test]
fn setting_the_wall_clock_changes_what_snapshots_say_of_it_and_nothing_else() {
    const DAY: i64 = 86_400;
    let mut target = Target::start(&pythons()[0], "libc_blocks.py");
    let before = Snapshot::take(target.pid());
    let folder = tempfile::tempdir().unwrap();
    let (path, offset) = (folder.path().join("c.heaptap"), folder.path().join("offset"));
    std::fs::write(&offset, "0").unwrap();
    let mut command = heaptap();
    command.env("LD_PRELOAD", set_clock(folder.path())).env("CLOCK_OFFSET", &offset);
    let recording =
        Recording::try_attach_by(command, target.pid(), &path, &["--snapshot-every", "1s"]).unwrap();
    for days in [0, 3, -7] {
        // Written beside and moved there: it is read at any moment.
        let beside = folder.path().join("beside");
        std::fs::write(&beside, (days * DAY).to_string()).unwrap();
        std::fs::rename(&beside, &offset).unwrap();
        target.go();
        let known = moments(&path).len();
        until(&path, |found| found.len() >= known + 3);
    }
    recording.stop().assert_code(0);
    assert_left_no_trace(&before, &mut target);
    let found = moments(&path);
    let clock = |moment: &Moment| (moment.unix_ns as i64 - moment.time_ns as i64) / 1_000_000_000;
    let mut days: Vec<i64> =
        found.iter().map(|moment| (clock(moment) - clock(&found[0]) + DAY / 2).div_euclid(DAY)).collect();
    assert!(days.len() >= 9);
    days.dedup();
    assert_eq!(days, [0, 3, -7]);
    for pair in found.windows(2) {
        let passed = pair[1].time_ns.checked_sub(pair[0].time_ns).expect("time went back");
        let (least, most) = if pair[1].reason == "tick" { (700, 10_000) } else { (0, 10_000) };
        assert!(
            (least..most).contains(&(passed / 1_000_000)),
            "{passed} ns before snapshot {}",
            pair[1].index
        );
    }
    // Every moment is found again by the clock that it showed.
    for moment in [&found[1], &found[found.len() / 2], found.last().unwrap()] {
        let at =
            humantime::format_rfc3339_nanos(std::time::UNIX_EPOCH + Duration::from_nanos(moment.unix_ns));
        let (at, path) = (at.to_string(), path.to_str().unwrap());
        let said = heaptap_says(0, &["diff", "--json", "--from", "start", "--to", &at, path]);
        let said: Value = serde_json::from_slice(&said.stdout).unwrap();
        assert_eq!(said["to"]["snapshot"].as_u64(), Some(moment.index), "{said:#}");
    }
}

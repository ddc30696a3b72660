//! The report verbs, run as a user runs them, on a capture whose events are known.

mod script;

use heaptap::addr::RemoteAddr;
use heaptap::capture::{AllocatorKind, BreakpointKind, DropReason, Free, Header, StackId};
use script::{Script, header, heaptap, sampled_header, shop, shop_events, shop_sampled, shop_sampled_events};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A directory with `shop.heaptap` in it.
fn shop_dir() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("shop.heaptap");
    shop(&path);
    (dir, path)
}

fn stdout(arguments: &[&str], capture: &Path) -> String {
    let output = heaptap().args(arguments).arg(capture).assert().success().get_output().clone();
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn json(arguments: &[&str], capture: &Path) -> serde_json::Value {
    serde_json::from_str(&stdout(arguments, capture)).unwrap()
}

/// stderr and the exit code of a run that fails.
fn failure(arguments: &[&str]) -> (String, i32) {
    let output = heaptap().args(arguments).assert().failure().get_output().clone();
    (String::from_utf8(output.stderr).unwrap(), output.status.code().unwrap())
}

#[test]
fn every_text_report_is_as_agreed() {
    let (_dir, capture) = shop_dir();
    let cases: &[(&str, &[&str])] = &[
        ("summary", &["summary"]),
        ("summary_leaks_by_count", &["summary", "--leaks", "--sort", "allocations"]),
        ("summary_own_two_rows", &["summary", "--sort", "own", "--max-rows", "2"]),
        ("table", &["table"]),
        ("table_leaks", &["table", "--leaks"]),
        ("table_temporary", &["table", "--temporary=0"]),
        ("tree", &["tree"]),
        ("tree_leaks_one_stack", &["tree", "--leaks", "--max-stacks", "1"]),
        ("tree_temporary", &["tree", "--temporary"]),
        ("tree_temporary_all_frames", &["tree", "--temporary", "--all-frames"]),
        ("stats", &["stats"]),
        ("stats_leaks", &["stats", "--leaks", "--top", "1"]),
        ("dump", &["dump"]),
        ("dump_leaks", &["dump", "--leaks"]),
    ];
    for (name, arguments) in cases {
        insta::assert_snapshot!(*name, stdout(arguments, &capture));
    }
}

#[test]
fn every_json_report_is_as_agreed() {
    let (_dir, capture) = shop_dir();
    let cases: &[(&str, &[&str])] = &[
        ("summary_json", &["summary", "--json"]),
        ("table_json", &["table", "--json", "--leaks"]),
        ("tree_json", &["tree", "--json"]),
        ("stats_json", &["stats", "--json"]),
    ];
    for (name, arguments) in cases {
        let text = stdout(arguments, &capture);
        serde_json::from_str::<serde_json::Value>(&text).unwrap();
        insta::assert_snapshot!(*name, text);
    }
}

/// A directory with a sampled capture in it.
fn sampled_dir() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sampled.heaptap");
    shop_sampled(&path);
    (dir, path)
}

#[test]
fn reports_of_a_sampled_capture_are_as_agreed() {
    let (_dir, capture) = sampled_dir();
    let cases: &[(&str, &[&str])] = &[
        ("sampled_summary", &["summary"]),
        ("sampled_summary_json", &["summary", "--json", "--leaks"]),
        ("sampled_table", &["table"]),
        ("sampled_table_temporary", &["table", "--temporary"]),
        ("sampled_table_json", &["table", "--json"]),
        ("sampled_tree", &["tree"]),
        ("sampled_tree_json", &["tree", "--json", "--max-stacks", "1"]),
        ("sampled_stats", &["stats"]),
        ("sampled_stats_json", &["stats", "--json"]),
        ("sampled_dump_leaks", &["dump", "--leaks"]),
    ];
    for (name, arguments) in cases {
        insta::assert_snapshot!(*name, stdout(arguments, &capture));
    }
}

#[test]
fn every_report_of_a_sampled_capture_says_so_and_what_was_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lossy.heaptap");
    let mut script = Script::create(&path, &sampled_header());
    shop_sampled_events(&mut script);
    script.writer.dropped(17, DropReason::BufferFull).unwrap();
    script.finish();
    for verb in ["summary", "table", "tree", "stats"] {
        let text = stdout(&[verb], &path);
        let line = text.lines().find(|line| line.starts_with("Sampled at 512.0 KiB mean")).unwrap();
        assert!(line.contains("± is their error at 95 %") && line.ends_with("; 17 events dropped"), "{line}");
        let document = json(&[verb, "--json"], &path);
        assert_eq!(document["estimated"], true);
        assert_eq!(document["run"]["sampling"]["samples"], 123);
        assert_eq!(document["run"]["sampling"]["largest_interval_bytes"], 1 << 20);
    }
    let svg = stdout(&["flamegraph", "-o", "-"], &path);
    assert!(
        svg.contains("17 EVENTS WERE DROPPED; estimates (± 95 %) from a sample at 512.0 KiB mean"),
        "{svg}"
    );
    assert!(svg.contains("heaptap: pid 4242, 43.1 MiB ±11.4"), "{svg}");
    // Exact captures have none of these fields.
    let (_dir, exact) = shop_dir();
    for verb in ["summary", "table", "tree", "stats"] {
        let text = stdout(&[verb, "--json"], &exact);
        assert!(
            !text.contains("estimated") && !text.contains("error_95") && !text.contains("samples"),
            "{text}"
        );
    }
}

#[test]
fn estimates_of_the_reports_agree_with_each_other() {
    let (_dir, capture) = sampled_dir();
    let (summary, table, stats) = (
        json(&["summary", "--json"], &capture),
        json(&["table", "--json"], &capture),
        json(&["stats", "--json"], &capture),
    );
    assert_eq!(summary["total_bytes"], stats["peak_bytes"]);
    assert_eq!(summary["total_bytes_error_95"], stats["peak_bytes_error_95"]);
    let sum: u64 =
        table["allocations"].as_array().unwrap().iter().map(|row| row["bytes"].as_u64().unwrap()).sum();
    // Each row is rounded by itself.
    assert!(sum.abs_diff(summary["total_bytes"].as_u64().unwrap()) <= 5);
    // What failed, and what was freed of blocks from before, a sample does not tell.
    assert!(stats["failed_allocations"].is_null() && stats["frees_from_before"].is_null());
}

#[test]
fn what_was_not_recorded_of_pythons_own_allocators_depends_on_the_build() {
    let dir = tempfile::tempdir().unwrap();
    let cases = [
        ("default build", false, Some("only the arenas it maps")),
        ("free-threaded build", false, Some("nor what it reserved before the attach")),
        ("free-threaded build", true, None),
    ];
    for (n, (flavour, python_allocators, expected)) in cases.into_iter().enumerate() {
        let path = dir.path().join(format!("{n}.heaptap"));
        let mut facts = Header { python_allocators, ..header() };
        facts.python.flavour = flavour.into();
        let mut script = Script::create(&path, &facts);
        script.allocate(AllocatorKind::ObjectMalloc, 1, 16, 48, StackId::EMPTY);
        script.allocate(AllocatorKind::Mmap, 1, 1 << 32, 1 << 30, StackId::EMPTY);
        script.finish();
        let text = stdout(&["table", "--leaks"], &path);
        let note = text.lines().find(|line| line.starts_with("note: "));
        assert_eq!(note.is_some(), expected.is_some(), "{text}");
        assert!(expected.is_none_or(|expected| note.unwrap().contains(expected)), "{text}");
        assert!(text.contains("object_malloc") && text.contains("1.0 GiB"), "{text}");
    }
}

#[test]
fn the_reports_agree_with_each_other() {
    let (_dir, capture) = shop_dir();
    for view in [&["--leaks"][..], &["--temporary=3"], &[]] {
        let run = |verb: &'static str| json(&[&[verb, "--json"][..], view].concat(), &capture);
        let (summary, table, tree) = (run("summary"), run("table"), run("tree"));
        let sum = |rows: &serde_json::Value, field: &str| -> u64 {
            rows.as_array().unwrap().iter().map(|row| row[field].as_u64().unwrap()).sum()
        };
        let total = summary["total_bytes"].as_u64().unwrap();
        assert!(total > 0);
        assert_eq!(sum(&summary["functions"], "own_bytes"), total);
        assert_eq!(sum(&table["allocations"], "bytes"), total);
        assert_eq!(sum(&tree["nodes"], "own_bytes"), total);
        assert_eq!(tree["nodes"][0]["total_bytes"], total);
        assert_eq!(sum(&table["allocations"], "count"), summary["total_count"].as_u64().unwrap());
    }
}

#[test]
fn recursion_is_counted_once() {
    let (_dir, capture) = shop_dir();
    let summary = json(&["summary", "--json", "--temporary=0"], &capture);
    let functions = summary["functions"].as_array().unwrap();
    let parse = functions.iter().find(|row| row["function"] == "parse").unwrap();
    let decode = functions.iter().find(|row| row["function"] == "JSONDecoder.decode").unwrap();
    assert_eq!(parse["total_bytes"], decode["total_bytes"]);
    assert_eq!(parse["own_bytes"], (0..40).map(|n| 8000 + n).sum::<u64>());
}

#[test]
fn the_flame_graph_is_a_file_named_after_the_capture_and_never_written_over() {
    let (dir, capture) = shop_dir();
    let run = |arguments: &[&str]| {
        let mut command = heaptap();
        command.current_dir(dir.path()).arg("flamegraph").args(arguments).arg(&capture);
        command
    };
    run(&[]).assert().success().stdout("wrote shop.svg\n");
    let svg = std::fs::read_to_string(dir.path().join("shop.svg")).unwrap();
    for expected in
        ["Cache.put (/srv/shop/cache.py:17) (40,960 bytes", "all (", "Python 3.12.1", "trap breakpoints"]
    {
        assert!(svg.contains(expected), "{expected} is missing");
    }
    std::fs::write(dir.path().join("shop.svg"), "mine").unwrap();
    let output = run(&[]).assert().code(1).get_output().clone();
    assert!(String::from_utf8_lossy(&output.stderr).contains("shop.svg exists already\nhint: "));
    assert_eq!(std::fs::read(dir.path().join("shop.svg")).unwrap(), b"mine");
    run(&["--force"]).assert().success();
    assert_eq!(std::fs::read_to_string(dir.path().join("shop.svg")).unwrap(), svg);
    run(&["--leaks"]).assert().success().stdout("wrote shop-leaks.svg\n");
    let inverted = run(&["--inverted", "--icicle", "-o", "-"]).assert().success().get_output().stdout.clone();
    assert!(String::from_utf8(inverted).unwrap().contains("Cache.put"));
    run(&["--force", "-o", "/dev/null"]).assert().code(1);
    let mut names: Vec<_> =
        std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["shop-leaks.svg", "shop.heaptap", "shop.svg"]);
}

#[test]
fn a_cut_file_and_dropped_events_are_told_in_every_report() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cut.heaptap");
    let mut script = Script::create(&path, &header());
    shop_events(&mut script);
    script.writer.dropped(17, DropReason::BufferFull).unwrap();
    script.writer.free(Free { deallocator: AllocatorKind::Free, tid: 1, address: RemoteAddr(1) }).unwrap();
    script.finish();
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() - 3]).unwrap();
    for verb in ["summary", "table", "tree", "stats"] {
        let text = stdout(&[verb], &path);
        assert!(text.contains("warning: the file is cut short at byte"), "{text}");
        assert!(text.contains("warning: 17 events were dropped while recording"), "{text}");
        assert!(text.contains("warning: the allocations of 1 freed blocks are missing"), "{text}");
        let document = json(&[verb, "--json"], &path);
        assert_eq!(document["run"]["complete"], false);
        assert_eq!(document["run"]["dropped_events"], 17);
        assert_eq!(document["run"]["warnings"].as_array().unwrap().len(), 3);
    }
    assert!(stdout(&["dump"], &path).ends_with("the file ends within a chunk\n"));
    let svg = stdout(&["flamegraph", "-o", "-"], &path);
    assert!(svg.contains("THE FILE IS CUT OR DAMAGED") && svg.contains("17 EVENTS WERE DROPPED"));
}

#[test]
fn names_from_a_hostile_target_write_no_control_codes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("evil.heaptap");
    let evil = "\x1b]0;owned\x07\u{9b}31m\u{202e};\n";
    let mut hostile = Header { command_line: vec![evil.into()], ..header() };
    hostile.python.version = evil.into();
    hostile.breakpoints = BreakpointKind::Jump;
    let mut script = Script::create(&path, &hostile);
    script.writer.define_thread(7, evil, evil).unwrap();
    let stack = script.stack(&[(evil, evil, 1), ("f", evil, 0)]);
    script.allocate(AllocatorKind::Malloc, 7, 16, 100, stack);
    script.finish();
    let runs: &[&[&str]] = &[
        &["summary"],
        &["table"],
        &["tree"],
        &["stats"],
        &["dump"],
        &["summary", "--json"],
        &["table", "--json"],
        &["tree", "--json"],
        &["stats", "--json"],
        &["dump", "--json"],
        &["flamegraph", "-o", "-"],
    ];
    for arguments in runs {
        let text = stdout(arguments, &path);
        let evil = text.chars().find(|c| (c.is_control() && *c != '\n') || *c == '\u{202e}');
        // inferno's own script is indented with tabs.
        assert!(matches!(evil, None | Some('\t')), "{arguments:?} wrote {evil:?}");
        assert!(text.contains("owned"), "{arguments:?} left the name out");
    }
}

#[test]
fn a_capture_without_allocations_is_no_error_but_for_the_flame_graph() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("empty.heaptap");
    Script::create(&path, &header()).finish();
    for verb in ["summary", "table", "tree", "stats", "dump"] {
        stdout(&[verb], &path);
    }
    let (error, code) = failure(&["flamegraph", "-o", "-", path.to_str().unwrap()]);
    assert_eq!(
        (error.lines().next().unwrap(), code),
        ("heaptap: error: there is nothing to draw: the view shows no bytes", 1)
    );
}

#[test]
fn what_is_no_capture_is_said_with_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let text = dir.path().join("notes.txt");
    std::fs::write(&text, "not a capture at all").unwrap();
    for (path, expected) in [
        (dir.path().join("missing"), "cannot open"),
        (text, "is not a heaptap capture"),
        (dir.path().into(), "has no index.json"),
    ] {
        let (error, code) = failure(&["summary", path.to_str().unwrap()]);
        assert_eq!(code, 1);
        assert!(error.starts_with("heaptap: error: ") && error.contains(expected), "{error}");
        assert!(error.contains("\nhint: "), "{error}");
    }
    assert_eq!(failure(&["summary"]).1, 2);
    assert_eq!(failure(&["summary", "--leaks", "--temporary", "x"]).1, 2);
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("long.heaptap");
    let mut script = Script::create(&path, &header());
    for n in 0..50_000 {
        script.allocate(AllocatorKind::Malloc, 1, 16 * n, 1, StackId::EMPTY);
    }
    script.finish();
    let mut child = Command::new(assert_cmd::cargo::cargo_bin!("heaptap"))
        .arg("dump")
        .arg(&path)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}

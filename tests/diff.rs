//! `heaptap diff` as a user runs it, on captures whose events or snapshots are known.

mod script;

use heaptap::capture::{
    AllocatorKind, CaptureReader, CaptureWriter, SiteState, Snapshot, SnapshotHead, StackId, Totals, Trailer,
};
use script::{MAIN, Script, WORKER, header, heaptap, sampled_header};
use serde_json::Value;
use std::path::{Path, PathBuf};

const R: u64 = 512 << 10;

fn run(arguments: &[&str], captures: &[&Path]) -> String {
    let output = heaptap().arg("diff").args(arguments).args(captures).assert().success().get_output().clone();
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn json(arguments: &[&str], captures: &[&Path]) -> Value {
    serde_json::from_str(&run(&[arguments, &["--json"]].concat(), captures)).unwrap()
}

fn fails(arguments: &[&str], captures: &[&Path]) -> (String, i32) {
    let output = heaptap().arg("diff").args(arguments).args(captures).assert().failure().get_output().clone();
    (String::from_utf8(output.stderr).unwrap(), output.status.code().unwrap())
}

/// (line, bytes, growth, blocks, their growth) of every row.
fn rows(document: &Value) -> Vec<(u64, u64, i64, u64, i64)> {
    let row = |row: &Value| {
        (
            row["line"].as_u64().unwrap_or(0),
            row["bytes"].as_u64().unwrap(),
            row["growth_bytes"].as_i64().unwrap(),
            row["count"].as_u64().unwrap(),
            row["growth_count"].as_i64().unwrap(),
        )
    };
    document["rows"].as_array().unwrap().iter().map(row).collect()
}

/// Events: a cache of 3 blocks from 100 ms, one line that shrinks at 1 s, one that grows at 2 s.
fn events(path: &Path) {
    let mut script = Script::create(path, &header());
    script.writer.define_thread(MAIN, "python3", "MainThread").unwrap();
    script.writer.define_thread(WORKER, "python3", "Thread-7 (serve)").unwrap();
    let main = ("main", "/srv/shop.py", 1);
    let cache = script.stack(&[main, ("fill", "/srv/shop.py", 10)]);
    let shrinks = script.stack(&[main, ("work", "/srv/shop.py", 20)]);
    let grows = script.stack(&[main, ("loads", "/v/lib/python3.12/site-packages/orjson/a.py", 30)]);
    script.at_ms(100);
    (0..3).for_each(|n| script.allocate(AllocatorKind::Malloc, MAIN, 0x1000 + n * 64, 1000, cache));
    (0..2).for_each(|n| script.allocate(AllocatorKind::Calloc, MAIN, 0x2000 + n * 64, 500, shrinks));
    script.at_ms(1000);
    script.free(AllocatorKind::Free, MAIN, 0x2000);
    script.at_ms(2000);
    (0..5).for_each(|n| script.allocate(AllocatorKind::Malloc, WORKER, 0x3000 + n * 64, 100, grows));
    script.finish();
}

#[test]
fn events_are_replayed_to_either_moment() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.heaptap");
    events(&path);
    let whole = json(&[], &[&path]);
    assert_eq!(rows(&whole), [(10, 3000, 3000, 3, 3), (30, 500, 500, 5, 5), (20, 500, 500, 1, 1)]);
    let late = json(&["--from", "+500ms"], &[&path]);
    assert_eq!(rows(&late), [(30, 500, 500, 5, 5), (20, 500, -500, 1, -1), (10, 3000, 0, 3, 0)]);
    assert_eq!(late["from"]["time_ns"], 500_000_000);
    assert_eq!((&late["total"]["bytes"], &late["total"]["growth_bytes"]), (&4000.into(), &0.into()));
    // What is true of a time is what happened up to it.
    let early = json(&["--from", "+100ms", "--to", "-1500ms"], &[&path]);
    assert_eq!(rows(&early), [(20, 500, -500, 1, -1), (10, 3000, 0, 3, 0)]);
}

#[test]
fn rows_are_grouped_filtered_and_limited_as_asked() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.heaptap");
    events(&path);
    let names = |by: &str, field: &str, more: &[&str]| -> Vec<(String, i64)> {
        let document = json(&[&["--by", by], more].concat(), &[&path]);
        let row =
            |row: &Value| (row[field].as_str().unwrap().to_owned(), row["growth_bytes"].as_i64().unwrap());
        document["rows"].as_array().unwrap().iter().map(row).collect()
    };
    let of = |pairs: &[(&str, i64)]| pairs.iter().map(|(n, g)| ((*n).to_owned(), *g)).collect::<Vec<_>>();
    assert_eq!(names("module", "module", &[]), of(&[("<application>", 3500), ("orjson", 500)]));
    assert_eq!(names("allocator", "allocator", &[]), of(&[("malloc", 3500), ("calloc", 500)]));
    assert_eq!(names("thread", "thread", &[]), of(&[("MainThread", 3500), ("Thread-* (serve)", 500)]));
    assert_eq!(
        names("function", "function", &["--cumulative"]),
        of(&[("main", 4000), ("fill", 3000), ("loads", 500), ("work", 500)])
    );
    assert_eq!(names("function", "function", &["--include", "thread=Thread-*"]), of(&[("loads", 500)]));
    assert_eq!(names("function", "function", &["--exclude", "*/shop.py"]), of(&[("loads", 500)]));
    assert_eq!(names("function", "function", &["--max-rows", "1"]), of(&[("fill", 3000)]));
    let stacks = json(&["--by", "traceback"], &[&path]);
    assert_eq!(stacks["rows"][0]["traceback"][0]["function"], "fill");
    assert_eq!(stacks["rows"][0]["traceback"][1]["line"], 1);
    let csv = run(&["--csv", "--by", "module"], &[&path]);
    assert_eq!(
        csv,
        "module,bytes,growth_bytes,count,growth_count,average_bytes,old_bytes,old_count\n\
         <application>,3500,3500,4,4,875,0,0\norjson,500,500,5,5,100,0,0\n"
    );
    let text = run(&[], &[&path]);
    assert!(text.contains("fill (/srv/shop.py:10)") && text.contains("+2.9 KiB"), "{text}");
    assert_eq!(fails(&["--by", "thread", "--cumulative"], &[&path]).1, 2);
    assert_eq!(fails(&["--from", "3"], &[&path]).1, 1);
    assert!(fails(&["--from", "2001-01-01T00:00:00Z"], &[&path]).0.contains("was not being recorded then"));
    assert!(fails(&["--from", "+2s", "--to", "+1s"], &[&path]).0.contains("after the second"));
}

#[test]
fn two_recordings_are_compared_by_the_names_of_their_code() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (dir.path().join("1.heaptap"), dir.path().join("2.heaptap"));
    events(&one);
    // Other ids, other addresses, another thread.
    let mut script = Script::create(&two, &header());
    script.stack(&[("elsewhere", "b.py", 1)]);
    let cache = script.stack(&[("main", "/srv/shop.py", 1), ("fill", "/srv/shop.py", 10)]);
    (0..4).for_each(|n| script.allocate(AllocatorKind::Malloc, 99, 0x9000 + n * 64, 1000, cache));
    script.finish();
    let both = json(&["--by", "traceback"], &[&one, &two]);
    let growths: Vec<i64> = rows(&both).iter().map(|row| row.2).collect();
    assert_eq!(growths, [1000, -500, -500]);
    assert!(both["old_run"]["pid"].is_u64() && both["run"]["pid"].is_u64());
}

/// Three snapshots of a sampled recording: 4 blocks, then 8, then 9 of which 2 came and 1 went.
fn snapshots(path: &Path) -> StackId {
    let mut writer = CaptureWriter::create(path, false, &sampled_header()).unwrap();
    let frame = writer.intern_frame("remember", "/srv/shop.py", 23).unwrap();
    let stack = writer.intern_stack(&[frame]).unwrap();
    let many = |n: u64| {
        (0..n).fold(Totals::default(), |mut sum, _| {
            sum.add(Totals::one(1000, R));
            sum
        })
    };
    for (index, (live, came, went)) in [(4, 4, 0), (8, 4, 0), (9, 2, 1)].into_iter().enumerate() {
        let time_ns = (index as u64 + 1) * 60_000_000_000;
        let unix_ns = 1_700_000_000_000_000_000 + time_ns;
        let head = SnapshotHead { index: 10 + index as u32, time_ns, unix_ns, ..SnapshotHead::default() };
        let row = SiteState {
            stack,
            allocator: AllocatorKind::Malloc,
            tid: MAIN,
            live: many(live),
            allocated: many(came),
            freed: many(went),
            ..SiteState::default()
        };
        writer.snapshot(&Snapshot { head, rows: vec![row] }).unwrap();
    }
    writer.finish(Trailer { duration_ns: 200_000_000_000, ..Trailer::default() }).unwrap();
    stack
}

fn error_of(samples: u64) -> u64 {
    (1.959_963_984_540_054 * ((samples as f64 + 2.0 * (samples as f64).cbrt()).sqrt()) * R as f64).ceil()
        as u64
}

#[test]
fn snapshots_are_found_by_number_time_and_place() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.heaptap");
    snapshots(&path);
    let found = |from: &str, to: &str| {
        let document = json(&["--from", from, "--to", to], &[&path]);
        [&document["from"]["snapshot"], &document["to"]["snapshot"]].map(|n| n.as_u64())
    };
    assert_eq!(found("first", "last"), [Some(10), Some(12)]);
    assert_eq!(found("11", "12"), [Some(11), Some(12)]);
    assert_eq!(found("+115s", "-10s"), [Some(11), Some(12)]);
    // The recording began at 22:13:20.
    assert_eq!(found("22:14", "22:15:20"), [Some(10), Some(11)]);
    assert_eq!(found("start", "first"), [None, Some(10)]);
    let (said, code) = fails(&["--from", "13"], &[&path]);
    assert!(said.contains("no snapshot 13") && said.contains("from 10 to 12") && code == 1, "{said}");
}

#[test]
fn a_growth_is_as_sure_as_what_flowed_or_what_was_there() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.heaptap");
    snapshots(&path);
    let growth = |from: &str, to: &str| {
        let row = json(&["--from", from, "--to", to], &[&path])["rows"][0].clone();
        (row["growth_bytes"].as_i64().unwrap(), row["growth_bytes_error_95"].as_u64().unwrap())
    };
    let near = |(bytes, error): (i64, u64), blocks: i64, samples: u64| {
        // One block of 1000 bytes stands for the interval and half a block.
        assert!((bytes - blocks * (R as i64 + 500)).abs() < 100, "{bytes} {blocks}");
        assert!(
            (error as f64 / error_of(samples) as f64 - 1.0).abs() < 0.02,
            "{error} {}",
            error_of(samples)
        );
    };
    near(growth("11", "12"), 1, 3);
    near(growth("first", "last"), 5, 7);
    near(growth("start", "last"), 9, 9);
    // Another recording's blocks have nothing in common with these.
    let other = dir.path().join("b.heaptap");
    snapshots(&other);
    let row = json(&["--from", "11", "--to", "12"], &[&path, &other])["rows"][0].clone();
    near((row["growth_bytes"].as_i64().unwrap(), row["growth_bytes_error_95"].as_u64().unwrap()), 1, 17);
}

#[test]
fn damaged_and_empty_captures_are_said_to_be_so() {
    let dir = tempfile::tempdir().unwrap();
    let path: PathBuf = dir.path().join("a.heaptap");
    snapshots(&path);
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() - 10]).unwrap();
    assert!(run(&[], &[&path]).contains("warning: the file is cut short"));
    let empty = dir.path().join("b.heaptap");
    Script::create(&empty, &header()).finish();
    assert!(run(&[], &[&empty]).contains("nothing to show"));
    assert!(CaptureReader::open(&empty).is_ok());
    assert_eq!(fails(&[], &[Path::new("/nonexistent")]).1, 1);
}

/// A shop of two files, in some folder, with an installed package beside it.
fn release(path: &Path, folder: &str, environment: &str, blocks: u64) {
    let mut script = Script::create(path, &header());
    let app = format!("{folder}/shop/app.py");
    let (db, installed) =
        (format!("{folder}/shop/db.py"), format!("{environment}/site-packages/orm/query.py"));
    let main = ("main", &*app, 1);
    let stacks = [
        script.stack(&[main, ("serve", &app, 10)]),
        script.stack(&[main, ("load", &db, 20)]),
        script.stack(&[main, ("fetch", &installed, 30)]),
    ];
    for (n, stack) in stacks.into_iter().enumerate() {
        let first = 0x1000 * (n as u64 + 1);
        (0..blocks).for_each(|b| script.allocate(AllocatorKind::Malloc, MAIN, first + b * 64, 100, stack));
    }
    script.finish();
}

#[test]
fn code_that_lies_in_another_folder_is_the_same_code() {
    let folder = tempfile::tempdir().unwrap();
    let (old, new) = (folder.path().join("old"), folder.path().join("new"));
    release(&old, "/srv/r1", "/venv1/lib/python3.11", 2);
    release(&new, "/srv/r2", "/venv2/lib/python3.12", 5);
    let document = json(&[], &[&old, &new]);
    let growths: Vec<_> = rows(&document).into_iter().map(|row| (row.0, row.1, row.2)).collect();
    assert_eq!(growths.len(), 3, "{document:#}");
    assert!(growths.iter().all(|(_, bytes, growth)| (*bytes, *growth) == (500, 300)), "{growths:?}");
    let moved = &document["moved"];
    assert_eq!(
        moved.to_string(),
        r#"[["/srv/r1","/srv/r2"],["/venv1/lib/python3.11","/venv2/lib/python3.12"]]"#
    );
    assert!(run(&[], &[&old, &new]).contains("Code in /srv/r1 is taken for that in /srv/r2"));
    // Patterns are held against the names that are shown.
    assert_eq!(rows(&json(&["--include", "file=/srv/r2/*"], &[&old, &new])).len(), 2);
    assert!(rows(&json(&["--include", "file=/srv/r1/*"], &[&old, &new])).is_empty());
    // A recording is not compared with itself so.
    assert_eq!(json(&["--from", "start"], &[&new])["moved"], Value::Null);
}

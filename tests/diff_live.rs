//! `diff --by lineno` against tracemalloc, which the recorded program runs itself: the same lines in the same order, and the same
//! sizes: exactly, or within the error of samples.

mod common;

use common::heaptap::report;
use common::snapshot::assert_left_no_trace;
use common::{Python, Recording, Snapshot, Target, for_each_python};
use serde_json::Value;
use std::time::{Duration, UNIX_EPOCH};

/// What one line did: its number, growth in bytes and blocks, and the error of the former.
#[derive(Debug, Clone, Copy)]
struct Row {
    line: u64,
    growth: i64,
    blocks: i64,
    error: f64,
}

fn usual(python: &Python) -> bool {
    python.name.starts_with("pyenv-") && [9, 11, 13].contains(&python.minor())
}

/// Runs the program under a recording; its truth, and what `diff` says for its file: since the start, and since the middle.
fn recorded(python: &Python, arguments: &[&str]) -> (Value, Vec<Row>, Vec<Row>) {
    let mut target = Target::start(python, "traced_growth.py");
    let before = Snapshot::take(target.pid());
    let arguments = [&["--python-allocators", "--max-wait", "10s"], arguments].concat();
    let recording = Recording::attach(&target, &arguments);
    let truth = target.go();
    let capture = recording.stop();
    assert_eq!(capture.assert_code(0).drops(), 0, "{}", capture.stderr);
    assert_left_no_trace(&before, &mut target);
    let between = UNIX_EPOCH + Duration::from_nanos(truth["between_unix_ns"].as_u64().expect("a time"));
    let between = humantime::format_rfc3339_nanos(between).to_string();
    let rows = |from: &str| {
        let include = ["--json", "--include", "*/traced_growth.py", "--from", from];
        let document: Value = serde_json::from_str(&report(&capture.path, "diff", &include)).expect("JSON");
        let row = |row: &Value| Row {
            line: row["line"].as_u64().expect("a line"),
            growth: row["growth_bytes"].as_i64().expect("bytes"),
            blocks: row["growth_count"].as_i64().expect("blocks"),
            error: row["growth_bytes_error_95"].as_f64().unwrap_or(0.0),
        };
        document["rows"].as_array().expect("rows").iter().map(row).collect::<Vec<_>>()
    };
    (truth.clone(), rows("start"), rows(&between))
}

/// What tracemalloc says: only lines that changed.
fn traced(rows: &Value) -> Vec<Row> {
    let number = |row: &Value, at: usize| row[at].as_i64().expect("a number");
    let row = |row: &Value| Row {
        line: number(row, 0) as u64,
        growth: number(row, 2),
        blocks: number(row, 4),
        error: 0.0,
    };
    let all = rows.as_array().expect("rows").iter().map(row);
    all.filter(|row| row.growth != 0 || row.blocks != 0).collect()
}

#[test]
fn every_event_gives_what_tracemalloc_says() {
    for_each_python(usual, |python| {
        let (truth, whole, second) = recorded(python, &["--exact"]);
        for (said, wanted) in [(whole, traced(&truth["whole"])), (second, traced(&truth["second"]))] {
            let figures = |rows: &[Row]| -> Vec<(u64, i64, i64)> {
                // The snapshots' own lines: what they hold differs by which of them is looked at.
                rows.iter()
                    .filter(|row| row.growth.abs() > 4096)
                    .map(|row| (row.line, row.growth, row.blocks))
                    .collect()
            };
            assert_eq!(figures(&said), figures(&wanted), "{python}");
            assert!(figures(&wanted).len() >= 3, "{wanted:?}");
        }
    });
}

#[test]
fn samples_give_it_within_their_error() {
    for_each_python(usual, |python| {
        let sampling = ["--sample", "64KiB", "--seed", "12", "--max-cpu", "100"];
        let (truth, whole, second) = recorded(python, &sampling);
        for (said, wanted) in [(whole, traced(&truth["whole"])), (second, traced(&truth["second"]))] {
            for row in wanted.iter().filter(|row| row.growth.abs() > 1 << 20) {
                let own = said.iter().find(|own| own.line == row.line);
                let own = own.unwrap_or_else(|| panic!("{python}: line {} is not there: {said:?}", row.line));
                // 95 % is 1.96 standard deviations; here are some twenty figures.
                let off = (own.growth - row.growth).abs() as f64;
                assert!(off <= 1.6 * own.error + 1.0, "{python}: {own:?}, tracemalloc {row:?}");
            }
            // The order holds where the sizes are not nearer than their errors.
            let order = |rows: &[Row]| -> Vec<u64> {
                rows.iter().filter(|row| row.growth.abs() > 4 << 20).map(|row| row.line).collect()
            };
            assert_eq!(order(&said), order(&wanted), "{python}: {said:?}, tracemalloc {wanted:?}");
        }
    });
}

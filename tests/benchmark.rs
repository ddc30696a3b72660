//! `scripts/bench` measures: its smallest run, which needs no release build and no package index.

use serde_json::Value;
use std::path::Path;
use std::process::Command;

#[test]
fn a_run_of_the_benchmark_gives_figures_and_tables() {
    let folder = tempfile::tempdir().unwrap();
    let (json, tables) = (folder.path().join("run.json"), folder.path().join("tables.md"));
    let output = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/bench"))
        .args([
            "--only",
            "json,threads",
            "--variants",
            "bare,tracemalloc",
            "--rounds",
            "1",
            "--seconds",
            "0.3",
        ])
        .arg("--json")
        .arg(&json)
        .arg("--out")
        .arg(&tables)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let run: Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    let results = run["results"].as_object().unwrap();
    assert_eq!(results.len(), 4, "{results:?}");
    for (cell, rounds) in results {
        let round = &rounds[0];
        for phase in ["before", "during", "after"] {
            assert!(round[phase]["per_second"].as_f64().unwrap() > 1.0, "{cell}: {round}");
            assert!(round[phase]["cpu_per_step"].as_f64().unwrap() > 0.0, "{cell}: {round}");
        }
    }
    // CPU time, since others may load the machine: tracemalloc makes json 8 to 10 times slower, nothing does not.
    let dearer = |cell: &str| {
        let round = &results[cell][0];
        round["during"]["cpu_per_step"].as_f64().unwrap() / round["before"]["cpu_per_step"].as_f64().unwrap()
    };
    assert!(dearer("json/tracemalloc") > 3.0, "{}", results["json/tracemalloc"]);
    assert!((0.6..1.6).contains(&dearer("json/bare")), "{}", results["json/bare"]);
    let tables = std::fs::read_to_string(tables).unwrap();
    for part in ["# Benchmarks", "| CPU |", "CPython", "nothing attached", "tracemalloc, 1 frame"] {
        assert!(tables.contains(part), "{part}: {tables}");
    }
    assert!(!tables.contains("failed"), "{tables}");
}

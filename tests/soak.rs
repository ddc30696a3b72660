//! `scripts/soak` in its short form: real servers under load, recorded with snapshots. No request fails, files stay below their bound,
//! and everything that it tells is there. What it costs the server is for the long form: others may load this machine.

mod common;

use common::skipped;
use serde_json::Value;
use std::path::Path;
use std::process::Command;

fn soak(arguments: &[&str]) -> Option<Value> {
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("soak.json");
    let output = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/soak"))
        .args(["--minutes", "0.2", "--alone", "0.03", "--snapshot-every", "1s", "--max-file", "8MiB"])
        .args(["--heaptap", env!("CARGO_BIN_EXE_heaptap"), "--json"])
        .arg(&json)
        .args(arguments)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    if let Some(missing) = ["is not installed", "no environment with"].iter().find(|why| said.contains(*why))
    {
        skipped(&format!("the soak: {missing}: {}", said.trim()));
        return None;
    }
    assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stdout));
    Some(serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap())
}

#[test]
fn gunicorn_with_four_workers_is_recorded_under_load() {
    let Some(run) = soak(&["--rate", "400"]) else { return };
    let recorded = &run["phases"]["recorded"];
    assert!(recorded["requests"].as_u64().unwrap() > 500 && recorded["failed"] == 0, "{run:#}");
    let heaptap = &run["heaptap"];
    // The master and its workers.
    assert_eq!(heaptap["files"].as_object().unwrap().len(), 5, "{run:#}");
    // The first line of each process that had a sample.
    assert!((1..=5).contains(&heaptap["leaks"].as_array().unwrap().len()), "{run:#}");
    assert!(heaptap["resident_most_mib"].as_f64().unwrap() > 1.0, "{run:#}");
}

#[test]
fn a_server_that_allocates_much_is_recorded() {
    let Some(run) = soak(&["--allocating", "200"]) else { return };
    assert!(run["phases"]["recorded"]["batches"].as_u64().unwrap() > 300, "{run:#}");
    let files = run["heaptap"]["files"].as_object().unwrap();
    assert!(files.len() == 1 && files["server.heaptap"].as_u64().unwrap() < 8 << 20, "{run:#}");
}

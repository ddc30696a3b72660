//! The report verbs on a folder of captures whose events are known: merged, and kept apart by process.

mod script;

use heaptap::capture::{
    AllocatorKind, EndReason, Header, Index, IndexEntry, NotRecorded, NotRecordedKind, StackId,
};
use script::{Script, header, heaptap, shop_events, trailer};
use std::collections::BTreeMap;
use std::path::Path;

/// Three workers of one server: two do the same, one of which has its ids the other way round; one was cut short. And two
/// processes that were not recorded.
fn tree(folder: &Path) {
    let worker = |pid: u32, title: &str| Header {
        pid,
        command_line: vec![format!("gunicorn: {title}")],
        start_unix_ns: header().start_unix_ns + u64::from(pid) * 1_000_000,
        ..header()
    };
    let mut master = Script::create(&folder.join("100.heaptap"), &worker(100, "master [shop]"));
    shop_events(&mut master);
    master.finish();
    let mut second = Script::create(&folder.join("101.heaptap"), &worker(101, "worker [shop]"));
    second.stack(&[("other", "/srv/shop/other.py", 1)]);
    shop_events(&mut second);
    second.allocate(AllocatorKind::Malloc, 9999, 0x7f77_0000_0000, 5_000_000, StackId::EMPTY);
    let end =
        heaptap::capture::Trailer { reason: EndReason::TargetExited { code: 0 }, ..trailer(&second.live) };
    second.writer.finish(end).unwrap();
    let mut cut = Script::create(&folder.join("102.heaptap"), &worker(102, "worker [shop]"));
    shop_events(&mut cut);
    cut.writer.flush().unwrap();
    drop(cut);
    let mut index = Index::new("process 100, its descendants and those born later".into(), 1);
    let entry = |pid: u32, capture: Option<&str>| IndexEntry {
        pid,
        capture: capture.map(str::to_owned),
        not_recorded: capture.is_none().then(|| NotRecorded {
            kind: NotRecordedKind::NotPython,
            why: "no CPython was found in it".into(),
        }),
        ..IndexEntry::default()
    };
    index.processes = vec![
        entry(100, Some("100.heaptap")),
        entry(99, None),
        entry(101, Some("101.heaptap")),
        entry(102, Some("102.heaptap")),
        entry(98, None),
    ];
    index.write(folder).unwrap();
}

fn stdout(arguments: &[&str], folder: &Path) -> String {
    let output = heaptap().args(arguments).arg(folder).assert().success().get_output().clone();
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn failure(arguments: &[&str]) -> String {
    let output = heaptap().args(arguments).assert().code(1).get_output().clone();
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn every_report_of_a_folder_is_as_agreed() {
    let folder = tempfile::tempdir().unwrap();
    tree(folder.path());
    let cases: &[(&str, &[&str])] = &[
        ("summary", &["summary"]),
        ("summary_split", &["summary", "--leaks", "--split-processes"]),
        ("summary_json", &["summary", "--json", "--max-rows", "2"]),
        ("table", &["table"]),
        ("table_split", &["table", "--split-processes"]),
        ("table_split_json", &["table", "--split-processes", "--json", "--leaks", "--max-rows", "3"]),
        ("tree", &["tree", "--leaks"]),
        ("tree_split", &["tree", "--split-processes"]),
        ("stats", &["stats"]),
        ("stats_json", &["stats", "--json", "--leaks", "--top", "2"]),
    ];
    for (name, arguments) in cases {
        insta::assert_snapshot!(*name, stdout(arguments, folder.path()));
    }
}

#[test]
fn a_flame_graph_of_a_folder_has_its_processes_as_roots() {
    let folder = tempfile::tempdir().unwrap();
    tree(folder.path());
    let merged = stdout(&["flamegraph", "-o", "-"], folder.path());
    assert!(merged.contains("heaptap: 3 captures, ") && merged.contains("THE FILE IS CUT"), "{merged}");
    assert!(!merged.contains("process 101"), "{merged}");
    let split = stdout(&["flamegraph", "--split-processes", "-o", "-"], folder.path());
    assert!(split.contains("process 101 gunicorn: worker [shop]"), "{split}");
}

#[test]
fn what_is_no_folder_of_captures_is_refused_and_what_cannot_be_read_is_told() {
    let place = tempfile::tempdir().unwrap();
    let folder = place.path().join("tree");
    std::fs::create_dir(&folder).unwrap();
    let path = folder.to_str().unwrap();
    assert!(failure(&["summary", path]).contains("has no index.json"));
    std::fs::write(folder.join("index.json"), "{}").unwrap();
    assert!(failure(&["summary", path]).contains("is not the index of a folder of captures"));
    Index::new(String::new(), 1).write(&folder).unwrap();
    assert!(failure(&["summary", path]).contains("holds no capture that can be read"));
    tree(&folder);
    let said = failure(&["dump", path]);
    assert!(said.contains("no common order") && said.contains("hint: dump one of them"), "{said}");
    let one = folder.join("100.heaptap");
    let said = failure(&["tree", "--split-processes", one.to_str().unwrap()]);
    assert!(said.contains("no processes to keep apart"), "{said}");
    // One capture that is none is left out, aloud.
    std::fs::write(&one, "not a capture").unwrap();
    let output = heaptap().args(["stats", path]).assert().success().get_output().clone();
    let (said, complaint) =
        (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert!(said.contains("2 captures together") && said.contains("3 programs not recorded"), "{said}");
    assert!(complaint.contains("100.heaptap") && complaint.contains("left out"), "{complaint}");
}

#[test]
fn the_sums_of_a_folder_are_those_of_its_captures() {
    let folder = tempfile::tempdir().unwrap();
    tree(folder.path());
    let json = |verb: &str, path: &Path| -> serde_json::Value {
        serde_json::from_str(&stdout(&[verb, "--json", "--leaks"], path)).unwrap()
    };
    let all = json("summary", folder.path());
    let sum: u64 = ["100", "101", "102"]
        .iter()
        .map(|name| json("summary", &folder.path().join(format!("{name}.heaptap"))))
        .map(|one| one["total_bytes"].as_u64().unwrap())
        .sum();
    assert_eq!(all["total_bytes"], sum);
    assert_eq!(all["run"]["complete"], false);
    assert_eq!(all["run"]["pid"], serde_json::Value::Null);
}

#[test]
fn leaks_of_a_folder_judge_each_process_and_all_together() {
    let folder = tempfile::tempdir().unwrap();
    tree(folder.path());
    let text = stdout(&["leaks"], folder.path());
    assert_eq!(text.matches("Judged by").count(), 3, "{text}");
    assert!(text.contains("Leaks of all 3 captures:\n"), "{text}");
    let json: serde_json::Value = serde_json::from_str(&stdout(&["leaks", "--json"], folder.path())).unwrap();
    let pids: std::collections::BTreeSet<_> =
        json.as_array().unwrap().iter().map(|site| site["pid"].as_u64().unwrap()).collect();
    assert_eq!(pids.into_iter().collect::<Vec<_>>(), [100, 101, 102]);
    // That of the third was cut.
    let is_told = |site: &serde_json::Value| (site["incomplete"] == true) == (site["pid"] == 102);
    assert!(json.as_array().unwrap().iter().all(is_told), "{json}");
}

#[test]
fn reports_of_one_process_say_so_of_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    tree(folder.path());
    let said = failure(&["gauges", folder.path().to_str().unwrap()]);
    assert!(said.contains("is a folder") && said.contains("hint: heaptap gauges"), "{said}");
}

/// What grew in all processes together is the sum of what grew in each.
#[test]
fn a_diff_of_a_folder_is_the_sum_of_its_processes() {
    let folder = tempfile::tempdir().unwrap();
    tree(folder.path());
    let rows = |arguments: &[&str], path: &Path| -> BTreeMap<(String, u64), i64> {
        let json: serde_json::Value =
            serde_json::from_str(&stdout(&[&["diff", "--json"], arguments].concat(), path)).unwrap();
        let rows = json["rows"].as_array().unwrap().iter();
        rows.map(|row| {
            let function = row["function"].as_str().unwrap_or_default().to_owned();
            ((function, row["line"].as_u64().unwrap_or(0)), row["growth_bytes"].as_i64().unwrap())
        })
        .collect()
    };
    let mut sum = BTreeMap::new();
    for pid in [100, 101, 102] {
        for (place, growth) in rows(&[], &folder.path().join(format!("{pid}.heaptap"))) {
            *sum.entry(place).or_insert(0) += growth;
        }
    }
    assert!(sum.values().any(|growth| *growth > 0), "{sum:?}");
    assert_eq!(rows(&[], folder.path()), sum);
    // Before the first began there was nothing; two folders are compared by the names of code.
    assert!(rows(&["--to", "start"], folder.path()).is_empty());
    let same = folder.path().to_str().unwrap();
    assert!(rows(&[same], folder.path()).values().all(|growth| *growth == 0));
    let text = stdout(&["diff"], folder.path());
    assert!(text.contains("3 captures together"), "{text}");
}

/// The second of three ended long before the others: in the end it has nothing.
#[test]
fn a_process_that_has_ended_has_nothing_any_more() {
    let folder = tempfile::tempdir().unwrap();
    let second = 1_000_000_000;
    for (pid, duration_ns, reason) in [
        (1, 60 * second, EndReason::Duration),
        (2, 10 * second, EndReason::TargetExited { code: 0 }),
        (3, 10 * second, EndReason::Interrupted { signal: "SIGINT".into() }),
    ] {
        let of = Header { pid, ..header() };
        let mut script = Script::create(&folder.path().join(format!("{pid}.heaptap")), &of);
        let stack = script.stack(&[("work", "/srv/work.py", pid)]);
        script.allocate(AllocatorKind::Malloc, 1, 0x1000, 1000, stack);
        let end = heaptap::capture::Trailer { reason, duration_ns, ..trailer(&script.live) };
        script.writer.finish(end).unwrap();
    }
    let mut index = Index::new("three".into(), 1);
    index.processes = (1..4)
        .map(|pid| IndexEntry { pid, capture: Some(format!("{pid}.heaptap")), ..IndexEntry::default() })
        .collect();
    index.write(folder.path()).unwrap();
    let total = |arguments: &[&str]| {
        let said = stdout(&[&["diff", "--json"], arguments].concat(), folder.path());
        let json: serde_json::Value = serde_json::from_str(&said).unwrap();
        (json["total"]["bytes"].as_u64().unwrap(), json["total"]["growth_bytes"].as_i64().unwrap())
    };
    assert_eq!(total(&["--to", "+9s"]), (3000, 3000));
    assert_eq!(total(&[]), (2000, 2000));
    assert_eq!(total(&["--from", "+9s"]), (2000, -1000));
}

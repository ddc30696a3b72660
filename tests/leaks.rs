//! `heaptap leaks` as a user runs it: what it says of captures with snapshots, gauges, or events.

mod script;

use heaptap::capture::{
    AGES, Age, AllocatorKind, CaptureWriter, Gauges, SiteState, Snapshot, SnapshotHead, Totals, Trailer,
};
use script::{MAIN, Script, header, heaptap};
use serde_json::Value;
use std::path::Path;

const MIB: u64 = 1 << 20;
const MINUTE: u64 = 60_000_000_000;

fn run(arguments: &[&str], capture: &Path) -> String {
    let output = heaptap().arg("leaks").args(arguments).arg(capture).assert().success().get_output().clone();
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn json(arguments: &[&str], capture: &Path) -> Value {
    serde_json::from_str(&run(&[arguments, &["--json"]].concat(), capture)).unwrap()
}

/// An hour with a snapshot a minute: one site leaks 1 MiB a minute, one filled 10 MiB in the first third.
fn snapshots(path: &Path, gauges: bool) {
    let mut writer = CaptureWriter::create(path, false, &header()).unwrap();
    let mut stack = |function: &str, line| {
        let frame = writer.intern_frame(function, "/srv/shop.py", line).unwrap();
        writer.intern_stack(&[frame]).unwrap()
    };
    let (leaks, cache) = (stack("remember", 23), stack("fill", 40));
    for index in 1..=60_u64 {
        let row = |stack, blocks: u64, came: u64| {
            let mut ages = [Age::default(); AGES];
            // All but what came in the last minute is older than 15 minutes, of what counts here.
            ages[6] = Age { bytes: (blocks - came) * MIB, blocks: blocks - came };
            ages[0] = Age { bytes: came * MIB, blocks: came };
            SiteState {
                stack,
                allocator: AllocatorKind::Malloc,
                tid: MAIN,
                live: Totals::certain(blocks * MIB, blocks),
                allocated: Totals::certain(came * MIB, came),
                freed: Totals::default(),
                ages,
            }
        };
        let cached = (index / 2).min(10);
        let fills = u64::from(cached > ((index - 1) / 2).min(10));
        let head = SnapshotHead {
            index: index as u32,
            time_ns: index * MINUTE,
            unix_ns: 1_700_000_000_000_000_000 + index * MINUTE,
            ..SnapshotHead::default()
        };
        writer
            .snapshot(&Snapshot { head, rows: vec![row(leaks, index, 1), row(cache, cached, fills)] })
            .unwrap();
    }
    if gauges {
        let gauge = |minute: u64| Gauges {
            time_ns: minute * MINUTE,
            anonymous: Some((100 + minute * 4 / 3) * MIB),
            heap_in_use: Some(70 * MIB),
            heap_free: Some(90 * MIB),
            ..Gauges::default()
        };
        writer.gauges(&(0..=60).map(gauge).collect::<Vec<_>>()).unwrap();
    }
    writer.finish(Trailer { duration_ns: 60 * MINUTE, ..Trailer::default() }).unwrap();
}

#[test]
fn a_verdict_comes_with_its_evidence() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.heaptap");
    snapshots(&path, true);
    let document = json(&[], &path);
    let sites = document.as_array().unwrap();
    // Two lines, and the process.
    assert_eq!(sites.len(), 3);
    let leak = &sites[0];
    assert_eq!(
        (&leak["verdict"], &leak["function"], &leak["line"]),
        (&"leak".into(), &"remember".into(), &23.into())
    );
    assert_eq!(leak["file"], "/srv/shop.py");
    assert_eq!((&leak["bytes"], &leak["growth_bytes"]), (&(60 * MIB).into(), &(60 * MIB).into()));
    assert_eq!(leak["bytes_per_hour"].as_f64().unwrap(), (60 * MIB) as f64);
    assert_eq!(leak["first_seen_ns"], MINUTE);
    let evidence = leak["evidence"].as_str().unwrap();
    assert!(
        evidence.starts_with("+60.0 MiB/h (+60.0 MiB to +60.0 MiB at 95 %); 60.0 MiB in 60 blocks live"),
        "{evidence}"
    );
    assert!(
        evidence.contains("98 % of it older than 15 min, first seen 60.0 s after the start"),
        "{evidence}"
    );
    assert_eq!(sites[1]["verdict"], "warming");
    assert_eq!(leak["share_of_resident_growth"], 0.75);
    assert!(sites[1]["share_of_resident_growth"].is_null());
    let process = &sites[2];
    assert_eq!((&process["verdict"], &process["function"]), (&"fragmentation".into(), &Value::Null));
    assert_eq!(process["heap_free_bytes"], 90 * MIB);
    let said = process["evidence"].as_str().unwrap();
    assert!(said.contains("grew by +80.0 MiB, of which the leaks explain +60.0 MiB (75 %)"), "{said}");
    assert!(
        said.contains("fragmentation: malloc holds 90.0 MiB that the program has freed (56 % of its heap)"),
        "{said}"
    );
}

#[test]
fn text_ranks_and_says_what_is_not_known() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.heaptap");
    snapshots(&path, false);
    let text = run(&[], &path);
    assert!(text.contains("1 leak, 1 warming, 0 sawtooth, 0 footprint, 0 without enough data"), "{text}");
    assert!(text.contains("is not known"), "{text}");
    assert!(
        text.find("leak            remember (/srv/shop.py:23)").unwrap()
            < text.find("warming         fill").unwrap()
    );
    assert!(run(&["--max-rows", "1"], &path).contains("and 1 more rows"));
    assert!(!run(&["--exclude", "function=rem*"], &path).contains("remember"));
    assert!(json(&["--include", "nothing"], &path).as_array().unwrap().is_empty());
    // Without gauges nothing is known of the process.
    let sites = json(&[], &path).as_array().unwrap().clone();
    assert!(sites.iter().all(|site| site["verdict"] != "fragmentation"));
    assert!(sites[0]["share_of_resident_growth"].is_null());
}

#[test]
fn events_are_judged_as_snapshots_are() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.heaptap");
    let mut script = Script::create(&path, &header());
    let main = ("main", "/srv/shop.py", 1);
    let leaks = script.stack(&[main, ("remember", "/srv/shop.py", 23)]);
    let works = script.stack(&[main, ("work", "/srv/shop.py", 30)]);
    let stays = script.stack(&[main, ("load", "/srv/shop.py", 3)]);
    script.allocate(AllocatorKind::Mmap, MAIN, 0x10_0000_0000, 8 * MIB, stays);
    for n in 0..1000_u64 {
        // To the end, which the trailer has at 2.5 s.
        script.at_ms(5 * n / 2);
        script.allocate(AllocatorKind::Malloc, MAIN, 0x1000_0000 + n * 4096, 4096, leaks);
        script.allocate(AllocatorKind::Malloc, MAIN, 0x2000_0000, 100_000, works);
        script.free(AllocatorKind::Free, MAIN, 0x2000_0000);
    }
    script.finish();
    let sites = json(&[], &path).as_array().unwrap().clone();
    let verdict = |function: &str| {
        let site = sites.iter().find(|site| site["function"] == function);
        site.map(|site| site["verdict"].as_str().unwrap().to_owned())
    };
    assert_eq!(verdict("remember").as_deref(), Some("leak"), "{sites:?}");
    assert_eq!((verdict("load").as_deref(), verdict("work")), (Some("footprint"), None));
}

#[test]
fn nothing_is_nothing_and_damage_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let empty = dir.path().join("a.heaptap");
    Script::create(&empty, &header()).finish();
    assert!(run(&[], &empty).contains("nothing to show"));
    let cut = dir.path().join("b.heaptap");
    snapshots(&cut, false);
    let bytes = std::fs::read(&cut).unwrap();
    std::fs::write(&cut, &bytes[..bytes.len() / 2]).unwrap();
    assert!(run(&[], &cut).contains("warning: the file is cut short"));
    assert!(json(&[], &cut).as_array().unwrap().iter().all(|site| site["incomplete"] == true));
    heaptap().args(["leaks", "/nonexistent"]).assert().code(1);
}

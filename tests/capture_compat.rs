//! Captures of every format version are read for ever: one golden file per version.

mod script;

use heaptap::analysis::{View, analyse};
use heaptap::capture::CaptureReader;
use heaptap::report::dump::dump;
use std::path::{Path, PathBuf};

fn golden(version: u32) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("fixtures/captures/v{version}.heaptap"))
}

fn dumped(path: &Path) -> String {
    let mut out = Vec::new();
    dump(CaptureReader::open(path).unwrap(), true, None, &mut out).unwrap();
    String::from_utf8(out).unwrap()
}

/// Makes the golden file of the current version, if there is none. See `fixtures/captures/README.md`.
#[test]
#[ignore = "makes a fixture"]
fn write_golden_capture() {
    script::native::shop_native(&golden(5));
}

#[test]
fn version_1_is_read_record_by_record_as_when_it_was_written() {
    insta::assert_snapshot!(dumped(&golden(1)));
}

#[test]
fn version_2_is_read_record_by_record_as_when_it_was_written() {
    insta::assert_snapshot!(dumped(&golden(2)));
}

#[test]
fn version_3_is_read_record_by_record_as_when_it_was_written() {
    insta::assert_snapshot!(dumped(&golden(3)));
}

#[test]
fn version_4_is_read_record_by_record_as_when_it_was_written() {
    insta::assert_snapshot!(dumped(&golden(4)));
}

#[test]
fn version_5_is_read_record_by_record_as_when_it_was_written() {
    insta::assert_snapshot!(dumped(&golden(5)));
}

#[test]
fn reports_of_snapshots_alone_are_of_the_highest_and_the_last() {
    let of = |view| analyse(CaptureReader::open(golden(4)).unwrap(), view).unwrap();
    let (peak, leaks) = (of(View::HighWaterMark), of(View::Leaks));
    for findings in [&peak, &leaks] {
        let shown = findings.of_snapshot.unwrap();
        assert!((3..=4).contains(&shown.count) && shown.shown.head.index == 5);
        let counters = findings.trailer.as_ref().unwrap().counters;
        assert_eq!(
            (findings.live.bytes(), findings.live.count()),
            (counters.live_bytes, counters.live_blocks)
        );
        assert_eq!(findings.peak.bytes(), counters.peak_live_bytes);
        // 80 samples came in the cache and as many in the parser, whatever snapshots were thinned out.
        assert_eq!((findings.statistics.allocated.samples(), findings.freed.samples()), (160, 80));
        assert_eq!(findings.sites.len(), 2);
    }
    let refused = analyse(CaptureReader::open(golden(4)).unwrap(), View::Temporary(1)).err().unwrap();
    assert!(refused.to_string().contains("no event log"));
}

#[test]
fn what_is_written_today_means_the_same_as_the_golden_files() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("today.heaptap");
    script::shop(&path);
    assert_eq!(dumped(&path), dumped(&golden(1)));
    let path = dir.path().join("sampled.heaptap");
    script::shop_sampled(&path);
    assert_eq!(dumped(&path), dumped(&golden(2)));
    assert_eq!(dumped(&path), dumped(&golden(3)));
    let path = dir.path().join("snapshots.heaptap");
    script::shop_snapshots(&path);
    assert_eq!(dumped(&path), dumped(&golden(4)));
    let path = dir.path().join("native.heaptap");
    script::native::shop_native(&path);
    assert_eq!(dumped(&path), dumped(&golden(5)));
}

#[test]
fn the_versions_differ_in_what_a_reader_must_know() {
    let prefix = |version| std::fs::read(golden(version)).unwrap()[8..12].to_vec();
    let expected = [[1, 0, 0, 0], [2, 0, 0, 1], [3, 0, 0, 1], [4, 0, 0, 3], [5, 0, 0, 0]];
    assert_eq!([1, 2, 3, 4, 5].map(prefix), expected);
}

fn recorder_and_analysis_agree(version: u32) {
    let findings = analyse(CaptureReader::open(golden(version)).unwrap(), View::HighWaterMark).unwrap();
    let counters = findings.trailer.as_ref().unwrap().counters;
    assert_eq!(findings.peak.bytes(), counters.peak_live_bytes);
    assert_eq!((findings.live.bytes(), findings.live.count()), (counters.live_bytes, counters.live_blocks));
    assert_eq!(findings.events, counters.events);
    assert_eq!((findings.frees, findings.unmaps), (counters.frees, counters.unmaps));
    assert_eq!((findings.missing.missed_frees, findings.missing.missed_allocations), (0, 0));
}

#[test]
fn the_recorder_and_the_analysis_agree_on_what_is_live() {
    recorder_and_analysis_agree(1);
    recorder_and_analysis_agree(2);
    recorder_and_analysis_agree(3);
    recorder_and_analysis_agree(5);
    let findings = analyse(CaptureReader::open(golden(1)).unwrap(), View::HighWaterMark).unwrap();
    // 39 cache entries of 1 KiB and a quarter of the mapping are left.
    assert_eq!(findings.live.bytes(), 39 * 1024 + (1 << 18));
}

//! A file's bytes through the reader and every report.

use heaptap::analysis::{DiffOptions, Filter, Grouping, Moment, Outline, View, When, analyse, diff, leaks};
use heaptap::capture::format::{FLAG_SAMPLED, MAGIC, VERSION};
use heaptap::capture::{CaptureReader, ReadOptions};
use heaptap::report::dump::dump;
use heaptap::report::{
    DiffFormat, DiffReport, FlameGraph, Format, LeaksReport, Report, Stats, Summary, Table, Tree,
};
use std::io::{Cursor, Write, sink};

/// Everything that can be made of a file.
pub fn use_up(bytes: &[u8]) {
    let open = || CaptureReader::from_input("test", Box::new(Cursor::new(bytes.to_vec())));
    let Ok(reader) = open() else { return };
    for json in [false, true] {
        dump(open().unwrap(), json, None, &mut sink()).unwrap();
    }
    drop(reader);
    compare(bytes);
    for view in [View::HighWaterMark, View::Leaks, View::Temporary(2)] {
        let findings = analyse(open().unwrap(), view).unwrap();
        let reports: [&dyn Report; 5] = [
            &Summary::default(),
            &Table::default(),
            &Tree { max_stacks: 3, all_frames: false },
            &Tree { max_stacks: 0, all_frames: true },
            &Stats::default(),
        ];
        for report in reports {
            for format in [Format { json: false, width: Some(80) }, Format { json: true, width: None }] {
                report.write(&findings, format, &mut sink()).unwrap();
            }
        }
        for inverted in [false, true] {
            // The only refusal is that there is nothing to draw.
            let _ = FlameGraph { inverted, icicle: false }.write(&findings, Format::default(), &mut sink());
        }
    }
}

/// What is read from a file, twice.
fn compare(bytes: &[u8]) {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    let new = Outline::read(file.path(), &ReadOptions::default()).unwrap();
    let to = new.find(When::Last).unwrap();
    for (grouping, cumulative) in [
        (Grouping::Lineno, true),
        (Grouping::Traceback, false),
        (Grouping::Module, false),
        (Grouping::Thread, false),
    ] {
        let options = DiffOptions { grouping, cumulative, filter: Filter::default() };
        for from in [Moment::START, new.find(When::AfterStart(1_000_000)).unwrap()] {
            for old in [None, Some(&new)] {
                let diff = diff(old.map(|old| (old, from)), from, (&new, to), &options).unwrap();
                let report =
                    DiffReport { diff: &diff, grouping, cumulative, old, from, new: &new, to, max_rows: 5 };
                for format in [DiffFormat::Text, DiffFormat::Json, DiffFormat::Csv] {
                    report.write(format, Some(80), &mut sink()).unwrap();
                }
            }
        }
    }
    let leaks = leaks(&new, Filter::default()).unwrap();
    for json in [false, true] {
        LeaksReport { leaks: &leaks, outline: &new, max_rows: 0 }.write(json, &mut sink()).unwrap();
    }
}

/// `events` as the content of a chunk with a right checksum, after a right header of a sampled capture.
pub fn with_events(events: &[u8]) -> Vec<u8> {
    with_chunks(false, &[(2, events)])
}

/// Chunks (kind and content) with right checksums, after a right header of a sampled capture.
pub fn with_chunks(native: bool, chunks: &[(u8, &[u8])]) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend(FLAG_SAMPLED.to_le_bytes());
    bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
    let header = format!(r#"{{"sampling_mean_bytes": 1024, "native": {native}}}"#);
    for (kind, content) in [(1, header.as_bytes())].iter().chain(chunks) {
        let len = (content.len() as u32).to_le_bytes();
        let header = [&[*kind, 0][..], &len, &len].concat();
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&header);
        hasher.update(content);
        bytes.extend_from_slice(&header);
        bytes.extend_from_slice(&hasher.finalize().to_le_bytes());
        bytes.extend_from_slice(content);
    }
    bytes
}

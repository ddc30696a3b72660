//! Any bytes as the records of a sound capture, through the analysis and every report.
//!
//! The checksums are made here: a fuzzer does not find them, and behind them is where the code is.
//! `cargo +nightly fuzz run reports -- -rss_limit_mb=1024`
#![no_main]

use heaptap::analysis::{View, analyse};
use heaptap::capture::CaptureReader;
use heaptap::capture::format::{FLAG_SAMPLED, MAGIC, VERSION, codec, kind};
use heaptap::report::dump::dump;
use heaptap::report::{FlameGraph, Format, Report, Stats, Summary, Table, Tree};
use libfuzzer_sys::fuzz_target;
use std::io::{Cursor, sink};

/// IEEE crc32, bit by bit.
fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = !0u32;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg());
        }
    }
    !crc
}

fn chunk(kind: u8, content: &[u8], out: &mut Vec<u8>) {
    let len = (content.len() as u32).to_le_bytes();
    let header = [&[kind, codec::RAW][..], &len, &len].concat();
    let crc = crc32(&[&header[..], content].concat());
    out.extend([&header[..], &crc.to_le_bytes(), content].concat());
}

fuzz_target!(|bytes: &[u8]| {
    // The first byte says whether there are native frames; then the last quarter is what they are called.
    let native = bytes.first().is_some_and(|first| first & 1 == 1);
    let (events, symbols) = bytes.split_at(if native { bytes.len() - bytes.len() / 4 } else { bytes.len() });
    let events = events.get(1..).unwrap_or_default();
    let mut file = [&MAGIC[..], &VERSION.to_le_bytes(), &FLAG_SAMPLED.to_le_bytes()].concat();
    let crc = crc32(&file);
    file.extend(crc.to_le_bytes());
    let header = format!(r#"{{"sampling_mean_bytes": 1024, "native": {native}}}"#);
    chunk(kind::HEADER, header.as_bytes(), &mut file);
    for part in events.chunks(1 << 16) {
        chunk(kind::EVENTS, part, &mut file);
    }
    if native {
        chunk(kind::SYMBOLS, &symbols[..symbols.len().min(1 << 16)], &mut file);
    }
    let open = || {
        CaptureReader::from_input("fuzz", Box::new(Cursor::new(file.clone()))).expect("the header is sound")
    };
    for json in [false, true] {
        dump(open(), json, None, &mut sink()).expect("a sink takes everything");
    }
    for view in [View::HighWaterMark, View::Leaks, View::Temporary(3)] {
        let findings = analyse(open(), view).expect("reading from memory does not fail");
        let tree = Tree { max_stacks: 0, all_frames: false };
        let reports: [&dyn Report; 4] = [&Summary::default(), &Table::default(), &tree, &Stats::default()];
        for report in reports {
            for json in [false, true] {
                report
                    .write(&findings, Format { json, width: Some(80) }, &mut sink())
                    .expect("a sink takes everything");
            }
        }
        let _ = FlameGraph::default().write(&findings, Format::default(), &mut sink());
    }
});

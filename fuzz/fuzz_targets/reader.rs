//! Any bytes as a capture: every record is read, no table is looked up out of bounds.
//!
//! `cargo +nightly fuzz run reader -- -rss_limit_mb=1024`, with `fixtures/captures` as a seed corpus.
#![no_main]

use heaptap::capture::{CaptureReader, Record};
use libfuzzer_sys::fuzz_target;
use std::io::Cursor;

fuzz_target!(|bytes: &[u8]| {
    let Ok(mut reader) = CaptureReader::from_input("fuzz", Box::new(Cursor::new(bytes.to_vec()))) else {
        return;
    };
    while let Some(record) = reader.next() {
        let record = record.expect("reading from memory does not fail");
        if let Record::Allocation(event) = record {
            for frame in reader.stacks().frames(event.stack).take(64) {
                assert!(!reader.stacks().frame(frame).function.contains('\0') || bytes.contains(&0));
            }
        }
    }
    assert!(reader.trailer().is_some() != reader.cut().is_some(), "a file is whole or cut");
});

//! Truncated, flipped and made-up captures through the reader and every report: an error or a partial
//! report, never a panic, and no more memory than the file's bytes account for.

mod script;

use heaptap::analysis::{View, analyse};
use heaptap::capture::CaptureReader;
use heaptap::report::dump::dump;
use heaptap::report::{FlameGraph, Format, Report, Stats, Summary, Table, Tree};
use proptest::prelude::*;
use std::alloc::{GlobalAlloc, Layout, System};
use std::io::{Cursor, sink};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicUsize, Ordering};

static SHOP: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("shop.heaptap");
    script::shop(&path);
    std::fs::read(path).unwrap()
});

/// Everything that can be made of a file.
fn use_up(bytes: &[u8]) {
    let open = || CaptureReader::from_input("test", Box::new(Cursor::new(bytes.to_vec())));
    let Ok(reader) = open() else { return };
    for json in [false, true] {
        dump(open().unwrap(), json, &mut sink()).unwrap();
    }
    drop(reader);
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

/// `events` as the content of a chunk with a right checksum, after a right header.
fn with_events(events: &[u8]) -> Vec<u8> {
    let mut bytes = SHOP[..16].to_vec();
    for (kind, content) in [(1u8, &b"{}"[..]), (2, events)] {
        let len = (content.len() as u32).to_le_bytes();
        let header = [&[kind, 0][..], &len, &len].concat();
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&header);
        hasher.update(content);
        bytes.extend_from_slice(&header);
        bytes.extend_from_slice(&hasher.finalize().to_le_bytes());
        bytes.extend_from_slice(content);
    }
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn truncated_captures_do_no_harm(cut: prop::sample::Index) {
        use_up(&SHOP[..cut.index(SHOP.len())]);
    }

    #[test]
    fn flipped_bits_do_no_harm(flips in prop::collection::vec(any::<prop::sample::Index>(), 1..6)) {
        let mut bytes = SHOP.clone();
        for flip in flips {
            let bit = flip.index(bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
        use_up(&bytes);
    }

    #[test]
    fn made_up_records_do_no_harm(events in prop::collection::vec(
        prop_oneof![any::<u8>(), 0xe0u8..0xea, 0u8..8], 0..300))
    {
        // A string, a frame, a stack and a thread first, so that some of what follows has a meaning.
        let start = [0xe0, 0, 1, b'f', 0xe1, 0, 0, 0, 1, 0xe2, 2, 0, 0, 0xe4, 2];
        use_up(&with_events(&[&start[..], &events].concat()));
    }
}

/// Counts bytes, for the bound below.
struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

#[allow(unsafe_code)] // counts, and hands on to the system's allocator
// SAFETY: every call is passed on unchanged to `System`, which upholds the contract.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        PEAK.fetch_max(LIVE.fetch_add(layout.size(), Ordering::Relaxed) + layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

#[test]
fn what_a_file_announces_is_not_reserved() {
    // Lengths of 4 GiB in a chunk, in a string, in ids; far addresses and sizes in records.
    let mut huge_chunk = with_events(&[]);
    huge_chunk.extend_from_slice(&[2, 1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0]);
    let far = [0xff, 0xff, 0xff, 0xff, 0x0f];
    let files = [
        huge_chunk,
        with_events(&[&[0xe0, 0][..], &far, b"f"].concat()),
        with_events(&[&[0xe0][..], &far, &[1, b'f']].concat()),
        with_events(&[&[0xe2][..], &far, &[0, 0]].concat()),
    ];
    for bytes in files {
        let before = LIVE.load(Ordering::Relaxed);
        PEAK.store(before, Ordering::Relaxed);
        use_up(&bytes);
        let used = PEAK.load(Ordering::Relaxed).saturating_sub(before);
        // Other tests of this binary run beside this one; each stays far below this too.
        assert!(used < 64 << 20, "{used} bytes for a file of {}", bytes.len());
    }
}

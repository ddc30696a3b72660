//! What a capture announces is not reserved: memory goes with the bytes that are there. Alone in its
//! binary, for it counts the bytes of the whole process.

mod script;

use heaptap::capture::CaptureReader;
use script::use_up::{use_up, with_chunks, with_events};
use std::alloc::{GlobalAlloc, Layout, System};
use std::io::Cursor;
use std::sync::atomic::{AtomicUsize, Ordering};

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
        with_events(&[&[0, 0, 0, 0x20, 0][..], &far, b"f"].concat()),
        with_events(&[&[0, 0, 0, 0x20][..], &far, &[1, b'f']].concat()),
        with_events(&[&[0, 0, 0, 0x22][..], &far, &[0, 0]].concat()),
        // A column of 4 GiB, and the most events in the fewest bytes.
        with_events(&[&[0, 0][..], &far].concat()),
        with_events(&[&[0, 0, 2, 5, 5, 0x24, 2, 0x53, 0x53][..], &[0x1f; 300]].concat()),
        // A far module, one with a long build id, a frame of it, and names: so many strings, frames, places.
        with_chunks(true, &[(2, &[&[0, 0, 0, 0x2b][..], &far, &[1, b'm', 0]].concat())]),
        with_chunks(true, &[(2, &[&[0, 0, 0, 0x2b, 0, 1, b'm'][..], &far].concat())]),
        with_chunks(true, &[(2, &[&[0, 0, 0, 0x2c, 0][..], &far, &[1, 0]].concat())]),
        with_chunks(true, &[(6, &far)]),
        with_chunks(true, &[(6, &[&[0][..], &far].concat())]),
        with_chunks(true, &[(6, &[&[0, 1, 0, 0][..], &far].concat())]),
    ];
    for bytes in files {
        assert!(CaptureReader::from_input("test", Box::new(Cursor::new(bytes.clone()))).is_ok());
        let before = LIVE.load(Ordering::Relaxed);
        PEAK.store(before, Ordering::Relaxed);
        use_up(&bytes);
        let used = PEAK.load(Ordering::Relaxed).saturating_sub(before);
        // Two chunks of the greatest size are 4 MiB; the rest is the reports' own.
        assert!(used < 8 << 20, "{used} bytes for a file of {}", bytes.len());
    }
}

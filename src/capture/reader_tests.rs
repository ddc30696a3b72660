//! Writer and reader together: what goes in comes out, cut and damaged files give what they still hold.

use super::*;
use crate::addr::RemoteAddr;
use crate::capture::format::{CHUNK_EVENTS, CHUNK_HEADER_LEN};
use crate::capture::{
    Allocation, AllocatorKind, CaptureWriter, Counters, DropReason, EndReason, Free, FreeUnknown, GapReason,
    StackId, Unmap,
};
use proptest::prelude::*;
use std::io::Cursor;

fn header() -> Header {
    Header {
        pid: 42,
        command_line: vec!["python".into(), "app.py".into()],
        page_size: 4096,
        sampling_mean_bytes: Some(512 << 10),
        ..Header::default()
    }
}

fn read(bytes: Vec<u8>) -> Result<CaptureReader, CaptureError> {
    CaptureReader::from_input("test", Box::new(Cursor::new(bytes)))
}

/// Events only, without definitions and times.
fn events(reader: &mut CaptureReader) -> Vec<Record> {
    reader
        .map(|record| record.unwrap())
        .filter(|record| {
            !matches!(
                record,
                Record::String(_) | Record::Frame(_) | Record::Stack(_) | Record::Thread(_) | Record::Time(_)
            )
        })
        .collect()
}

/// Writes with `script` and gives the file's bytes.
fn write(script: impl FnOnce(&mut CaptureWriter)) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.heaptap");
    let mut writer = CaptureWriter::create(&path, false, &header()).unwrap();
    script(&mut writer);
    let counters = Counters { interval_at_end: 1 << 20, samples: 99, ..Counters::default() };
    writer.finish(Trailer { reason: EndReason::Duration, counters, ..Trailer::default() }).unwrap();
    std::fs::read(&path).unwrap()
}

fn malloc(tid: u32, address: u64, size: u64, stack: StackId) -> Allocation {
    Allocation {
        allocator: AllocatorKind::Malloc,
        tid,
        address: RemoteAddr(address),
        size,
        stack,
        interval: 0,
    }
}

/// `chunks` chunks of ten allocations each, every one with a stack of its own.
fn in_chunks(chunks: u64) -> Vec<u8> {
    write(|writer| {
        for chunk in 0..chunks {
            for n in 0..10 {
                let frame = writer.intern_frame(&format!("f{chunk}_{n}"), "a.py", n as u32).unwrap();
                let stack = writer.intern_stack(&[frame]).unwrap();
                writer.allocation(malloc(7, 0x1000 * chunk + 16 * n, n, stack)).unwrap();
            }
            writer.flush().unwrap();
        }
    })
}

/// Offsets at which chunks begin, and the file's length.
fn chunk_offsets(bytes: &[u8]) -> Vec<usize> {
    let mut at = PREFIX_LEN;
    let mut offsets = Vec::new();
    while at < bytes.len() {
        offsets.push(at);
        at += CHUNK_HEADER_LEN + ChunkHeader::parse(bytes[at..].first_chunk().unwrap()).stored_len;
    }
    offsets.push(at);
    offsets
}

fn any_event() -> impl Strategy<Value = Record> {
    let kind = || prop::sample::select(&AllocatorKind::ALL[..]);
    let address = || prop_oneof![0u64..4096, any::<u64>()].prop_map(RemoteAddr);
    let tid = || prop_oneof![1u32..4, any::<u32>()];
    let interval = || prop_oneof![3 => Just(0u64), 3 => Just(1 << 19), 1 => any::<u64>()];
    prop_oneof![
        (kind(), tid(), address(), any::<u64>(), 0u32..4, interval()).prop_map(
            |(allocator, tid, address, size, stack, interval)| {
                let stack = StackId(stack);
                let interval = if allocator.is_ranged() { 0 } else { interval };
                Record::Allocation(Allocation { allocator, tid, address, size, stack, interval })
            }
        ),
        (kind(), tid(), address()).prop_map(|(deallocator, tid, address)| Record::Free(Free {
            deallocator,
            tid,
            address
        })),
        (kind(), tid(), address()).prop_map(|(deallocator, tid, address)| {
            Record::FreeUnknown(FreeUnknown { deallocator, tid, address })
        }),
        (tid(), address(), any::<u64>()).prop_map(|(tid, address, len)| Record::Unmap(Unmap {
            tid,
            address,
            len
        })),
        (any::<u64>(), any::<u8>())
            .prop_map(|(count, id)| Record::Drop { count, reason: DropReason::from_id(id) }),
        (any::<u64>(), any::<u8>())
            .prop_map(|(duration_ns, id)| Record::Gap { duration_ns, reason: GapReason::from_id(id) }),
    ]
}

fn put(writer: &mut CaptureWriter, record: &Record) {
    match *record {
        Record::Allocation(event) => writer.allocation(event),
        Record::Free(event) => writer.free(event),
        Record::FreeUnknown(event) => writer.free_unknown(event),
        Record::Unmap(event) => writer.unmap(event),
        Record::Drop { count, reason } => writer.dropped(count, reason),
        Record::Gap { duration_ns, reason } => writer.gap(duration_ns, reason),
        _ => unreachable!(),
    }
    .unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_event_comes_out_as_it_went_in(
        records in prop::collection::vec(any_event(), 0..400),
        flush_every in 1usize..200,
    ) {
        let bytes = write(|writer| {
            let frames: Vec<_> =
                (0..3).map(|n| writer.intern_frame("f", "a.py", n).unwrap()).collect();
            assert_eq!(writer.intern_stack(&frames).unwrap(), StackId(3));
            for (n, record) in records.iter().enumerate() {
                put(writer, record);
                if n % flush_every == 0 {
                    writer.flush().unwrap();
                }
            }
        });
        let mut reader = read(bytes).unwrap();
        prop_assert_eq!(events(&mut reader), records);
        prop_assert_eq!(reader.cut(), None);
        prop_assert_eq!(reader.damage().chunks, 0);
    }

    #[test]
    fn flipped_bits_lose_what_they_hit_and_never_panic(
        flips in prop::collection::vec(any::<prop::sample::Index>(), 1..4),
    ) {
        let mut bytes = in_chunks(6);
        for flip in flips {
            let bit = flip.index(bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
        if let Ok(mut reader) = read(bytes) {
            let good = events(&mut reader);
            prop_assert!(good.len() <= 60 && good.len().is_multiple_of(10));
            prop_assert!(reader.cut().is_some() || reader.trailer().is_some());
            // Nothing may be missing in silence.
            prop_assert!(good.len() == 60 || reader.cut().is_some() || reader.damage().chunks > 0);
        }
    }

    #[test]
    fn bytes_that_pass_the_checksum_but_mean_nothing_do_no_harm(raw in prop::collection::vec(any::<u8>(), 0..400)) {
        let mut bytes = write(|_| {});
        bytes.truncate(chunk_offsets(&bytes)[1]);
        // Once with columns of nothing, once as it is.
        crate::capture::chunk::seal(kind::EVENTS, &[&[0, 0, 0][..], &raw].concat(), &mut bytes);
        crate::capture::chunk::seal(kind::EVENTS, &raw, &mut bytes);
        let mut reader = read(bytes).unwrap();
        for record in reader.by_ref() {
            record.unwrap();
        }
        prop_assert!(reader.stacks().stack_count() <= 2 * raw.len());
    }
}

#[test]
fn a_file_cut_at_any_byte_reads_up_to_its_last_whole_chunk() {
    let bytes = in_chunks(3);
    let offsets = chunk_offsets(&bytes);
    for len in 0..bytes.len() {
        match read(bytes[..len].to_vec()) {
            Err(_) => assert!(len < offsets[1], "the header was whole at {len}"),
            Ok(mut reader) => {
                let whole = offsets[1..].iter().filter(|end| **end <= len).count() - 1;
                assert_eq!(events(&mut reader).len(), 10 * whole, "cut at {len}");
                assert_eq!(reader.cut().unwrap().offset as usize, offsets[whole + 1]);
                assert!(reader.trailer().is_none());
            }
        }
    }
}

#[test]
fn a_damaged_chunk_loses_itself_only() {
    let mut bytes = in_chunks(4);
    let offsets = chunk_offsets(&bytes);
    bytes[offsets[2] + CHUNK_HEADER_LEN + 5] ^= 0x40;
    let mut reader = read(bytes).unwrap();
    let left = events(&mut reader);
    assert_eq!(left.len(), 30);
    assert_eq!((reader.damage().chunks, reader.cut()), (1, None));
    assert_eq!(reader.damage().first.as_ref().unwrap().offset, offsets[2] as u64);
    let Record::Allocation(last) = left[29] else { panic!() };
    let frame = reader.stacks().frames(last.stack).next().unwrap();
    assert_eq!(reader.stacks().frame(frame).function, "f3_9");
    assert!(reader.trailer().is_some());
}

#[test]
fn counters_time_and_threads_are_kept() {
    let bytes = write(|writer| {
        writer.define_thread(7, "worker", "Thread-1").unwrap();
        for n in 0..100 {
            writer.time(n * 100_000);
            writer.allocation(malloc(7, 16 * n, 8, StackId::EMPTY)).unwrap();
            writer
                .free(Free { deallocator: AllocatorKind::Free, tid: 7, address: RemoteAddr(16 * n) })
                .unwrap();
        }
        writer.dropped(5, DropReason::BufferFull).unwrap();
    });
    let mut reader = read(bytes).unwrap();
    let times: Vec<u64> = (&mut reader)
        .filter_map(|record| match record.unwrap() {
            Record::Time(ns) => Some(ns),
            _ => None,
        })
        .collect();
    assert_eq!(times.first(), Some(&100_000));
    assert!(times.len() <= 11 && times.is_sorted() && *times.last().unwrap() >= 9_000_000);
    assert_eq!(reader.stacks().thread(7).unwrap().python, "Thread-1");
    let own = Counters { events: 200, allocations: 100, frees: 100, drops: 5, ..Counters::default() };
    let expected = Counters { interval_at_end: 1 << 20, ..own };
    assert_eq!(reader.trailer().unwrap().counters, expected);
}

#[test]
fn another_version_or_file_says_what_it_is() {
    let mut bytes = in_chunks(1);
    let newer = crate::capture::writer::prefix(9, 0);
    bytes[..PREFIX_LEN].copy_from_slice(&newer);
    let error = read(bytes.clone()).err().unwrap();
    assert!(matches!(error, CaptureError::NewerVersion { found: 9, .. }));
    assert!(error.to_string().contains("version 9") && error.hint().is_some());
    for (version, flags) in [(1, FLAG_SAMPLED), (2, 0x0200), (3, 0x0200), (3, FLAG_SAMPLED | 0x8000)] {
        bytes[..PREFIX_LEN].copy_from_slice(&crate::capture::writer::prefix(version, flags));
        assert!(matches!(read(bytes.clone()), Err(CaptureError::NewerFeatures { .. })));
    }
    for (version, flags) in [(3, 0x0001), (3, 0x0080), (3, FLAG_SAMPLED | 0x0080)] {
        bytes[..PREFIX_LEN].copy_from_slice(&crate::capture::writer::prefix(version, flags));
        assert_eq!(events(&mut read(bytes.clone()).unwrap()).len(), 10);
    }
    assert!(matches!(read(b"#!/bin/sh\necho hello\n".to_vec()), Err(CaptureError::NotACapture { .. })));
    assert!(matches!(read(Vec::new()), Err(CaptureError::NotACapture { .. })));
}

#[test]
fn an_interval_is_said_when_it_changes_and_in_every_chunk() {
    let sample = |address, interval| Allocation { interval, ..malloc(1, address, 8, StackId::EMPTY) };
    let mapped = Allocation { allocator: AllocatorKind::Mmap, ..sample(4096, 77) };
    let mut sizes = Vec::new();
    let bytes = write(|writer| {
        for event in [sample(16, 0), sample(32, 512), mapped, sample(48, 512), sample(64, 1024)] {
            writer.allocation(event).unwrap();
        }
        writer.flush().unwrap();
        writer.allocation(sample(80, 1024)).unwrap();
        writer.flush().unwrap();
        writer.allocation(sample(96, 0)).unwrap();
        sizes.push(writer.counters().samples);
    });
    let mut reader = read(bytes).unwrap();
    let intervals: Vec<u64> = events(&mut reader)
        .iter()
        .map(|record| match record {
            Record::Allocation(event) => event.interval,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(intervals, [0, 512, 0, 512, 1024, 1024, 0]);
    assert_eq!((sizes[0], reader.trailer().unwrap().counters.samples), (4, 4));
}

#[test]
fn samples_in_a_file_that_says_it_has_none_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let exact = Header { sampling_mean_bytes: None, ..header() };
    let mut writer = CaptureWriter::create(dir.path().join("a.heaptap"), false, &exact).unwrap();
    let sample = Allocation { interval: 512, ..malloc(1, 16, 8, StackId::EMPTY) };
    assert!(matches!(writer.allocation(sample), Err(CaptureError::NotSampled { .. })));
    // A mapping is certain with any interval, and the refusal spoils nothing.
    writer.allocation(Allocation { allocator: AllocatorKind::Mmap, ..sample }).unwrap();
    writer.finish(Trailer::default()).unwrap();
    let mut reader = CaptureReader::open(dir.path().join("a.heaptap")).unwrap();
    assert_eq!(events(&mut reader).len(), 1);

    let mut bytes = write(|writer| writer.allocation(sample).unwrap());
    bytes[..PREFIX_LEN].copy_from_slice(&crate::capture::writer::prefix(VERSION, 0));
    let mut reader = read(bytes.clone()).unwrap();
    assert_eq!((events(&mut reader).len(), reader.damage().chunks), (0, 1));
    // Version 1 has no such record at all, version 2 has it with the flag.
    for (version, flags, found) in [(1, 0, (0, 1)), (2, 0, (0, 1)), (2, FLAG_SAMPLED, (1, 0))] {
        let mut bytes = crate::capture::writer::prefix(version, flags).to_vec();
        crate::capture::chunk::seal(kind::HEADER, b"{}", &mut bytes);
        crate::capture::chunk::seal(kind::EVENTS, &[0xe4, 2, 0xea, 100, 0x60, 2, 8], &mut bytes);
        let mut reader = read(bytes).unwrap();
        assert_eq!((events(&mut reader).len(), reader.damage().chunks), found);
    }
}

#[test]
fn unknown_chunks_and_fields_are_passed_over() {
    let bytes = in_chunks(1);
    let offsets = chunk_offsets(&bytes);
    let mut newer = bytes[..PREFIX_LEN].to_vec();
    crate::capture::chunk::seal(
        kind::HEADER,
        br#"{"pid": 5, "breakpoints": "quantum", "news": [1]}"#,
        &mut newer,
    );
    crate::capture::chunk::seal(77, b"something", &mut newer);
    newer.extend_from_slice(&bytes[offsets[1]..offsets[2]]);
    let trailer = br#"{"reason": {"kind": "bored", "of": "it"}, "more": 1}"#;
    crate::capture::chunk::seal(kind::TRAILER, trailer, &mut newer);
    let mut reader = read(newer).unwrap();
    assert_eq!(reader.header().pid, 5);
    assert_eq!(events(&mut reader).len(), 10);
    assert_eq!((reader.cut(), reader.damage().chunks), (None, 0));
    assert_eq!(reader.trailer().unwrap().reason, EndReason::Unknown);
}

#[test]
fn a_full_disk_is_an_error_and_then_the_writer_is_closed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.heaptap");
    let mut writer = CaptureWriter::create(&path, false, &header()).unwrap();
    writer.allocation(malloc(1, 16, 1, StackId::EMPTY)).unwrap();
    writer.flush().unwrap();
    writer.replace_file(std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap());
    writer.allocation(malloc(1, 32, 1, StackId::EMPTY)).unwrap();
    let error = writer.flush().unwrap_err();
    assert!(
        matches!(&error, CaptureError::Write { source, .. } if source.kind() == std::io::ErrorKind::StorageFull)
    );
    assert!(error.to_string().contains("a.heaptap"));
    assert!(matches!(writer.allocation(malloc(1, 48, 1, StackId::EMPTY)), Err(CaptureError::Closed { .. })));
    assert!(matches!(writer.finish(Trailer::default()), Err(CaptureError::Closed { .. })));
    let mut reader = CaptureReader::open(&path).unwrap();
    assert_eq!(events(&mut reader).len(), 1);
    assert!(reader.cut().is_some());
}

#[test]
fn a_huge_command_line_still_fits_the_header() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.heaptap");
    let header = Header { command_line: vec!["é".repeat(2 << 20); 3], ..header() };
    CaptureWriter::create(&path, false, &header).unwrap().finish(Trailer::default()).unwrap();
    let kept = CaptureReader::open(&path).unwrap().header().command_line.clone();
    assert!(kept[0].ends_with('…') && kept.concat().len() < 100_000);
}

#[test]
fn frees_find_their_blocks_however_long_ago_they_were_allocated() {
    let address = |n: u64| n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 16 << 3;
    let mut expected = Vec::new();
    for n in 0..2000u64 {
        expected.push(Record::Allocation(malloc(1, address(n), 8, StackId::EMPTY)));
        for back in [0, 1, 3, 100, 254, 255, 256, 257, 700] {
            if n % 7 == back % 7 && n >= back {
                let address = RemoteAddr(address(n - back));
                expected.push(Record::Free(Free { deallocator: AllocatorKind::Free, tid: 1, address }));
            }
        }
    }
    let bytes = write(|writer| expected.iter().for_each(|record| put(writer, record)));
    assert_eq!(events(&mut read(bytes).unwrap()), expected);
}

/// A ring of blocks of a few sizes, each replaced in a certain order; every sixteenth in none.
fn ring(events: u64) -> Vec<Record> {
    let mut places = [0u64; 97];
    let mut records = Vec::new();
    for n in 0..events / 2 {
        let chance = n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
        let place = if n % 16 == 0 { chance } else { n * 7 } as usize % places.len();
        let size = 600 + n * n % 31 * 16;
        let old =
            std::mem::replace(&mut places[place], 0x7f00_0000_0000 + (chance & 0xfff) * 0x2000 + n % 2 * 8);
        if old > 0 {
            let (deallocator, address) = (AllocatorKind::Free, RemoteAddr(old));
            records.push(Record::Free(Free { deallocator, tid: 1, address }));
        }
        records.push(Record::Allocation(malloc(1, places[place], size, StackId::EMPTY)));
    }
    records
}

#[test]
fn what_repeats_itself_beyond_every_bound_comes_out_as_it_went_in() {
    // More than the history of the events expected, and more than a chunk may have.
    let records = ring(u64::from(CHUNK_EVENTS) + 300_000);
    let bytes = write(|writer| records.iter().for_each(|record| put(writer, record)));
    let mut reader = read(bytes).unwrap();
    assert!(events(&mut reader) == records);
    assert_eq!((reader.cut(), reader.damage().chunks), (None, 0));
}

#[test]
fn a_chunk_does_not_need_the_one_before_it() {
    // The same events three times: were anything expected across chunks, the third would lean on the second.
    let records = ring(4000);
    let mut bytes = write(|writer| {
        for _ in 0..3 {
            records.iter().for_each(|record| put(writer, record));
            writer.flush().unwrap();
        }
    });
    let offsets = chunk_offsets(&bytes);
    bytes[offsets[2] + CHUNK_HEADER_LEN + 5] ^= 0x40;
    let mut reader = read(bytes).unwrap();
    assert!(events(&mut reader) == [&records[..], &records].concat());
    assert_eq!(reader.damage().chunks, 1);
}

#[test]
fn more_events_than_a_chunk_may_have_are_refused() {
    let mut bytes = write(|_| {});
    bytes.truncate(chunk_offsets(&bytes)[1]);
    // A thread, one free at 16, and then that it goes on like this.
    let mut raw = vec![0, 0, 2, 5, 5, 0x24, 2, 0x53, 0x53];
    raw.extend(vec![0x1f; CHUNK_EVENTS as usize / 32 + 1]);
    crate::capture::chunk::seal(kind::EVENTS, &raw, &mut bytes);
    let mut reader = read(bytes).unwrap();
    assert_eq!(events(&mut reader).len(), CHUNK_EVENTS as usize);
    assert_eq!(reader.damage().first.as_ref().unwrap().why, "it has more events than a chunk may have");
}

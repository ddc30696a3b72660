//! Files with snapshots: thinned, bounded, and written to a disk that is full for a while.

use super::*;
use crate::addr::RemoteAddr;
use crate::capture::{
    Allocation, AllocatorKind, CaptureReader, EndReason, Header, Record, SiteState, SnapshotHead,
    SnapshotReason, Totals, Trailer,
};
use std::fs::File;
use std::path::{Path, PathBuf};

const SECOND: u64 = 1_000_000_000;

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn file(&self) -> PathBuf {
        self.0.path().join("c.heaptap")
    }

    fn writer(&self, aggregated: bool, snapshots: usize, max_bytes: u64) -> CaptureWriter {
        let header = Header { aggregated, ..Header::default() };
        let mut writer = CaptureWriter::create(self.file(), false, &header).unwrap();
        writer.keep(Keep { snapshots, max_bytes }).unwrap();
        writer
    }
}

fn stack(writer: &mut CaptureWriter, function: &str) -> StackId {
    let frame = writer.intern_frame(function, "a.py", 1).unwrap();
    writer.intern_stack(&[frame]).unwrap()
}

fn row(stack: StackId, live: u64, came: u64) -> SiteState {
    let (live, allocated) = (Totals::certain(live, 1), Totals::certain(came, came));
    SiteState { stack, live, allocated, freed: Totals::certain(came / 2, 1), ..SiteState::default() }
}

fn snapshot(index: u32, rows: Vec<SiteState>) -> Snapshot {
    let time_ns = u64::from(index) * SECOND;
    let mut snapshot =
        Snapshot { head: SnapshotHead { index, time_ns, unix_ns: 0, reason: SnapshotReason::Tick }, rows };
    snapshot.settle();
    snapshot
}

fn read(path: &Path) -> (Vec<Snapshot>, CaptureReader) {
    let mut reader = CaptureReader::open(path).unwrap();
    let mut snapshots = Vec::new();
    while let Some(record) = reader.next() {
        if record.unwrap() == Record::Snapshot {
            snapshots.extend(reader.snapshot());
        }
    }
    assert_eq!(reader.damage().chunks, 0);
    (snapshots, reader)
}

fn came(snapshots: &[Snapshot]) -> (u64, u64) {
    let rows = snapshots.iter().flat_map(|snapshot| &snapshot.rows);
    rows.fold((0, 0), |sum, row| (sum.0 + row.allocated.bytes(), sum.1 + row.freed.count()))
}

#[test]
fn what_came_and_went_by_snapshots_that_are_thinned_out_is_with_those_that_stay() {
    let folder = Folder::new();
    let mut writer = folder.writer(true, 4, 1 << 30);
    let stacks: Vec<StackId> = (0..40).map(|n| stack(&mut writer, &format!("f{n}"))).collect();
    let (mut expected, mut taken) = ((0, 0), Vec::new());
    for index in 0..40_u32 {
        writer.time(u64::from(index) * SECOND);
        // The 17th is the highest. Each has a site of its own that is gone in the next one.
        let live = if index == 17 { 5000 } else { 100 + u64::from(index) };
        let rows = vec![row(stacks[0], live, 10), row(stacks[index as usize], 1, u64::from(index))];
        let taking = snapshot(index, rows);
        let sums = came(std::slice::from_ref(&taking));
        expected = (expected.0 + sums.0, expected.1 + sums.1);
        taken.push(taking.clone());
        assert!(writer.keep_snapshot(taking).unwrap());
        assert!(writer.snapshots_kept() <= 5, "{}", writer.snapshots_kept());
    }
    writer.finish(Trailer { reason: EndReason::Duration, ..Trailer::default() }).unwrap();
    let (snapshots, reader) = read(&folder.file());
    let indices: Vec<u32> = snapshots.iter().map(|snapshot| snapshot.head.index).collect();
    assert!(
        indices.len() <= 5 && indices.is_sorted() && [0, 17, 39].iter().all(|i| indices.contains(i)),
        "{indices:?}"
    );
    assert_eq!(came(&snapshots), expected);
    for snapshot in &snapshots {
        assert_eq!(snapshot.live(), taken[snapshot.head.index as usize].live());
    }
    assert!(reader.trailer().is_some() && reader.header().aggregated);
    let names: Vec<_> =
        reader.stacks().frames(stacks[39]).map(|f| reader.stacks().frame(f).function).collect();
    assert_eq!(names, ["f39"]);
    // Nothing is left beside it, and it is its owner's alone.
    assert_eq!(std::fs::read_dir(folder.0.path()).unwrap().count(), 1);
    let mode = std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(folder.file()).unwrap());
    assert_eq!(mode & 0o7777, 0o600);
}

#[test]
fn a_flood_of_stacks_does_not_make_the_file_larger_than_it_may_be() {
    const MOST: u64 = 2 << 20;
    let folder = Folder::new();
    let mut writer = folder.writer(true, 100, MOST);
    let mut live = Vec::new();
    for index in 0..60_u32 {
        writer.time(u64::from(index) * SECOND);
        for n in 0..3000 {
            // No two alike: nothing for lz4 to find.
            let name = format!(
                "{:032x}",
                u128::from(index * 3000 + n).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835)
            );
            live.push(row(stack(&mut writer, &name), u64::from(n % 977) + 1, 3));
        }
        let mut taking = snapshot(index, live.clone());
        taking.settle();
        let bytes = taking.live().bytes();
        assert!(writer.keep_snapshot(taking).unwrap(), "{:?}", writer.trouble());
        writer.flush().unwrap();
        let size = std::fs::metadata(folder.file()).unwrap().len();
        assert!(size <= MOST && size == writer.bytes_written(), "{size}");
        if index % 20 == 19 {
            let (snapshots, _) = read(&folder.file());
            let last = snapshots.last().unwrap();
            assert_eq!((last.head.index, last.live().bytes()), (index, bytes));
            assert!(snapshots.len() >= 3 && snapshots[0].head.index == 0);
        }
    }
    writer.finish(Trailer::default()).unwrap();
    let (snapshots, reader) = read(&folder.file());
    assert!(std::fs::metadata(folder.file()).unwrap().len() <= MOST && reader.trailer().is_some());
    let not_kept = snapshots.last().unwrap().rows.iter().find(|row| {
        reader.stacks().frames(row.stack).any(|frame| reader.stacks().frame(frame).function == NOT_KEPT)
    });
    assert!(not_kept.is_some_and(|row| row.live.bytes() > 0));
}

fn allocation(n: u64) -> Allocation {
    let address = RemoteAddr(n.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    Allocation {
        allocator: AllocatorKind::Malloc,
        tid: 1,
        address,
        size: n,
        stack: StackId::EMPTY,
        interval: 0,
    }
}

#[test]
fn a_full_file_has_no_more_events_but_snapshots_and_says_so() {
    let folder = Folder::new();
    let mut writer = folder.writer(false, 10, 1 << 20);
    for n in 0..200_000 {
        writer.allocation(allocation(n)).unwrap();
    }
    for index in 0..20 {
        assert!(writer.keep_snapshot(snapshot(index, vec![row(StackId::EMPTY, 7, 1)])).unwrap());
    }
    let counters = writer.counters();
    writer.finish(Trailer::default()).unwrap();
    assert!(std::fs::metadata(folder.file()).unwrap().len() <= 1 << 20);
    let (mut logged, mut dropped) = (0, 0);
    for record in CaptureReader::open(folder.file()).unwrap() {
        match record.unwrap() {
            Record::Allocation(event) => {
                assert_eq!((event, dropped), (allocation(logged), 0));
                logged += 1;
            }
            Record::Drop { count, reason } => {
                assert_eq!(reason, DropReason::FileFull);
                dropped += count;
            }
            _ => {}
        }
    }
    assert_eq!((logged + dropped, counters.allocations, counters.drops), (200_000, 200_000, dropped));
    assert!(logged > 10_000 && dropped > 10_000, "{logged} {dropped}");
    assert!(read(&folder.file()).0.len() >= 10);
}

/// A name of 16,000 characters in which there is nothing for lz4 to find.
fn incompressible(seed: u64) -> String {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        char::from(b'0' + (x % 75) as u8)
    };
    (0..16_000).map(|_| next()).collect()
}

#[test]
fn a_full_disk_loses_nothing_that_fits_memory() {
    let folder = Folder::new();
    let mut writer = folder.writer(true, 10, 1 << 30);
    let first = stack(&mut writer, "first");
    assert!(writer.keep_snapshot(snapshot(0, vec![row(first, 1, 1)])).unwrap());
    let disk = writer.output.file().try_clone().unwrap();
    writer.replace_file(File::options().write(true).open("/dev/full").unwrap());
    let second = stack(&mut writer, "second");
    writer.flush().unwrap();
    assert!(!writer.keep_snapshot(snapshot(1, vec![row(second, 2, 2)])).unwrap());
    assert!(writer.trouble().is_some_and(|why| why.contains("disk is full")));
    // Until there is no room in memory either: then new stacks are not told apart, and what waits grows no more.
    let mut noise = 0;
    while !writer.output.is_clogged() {
        stack(&mut writer, &incompressible(noise));
        writer.flush().unwrap();
        noise += 1;
        assert!(noise < 2000);
    }
    let waiting = writer.output.waiting_bytes();
    let not_kept = writer.keeping.as_ref().unwrap().not_kept.1;
    for more in noise..noise + 100 {
        assert_eq!(stack(&mut writer, &incompressible(more)), not_kept);
        writer.flush().unwrap();
    }
    assert_eq!((stack(&mut writer, "second"), writer.output.waiting_bytes()), (second, waiting));
    writer.replace_file(disk);
    assert!(writer.keep_snapshot(snapshot(2, vec![row(second, 2, 3)])).unwrap());
    assert_eq!(writer.trouble(), None);
    writer.finish(Trailer::default()).unwrap();
    let (snapshots, reader) = read(&folder.file());
    let indices: Vec<u32> = snapshots.iter().map(|snapshot| snapshot.head.index).collect();
    assert_eq!(indices, [0, 2]);
    let names: Vec<_> = reader.stacks().frames(second).map(|f| reader.stacks().frame(f).function).collect();
    assert_eq!(names, ["second"]);
}

#[test]
fn a_disk_that_is_full_at_the_end_is_an_error() {
    let folder = Folder::new();
    let mut writer = folder.writer(true, 10, 1 << 30);
    writer.replace_file(File::options().write(true).open("/dev/full").unwrap());
    writer.flush().unwrap();
    assert!(matches!(writer.finish(Trailer::default()), Err(CaptureError::Write { .. })));
}

#[test]
fn a_file_that_was_moved_is_not_replaced() {
    let folder = Folder::new();
    let mut writer = folder.writer(true, 3, 1 << 30);
    let elsewhere = folder.0.path().join("elsewhere");
    std::fs::rename(folder.file(), &elsewhere).unwrap();
    std::fs::write(folder.file(), "precious").unwrap();
    for index in 0..8 {
        writer.keep_snapshot(snapshot(index, vec![row(StackId::EMPTY, 1, 1)])).unwrap();
    }
    assert_eq!(std::fs::read(folder.file()).unwrap(), b"precious");
    assert_eq!(std::fs::read_dir(folder.0.path()).unwrap().count(), 2);
    // They are kept beyond their number rather than lost.
    assert_eq!(read(&elsewhere).0.len(), 8);
}

#[test]
fn threads_are_named_with_the_first_snapshot_that_has_them() {
    let folder = Folder::new();
    let mut writer = folder.writer(true, 10, 1 << 30);
    for tid in 1..1000 {
        writer.define_thread(tid, "python", &format!("Thread-{tid}")).unwrap();
    }
    let of = |tid| SiteState { tid, ..row(StackId::EMPTY, 1, 1) };
    writer.keep_snapshot(snapshot(0, vec![of(7)])).unwrap();
    writer.keep_snapshot(snapshot(1, vec![of(7), of(9)])).unwrap();
    writer.finish(Trailer::default()).unwrap();
    let records = CaptureReader::open(folder.file()).unwrap();
    let threads: Vec<u32> = records
        .filter_map(|record| match record.unwrap() {
            Record::Thread(tid) => Some(tid),
            _ => None,
        })
        .collect();
    assert_eq!(threads, [7, 9]);
}

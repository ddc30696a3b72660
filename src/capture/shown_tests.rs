//! Native frames through a writer and a reader, and what each view shows of them.

use super::*;
use crate::addr::RemoteAddr;
use crate::capture::format::{CHUNK_HEADER_LEN, PREFIX_LEN, kind};
use crate::capture::{
    Allocation, AllocatorKind, CaptureError, CaptureReader, CaptureWriter, Header, Keep, ModuleId, SiteState,
    Snapshot, SnapshotHead, SnapshotReason, Totals, Trailer,
};
use proptest::prelude::*;
use std::collections::{HashMap, HashSet};
use std::io::Cursor;
use std::path::Path;

const ALL: FrameView = FrameView { python: true, native: true, interpreter: true };
const LIBRARIES: [(&str, &[u8]); 3] =
    [("/usr/lib/libfast.so.1", &[1, 2, 3]), ("/usr/lib/libfast.so.1", &[4]), ("/usr/bin/python3.12", &[])];

/// A frame, as a test has it before it is written.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
enum Plain {
    Python(u32),
    Native(Option<u32>, u64),
    Marker,
}

fn header() -> Header {
    Header { native: true, ..Header::default() }
}

fn native(module: Option<u32>, address: u64) -> NativeFrame {
    let interpreter = module == Some(2);
    NativeFrame { module: module.map(ModuleId), address, interpreter, guessed: address.is_multiple_of(5) }
}

fn intern(writer: &mut CaptureWriter, frame: &Plain) -> FrameId {
    match frame {
        Plain::Python(line) => writer.intern_frame("f", "a.py", *line),
        Plain::Marker => writer.intern_frame("<deeper frames not kept>", "", 0),
        Plain::Native(module, address) => {
            // All modules, so that their numbers are those of the list.
            for (path, build_id) in LIBRARIES {
                writer.intern_module(path, build_id).unwrap();
            }
            writer.intern_native_frame(native(*module, *address))
        }
    }
    .unwrap()
}

/// What an address is called, where it is: of three functions, the first two inlined into the third.
fn places(address: u64) -> Vec<NativePlace> {
    let place = |function: &str, line| NativePlace {
        function: Some(function.to_owned()),
        file: Some("fast.c".to_owned()),
        line: Some(line),
    };
    match address % 4 {
        0 => Vec::new(),
        1 => vec![place("g", 3)],
        2 => vec![place("inner", 1), place("middle", 2), place("g", 3)],
        _ => vec![NativePlace { function: Some("nameless line".to_owned()), ..NativePlace::default() }],
    }
}

fn write(path: &Path, stacks: &[Vec<Plain>], flush_every: usize, named: bool) {
    let mut writer = CaptureWriter::create(path, true, &header()).unwrap();
    for (n, stack) in stacks.iter().enumerate() {
        let frames: Vec<FrameId> = stack.iter().map(|frame| intern(&mut writer, frame)).collect();
        let stack = writer.intern_stack(&frames).unwrap();
        writer.allocation(allocation(n as u64, stack)).unwrap();
        if n % flush_every == 0 {
            writer.flush().unwrap();
        }
    }
    if named {
        let frames = writer.native_frames();
        let named: Vec<_> = frames.into_iter().map(|frame| (frame, places(frame.address))).collect();
        writer.symbols(&named).unwrap();
    }
    writer.finish(Trailer::default()).unwrap();
}

fn allocation(n: u64, stack: StackId) -> Allocation {
    let address = RemoteAddr(4096 + 16 * n);
    Allocation { allocator: AllocatorKind::Malloc, tid: 1, address, size: n, stack, interval: 0 }
}

/// What one frame is shown as, innermost first.
fn expected(frame: &Plain, view: FrameView, named: bool) -> Vec<(String, String, u32, Option<String>)> {
    let (module, address) = match frame {
        Plain::Python(_) if !view.python => return Vec::new(),
        Plain::Python(line) => return vec![("f".into(), "a.py".into(), *line, None)],
        Plain::Marker => return vec![("<deeper frames not kept>".into(), String::new(), 0, None)],
        Plain::Native(module, address) => (*module, *address),
    };
    if !view.native || module == Some(2) && !view.interpreter {
        return Vec::new();
    }
    let library = module.map_or("", |module| LIBRARIES[module as usize].0);
    let short = ["libfast.so.1", "libfast.so.1", "python3.12"];
    let short = module.map_or("no file", |module| short[module as usize]);
    let mut found = if named { places(address) } else { Vec::new() };
    if found.is_empty() {
        found.push(NativePlace::default());
    }
    let text = |place: NativePlace| {
        let function = place.function.unwrap_or(format!("{address:#x} in {short}"));
        (function, place.file.unwrap_or(library.into()), place.line.unwrap_or(0), Some(library.to_owned()))
    };
    found.into_iter().map(text).collect()
}

fn text(table: &StackTable, stack: StackId) -> Vec<(String, String, u32, Option<String>)> {
    let owned = |frame: FrameText| {
        let library = match frame.kind {
            FrameKind::Python => None,
            FrameKind::Native { library } => Some(library.to_owned()),
        };
        (frame.function.to_owned(), frame.file.to_owned(), frame.line, library)
    };
    table.frames(stack).map(|id| owned(table.frame(id))).collect()
}

/// The stacks of all allocations, in their order.
fn stacks(path: &Path, options: &ReadOptions) -> (Vec<StackId>, StackTable) {
    let mut reader = CaptureReader::open_with(path, options).unwrap();
    let mut stacks = Vec::new();
    for record in reader.by_ref() {
        if let Record::Allocation(event) = record.unwrap() {
            stacks.push(event.stack);
        }
    }
    assert_eq!((reader.damage().chunks, reader.cut()), (0, None));
    (stacks, reader.into_stacks())
}

fn any_frame() -> impl Strategy<Value = Plain> {
    prop_oneof![
        4 => (1u32..4).prop_map(Plain::Python),
        4 => (0u32..3, 0u64..9).prop_map(|(module, address)| Plain::Native(Some(module), address)),
        1 => (0u64..3).prop_map(|address| Plain::Native(None, address)),
        1 => Just(Plain::Marker),
    ]
}

fn any_view() -> impl Strategy<Value = FrameView> {
    (any::<bool>(), any::<bool>(), any::<bool>()).prop_map(|(python, native, interpreter)| FrameView {
        python,
        native,
        interpreter,
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn every_view_shows_what_was_written_and_what_looks_the_same_is_the_same(
        plain in prop::collection::vec(prop::collection::vec(any_frame(), 0..7), 1..40),
        view in any_view(),
        flush_every in 1usize..20,
        named: bool,
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("c.heaptap");
        write(&path, &plain, flush_every, named);
        let (found, table) = stacks(&path, &view.into());
        let mut by_text = HashMap::new();
        for (stack, plain) in found.iter().zip(&plain) {
            let shown = text(&table, *stack);
            let mut wanted: Vec<_> = plain.iter().flat_map(|frame| expected(frame, view, named)).collect();
            if wanted.is_empty() && !plain.is_empty() {
                wanted.push((HIDDEN.into(), String::new(), 0, None));
            }
            prop_assert_eq!(&shown, &wanted);
            prop_assert_eq!(*by_text.entry(shown).or_insert(*stack), *stack);
        }
        prop_assert_eq!(found.len(), plain.len());
    }

    #[test]
    fn flipped_bits_in_native_frames_and_symbols_do_no_harm(
        flips in prop::collection::vec(any::<prop::sample::Index>(), 1..5),
        reseal: bool,
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("c.heaptap");
        let frames = (0..40).map(|n| vec![Plain::Native(Some(n % 3), u64::from(n)), Plain::Python(n)]);
        write(&path, &frames.collect::<Vec<_>>(), 7, true);
        let mut bytes = std::fs::read(&path).unwrap();
        for flip in flips {
            let bit = PREFIX_LEN * 8 + flip.index((bytes.len() - PREFIX_LEN) * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
        if reseal {
            put_checksums_right(&mut bytes);
        }
        let Ok(mut reader) = CaptureReader::from_input("test", Box::new(Cursor::new(bytes))) else {
            return Ok(());
        };
        let mut seen = 0;
        while let Some(record) = reader.next() {
            if let Record::Allocation(event) = record.unwrap() {
                seen += 1;
                text(reader.stacks(), event.stack);
            }
        }
        prop_assert!(seen == 40 || reader.cut().is_some() || reader.damage().chunks > 0 || reseal);
    }
}

/// So that what is in a chunk is believed whatever it is.
fn put_checksums_right(bytes: &mut [u8]) {
    for (at, len) in chunks(bytes) {
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&bytes[at..at + 10]);
        hasher.update(&bytes[at + CHUNK_HEADER_LEN..at + len]);
        bytes[at + 10..at + 14].copy_from_slice(&hasher.finalize().to_le_bytes());
    }
}

/// Where each chunk begins, and how long it is.
fn chunks(bytes: &[u8]) -> Vec<(usize, usize)> {
    let (mut at, mut chunks) = (PREFIX_LEN, Vec::new());
    while let Some(header) = bytes.get(at..at + CHUNK_HEADER_LEN) {
        let len = CHUNK_HEADER_LEN + u32::from_le_bytes(header[2..6].try_into().unwrap()) as usize;
        if at + len > bytes.len() {
            break;
        }
        chunks.push((at, len));
        at += len;
    }
    chunks
}

#[test]
fn a_file_without_native_frames_says_so_to_who_wants_only_them() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("c.heaptap");
    let mut writer = CaptureWriter::create(&path, true, &Header::default()).unwrap();
    assert!(matches!(writer.intern_module("/lib/x.so", &[]), Err(CaptureError::NotNative { .. })));
    assert!(matches!(writer.intern_native_frame(native(None, 1)), Err(CaptureError::NotNative { .. })));
    writer.finish(Trailer::default()).unwrap();
    let only_native = FrameView { python: false, ..ALL }.into();
    let refused = CaptureReader::open_with(&path, &only_native).err().unwrap();
    assert!(matches!(refused, CaptureError::NoNative { .. }) && refused.hint().is_some());
}

/// Can be read once, as a pipe.
struct Pipe(Cursor<Vec<u8>>);

impl std::io::Read for Pipe {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        self.0.read(buf)
    }
}

impl std::io::Seek for Pipe {
    fn seek(&mut self, _: std::io::SeekFrom) -> std::io::Result<u64> {
        Err(std::io::ErrorKind::NotSeekable.into())
    }
}

#[test]
fn what_comes_through_a_pipe_has_its_names_too() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("c.heaptap");
    write(&path, &[vec![Plain::Native(Some(0), 2), Plain::Python(1)]], 1, true);
    let pipe = Pipe(Cursor::new(std::fs::read(&path).unwrap()));
    let mut reader = CaptureReader::from_input("pipe", Box::new(pipe)).unwrap();
    assert!(reader.by_ref().all(|record| record.is_ok()) && reader.trailer().is_some());
    let functions: Vec<_> = text(reader.stacks(), StackId(4)).into_iter().map(|frame| frame.0).collect();
    assert_eq!(functions, ["inner", "middle", "g", "f"]);
}

#[test]
fn damaged_symbols_are_told_of_and_cost_names_only() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("c.heaptap");
    write(&path, &[vec![Plain::Native(Some(0), 1), Plain::Python(1)]], 1, true);
    let bytes = std::fs::read(&path).unwrap();
    let (at, len) = chunks(&bytes).into_iter().find(|(at, _)| bytes[*at] == kind::SYMBOLS).unwrap();
    let mut sealed = Vec::new();
    crate::capture::chunk::seal(kind::SYMBOLS, &[0, 1, 1, 2, 1, 9], &mut sealed);
    let mut flipped = bytes[at..at + len].to_vec();
    flipped[len - 1] ^= 1;
    for damaged in [sealed, flipped] {
        let other = [&bytes[..at], &damaged, &bytes[at + len..]].concat();
        let mut reader = CaptureReader::from_input("test", Box::new(Cursor::new(other))).unwrap();
        let stacks = reader.by_ref().filter_map(|record| match record.unwrap() {
            Record::Allocation(event) => Some(event.stack),
            _ => None,
        });
        let stacks: Vec<StackId> = stacks.collect();
        assert!((reader.damage().chunks, reader.trailer().is_some()) == (1, true), "{:?}", reader.damage());
        assert_eq!(reader.damage().first.as_ref().unwrap().offset, at as u64);
        assert_eq!(text(reader.stacks(), stacks[0])[0].0, "0x1 in libfast.so.1");
    }
}

#[test]
fn native_frames_in_a_file_that_says_it_has_none_are_not_believed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("c.heaptap");
    write(&path, &[vec![Plain::Native(Some(0), 1)]], 1, true);
    let bytes = std::fs::read(&path).unwrap();
    let header_len = u32::from_le_bytes(bytes[PREFIX_LEN + 2..PREFIX_LEN + 6].try_into().unwrap()) as usize;
    let events = PREFIX_LEN + CHUNK_HEADER_LEN + header_len;
    for (version, header, damaged) in
        [(5, r#"{"native":true}"#, 0), (5, "{}", 1), (4, r#"{"native":true}"#, 1)]
    {
        let mut other = crate::capture::writer::prefix(version, 0).to_vec();
        crate::capture::chunk::seal(kind::HEADER, header.as_bytes(), &mut other);
        other.extend_from_slice(&bytes[events..]);
        let mut reader = CaptureReader::from_input("test", Box::new(Cursor::new(other))).unwrap();
        let allocations =
            reader.by_ref().filter(|record| matches!(record, Ok(Record::Allocation(_)))).count();
        assert_eq!((reader.damage().chunks, allocations as u64), (damaged, 1 - damaged));
    }
}

/// Answers every question, and remembers it.
#[derive(Default)]
struct Asked(std::cell::RefCell<Vec<(String, Vec<u8>, u64)>>);

impl Symbolizer for Asked {
    fn places(&self, path: &str, build_id: &[u8], address: u64) -> Vec<NativePlace> {
        self.0.borrow_mut().push((path.to_owned(), build_id.to_owned(), address));
        let place = NativePlace { function: Some("looked_up".to_owned()), ..NativePlace::default() };
        vec![place; 100]
    }
}

#[test]
fn names_that_the_file_does_not_have_are_asked_for_once_and_those_hidden_never() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("c.heaptap");
    let mut writer = CaptureWriter::create(&path, true, &header()).unwrap();
    let frames = [Plain::Native(Some(0), 1), Plain::Native(Some(1), 2), Plain::Native(Some(2), 3)];
    let mut frames: Vec<FrameId> = frames.iter().map(|frame| intern(&mut writer, frame)).collect();
    frames.push(writer.intern_native_frame(native(None, 9)).unwrap());
    let stack = writer.intern_stack(&frames).unwrap();
    let twice = writer.intern_call(stack, frames[1]).unwrap();
    writer.allocation(allocation(1, twice)).unwrap();
    writer.symbols(&[(native(Some(0), 1), places(1))]).unwrap();
    drop(writer);
    let asked = Rc::new(Asked::default());
    let options = ReadOptions { symbolizer: Some(asked.clone()), ..ReadOptions::default() };
    let mut reader = CaptureReader::open_with(&path, &options).unwrap();
    let event = reader
        .by_ref()
        .find_map(|record| match record.unwrap() {
            Record::Allocation(event) => Some(event),
            _ => None,
        })
        .unwrap();
    assert_eq!(*asked.0.borrow(), [(LIBRARIES[1].0.to_owned(), vec![4], 2)]);
    let text = text(reader.stacks(), event.stack);
    let functions: Vec<&str> = text.iter().map(|frame| &*frame.0).collect();
    let looked_up = ["looked_up"; MAX_PLACES];
    assert_eq!(functions, [&looked_up[..], &["g"], &looked_up, &["0x9 in no file"]].concat());
}

#[test]
fn frames_of_many_inlined_functions_are_bounded() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("c.heaptap");
    let mut writer = CaptureWriter::create(&path, true, &header()).unwrap();
    writer.intern_module("/lib/deep.so", &[]).unwrap();
    let frame = native(Some(0), 1);
    let id = writer.intern_native_frame(frame).unwrap();
    let place = |n: u32| NativePlace { function: Some(format!("f{n}")), line: Some(n), file: None };
    writer.symbols(&[(frame, (0..200).map(place).collect())]).unwrap();
    let (nodes, mut stack) = (40_000, StackId::EMPTY);
    for _ in 0..nodes {
        stack = writer.intern_call(stack, id).unwrap();
    }
    writer.allocation(allocation(1, stack)).unwrap();
    writer.finish(Trailer::default()).unwrap();
    let (found, table) = stacks(&path, &ReadOptions::default());
    let shown = table.frames(found[0]).count();
    assert!(shown > 1 << 20 && shown as u64 <= INLINED + (1 + INLINED_PER_NODE) * nodes, "{shown}");
    // What there is no room for is shown as the function it was inlined into.
    assert_eq!(table.frame(table.frames(found[0]).next().unwrap()).function, "f63");
    assert_eq!(table.frame_count(), MAX_PLACES);
}

fn row(stack: StackId, live: u64) -> SiteState {
    SiteState { stack, live: Totals::certain(live, 1), ..SiteState::default() }
}

fn snapshot(index: u32, rows: Vec<SiteState>) -> Snapshot {
    let time_ns = u64::from(index) * 1_000_000_000;
    let head = SnapshotHead { index, time_ns, unix_ns: 0, reason: SnapshotReason::Tick };
    let mut snapshot = Snapshot { head, rows };
    snapshot.settle();
    snapshot
}

/// All snapshots as bytes live by text of their stacks.
fn live(path: &Path, view: FrameView) -> Vec<HashMap<Vec<String>, u64>> {
    let mut reader = CaptureReader::open_with(path, &view.into()).unwrap();
    let mut all = Vec::new();
    while let Some(record) = reader.next() {
        if record.unwrap() == Record::Snapshot {
            let snapshot = reader.snapshot().unwrap();
            let sites: HashSet<_> = snapshot.rows.iter().map(SiteState::site).collect();
            assert_eq!(sites.len(), snapshot.rows.len(), "two rows of one site");
            let functions = |row: &SiteState| {
                let text = text(reader.stacks(), row.stack);
                (text.into_iter().map(|frame| frame.0).collect(), row.live.bytes())
            };
            all.push(snapshot.rows.iter().map(functions).collect());
        }
    }
    assert_eq!(reader.damage().chunks, 0);
    all
}

#[test]
fn rows_of_snapshots_that_look_the_same_are_one_also_after_the_file_was_rewritten() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("c.heaptap");
    let mut writer = CaptureWriter::create(&path, true, &Header { aggregated: true, ..header() }).unwrap();
    writer.keep(Keep { snapshots: 3, max_bytes: 1 << 20 }).unwrap();
    let mut stack = |frames: &[Plain]| {
        let frames: Vec<FrameId> = frames.iter().map(|frame| intern(&mut writer, frame)).collect();
        writer.intern_stack(&frames).unwrap()
    };
    let (python, eval) = (Plain::Python(1), Plain::Native(Some(2), 7));
    // The last one is another address of the same line.
    let stacks = [
        stack(&[Plain::Native(Some(0), 1), eval.clone(), python.clone()]),
        stack(&[Plain::Native(Some(0), 5), python.clone()]),
        stack(&[python.clone(), eval]),
        stack(&[python]),
    ];
    for index in 0..20 {
        let rows = stacks.iter().enumerate().map(|(n, stack)| row(*stack, 1 << (4 * n))).collect();
        assert!(writer.keep_snapshot(snapshot(index, rows)).unwrap());
    }
    let named: Vec<_> =
        writer.native_frames().into_iter().map(|frame| (frame, places(frame.address))).collect();
    writer.symbols(&named).unwrap();
    writer.finish(Trailer::default()).unwrap();
    let functions = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
    let shown = live(&path, FrameView::default());
    assert!((3..=4).contains(&shown.len()), "{}", shown.len());
    let merged = HashMap::from([(functions(&["g", "f"]), 0x11), (functions(&["f"]), 0x1100)]);
    assert!(shown.iter().all(|snapshot| *snapshot == merged), "{shown:?}");
    let only_python = live(&path, FrameView { native: false, ..FrameView::default() });
    assert!(only_python.iter().all(|snapshot| *snapshot == HashMap::from([(functions(&["f"]), 0x1111)])));
    let whole = live(&path, ALL);
    assert!(whole.iter().all(|snapshot| snapshot.len() == 4 && snapshot.values().sum::<u64>() == 0x1111));
}

#[test]
fn a_full_file_keeps_what_it_has_of_native_code_and_takes_no_more() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("c.heaptap");
    const MOST: u64 = 400 << 10;
    let mut writer = CaptureWriter::create(&path, true, &Header { aggregated: true, ..header() }).unwrap();
    writer.keep(Keep { snapshots: 3, max_bytes: MOST }).unwrap();
    let module = writer.intern_module("/lib/first.so", &[7]).unwrap();
    let frame = |module, address| NativeFrame { module, address, interpreter: false, guessed: false };
    let first = writer.intern_native_frame(frame(Some(module), 1)).unwrap();
    let mut last = first;
    for n in 2..40_000_u64 {
        last =
            writer.intern_native_frame(frame(Some(module), n.wrapping_mul(0x9e37_79b9_7f4a_7c15))).unwrap();
    }
    // Now there is no room for definitions.
    assert_eq!(writer.intern_frame("new", "b.py", 1).unwrap(), last);
    assert_eq!(writer.intern_native_frame(frame(Some(module), 1)).unwrap(), first);
    assert_eq!(writer.intern_module("/lib/first.so", &[7]).unwrap(), module);
    let late = writer.intern_module("/lib/late.so", &[]).unwrap();
    assert_eq!(writer.intern_native_frame(frame(Some(late), 1)).unwrap(), last);
    assert!(writer.native_frames().len() < 40_000 && writer.native_frames()[0] == frame(Some(module), 1));
    // Names have a tenth of the file, and what of them is too much breaks nothing.
    let name = |n: u64| {
        let noise = (0..16).map(|i| format!("{:x}", (n + i).wrapping_mul(0x9e37_79b9_7f4a_7c15)));
        vec![NativePlace { function: Some(noise.collect()), ..NativePlace::default() }]
    };
    for some in writer.native_frames().chunks(50) {
        let named: Vec<_> = some.iter().map(|frame| (*frame, name(frame.address))).collect();
        writer.symbols(&named).unwrap();
    }
    writer.finish(Trailer::default()).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let chunks = chunks(&bytes).into_iter();
    let names: usize = chunks.filter(|(at, _)| bytes[*at] == kind::SYMBOLS).map(|(_, len)| len).sum();
    assert!(bytes.len() as u64 <= MOST && (MOST / 11..MOST / 10).contains(&(names as u64)), "{names}");
    let (_, table) = stacks(&path, &ReadOptions::default());
    let unnamed = (0..table.frame_count())
        .filter(|id| table.frame(FrameId(*id as u32)).function.ends_with(" in first.so"));
    assert!((1..table.frame_count() - 50).contains(&unnamed.count()));
}

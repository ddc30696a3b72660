//! [`CaptureWriter`]: records in, whole chunks out.
//!
//! Crash consistency: a chunk is handed to the kernel by one call once it is complete, so a file
//! whose writer was killed ends with a whole chunk or with one that fails its checksum. Memory: one
//! chunk three times (6 MiB), what is expected of its events (6.3 MiB), and the tables of distinct strings, frames and
//! stacks.

use super::chunk;
use super::create::create;
use super::encode::ChunkEncoder;
use super::error::CaptureError;
use super::format::{
    CHUNK_EVENTS, CHUNK_TARGET_LEN, FLAG_AGGREGATED, FLAG_SAMPLED, MAGIC, MAX_RAW_LEN, MAX_STRING_LEN,
    VERSION, kind,
};
use super::gauges::{self, Gauges};
use super::header::Header;
use super::intern::{Full, Interned, Interner, cut};
use super::output::Output;
use super::record::{
    Allocation, DropReason, FrameId, Free, FreeUnknown, GapReason, StackId, StringId, Unmap,
};
use super::snapshot::Snapshot;
use super::trailer::{Counters, Trailer};
use super::writer_keeping::Keeping;
use std::path::Path;

/// Times closer together than this are one.
const TIME_STEP_NS: u64 = 1_000_000;
/// Room kept at the end of a chunk for one more record (the longest has two strings).
const _: () = assert!(CHUNK_TARGET_LEN + 4 * MAX_STRING_LEN < MAX_RAW_LEN);

/// Moments in a chunk: at their longest (10 bytes a number) they fit.
const GAUGES_PER_CHUNK: usize = 4096;

/// Writes one capture file. Any error is final: what was written before stays readable, and every
/// later call fails with [`CaptureError::Closed`].
pub struct CaptureWriter {
    pub(super) output: Output,
    /// Whether the file says that allocations may be samples.
    sampled: bool,
    /// Whether it says that there are native frames.
    pub(super) native: bool,
    /// Whether there is an event log. Without one, events are only counted.
    pub(super) logs_events: bool,
    pub(super) encoder: ChunkEncoder,
    pub(super) interner: Interner,
    raw: Vec<u8>,
    pub(super) packed: Vec<u8>,
    pub(super) counters: Counters,
    pub(super) now_ns: u64,
    /// The last time put into the current chunk.
    written_time: Option<u64>,
    /// Of a capture with snapshots: how it is kept small.
    pub(super) keeping: Option<Box<Keeping>>,
}

impl CaptureWriter {
    /// Creates `path` (mode 0600) and writes the header. An existing file is an error unless `force`,
    /// and anything but a regular file or `/dev/null` is an error always. Samples can be written only if the
    /// header has a `sampling_mean_bytes`, native frames only if it says `native`, and no events if it says `aggregated`: they are
    /// counted then.
    pub fn create(path: impl AsRef<Path>, force: bool, header: &Header) -> Result<Self, CaptureError> {
        let path = path.as_ref().to_owned();
        let document =
            serde_json::to_vec(&header.clamped()).map_err(|error| document_error(&path, "header", error))?;
        let file = create(&path, force)?;
        let mut writer = Self {
            output: Output::new(path, file),
            sampled: header.sampling_mean_bytes.is_some(),
            native: header.native,
            logs_events: !header.aggregated,
            encoder: ChunkEncoder::new(),
            interner: Interner::default(),
            raw: Vec::new(),
            packed: Vec::new(),
            counters: Counters::default(),
            now_ns: 0,
            written_time: None,
            keeping: None,
        };
        let sampled = if writer.sampled { FLAG_SAMPLED } else { 0 };
        let aggregated = if header.aggregated { FLAG_AGGREGATED } else { 0 };
        writer.packed.extend_from_slice(&prefix(VERSION, sampled | aggregated));
        writer.document("header", kind::HEADER, &document)?;
        Ok(writer)
    }

    /// The id of a code location. `line` 0 means unknown.
    pub fn intern_frame(&mut self, function: &str, file: &str, line: u32) -> Result<FrameId, CaptureError> {
        if self.is_closed_to_definitions()? {
            return Ok(self.known_frame(function, file, line));
        }
        let function = self.intern_string(function)?;
        let file = self.intern_string(file)?;
        match self.interner.frame(function, file, line) {
            Ok(Interned::Known(id)) => Ok(id),
            Ok(Interned::New(id)) => {
                self.room()?;
                self.encoder.frame(id, function, file, line);
                Ok(id)
            }
            Err(full) => Err(self.full(full)),
        }
    }

    /// The id of a stack, given innermost frame first. Costs one look-up per frame; an id that this
    /// writer did not give out is taken for the end of the stack.
    pub fn intern_stack(&mut self, innermost_first: &[FrameId]) -> Result<StackId, CaptureError> {
        let mut stack = StackId::EMPTY;
        for &frame in innermost_first.iter().rev() {
            stack = self.intern_call(stack, frame)?;
        }
        Ok(stack)
    }

    /// The id of the stack that is `caller` with `frame` on top: for recorders that remember their
    /// threads' last stacks and walk only what changed.
    pub fn intern_call(&mut self, caller: StackId, frame: FrameId) -> Result<StackId, CaptureError> {
        let known = (frame.0 as usize) < self.interner.frame_count()
            && (caller.0 as usize) <= self.interner.node_count();
        if !known {
            return Ok(caller);
        }
        if self.is_closed_to_definitions()? {
            return Ok(self.known_node(caller, frame));
        }
        match self.interner.node(caller, frame) {
            Ok(Interned::Known(id)) => Ok(id),
            Ok(Interned::New(id)) => {
                self.room()?;
                self.encoder.node(id, caller, frame);
                Ok(id)
            }
            Err(full) => Err(self.full(full)),
        }
    }

    /// Names a thread; an empty name is an unknown one. May be said again when the name changes.
    /// In a file without an event log the names are written with the first snapshot that has the thread.
    pub fn define_thread(&mut self, tid: u32, os_name: &str, python_name: &str) -> Result<(), CaptureError> {
        if self.keeps_names_back(tid, os_name, python_name) {
            return Ok(());
        }
        self.room()?;
        self.encoder.thread(tid, &cut(os_name, MAX_STRING_LEN), &cut(python_name, MAX_STRING_LEN));
        Ok(())
    }

    /// Nanoseconds since the start, true of the events that follow. Cheap to call before every event:
    /// a record is made when a millisecond has passed. A time before the last is taken for the last.
    pub fn time(&mut self, ns_since_start: u64) {
        self.now_ns = self.now_ns.max(ns_since_start);
    }

    /// Memory was handed out.
    pub fn allocation(&mut self, event: Allocation) -> Result<(), CaptureError> {
        let is_sample = event.interval > 0 && !event.allocator.is_ranged();
        if is_sample && !self.sampled {
            return Err(CaptureError::NotSampled { path: self.output.path().to_owned() });
        }
        self.counters.samples += u64::from(is_sample);
        self.counters.allocations += 1;
        if self.begin_event()? {
            self.encoder.allocation(&event);
        }
        Ok(())
    }

    /// A block of this capture was given back.
    pub fn free(&mut self, event: Free) -> Result<(), CaptureError> {
        self.counters.frees += 1;
        if self.begin_event()? {
            self.encoder.free(&event);
        }
        Ok(())
    }

    /// A block from before the attach was given back.
    pub fn free_unknown(&mut self, event: FreeUnknown) -> Result<(), CaptureError> {
        self.counters.frees_from_before += 1;
        if self.begin_event()? {
            self.encoder.free_unknown(&event);
        }
        Ok(())
    }

    /// A range was unmapped.
    pub fn unmap(&mut self, event: Unmap) -> Result<(), CaptureError> {
        self.counters.unmaps += 1;
        if self.begin_event()? {
            self.encoder.unmap(&event);
        }
        Ok(())
    }

    /// `count` events are missing here.
    pub fn dropped(&mut self, count: u64, reason: DropReason) -> Result<(), CaptureError> {
        self.counters.drops = self.counters.drops.saturating_add(count);
        if let Some(keeping) = &mut self.keeping {
            keeping.dropped(count, reason);
            return self.output.check();
        }
        self.put_dropped(count, reason)
    }

    /// Nothing was recorded for a while.
    pub fn gap(&mut self, duration_ns: u64, reason: GapReason) -> Result<(), CaptureError> {
        self.begin_record()?;
        self.counters.gaps += 1;
        self.encoder.gap(duration_ns, reason);
        Ok(())
    }

    /// A snapshot. Its stacks are this writer's.
    pub fn snapshot(&mut self, snapshot: &Snapshot) -> Result<(), CaptureError> {
        // The definitions that it uses come first.
        self.flush()?;
        snapshot.encode(|part| {
            chunk::seal(kind::SNAPSHOT, part, &mut self.packed);
            self.output.write(&mut self.packed)
        })
    }

    /// Gauges, oldest first.
    pub fn gauges(&mut self, gauges: &[Gauges]) -> Result<(), CaptureError> {
        self.check_open()?;
        for some in gauges.chunks(GAUGES_PER_CHUNK) {
            chunk::seal(kind::GAUGES, &gauges::encode(some), &mut self.packed);
            self.write_beside_snapshots()?;
        }
        Ok(())
    }

    /// What this writer has counted so far (only the counters that it sees itself).
    pub fn counters(&self) -> Counters {
        // The one for stacks that are not kept is none.
        let nodes = self.interner.node_count() - usize::from(self.keeping.is_some());
        Counters { distinct_stacks: nodes as u64, ..self.counters }
    }

    /// Bytes of the file so far.
    pub fn bytes_written(&self) -> u64 {
        self.output.offset()
    }

    /// Hands the records so far to the kernel. Called about once a second by the recorder, so that a
    /// kill loses no more than that.
    pub fn flush(&mut self) -> Result<(), CaptureError> {
        self.check_open()?;
        if self.encoder.is_empty() {
            // What waits for room on the disk may have it by now.
            return if self.output.is_waiting() { self.write_beside_snapshots() } else { Ok(()) };
        }
        self.encoder.finish(&mut self.raw);
        chunk::seal(kind::EVENTS, &self.raw, &mut self.packed);
        self.raw.clear();
        self.written_time = None;
        if let Some(keeping) = &mut self.keeping {
            keeping.keeper.log_bytes += self.packed.len() as u64;
        }
        self.write_beside_snapshots()
    }

    /// Writes what is left and the trailer. The counters that the writer sees itself replace those
    /// given.
    pub fn finish(mut self, trailer: Trailer) -> Result<(), CaptureError> {
        self.tell_dropped(true)?;
        self.flush()?;
        let own = self.counters();
        let counters = Counters {
            events: own.events,
            allocations: own.allocations,
            samples: own.samples,
            frees: own.frees,
            frees_from_before: own.frees_from_before,
            unmaps: own.unmaps,
            drops: own.drops,
            gaps: own.gaps,
            distinct_stacks: own.distinct_stacks,
            ..trailer.counters
        };
        let document = serde_json::to_vec(&Trailer { counters, ..trailer })
            .map_err(|error| document_error(self.output.path(), "trailer", error))?;
        self.document("trailer", kind::TRAILER, &document)?;
        self.output.require_written()
    }

    /// Lets a test write into a device that fails.
    #[cfg(test)]
    pub(super) fn replace_file(&mut self, file: std::fs::File) {
        let offset = self.output.offset();
        self.output.replace(file, offset);
    }

    fn intern_string(&mut self, text: &str) -> Result<StringId, CaptureError> {
        let text = cut(text, MAX_STRING_LEN);
        match self.interner.string(&text) {
            Ok(Interned::Known(id)) => Ok(id),
            Ok(Interned::New(id)) => {
                self.room()?;
                self.encoder.string(id, &text);
                Ok(id)
            }
            Err(full) => Err(self.full(full)),
        }
    }

    /// Counts an event. Whether it is to be put into the log.
    fn begin_event(&mut self) -> Result<bool, CaptureError> {
        self.counters.events += 1;
        if !self.logs_events {
            self.count_unlogged();
            return self.output.check().map(|()| false);
        }
        if self.keeping.is_some() && !self.may_log_events()? {
            self.count_unlogged();
            return Ok(false);
        }
        self.begin_record()?;
        Ok(true)
    }

    pub(super) fn put_dropped(&mut self, count: u64, reason: DropReason) -> Result<(), CaptureError> {
        self.begin_record()?;
        self.encoder.dropped(count, reason);
        Ok(())
    }

    /// Makes room, and states the time if it is due.
    fn begin_record(&mut self) -> Result<(), CaptureError> {
        self.room()?;
        let due = match self.written_time {
            Some(written) => self.now_ns - written >= TIME_STEP_NS,
            None => self.now_ns > 0,
        };
        if due {
            self.encoder.time(self.now_ns);
            self.written_time = Some(self.now_ns);
        }
        Ok(())
    }

    pub(super) fn room(&mut self) -> Result<(), CaptureError> {
        let full = self.encoder.len() >= CHUNK_TARGET_LEN || self.encoder.events() == CHUNK_EVENTS;
        if full { self.flush() } else { self.check_open() }
    }

    fn check_open(&self) -> Result<(), CaptureError> {
        self.output.check()
    }

    pub(super) fn full(&mut self, Full(what): Full) -> CaptureError {
        CaptureError::TooMany { path: self.output.path().to_owned(), what }
    }

    fn document(&mut self, what: &'static str, kind: u8, document: &[u8]) -> Result<(), CaptureError> {
        if document.len() > MAX_RAW_LEN {
            let why = format!("{} bytes are more than a chunk holds", document.len());
            return Err(CaptureError::Document { path: self.output.path().to_owned(), what, why });
        }
        chunk::seal(kind, document, &mut self.packed);
        self.output.write(&mut self.packed)
    }
}

fn document_error(path: &Path, what: &'static str, error: serde_json::Error) -> CaptureError {
    CaptureError::Document { path: path.to_owned(), what, why: error.to_string() }
}

/// The first sixteen bytes of a file.
pub(super) fn prefix(version: u16, flags: u16) -> [u8; super::format::PREFIX_LEN] {
    let mut bytes = [0; super::format::PREFIX_LEN];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..10].copy_from_slice(&version.to_le_bytes());
    bytes[10..12].copy_from_slice(&flags.to_le_bytes());
    let crc = crc32fast::hash(&bytes[..12]);
    bytes[12..].copy_from_slice(&crc.to_le_bytes());
    bytes
}

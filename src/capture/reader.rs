//! [`CaptureReader`]: a file to records, in one pass.
//!
//! What it owes: a file cut anywhere gives all of its whole chunks; a damaged chunk loses itself; a
//! hostile file gives an error, never a panic. Memory is two chunks (4 MiB), what is expected of the events of one
//! (`predict`, 5.3 MiB) and the tables, which grow with the bytes of the definitions read (lz4 can hold 255 of them in
//! one byte of the file).
//! It knows chunks and documents; the records of each version are in a module of their own (`v1`, `v2`, `v3`, `v5`), and of what is
//! shown of stacks with native frames, `shown` knows.

use super::chunk::ChunkHeader;
use super::error::CaptureError;
use super::format::{FLAG_AGGREGATED, FLAG_SAMPLED, MAGIC, PREFIX_LEN, REQUIRED_FLAGS, VERSION, kind};
use super::gauges::{self, Gauges};
use super::header::Header;
use super::reader_chunks::{Found, fill, possible_bytes};
use super::record::{Allocation, Record};
use super::shown::{ReadOptions, Shown};
use super::snapshot::{Snapshot, SnapshotHead};
use super::snapshot_columns::{SnapshotPart, Wanted};
use super::snapshot_parts::{Assembler, HEAD_LEN, Taken};
use super::stack_table::StackTable;
use super::trailer::Trailer;
use super::{v1, v2, v3};
use std::fs::File;
use std::io::{BufReader, Read, Seek};
use std::path::{Path, PathBuf};

/// What a capture is read from.
pub trait Input: Read + Seek {}

impl<T: Read + Seek> Input for T {}

/// Where a file stops making sense.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CutShort {
    /// Byte of the file from which nothing was read.
    pub offset: u64,
    /// Why.
    pub why: String,
}

/// Chunks in the middle that were lost, while what follows could be read.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Damage {
    /// How many.
    pub chunks: u64,
    /// The first of them.
    pub first: Option<CutShort>,
}

/// Chunks with a wrong checksum and nothing good behind them yet.
struct Suspect {
    offset: u64,
    chunks: u64,
    /// The bytes they may have held.
    bytes: u64,
}

/// Reads one capture. Iterate for the records; [`trailer`](Self::trailer), [`cut`](Self::cut) and
/// [`damage`](Self::damage) are known once the iterator has ended.
pub struct CaptureReader {
    pub(super) path: PathBuf,
    pub(super) input: Box<dyn Input>,
    pub(super) offset: u64,
    header: Header,
    tables: StackTable,
    /// Of a capture with native frames: what is shown of `tables`.
    shown: Option<Box<Shown>>,
    decoder: Decoder,
    pub(super) stored: Vec<u8>,
    pub(super) raw: Vec<u8>,
    pub(super) chunk_offset: u64,
    in_events: bool,
    /// What the chunk just read came to, other than events.
    waiting: Option<Record>,
    assembler: Assembler,
    snapshot: Option<Snapshot>,
    gauges: Vec<Gauges>,
    done: bool,
    suspect: Option<Suspect>,
    trailer: Option<Trailer>,
    cut: Option<CutShort>,
    damage: Damage,
}

/// The records of the file's version.
enum Decoder {
    V1(v1::ChunkDecoder),
    V2(v2::ChunkDecoder),
    V3(Box<v3::ChunkDecoder>),
}

impl Decoder {
    fn reset(&mut self) {
        match self {
            Self::V1(decoder) => decoder.reset(),
            Self::V2(decoder) => decoder.reset(),
            Self::V3(decoder) => decoder.reset(),
        }
    }

    fn next(&mut self, raw: &[u8], tables: &mut StackTable) -> Result<Option<Record>, &'static str> {
        match self {
            Self::V1(decoder) => decoder.next(raw, tables),
            Self::V2(decoder) => decoder.next(raw, tables),
            Self::V3(decoder) => decoder.next(raw, tables),
        }
    }
}

/// The version from which there may be native frames.
const NATIVE_SINCE: u16 = 5;

impl CaptureReader {
    /// Opens a file and reads its header.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, CaptureError> {
        Self::open_with(path, &ReadOptions::default())
    }

    /// The same, with a view of its stacks.
    pub fn open_with(path: impl AsRef<Path>, options: &ReadOptions) -> Result<Self, CaptureError> {
        let path = path.as_ref();
        let file = File::open(path).map_err(|source| CaptureError::Open { path: path.to_owned(), source })?;
        Self::from_input_with(path, Box::new(BufReader::new(file)), options)
    }

    /// Reads a capture from anything; `name` stands for its path in errors.
    pub fn from_input(name: impl AsRef<Path>, input: Box<dyn Input>) -> Result<Self, CaptureError> {
        Self::from_input_with(name, input, &ReadOptions::default())
    }

    /// The same, with a view of its stacks.
    pub fn from_input_with(
        name: impl AsRef<Path>,
        input: Box<dyn Input>,
        options: &ReadOptions,
    ) -> Result<Self, CaptureError> {
        let mut reader = Self {
            path: name.as_ref().to_owned(),
            input,
            offset: 0,
            header: Header::default(),
            tables: StackTable::default(),
            shown: None,
            decoder: Decoder::V1(v1::ChunkDecoder::new()),
            stored: Vec::new(),
            raw: Vec::new(),
            chunk_offset: 0,
            in_events: false,
            waiting: None,
            assembler: Assembler::default(),
            snapshot: None,
            gauges: Vec::new(),
            done: false,
            suspect: None,
            trailer: None,
            cut: None,
            damage: Damage::default(),
        };
        let version = reader.read_prefix()?;
        reader.read_header()?;
        if version >= NATIVE_SINCE && reader.header.native {
            if let Decoder::V3(decoder) = &mut reader.decoder {
                decoder.allow_native();
            }
            let symbols = reader.read_symbols()?;
            reader.shown = Some(Box::new(Shown::new(options.clone(), symbols)));
        } else if !options.view.python {
            return Err(CaptureError::NoNative { path: reader.path });
        }
        Ok(reader)
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The facts of the run.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The tables as far as they were read, with the stacks that are shown.
    pub fn stacks(&self) -> &StackTable {
        self.shown.as_ref().map_or(&self.tables, |shown| shown.table())
    }

    /// Gives up the reader for its tables.
    pub fn into_stacks(self) -> StackTable {
        self.shown.map_or(self.tables, |shown| shown.into_table())
    }

    /// The snapshot that the last record told of, for the one who asks first.
    pub fn snapshot(&mut self) -> Option<Snapshot> {
        self.snapshot.take()
    }

    /// When and why it was taken, for everyone who asks before.
    pub fn snapshot_head(&self) -> Option<SnapshotHead> {
        self.snapshot.as_ref().map(|snapshot| snapshot.head)
    }

    /// What the rows of snapshots have from here on; without it, everything.
    pub fn want(&mut self, wanted: Wanted) {
        self.assembler.want(wanted);
    }

    /// Has a snapshot come as one [`Record::Snapshot`] for each of its parts ([`part`](Self::part)), so that it need not be held as a
    /// whole. Whether it is whole is then known at its last part only.
    pub fn give_parts(&mut self) {
        self.assembler.give_parts();
    }

    /// The part that the last record told of, where snapshots come in parts.
    pub fn part(&self) -> &SnapshotPart {
        self.assembler.part()
    }

    /// The gauges that the last record told of.
    pub fn gauges(&self) -> &[Gauges] {
        &self.gauges
    }

    /// How the run ended; `None` before the end, and for a file that was cut.
    pub fn trailer(&self) -> Option<&Trailer> {
        self.trailer.as_ref()
    }

    /// Set when the file ends without a trailer.
    pub fn cut(&self) -> Option<&CutShort> {
        self.cut.as_ref()
    }

    /// What was lost in the middle.
    pub fn damage(&self) -> &Damage {
        &self.damage
    }

    /// Gives the version.
    fn read_prefix(&mut self) -> Result<u16, CaptureError> {
        let not_a_capture = |why| CaptureError::NotACapture { path: self.path.clone(), why };
        let mut bytes = [0; PREFIX_LEN];
        let got = fill(&mut self.input, &mut bytes).map_err(|source| CaptureError::Read {
            path: self.path.clone(),
            offset: 0,
            source,
        })?;
        if got == 0 {
            return Err(not_a_capture("it is empty"));
        }
        if got < PREFIX_LEN || bytes[..8] != MAGIC {
            return Err(not_a_capture("it does not begin as one"));
        }
        let crc = u32::from_le_bytes([bytes[12], bytes[13], bytes[14], bytes[15]]);
        if crc32fast::hash(&bytes[..12]) != crc {
            return Err(not_a_capture("its first sixteen bytes are damaged"));
        }
        let version = u16::from_le_bytes([bytes[8], bytes[9]]);
        let flags = u16::from_le_bytes([bytes[10], bytes[11]]);
        let known_flags;
        (self.decoder, known_flags) = match version {
            0 => return Err(not_a_capture("its version is 0")),
            1 => (Decoder::V1(v1::ChunkDecoder::new()), 0),
            2 => (Decoder::V2(v2::ChunkDecoder::new(flags & FLAG_SAMPLED != 0)), FLAG_SAMPLED),
            3 => (Decoder::V3(Box::new(v3::ChunkDecoder::new(flags & FLAG_SAMPLED != 0))), FLAG_SAMPLED),
            4 | 5 => {
                let sampled = flags & FLAG_SAMPLED != 0;
                (Decoder::V3(Box::new(v3::ChunkDecoder::new(sampled))), FLAG_SAMPLED | FLAG_AGGREGATED)
            }
            newer => {
                debug_assert!(newer > VERSION);
                return Err(CaptureError::NewerVersion { path: self.path.clone(), found: newer });
            }
        };
        if flags & REQUIRED_FLAGS & !known_flags != 0 {
            return Err(CaptureError::NewerFeatures { path: self.path.clone(), flags });
        }
        self.offset = PREFIX_LEN as u64;
        Ok(version)
    }

    fn read_header(&mut self) -> Result<(), CaptureError> {
        let why = match self.read_chunk()? {
            Found::Good(chunk) if chunk.kind == kind::HEADER => {
                match chunk.unpack(&self.stored, &mut self.raw) {
                    Ok(()) => match serde_json::from_slice(&self.raw) {
                        Ok(header) => {
                            self.header = header;
                            return Ok(());
                        }
                        Err(error) => error.to_string(),
                    },
                    Err(why) => why.to_owned(),
                }
            }
            Found::Good(_) => "the first chunk is not a header".to_owned(),
            Found::Bad(_) => "its checksum is wrong".to_owned(),
            Found::End => "the file ends before it".to_owned(),
            Found::Torn(why) => why.to_owned(),
        };
        Err(CaptureError::BadHeader { path: self.path.clone(), why })
    }

    /// Goes to the next events chunk, or to the end (`done`).
    fn advance(&mut self) -> Result<(), CaptureError> {
        match self.read_chunk()? {
            Found::Good(chunk) => {
                self.settle_suspect();
                self.enter(chunk);
            }
            Found::Bad(chunk) => {
                let suspect =
                    self.suspect.get_or_insert(Suspect { offset: self.chunk_offset, chunks: 0, bytes: 0 });
                suspect.chunks += 1;
                suspect.bytes += possible_bytes(&chunk);
            }
            Found::End => self
                .end("there is no trailer: heaptap was killed, its disk was full, or it is still recording"),
            Found::Torn(why) => self.end(why),
        }
        Ok(())
    }

    fn enter(&mut self, chunk: ChunkHeader) {
        if !matches!(chunk.kind, kind::EVENTS | kind::TRAILER | kind::SNAPSHOT | kind::GAUGES) {
            return;
        }
        if chunk.kind == kind::SNAPSHOT && !self.assembler.wants_rows() {
            chunk.unpack_start(&self.stored, HEAD_LEN, &mut self.raw);
        } else if let Err(why) = chunk.unpack(&self.stored, &mut self.raw) {
            self.lose(self.chunk_offset, 1, possible_bytes(&chunk), why);
            return;
        }
        match chunk.kind {
            kind::EVENTS => {
                self.decoder.reset();
                self.in_events = true;
            }
            kind::TRAILER => self.enter_trailer(),
            kind::SNAPSHOT => match self.assembler.take(&self.raw, self.tables.stack_count()) {
                Ok(Taken::More) => {}
                Ok(Taken::Part) => {
                    if let Some(shown) = &mut self.shown {
                        self.assembler.part_mut().map_stacks(|stack| shown.stack(stack));
                    }
                    self.waiting = Some(Record::Snapshot);
                }
                Ok(Taken::Whole(mut snapshot)) => {
                    if let Some(shown) = &mut self.shown {
                        snapshot.rows.iter_mut().for_each(|row| row.stack = shown.stack(row.stack));
                        snapshot.settle();
                    }
                    self.snapshot = Some(snapshot);
                    self.waiting = Some(Record::Snapshot);
                }
                Err(why) => self.lose(self.chunk_offset, 1, 0, why),
            },
            _ => match gauges::decode(&self.raw) {
                Ok(gauges) => {
                    self.gauges = gauges;
                    self.waiting = Some(Record::Gauges);
                }
                Err(why) => self.lose(self.chunk_offset, 1, 0, why),
            },
        }
    }

    fn enter_trailer(&mut self) {
        match serde_json::from_slice(&self.raw) {
            Ok(trailer) => {
                self.trailer = Some(trailer);
                self.done = true;
            }
            Err(_) => self.end("its trailer cannot be understood"),
        }
    }

    /// A good chunk came: those before it were damaged, not the end of the file.
    fn settle_suspect(&mut self) {
        if let Some(Suspect { offset, chunks, bytes }) = self.suspect.take() {
            self.lose(offset, chunks, bytes, "the checksum is wrong");
        }
    }

    fn lose(&mut self, offset: u64, chunks: u64, bytes: u64, why: &str) {
        self.note_damage(offset, chunks, why);
        self.tables.note_lost(bytes);
    }

    pub(super) fn note_damage(&mut self, offset: u64, chunks: u64, why: &str) {
        self.damage.chunks += chunks;
        self.damage.first.get_or_insert_with(|| CutShort { offset, why: why.to_owned() });
    }

    /// A record as it is shown; `None` for a definition of the file's own, in place of which those of what is shown are told.
    fn show(&mut self, record: Record) -> Result<Option<Record>, &'static str> {
        let Some(shown) = &mut self.shown else { return Ok(Some(record)) };
        match record {
            Record::String(_) => Ok(None),
            Record::Frame(_) | Record::Stack(_) => shown.follow(&self.tables).map(|()| None),
            Record::Allocation(event) => {
                Ok(Some(Record::Allocation(Allocation { stack: shown.stack(event.stack), ..event })))
            }
            Record::Thread(tid) => {
                if let Some(name) = self.tables.thread(tid) {
                    shown.name_thread(tid, name.clone());
                }
                Ok(Some(record))
            }
            _ => Ok(Some(record)),
        }
    }

    /// The next record of the chunk; `None` at its end, and for what is not shown.
    fn next_of_chunk(&mut self) -> Result<Option<Record>, &'static str> {
        if let Some(definition) = self.shown.as_mut().and_then(|shown| shown.next_definition()) {
            return Ok(Some(definition));
        }
        match self.decoder.next(&self.raw, &mut self.tables)? {
            Some(record) => self.show(record),
            None => {
                self.in_events = false;
                Ok(None)
            }
        }
    }

    fn end(&mut self, why: &str) {
        let (offset, why) = match self.suspect.take() {
            Some(suspect) => (suspect.offset, "a chunk's checksum is wrong and no good one follows"),
            None => (self.chunk_offset, why),
        };
        self.cut = Some(CutShort { offset, why: why.to_owned() });
        self.done = true;
    }
}

impl Iterator for CaptureReader {
    /// An error is one of reading the file; after it the iterator has ended.
    type Item = Result<Record, CaptureError>;

    fn next(&mut self) -> Option<Self::Item> {
        while !self.done {
            if self.in_events {
                match self.next_of_chunk() {
                    Ok(Some(record)) => return Some(Ok(record)),
                    Ok(None) => {}
                    Err(why) => {
                        self.in_events = false;
                        self.lose(self.chunk_offset, 1, self.raw.len() as u64, why);
                    }
                }
            } else if let Err(error) = self.advance() {
                self.done = true;
                return Some(Err(error));
            } else if let Some(record) = self.waiting.take() {
                return Some(Ok(record));
            }
        }
        None
    }
}

#[cfg(test)]
#[path = "reader_tests.rs"]
mod tests;

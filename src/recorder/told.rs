//! [`Told`]: what the agent told of code objects and stacks, and their ids in the capture.
//!
//! The agent tells a code object and a stack when it sees them first, and again when it has forgotten that it did; two threads
//! may tell the same at a time. So everything may come in pieces and more than once. Frames are resolved when their
//! stack is first used: by then their code has been told. Memory is bounded whatever is told.

use super::RecordError;
use super::aged::Aged;
use super::native_code::NativeCode;
use super::trap::DEEPER;
use crate::agent_abi::{STACKS_SEEN, part};
use crate::capture::{CaptureWriter, FrameId, StackId};
use crate::cpython::code_text::{CodeText, MAX_LINE_TABLE, MAX_NAME, UNKNOWN, name};
use crate::cpython::layout::LineTableFormat;
use crate::probe::ring_record::{CodePiece, Definitions, NativeEnd, ToldFrame};
use foldhash::fast::RandomState;
use std::collections::HashMap;

/// Stacks in each half of the memory of them.
const STACKS: usize = 1 << 18;
/// Bytes of code objects in each half of theirs.
const CODE_BYTES: usize = 32 << 20;
/// Bytes of frames that wait for their stack's first use.
const FRAME_BYTES: usize = 32 << 20;
/// Bytes of code objects that are told only in part.
const PARTIAL_BYTES: usize = 32 << 20;

/// Native frames that wait for their stack: of each thread one.
const MOST_NATIVES: usize = 4096;

/// A code object: its address, and which of those that had it.
type CodeKey = (u64, u32);

/// A code object of which all was told.
#[derive(Debug)]
struct Code {
    text: CodeText,
    /// The capture's ids of instructions already seen; `None` for a frame that had not begun.
    frames: HashMap<i32, Option<FrameId>, RandomState>,
}

/// A code object of which not all was told yet.
#[derive(Debug, Default)]
struct Partial {
    numbers: Gathered,
    name: Gathered,
    file: Gathered,
    lines: Gathered,
}

/// A part of it: the bytes from its beginning on.
#[derive(Debug, Default)]
struct Gathered {
    part: u32,
    total: u64,
    bytes: Vec<u8>,
}

/// A stack that was told and not used yet.
#[derive(Debug)]
struct Raw {
    frames: Box<[ToldFrame]>,
    cut: bool,
    native: Option<RawNative>,
}

/// Its native frames.
#[derive(Debug)]
struct RawNative {
    directory: u64,
    addresses: Box<[u64]>,
    end: NativeEnd,
}

/// See the module.
pub struct Told {
    format: LineTableFormat,
    codes: Aged<CodeKey, Code>,
    partial: HashMap<CodeKey, Partial, RandomState>,
    partial_bytes: usize,
    stacks: Aged<u64, StackId>,
    /// The hashes that the agent believes told: a table like its own.
    believed: Box<[u64]>,
    raw: HashMap<u64, Raw, RandomState>,
    raw_bytes: usize,
    /// Native frames that were told, and whose stack was not: that follows at once, or never.
    natives: HashMap<u64, RawNative, RandomState>,
    /// What they are, where native frames are told.
    native_code: Option<NativeCode>,
    /// The last answer of [`Told::stack_id`].
    last: (u64, StackId),
    ids: Vec<FrameId>,
    /// Frames whose code was not told.
    unknown_frames: u64,
}

impl Told {
    /// Nothing told yet. `format`: that of the line tables.
    pub fn new(format: LineTableFormat, native_code: Option<NativeCode>) -> Self {
        Self {
            format,
            codes: Aged::new(CODE_BYTES),
            partial: HashMap::default(),
            partial_bytes: 0,
            stacks: Aged::new(STACKS),
            believed: vec![0; STACKS_SEEN].into_boxed_slice(),
            raw: HashMap::default(),
            raw_bytes: 0,
            natives: HashMap::default(),
            native_code,
            last: (0, StackId::EMPTY),
            ids: Vec::new(),
            unknown_frames: 0,
        }
    }

    /// What native frames are, where they are told.
    pub fn native_code(&mut self) -> Option<&mut NativeCode> {
        self.native_code.as_mut()
    }

    /// The same, to be kept.
    pub fn take_native_code(&mut self) -> Option<NativeCode> {
        self.native_code.take()
    }

    /// Frames whose code was not told: `<unknown>` in the capture.
    pub fn unknown_frames(&self) -> u64 {
        self.unknown_frames
    }

    /// The capture's id of the stack with this hash; `None` if it was not told, or if code in it was not and `complete` asks
    /// for that. Costs a look-up, but for the first use of a stack.
    #[inline]
    pub fn stack_id(
        &mut self,
        hash: u64,
        complete: bool,
        writer: &mut CaptureWriter,
    ) -> Result<Option<StackId>, RecordError> {
        if hash == self.last.0 {
            return Ok(Some(self.last.1));
        }
        let known = match self.stacks.get(&hash) {
            Some(id) => Some(*id),
            None => self.resolve(hash, complete, writer)?,
        };
        if let Some(id) = known {
            self.last = (hash, id);
        }
        Ok(known)
    }

    /// The id of a stack that was never told.
    pub fn unknown_stack(&mut self, writer: &mut CaptureWriter) -> Result<StackId, RecordError> {
        self.unknown_frames += 1;
        let frame = writer.intern_frame(UNKNOWN, UNKNOWN, 0)?;
        Ok(writer.intern_stack(&[frame])?)
    }

    fn resolve(
        &mut self,
        hash: u64,
        complete: bool,
        writer: &mut CaptureWriter,
    ) -> Result<Option<StackId>, RecordError> {
        let Some(raw) = self.raw.get(&hash) else { return Ok(None) };
        let is_told = |frame: &ToldFrame| self.codes.contains(&(frame.code, frame.generation));
        if complete && !raw.frames.iter().all(is_told) {
            return Ok(None);
        }
        let Some(raw) = self.raw.remove(&hash) else { return Ok(None) };
        self.raw_bytes = self.raw_bytes.saturating_sub(weight(&raw));
        let id = self.intern(&raw, writer)?;
        let believed = &self.believed;
        self.stacks.insert(hash, id, 1, |hash| believed[place(*hash)] == *hash);
        // Stacks that are told and never used (their events were dropped) must not pile up.
        if self.raw_bytes > FRAME_BYTES {
            for hash in self.raw.keys().copied().collect::<Vec<_>>() {
                self.resolve(hash, false, writer)?;
            }
        }
        Ok(Some(id))
    }

    fn intern(&mut self, raw: &Raw, writer: &mut CaptureWriter) -> Result<StackId, RecordError> {
        self.ids.clear();
        let mut native_code = self.native_code.take();
        let done = match (&mut native_code, &raw.native) {
            (Some(code), Some(native)) => self.merged(raw, native, code, writer),
            _ => self.python(&raw.frames, writer).map(|ids| self.ids = ids),
        };
        self.native_code = native_code;
        done?;
        if raw.cut {
            self.ids.push(writer.intern_frame(DEEPER, "", 0)?);
        }
        Ok(writer.intern_stack(&self.ids)?)
    }

    /// Ids of Python's frames.
    fn python(
        &mut self,
        frames: &[ToldFrame],
        writer: &mut CaptureWriter,
    ) -> Result<Vec<FrameId>, RecordError> {
        let mut ids = Vec::with_capacity(frames.len());
        for frame in frames {
            match self.codes.get(&(frame.code, frame.generation)) {
                Some(code) => ids.extend(code.frame(self.format, frame.lasti, writer)?),
                None => {
                    self.unknown_frames += 1;
                    ids.push(writer.intern_frame(UNKNOWN, UNKNOWN, 0)?);
                }
            }
        }
        Ok(ids)
    }

    /// Ids of the native frames with Python's in their places.
    fn merged(
        &mut self,
        raw: &Raw,
        native: &RawNative,
        code: &mut NativeCode,
        writer: &mut CaptureWriter,
    ) -> Result<(), RecordError> {
        let mut calls = Vec::new();
        for call in raw.frames.split_inclusive(|frame| frame.entry) {
            calls.push(self.python(call, writer)?);
        }
        code.stack((&native.addresses, native.end), native.directory, calls, writer, &mut self.ids)
    }

    fn finish(&mut self, key: CodeKey) {
        let Some(partial) = self.partial.remove(&key) else { return };
        self.partial_bytes = self.partial_bytes.saturating_sub(partial.len());
        let code = Code { text: partial.into_text(), frames: HashMap::default() };
        let weight = code.weight();
        self.codes.insert(key, code, weight, |_| false);
    }
}

fn place(hash: u64) -> usize {
    hash as usize & (STACKS_SEEN - 1)
}

fn weight(raw: &Raw) -> usize {
    let native = raw.native.as_ref().map_or(0, |native| native.addresses.len() * 8);
    raw.frames.len() * size_of::<ToldFrame>() + native + 64
}

impl Definitions for Told {
    fn stack(&mut self, hash: u64, frames: impl ExactSizeIterator<Item = ToldFrame>, cut: bool) {
        self.believed[place(hash)] = hash;
        // Twice the bound: nobody has used a stack for long. What is told now is shown as unknown, should it be used.
        let full = self.raw_bytes > 2 * FRAME_BYTES;
        let native = self.natives.remove(&hash);
        if full || self.stacks.contains(&hash) || self.raw.contains_key(&hash) {
            return;
        }
        let raw = Raw { frames: frames.collect(), cut, native };
        self.raw_bytes += weight(&raw);
        self.raw.insert(hash, raw);
    }

    fn native(
        &mut self,
        hash: u64,
        directory: u64,
        addresses: impl ExactSizeIterator<Item = u64>,
        end: NativeEnd,
    ) {
        if self.natives.len() >= MOST_NATIVES {
            self.natives.clear();
        }
        self.natives.insert(hash, RawNative { directory, addresses: addresses.collect(), end });
    }

    fn code(&mut self, piece: CodePiece<'_>) {
        let key = (piece.code, piece.generation);
        if self.codes.contains(&key) {
            return;
        }
        if self.partial_bytes > PARTIAL_BYTES {
            tracing::warn!("the agent began to tell {} code objects and did not end", self.partial.len());
            self.partial.clear();
            self.partial_bytes = 0;
        }
        let partial = self.partial.entry(key).or_insert_with(|| {
            self.partial_bytes += size_of::<Partial>();
            Partial::default()
        });
        let before = partial.len();
        let last = partial.add(&piece);
        self.partial_bytes = self.partial_bytes.saturating_add(partial.len()).saturating_sub(before);
        if last {
            self.finish(key);
        }
    }
}

impl Partial {
    fn len(&self) -> usize {
        let parts = [&self.numbers, &self.name, &self.file, &self.lines];
        size_of::<Self>() + parts.iter().map(|part| part.bytes.capacity()).sum::<usize>()
    }

    /// Takes a piece; true if that was the last.
    fn add(&mut self, piece: &CodePiece<'_>) -> bool {
        match piece.part {
            part::NUMBERS => self.numbers.add(piece, 8),
            part::NAME_1 | part::NAME_2 | part::NAME_4 => self.name.add(piece, 4 * MAX_NAME),
            part::FILE_1 | part::FILE_2 | part::FILE_4 => self.file.add(piece, 4 * MAX_NAME),
            part::LINES => {
                self.lines.add(piece, MAX_LINE_TABLE);
                return self.lines.is_whole(MAX_LINE_TABLE);
            }
            _ => {}
        }
        false
    }

    fn into_text(self) -> CodeText {
        let number = |at: usize| {
            let bytes = self.numbers.bytes.get(at..at + 4).and_then(|b| b.try_into().ok());
            bytes.map_or(0, i32::from_le_bytes)
        };
        let whole = self.lines.total == self.lines.bytes.len() as u64;
        CodeText {
            function: self.name.text(part::NAME_1).into(),
            file: self.file.text(part::FILE_1).into(),
            first_line: number(0),
            first_traceable: number(4),
            line_table: if whole { self.lines.bytes.into() } else { [].into() },
        }
    }
}

impl Gathered {
    /// Adds what follows on what is there, up to `most` bytes. Whoever tells a part tells its pieces in order: one that leaves
    /// a hole will come again.
    fn add(&mut self, piece: &CodePiece<'_>, most: u64) {
        if (piece.part, piece.total) != (self.part, self.total) {
            *self = Self { part: piece.part, total: piece.total, bytes: Vec::new() };
        }
        let (have, offset) = (self.bytes.len(), piece.offset as usize);
        let room = usize::try_from(self.total.min(most)).unwrap_or(usize::MAX).saturating_sub(have);
        if offset <= have
            && let Some(new) = piece.bytes.get(have - offset..)
        {
            self.bytes.extend_from_slice(&new[..new.len().min(room)]);
        }
    }

    /// Whether all was told, or more than `most` bytes are to come: then nothing of it is wanted.
    fn is_whole(&self, most: u64) -> bool {
        self.total > most || self.bytes.len() as u64 == self.total
    }

    /// The name; `first` is the part with one byte per character.
    fn text(&self, first: u32) -> String {
        let width = match self.part.checked_sub(first) {
            Some(0) => 1,
            Some(1) => 2,
            Some(2) => 4,
            _ => return UNKNOWN.to_owned(),
        };
        let kept = self.bytes.len().min((MAX_NAME * width) as usize);
        name(&self.bytes[..kept], width, self.total / width)
    }
}

impl Code {
    fn weight(&self) -> usize {
        let CodeText { function, file, line_table, .. } = &self.text;
        // An instruction or so of four is ever seen in a stack.
        256 + function.len() + file.len() + line_table.len() * 3
    }

    /// The capture's id for a frame at `lasti`; `None` if it had not begun.
    fn frame(
        &mut self,
        format: LineTableFormat,
        lasti: i32,
        writer: &mut CaptureWriter,
    ) -> Result<Option<FrameId>, RecordError> {
        if let Some(id) = self.frames.get(&lasti) {
            return Ok(*id);
        }
        let id = if self.text.has_begun(lasti) {
            let line = self.text.line(format, lasti).unwrap_or(0);
            Some(writer.intern_frame(&self.text.function, &self.text.file, line)?)
        } else {
            None
        };
        // No more instructions than the table has bytes; else these are wild pointers.
        if self.frames.len() <= self.text.line_table.len() * 8 {
            self.frames.insert(lasti, id);
        }
        Ok(id)
    }
}

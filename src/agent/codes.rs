//! What is told of a code object the first time that one of its frames is seen: name, file, line table, as they lie in memory.
//!
//! Told in the target, for a code object may be gone, and its address another's, before the controller gets round to it. Which
//! (object, generation) was told is remembered in a small table; what it loses is told again.

use crate::abi::{CODES_SEEN, PythonFacts, State, part};
use crate::python::{half, is_code, word};
use core::sync::atomic::{AtomicU64, Ordering};

/// Characters of a name that are told at most: one more than are shown, so that a name that was cut can be known by it.
const MAX_NAME: u64 = 4096 + 1;
/// A longer line table is not told.
const MAX_LINE_TABLE: u64 = 4 << 20;
/// Bytes in one record.
const PIECE: usize = 8 << 10;
/// Said of what is no code object.
const UNKNOWN: &[u8; 9] = b"<unknown>";
/// Entries that a code object may be in.
const WAYS: usize = 2;
/// 2^64 / the golden ratio.
const MIX: u64 = 0x9e37_79b9_7f4a_7c15;
/// Size of a `PyObject` without anything in front of its reference count.
const PLAIN_OB_TYPE: u32 = 8;

/// The code object as the table knows it; never 0. Generations are spread over the whole word, so that no two objects that
/// can be near each other are one.
fn mixed(code: u64, generation: u32) -> u64 {
    let mixed = code.wrapping_add((generation as u64).wrapping_mul(MIX));
    if mixed == 0 { 1 } else { mixed }
}

unsafe fn entries<'a>(state: *mut State, mixed: u64) -> (&'a AtomicU64, &'a AtomicU64) {
    let shift = u64::BITS - (CODES_SEEN / WAYS).trailing_zeros();
    let at = (mixed.wrapping_mul(MIX) >> shift) as usize * WAYS;
    let first = (&raw mut (*state).codes_seen).cast::<u64>().add(at);
    (AtomicU64::from_ptr(first), AtomicU64::from_ptr(first.add(1)))
}

/// Whether [`mark_told`] was called for this code object (and is not forgotten).
///
/// # Safety
/// `state` is the agent's.
pub unsafe fn is_told(state: *mut State, code: u64, generation: u32) -> bool {
    let mixed = mixed(code, generation);
    let (first, second) = entries(state, mixed);
    first.load(Ordering::Relaxed) == mixed || second.load(Ordering::Relaxed) == mixed
}

/// Remembers the code object; of those that share its place the one remembered last is kept, too.
///
/// # Safety
/// `state` is the agent's.
pub unsafe fn mark_told(state: *mut State, code: u64, generation: u32) {
    let mixed = mixed(code, generation);
    let (first, second) = entries(state, mixed);
    let before = first.swap(mixed, Ordering::Relaxed);
    if before != mixed {
        second.store(before, Ordering::Relaxed);
    }
}

/// Tells of `code` through `emit`, which gets the words behind the first of a record (see `record::CODE`) and the bytes
/// that follow them. False as soon as `emit` says so: the rest is not told.
///
/// # Safety
/// `code` is what a frame of the calling thread executes, as `python::frames` gave it.
pub unsafe fn tell(
    state: *const State,
    code: u64,
    generation: u32,
    emit: &mut impl FnMut(&[u64; 4], *const u8, usize) -> bool,
) -> bool {
    let facts = &raw const (*state).python;
    let mut telling = Telling { code, generation, emit };
    if !is_code(facts, code) || is_dying(facts, code) {
        return telling.unknown();
    }
    let traceable = (*facts).co_firsttraceable;
    let has_traceable = traceable != crate::abi::ABSENT;
    let numbers = [
        half(code + (*facts).co_firstlineno as u64),
        if has_traceable { half(code + traceable as u64) } else { 0 },
    ];
    let name = word(code + (*facts).co_name as u64);
    let file = word(code + (*facts).co_filename as u64);
    let lines = word(code + (*facts).co_linetable as u64);
    telling.part(part::NUMBERS, numbers.as_ptr().cast(), size_of::<[u32; 2]>())
        && telling.text([part::NAME_1, part::NAME_2, part::NAME_4], text(facts, name))
        && telling.text([part::FILE_1, part::FILE_2, part::FILE_4], text(facts, file))
        && telling.lines(facts, lines)
}

/// A code object whose last reference is gone: 3.11.0 still shows its frame (python/cpython#99729), and its strings may be freed. In
/// free-threaded builds the count is not one word, and frames are unlinked first.
unsafe fn is_dying(facts: *const PythonFacts, code: u64) -> bool {
    (*facts).ob_type == PLAIN_OB_TYPE && word(code) == 0
}

/// Characters in memory: where, how many, bytes of each.
struct Text {
    data: *const u8,
    length: u64,
    width: u64,
}

const NO_TEXT: Text = Text { data: core::ptr::null(), length: 0, width: 1 };

/// The characters of a `str`, of every storage kind; none where it contradicts itself. Same rules as `cpython::text`.
unsafe fn text(facts: *const PythonFacts, object: u64) -> Text {
    if object == 0 {
        return NO_TEXT;
    }
    let state = half(object + (*facts).str_state as u64);
    let length = word(object + (*facts).str_length as u64);
    let width = (state >> ((*facts).str_kind_bit & 31) & 7) as u64;
    let compact = state >> ((*facts).str_compact_bit & 31) & 1 != 0;
    let ascii = state >> ((*facts).str_ascii_bit & 31) & 1 != 0;
    let data = match (compact, ascii) {
        (true, true) if width == 1 => object + (*facts).str_ascii_data as u64,
        (true, true) => 0,
        (true, false) => object + (*facts).str_compact_data as u64,
        (false, _) => word(object + (*facts).str_data as u64),
    };
    if data == 0 || !matches!(width, 1 | 2 | 4) || length > i64::MAX as u64 / 4 {
        return NO_TEXT;
    }
    Text { data: data as *const u8, length: if length < MAX_NAME { length } else { MAX_NAME }, width }
}

struct Telling<'a, E> {
    code: u64,
    generation: u32,
    emit: &'a mut E,
}

impl<E: FnMut(&[u64; 4], *const u8, usize) -> bool> Telling<'_, E> {
    /// All pieces of a part; one without bytes for an empty part.
    unsafe fn part(&mut self, part: u32, bytes: *const u8, len: usize) -> bool {
        let mut offset = 0;
        loop {
            let rest = len - offset;
            let piece = if rest < PIECE { rest } else { PIECE };
            let words = [
                self.code,
                self.generation as u64 | (part as u64) << 32,
                len as u64,
                offset as u64 | (piece as u64) << 32,
            ];
            if !(self.emit)(&words, bytes.wrapping_add(offset), piece) {
                return false;
            }
            offset += piece;
            if offset >= len {
                return true;
            }
        }
    }

    /// A string, as the part for its width: 1, 2 or 4.
    unsafe fn text(&mut self, [one, two, four]: [u32; 3], text: Text) -> bool {
        let part = match text.width {
            1 => one,
            2 => two,
            _ => four,
        };
        self.part(part, text.data, (text.length * text.width) as usize)
    }

    unsafe fn lines(&mut self, facts: *const PythonFacts, bytes: u64) -> bool {
        let len = if bytes == 0 { 0 } else { word(bytes + (*facts).bytes_size as u64) };
        let len = if len <= MAX_LINE_TABLE { len as usize } else { 0 };
        self.part(part::LINES, (bytes as *const u8).wrapping_add((*facts).bytes_data as usize), len)
    }

    unsafe fn unknown(&mut self) -> bool {
        let numbers = [0_u32; 2];
        self.part(part::NUMBERS, numbers.as_ptr().cast(), size_of::<[u32; 2]>())
            && self.part(part::NAME_1, UNKNOWN.as_ptr(), UNKNOWN.len())
            && self.part(part::FILE_1, UNKNOWN.as_ptr(), UNKNOWN.len())
            && self.part(part::LINES, core::ptr::null(), 0)
    }
}

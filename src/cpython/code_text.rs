//! [`CodeText`]: what is kept of a code object, however it was learnt: names, line table, and what follows for a frame.

use super::frame::RawFrame;
use super::layout::LineTableFormat;
use super::line_table::line_at;
use super::text::decode;
use std::sync::Arc;

/// Characters of a name or path that are kept.
pub const MAX_NAME: u64 = 4096;
/// Bytes of a line table that are kept; a longer one gives no lines.
pub const MAX_LINE_TABLE: u64 = 4 << 20;
/// Stands for the names of code that could not be read.
pub const UNKNOWN: &str = "<unknown>";
/// First traceable instructions from here on are no count: more than any function has cells.
const MAX_FIRST_TRACEABLE: i32 = 1 << 20;

/// Names and lines of a code object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CodeText {
    /// Qualified name (3.11+), plain name before.
    pub function: Arc<str>,
    /// `co_filename`.
    pub file: Arc<str>,
    /// `co_firstlineno`.
    pub first_line: i32,
    /// `_co_firsttraceable`, in units of two bytes; 0 where there is none.
    pub first_traceable: i32,
    /// `co_linetable` (`co_lnotab` before 3.10).
    pub line_table: Arc<[u8]>,
}

impl CodeText {
    /// False for a frame that has been pushed but not begun: `sys._getframe` does not show it either.
    pub fn has_begun(&self, lasti: i32) -> bool {
        let first = self.first_traceable.clamp(0, MAX_FIRST_TRACEABLE);
        lasti == RawFrame::NO_LASTI || lasti >= first * 2
    }

    /// The line of an instruction; `None` where it has none, or it can't be known.
    pub fn line(&self, format: LineTableFormat, lasti: i32) -> Option<u32> {
        if lasti == RawFrame::NO_LASTI {
            return None;
        }
        let line = line_at(format, &self.line_table, self.first_line, lasti)?;
        u32::try_from(line).ok()
    }
}

/// A name of `length` characters, of which the first [`MAX_NAME`] at most are in `bytes`, each `width` bytes.
pub fn name(bytes: &[u8], width: u64, length: u64) -> String {
    let mut text = decode(bytes, width);
    if length > MAX_NAME {
        text.push('…');
    }
    text
}

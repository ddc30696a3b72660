//! The writer's side of the tables: each string, frame and stack node gets its number once.
//!
//! Memory grows with distinct strings, frames and nodes, never with events.

use super::record::{FrameId, StackId, StringId};
use foldhash::fast::RandomState;
use std::borrow::Cow;
use std::collections::HashMap;

/// Whether an id was given out just now: then its definition must be written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Interned<T> {
    New(T),
    Known(T),
}

/// All 32-bit ids of a table are taken.
#[derive(Debug)]
pub(super) struct Full(pub(super) &'static str);

#[derive(Default)]
pub(super) struct Interner {
    strings: HashMap<Box<str>, StringId, RandomState>,
    frames: HashMap<(StringId, StringId, u32), FrameId, RandomState>,
    nodes: HashMap<(StackId, FrameId), StackId, RandomState>,
}

impl Interner {
    pub(super) fn string(&mut self, text: &str) -> Result<Interned<StringId>, Full> {
        if let Some(&id) = self.strings.get(text) {
            return Ok(Interned::Known(id));
        }
        let id = StringId(next_id(self.strings.len(), "string")?);
        self.strings.insert(text.into(), id);
        Ok(Interned::New(id))
    }

    pub(super) fn frame(
        &mut self,
        function: StringId,
        file: StringId,
        line: u32,
    ) -> Result<Interned<FrameId>, Full> {
        if let Some(&id) = self.frames.get(&(function, file, line)) {
            return Ok(Interned::Known(id));
        }
        let id = FrameId(next_id(self.frames.len(), "code location")?);
        self.frames.insert((function, file, line), id);
        Ok(Interned::New(id))
    }

    pub(super) fn node(&mut self, parent: StackId, frame: FrameId) -> Result<Interned<StackId>, Full> {
        if let Some(&id) = self.nodes.get(&(parent, frame)) {
            return Ok(Interned::Known(id));
        }
        let id = StackId(next_id(self.nodes.len() + 1, "stack")?);
        self.nodes.insert((parent, frame), id);
        Ok(Interned::New(id))
    }

    /// The id of a string that has one.
    pub(super) fn known_string(&self, text: &str) -> Option<StringId> {
        self.strings.get(text).copied()
    }

    /// The id of a code location that has one.
    pub(super) fn known_frame(&self, function: StringId, file: StringId, line: u32) -> Option<FrameId> {
        self.frames.get(&(function, file, line)).copied()
    }

    /// The id of a stack that has one.
    pub(super) fn known_node(&self, parent: StackId, frame: FrameId) -> Option<StackId> {
        self.nodes.get(&(parent, frame)).copied()
    }

    pub(super) fn frame_count(&self) -> usize {
        self.frames.len()
    }

    pub(super) fn node_count(&self) -> usize {
        self.nodes.len()
    }
}

fn next_id(taken: usize, what: &'static str) -> Result<u32, Full> {
    u32::try_from(taken).map_err(|_| Full(what))
}

/// `text`, or as much of it as fits `max` bytes with a `…` at its end.
pub(super) fn cut(text: &str, max: usize) -> Cow<'_, str> {
    if text.len() <= max {
        return Cow::Borrowed(text);
    }
    let mut end = max.saturating_sub('…'.len_utf8());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    Cow::Owned(format!("{}…", &text[..end]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_things_get_one_id() {
        let mut interner = Interner::default();
        assert_eq!(interner.string("a").unwrap(), Interned::New(StringId(0)));
        assert_eq!(interner.string("b").unwrap(), Interned::New(StringId(1)));
        assert_eq!(interner.string("a").unwrap(), Interned::Known(StringId(0)));
        let frame = FrameId(0);
        assert_eq!(interner.frame(StringId(0), StringId(1), 3).unwrap(), Interned::New(frame));
        assert_eq!(interner.node(StackId::EMPTY, frame).unwrap(), Interned::New(StackId(1)));
        assert_eq!(interner.node(StackId(1), frame).unwrap(), Interned::New(StackId(2)));
        assert_eq!(interner.node(StackId::EMPTY, frame).unwrap(), Interned::Known(StackId(1)));
    }

    #[test]
    fn a_long_string_is_cut_on_a_character() {
        assert_eq!(cut("abc", 3), "abc");
        assert_eq!(cut("ééééé", 6), "é…");
        assert!(cut(&"é".repeat(100), 51).len() <= 51);
    }
}

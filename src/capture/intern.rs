//! The writer's side of the tables: each string, module, frame and stack node gets its number once.
//!
//! Memory grows with distinct strings, modules, frames and nodes, never with events.

use super::native::{ModuleId, NativeFrame};
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

/// Function, file, line; of a native frame that has its names, the library.
type FrameKey = (StringId, StringId, u32, Option<StringId>);

/// The build id of a file, and what the file is known by.
type BuildOf = (Box<[u8]>, ModuleId);

#[derive(Default)]
pub(super) struct Interner {
    strings: HashMap<Box<str>, StringId, RandomState>,
    frames: HashMap<FrameKey, FrameId, RandomState>,
    nodes: HashMap<(StackId, FrameId), StackId, RandomState>,
    /// By path: build ids that files there had.
    modules: HashMap<Box<str>, Vec<BuildOf>, RandomState>,
    module_count: usize,
    /// They share their ids with `frames`.
    native: HashMap<NativeFrame, FrameId, RandomState>,
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
        self.named_frame((function, file, line, None))
    }

    pub(super) fn named_frame(&mut self, key: FrameKey) -> Result<Interned<FrameId>, Full> {
        if let Some(&id) = self.frames.get(&key) {
            return Ok(Interned::Known(id));
        }
        let id = FrameId(next_id(self.frame_count(), "code location")?);
        self.frames.insert(key, id);
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

    pub(super) fn module(&mut self, path: &str, build_id: &[u8]) -> Result<Interned<ModuleId>, Full> {
        if let Some(id) = self.known_module(path, build_id) {
            return Ok(Interned::Known(id));
        }
        let id = ModuleId(next_id(self.module_count, "mapped file")?);
        self.modules.entry(path.into()).or_default().push((build_id.into(), id));
        self.module_count += 1;
        Ok(Interned::New(id))
    }

    pub(super) fn native_frame(&mut self, frame: NativeFrame) -> Result<Interned<FrameId>, Full> {
        if let Some(id) = self.known_native_frame(frame) {
            return Ok(Interned::Known(id));
        }
        let id = FrameId(next_id(self.frame_count(), "code location")?);
        self.native.insert(frame, id);
        Ok(Interned::New(id))
    }

    /// The id of a string that has one.
    pub(super) fn known_string(&self, text: &str) -> Option<StringId> {
        self.strings.get(text).copied()
    }

    /// The id of a code location that has one.
    pub(super) fn known_frame(&self, function: StringId, file: StringId, line: u32) -> Option<FrameId> {
        self.frames.get(&(function, file, line, None)).copied()
    }

    /// The id of a stack that has one.
    pub(super) fn known_node(&self, parent: StackId, frame: FrameId) -> Option<StackId> {
        self.nodes.get(&(parent, frame)).copied()
    }

    /// The id of a module that has one.
    pub(super) fn known_module(&self, path: &str, build_id: &[u8]) -> Option<ModuleId> {
        let there = self.modules.get(path)?;
        there.iter().find(|(known, _)| **known == *build_id).map(|(_, id)| *id)
    }

    /// The id of a native frame that has one.
    pub(super) fn known_native_frame(&self, frame: NativeFrame) -> Option<FrameId> {
        self.native.get(&frame).copied()
    }

    /// All native frames, in the order they came in.
    pub(super) fn native_frames(&self) -> Vec<NativeFrame> {
        let mut frames: Vec<_> = self.native.iter().map(|(frame, id)| (*id, *frame)).collect();
        frames.sort_unstable_by_key(|(id, _)| *id);
        frames.into_iter().map(|(_, frame)| frame).collect()
    }

    pub(super) fn has_module(&self, module: ModuleId) -> bool {
        (module.0 as usize) < self.module_count
    }

    pub(super) fn frame_count(&self) -> usize {
        self.frames.len() + self.native.len()
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

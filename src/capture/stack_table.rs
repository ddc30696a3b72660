//! The reader's side of the tables: strings, frames, the stack tree, thread names.
//!
//! Every id is checked as it is defined, so that what is looked up later ends: a parent's id is below
//! its child's. Ids that were lost with a damaged chunk are holes, shown as such. Memory is bounded by
//! the bytes of the definitions read, plus the holes that the lost bytes could account for.

use super::native::{ModuleId, NativeFrame};
use super::record::{FrameId, StackId, StringId};
use foldhash::fast::RandomState;
use std::collections::HashMap;

const HOLE: u32 = u32::MAX;
/// What stands for text that was lost.
pub(super) const LOST: &str = "<lost>";
/// What stands for native code before anybody looked up what it is called.
const NATIVE: &str = "<native code>";
/// The fewest bytes a definition takes: what a lost chunk may have defined at most.
const SMALLEST_DEFINITION: u64 = 4;

/// What runs a frame's code.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub enum FrameKind<'a> {
    /// Python.
    #[default]
    Python,
    /// The processor: C, C++, Rust or whatever else was compiled.
    Native {
        /// The path of the file that has the code; empty if none has.
        library: &'a str,
    },
}

/// A code location in words.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct FrameText<'a> {
    /// Qualified name of the function.
    pub function: &'a str,
    /// Its file. Of native code whose source is not known, the library. Empty where there is none: what such a frame says is no code.
    pub file: &'a str,
    /// The line; 0 if unknown.
    pub line: u32,
    /// Whose it is.
    pub kind: FrameKind<'a>,
}

/// A thread's names; empty if unknown.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ThreadName {
    /// As the kernel has it.
    pub os: String,
    /// As `threading` has it.
    pub python: String,
}

#[derive(Clone, Copy)]
enum Frame {
    Lost,
    Python {
        function: StringId,
        file: StringId,
        line: u32,
    },
    /// Its number in `native`.
    Native(u32),
    /// Of native code, with what it is called.
    Named {
        function: StringId,
        file: StringId,
        line: u32,
        library: StringId,
    },
}

#[derive(Clone)]
struct Module {
    path: Box<str>,
    build_id: Box<[u8]>,
}

#[derive(Clone, Copy)]
struct Node {
    parent: StackId,
    frame: FrameId,
}

/// Strings, frames, stacks and threads defined so far.
#[derive(Default)]
pub struct StackTable {
    text: String,
    /// Start in `text`, length; length [`HOLE`] for a lost one.
    strings: Vec<(usize, u32)>,
    frames: Vec<Frame>,
    native: Vec<NativeFrame>,
    modules: Vec<Module>,
    /// Node `n` is at index `n - 1`.
    nodes: Vec<Node>,
    threads: HashMap<u32, ThreadName, RandomState>,
    holes_allowed: u64,
    lost: bool,
}

impl StackTable {
    /// Nodes defined, holes included: every [`StackId`] up to this number may occur.
    pub fn stack_count(&self) -> usize {
        self.nodes.len()
    }

    /// Code locations defined.
    pub fn frame_count(&self) -> usize {
        self.frames.len()
    }

    pub(super) fn string_count(&self) -> usize {
        self.strings.len()
    }

    /// A string.
    pub fn string(&self, id: StringId) -> &str {
        match self.strings.get(id.0 as usize) {
            Some(&(start, len)) if len != HOLE => &self.text[start..start + len as usize],
            _ => LOST,
        }
    }

    /// A code location.
    pub fn frame(&self, id: FrameId) -> FrameText<'_> {
        let text = |function, file, line, kind| FrameText { function, file, line, kind };
        match self.frames.get(id.0 as usize) {
            Some(&Frame::Python { function, file, line }) => {
                text(self.string(function), self.string(file), line, FrameKind::Python)
            }
            Some(&Frame::Named { function, file, line, library }) => {
                let kind = FrameKind::Native { library: self.string(library) };
                text(self.string(function), self.string(file), line, kind)
            }
            Some(Frame::Native(_)) => text(NATIVE, "", 0, FrameKind::Native { library: "" }),
            Some(Frame::Lost) | None => text(LOST, LOST, 0, FrameKind::Python),
        }
    }

    /// Ids of a location's function and file; `None` for a lost one. Equal ids are equal strings.
    pub fn frame_ids(&self, id: FrameId) -> Option<(StringId, StringId, u32)> {
        match *self.frames.get(id.0 as usize)? {
            Frame::Python { function, file, line } | Frame::Named { function, file, line, .. } => {
                Some((function, file, line))
            }
            Frame::Native(_) | Frame::Lost => None,
        }
    }

    /// The innermost frame of a stack and the stack of its caller; `None` for the empty stack. A stack
    /// that was lost is one frame that no table has (its text is `<lost>`).
    pub fn node(&self, stack: StackId) -> Option<(FrameId, StackId)> {
        let index = stack.0.checked_sub(1)?;
        match self.nodes.get(index as usize) {
            Some(node) => Some((node.frame, node.parent)),
            None => Some((FrameId(HOLE), StackId::EMPTY)),
        }
    }

    /// The frames of a stack, innermost first.
    pub fn frames(&self, stack: StackId) -> impl Iterator<Item = FrameId> + '_ {
        let mut at = stack;
        std::iter::from_fn(move || {
            let (frame, caller) = self.node(at)?;
            at = caller;
            Some(frame)
        })
    }

    /// A native frame as it was defined.
    pub(super) fn native_frame(&self, id: FrameId) -> Option<NativeFrame> {
        match self.frames.get(id.0 as usize)? {
            Frame::Native(number) => self.native.get(*number as usize).copied(),
            _ => None,
        }
    }

    /// Path and build id of a module as they were defined.
    pub(super) fn module(&self, id: ModuleId) -> (&str, &[u8]) {
        self.modules.get(id.0 as usize).map_or((LOST, &[]), |module| (&module.path, &module.build_id))
    }

    /// A thread's names, if they were recorded.
    pub fn thread(&self, tid: u32) -> Option<&ThreadName> {
        self.threads.get(&tid)
    }

    /// A chunk of `bytes` at most was lost: ids may be missing from here on.
    pub(super) fn note_lost(&mut self, bytes: u64) {
        self.lost = true;
        self.holes_allowed = self.holes_allowed.saturating_add(bytes / SMALLEST_DEFINITION);
    }

    pub(super) fn define_string(&mut self, id: StringId, text: &str) -> Result<(), &'static str> {
        let len = u32::try_from(text.len()).ok().filter(|len| *len != HOLE).ok_or("a string is too long")?;
        fill(&mut self.strings, id.0, (0, HOLE), &mut self.holes_allowed)?;
        self.strings.push((self.text.len(), len));
        self.text.push_str(text);
        Ok(())
    }

    pub(super) fn define_frame(
        &mut self,
        id: FrameId,
        function: StringId,
        file: StringId,
        line: u32,
    ) -> Result<(), &'static str> {
        let known = |string: StringId| (string.0 as usize) < self.strings.len();
        let defined = known(function) && known(file);
        if !(defined || self.lost) {
            return Err("a code location names a string that is not defined");
        }
        fill(&mut self.frames, id.0, Frame::Lost, &mut self.holes_allowed)?;
        self.frames.push(Frame::Python { function, file, line });
        Ok(())
    }

    /// A native frame with what it is called.
    pub(super) fn define_named_frame(
        &mut self,
        id: FrameId,
        (function, file, line): (StringId, StringId, u32),
        library: StringId,
    ) -> Result<(), &'static str> {
        fill(&mut self.frames, id.0, Frame::Lost, &mut self.holes_allowed)?;
        self.frames.push(Frame::Named { function, file, line, library });
        Ok(())
    }

    pub(super) fn define_module(
        &mut self,
        id: ModuleId,
        path: &str,
        build_id: &[u8],
    ) -> Result<(), &'static str> {
        let lost = Module { path: LOST.into(), build_id: Box::default() };
        fill(&mut self.modules, id.0, lost, &mut self.holes_allowed)?;
        self.modules.push(Module { path: path.into(), build_id: build_id.into() });
        Ok(())
    }

    pub(super) fn define_native_frame(
        &mut self,
        id: FrameId,
        frame: NativeFrame,
    ) -> Result<(), &'static str> {
        let defined = |module: ModuleId| (module.0 as usize) < self.modules.len();
        if !(frame.module.is_none_or(defined) || self.lost) {
            return Err("a native frame names a module that is not defined");
        }
        fill(&mut self.frames, id.0, Frame::Lost, &mut self.holes_allowed)?;
        // There are no more of these than of frames, whose ids are 32 bits.
        self.frames.push(Frame::Native(self.native.len() as u32));
        self.native.push(frame);
        Ok(())
    }

    pub(super) fn define_node(
        &mut self,
        id: StackId,
        parent: StackId,
        frame: FrameId,
    ) -> Result<(), &'static str> {
        let index = id.0.checked_sub(1).ok_or("a stack has the id of the empty one")?;
        if parent >= id {
            return Err("a stack's caller is not defined before it");
        }
        if (frame.0 as usize) >= self.frames.len() && !self.lost {
            return Err("a stack names a code location that is not defined");
        }
        let hole = Node { parent: StackId::EMPTY, frame: FrameId(HOLE) };
        fill(&mut self.nodes, index, hole, &mut self.holes_allowed)?;
        self.nodes.push(Node { parent, frame });
        Ok(())
    }

    pub(super) fn define_thread(&mut self, tid: u32, name: ThreadName) {
        self.threads.insert(tid, name);
    }

    /// Whether an event may name this stack: one that is defined, or that a lost chunk may have defined.
    pub(super) fn has_stack(&self, stack: StackId) -> bool {
        u64::from(stack.0) <= (self.nodes.len() as u64).saturating_add(self.holes_allowed)
    }
}

/// Makes `index` the next free place of `table`, with holes up to it where chunks were lost.
fn fill<T: Clone>(table: &mut Vec<T>, index: u32, hole: T, allowed: &mut u64) -> Result<(), &'static str> {
    let holes = (index as usize).checked_sub(table.len()).ok_or("an id is defined a second time")?;
    if holes as u64 > *allowed {
        return Err("an id is skipped");
    }
    *allowed -= holes as u64;
    table.resize(index as usize, hole);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_are_allowed_only_for_what_was_lost() {
        let mut table = StackTable::default();
        table.define_string(StringId(0), "f").unwrap();
        assert!(table.define_string(StringId(2), "g").is_err());
        assert!(table.define_string(StringId(0), "g").is_err());
        table.note_lost(9);
        assert!(table.define_string(StringId(4), "g").is_err());
        table.define_string(StringId(3), "g").unwrap();
        assert_eq!((table.string(StringId(2)), table.string(StringId(3))), (LOST, "g"));
        assert_eq!(table.frame(FrameId(7)).function, LOST);
    }

    #[test]
    fn a_stack_is_read_innermost_first() {
        let mut table = StackTable::default();
        for (id, text) in ["main", "work", "a.py"].iter().enumerate() {
            table.define_string(StringId(id as u32), text).unwrap();
        }
        table.define_frame(FrameId(0), StringId(0), StringId(2), 1).unwrap();
        table.define_frame(FrameId(1), StringId(1), StringId(2), 9).unwrap();
        assert!(table.define_frame(FrameId(2), StringId(9), StringId(2), 9).is_err());
        table.define_node(StackId(1), StackId::EMPTY, FrameId(0)).unwrap();
        table.define_node(StackId(2), StackId(1), FrameId(1)).unwrap();
        assert!(table.define_node(StackId(3), StackId(3), FrameId(1)).is_err());
        let names: Vec<&str> = table.frames(StackId(2)).map(|id| table.frame(id).function).collect();
        assert_eq!(names, ["work", "main"]);
        assert_eq!(table.frames(StackId::EMPTY).count(), 0);
    }
}

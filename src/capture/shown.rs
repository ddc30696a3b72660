//! [`Shown`]: the stacks of a capture with native frames as a [`FrameView`] shows them.
//!
//! Who reads a capture is given stacks of this table, never those of the file: hidden frames are not in them, functions that were inlined
//! into each other are frames of their own, and what looks the same is the same. So whatever groups by stack or frame need not
//! know that there is a view. Names come from the file, else from a [`Symbolizer`]. A file without native frames has no such table.

use super::format::MAX_PLACES;
use super::native::{NativeFrame, NativePlace};
use super::record::{FrameId, Record, StackId, StringId};
use super::stack_table::{FrameKind, FrameText, LOST, StackTable, ThreadName};
use super::stack_union::StackUnion;
use super::symbols::{PlaceText, Symbols};
use std::rc::Rc;

/// Frames by inlining that any file may have beyond one for each of its stack nodes, and how many more for each node: a hostile one could
/// have 64.
const INLINED: u64 = 1 << 20;
const INLINED_PER_NODE: u64 = 3;
/// What stands for a stack of which the view shows no frame.
const HIDDEN: &str = "<hidden frames>";

/// Which frames of a capture with native ones are shown. Frames that tell what is missing (of no file) are always.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FrameView {
    /// Those of Python.
    pub python: bool,
    /// Those of native code.
    pub native: bool,
    /// Of these, also the Python interpreter's own.
    pub interpreter: bool,
}

impl Default for FrameView {
    fn default() -> Self {
        Self { python: true, native: true, interpreter: false }
    }
}

impl FrameView {
    fn shows(self, frame: NativeFrame) -> bool {
        self.native && (self.interpreter || !frame.interpreter)
    }
}

/// Knows what native code is called that the capture has no names of.
pub trait Symbolizer {
    /// What is at an address of the file at `path` (as the target saw it) that has this build id, innermost first; nothing if that
    /// is not known.
    fn places(&self, path: &str, build_id: &[u8], address: u64) -> Vec<NativePlace>;
}

/// How a capture is read.
#[derive(Clone, Default)]
pub struct ReadOptions {
    /// What is shown of its stacks.
    pub view: FrameView,
    /// Who is asked for names that the file does not have: its recorder was killed, or is still at it.
    pub symbolizer: Option<Rc<dyn Symbolizer>>,
}

impl From<FrameView> for ReadOptions {
    fn from(view: FrameView) -> Self {
        Self { view, symbolizer: None }
    }
}

/// See the module.
pub(super) struct Shown {
    options: ReadOptions,
    symbols: Symbols,
    union: StackUnion,
    /// Of each frame of the file: where in `places` it begins, and how many it has. None is hidden.
    frames: Vec<(usize, usize)>,
    /// Outermost first.
    places: Vec<FrameId>,
    /// Of each stack of the file: that which is shown.
    stacks: Vec<StackId>,
    /// The stack of those that are hidden all; the empty one before there was any.
    hidden: StackId,
    inlined_left: u64,
    told: (usize, usize, usize),
}

impl Shown {
    pub(super) fn new(options: ReadOptions, symbols: Symbols) -> Self {
        Self {
            options,
            symbols,
            union: StackUnion::default(),
            frames: Vec::new(),
            places: Vec::new(),
            stacks: vec![StackId::EMPTY],
            hidden: StackId::EMPTY,
            inlined_left: INLINED,
            told: (0, 0, 0),
        }
    }

    /// The stacks shown.
    pub(super) fn table(&self) -> &StackTable {
        self.union.table()
    }

    pub(super) fn into_table(self) -> StackTable {
        self.union.into_table()
    }

    pub(super) fn name_thread(&mut self, tid: u32, name: ThreadName) {
        self.union.name_thread(tid, name);
    }

    /// What is shown of a stack of the file, which may have been lost with a part of it.
    pub(super) fn stack(&mut self, stack: StackId) -> StackId {
        match self.stacks.get(stack.0 as usize) {
            Some(shown) if *shown == StackId::EMPTY && stack != *shown => self.hidden,
            Some(shown) => *shown,
            None => self.lost(StackId::EMPTY).unwrap_or_default(),
        }
    }

    /// Takes in what was defined in the file since the last time.
    pub(super) fn follow(&mut self, file: &StackTable) -> Result<(), &'static str> {
        for id in self.frames.len()..file.frame_count() {
            let begin = self.places.len();
            self.add_frame(file, FrameId(id as u32))?;
            self.frames.push((begin, self.places.len() - begin));
        }
        for id in self.stacks.len()..=file.stack_count() {
            let Some((frame, caller)) = file.node(StackId(id as u32)) else { continue };
            // A caller's id is below its callee's.
            let caller = self.stacks[caller.0 as usize];
            let stack = self.add_node(caller, frame)?;
            if stack == StackId::EMPTY && self.hidden == StackId::EMPTY {
                let marker = FrameText { function: HIDDEN, file: "", line: 0, kind: FrameKind::Python };
                let marker = self.union.frame(marker)?;
                self.hidden = self.union.node(StackId::EMPTY, marker)?;
            }
            self.stacks.push(stack);
        }
        Ok(())
    }

    /// Something that was defined since the last time.
    pub(super) fn next_definition(&mut self) -> Option<Record> {
        let (strings, frames, stacks) = &mut self.told;
        let table = self.union.table();
        let next = |told: &mut usize, all: usize| {
            let next = (*told < all).then_some(*told as u32)?;
            *told += 1;
            Some(next)
        };
        next(strings, table.string_count())
            .map(|id| Record::String(StringId(id)))
            .or_else(|| next(frames, table.frame_count()).map(|id| Record::Frame(FrameId(id))))
            .or_else(|| next(stacks, table.stack_count()).map(|id| Record::Stack(StackId(id + 1))))
    }

    fn add_node(&mut self, caller: StackId, frame: FrameId) -> Result<StackId, &'static str> {
        self.inlined_left = self.inlined_left.saturating_add(INLINED_PER_NODE);
        let Some((begin, count)) = self.frames.get(frame.0 as usize).copied() else {
            return self.lost(caller);
        };
        let inlined = (count as u64).saturating_sub(1);
        // The outermost place is the function that the linker knows.
        let count = if inlined > self.inlined_left { 1 } else { count };
        self.inlined_left = self.inlined_left.saturating_sub(inlined);
        let mut stack = caller;
        for place in &self.places[begin..begin + count] {
            stack = self.union.node(stack, *place)?;
        }
        Ok(stack)
    }

    fn lost(&mut self, caller: StackId) -> Result<StackId, &'static str> {
        let frame = FrameText { function: LOST, file: LOST, line: 0, kind: FrameKind::Python };
        let frame = self.union.frame(frame)?;
        self.union.node(caller, frame)
    }

    fn add_frame(&mut self, file: &StackTable, id: FrameId) -> Result<(), &'static str> {
        let Some(frame) = file.native_frame(id) else {
            let text = file.frame(id);
            if self.options.view.python || text.file.is_empty() || text.function == LOST {
                self.places.push(self.union.frame(text)?);
            }
            return Ok(());
        };
        if !self.options.view.shows(frame) {
            return Ok(());
        }
        let (path, build_id) = frame.module.map(|module| file.module(module)).unwrap_or_default();
        if let Some(places) = self.symbols.places(frame) {
            return name(&mut self.union, &mut self.places, (path, frame.address), &places);
        }
        let symbolizer = self.options.symbolizer.as_ref().filter(|_| frame.module.is_some());
        let found =
            symbolizer.map(|symbolizer| symbolizer.places(path, build_id, frame.address)).unwrap_or_default();
        let places: Vec<_> = found.iter().take(MAX_PLACES).map(PlaceText::of).collect();
        name(&mut self.union, &mut self.places, (path, frame.address), &places)
    }
}

/// Appends the frames that show an address of a library, outermost first. `found` is innermost first.
fn name(
    union: &mut StackUnion,
    places: &mut Vec<FrameId>,
    (library, address): (&str, u64),
    found: &[PlaceText<'_>],
) -> Result<(), &'static str> {
    let short = library.rsplit('/').next().filter(|name| !name.is_empty()).unwrap_or("no file");
    let unknown = format!("{address:#x} in {short}");
    let nothing = [PlaceText { function: None, file: None, line: 0 }];
    for place in if found.is_empty() { &nothing } else { found }.iter().rev() {
        let text = FrameText {
            function: place.function.unwrap_or(&unknown),
            file: place.file.unwrap_or(library),
            line: place.line,
            kind: FrameKind::Native { library },
        };
        places.push(union.frame(text)?);
    }
    Ok(())
}

#[cfg(test)]
#[path = "shown_tests.rs"]
mod tests;

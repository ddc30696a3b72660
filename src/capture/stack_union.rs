//! [`StackUnion`]: the stacks of several captures in one table, united by text.
//!
//! Ids mean something within one capture only. Memory grows with the distinct strings, frames and stacks of all captures
//! together. What was lost in one of them is lost here, too, and shown as such.

use super::intern::{Full, Interned, Interner};
use super::record::{FrameId, StackId, StringId};
use super::stack_table::{FrameKind, FrameText, LOST, StackTable, ThreadName};

/// See the module.
#[derive(Default)]
pub struct StackUnion {
    interner: Interner,
    table: StackTable,
}

/// Where the stacks of one table are in the union.
pub struct StackMap {
    stacks: Vec<StackId>,
    lost: StackId,
}

impl StackMap {
    /// A stack of that table in the union.
    pub fn get(&self, stack: StackId) -> StackId {
        self.stacks.get(stack.0 as usize).copied().unwrap_or(self.lost)
    }
}

impl StackUnion {
    /// Adds every stack of `other`, below `root` (the empty stack for none). Errors name what there are more of than 32-bit ids.
    pub fn add(&mut self, other: &StackTable, root: StackId) -> Result<StackMap, &'static str> {
        let mut frames = Vec::with_capacity(other.frame_count());
        for id in 0..other.frame_count() {
            frames.push(self.frame(other.frame(FrameId(id as u32)))?);
        }
        let lost_frame = self.frame(python(LOST, LOST, 0))?;
        let lost = self.node(root, lost_frame)?;
        let mut stacks = vec![root];
        for id in 1..=other.stack_count() {
            let Some((frame, caller)) = other.node(StackId(id as u32)) else { continue };
            let frame = frames.get(frame.0 as usize).copied().unwrap_or(lost_frame);
            // A caller's id is below its callee's.
            let caller = stacks.get(caller.0 as usize).copied().unwrap_or(lost);
            stacks.push(self.node(caller, frame)?);
        }
        Ok(StackMap { stacks, lost })
    }

    /// A stack of one frame.
    pub fn root(&mut self, function: &str) -> Result<StackId, &'static str> {
        let frame = self.frame(python(function, "", 0))?;
        self.node(StackId::EMPTY, frame)
    }

    /// Names a thread of the union.
    pub fn name_thread(&mut self, tid: u32, name: ThreadName) {
        self.table.define_thread(tid, name);
    }

    /// What was added so far.
    pub(super) fn table(&self) -> &StackTable {
        &self.table
    }

    /// All that was added.
    pub fn into_table(self) -> StackTable {
        self.table
    }

    fn string(&mut self, text: &str) -> Result<StringId, &'static str> {
        let interned = self.interner.string(text);
        self.defined(interned, |table, id| table.define_string(id, text))
    }

    /// The frame with this text.
    pub(super) fn frame(&mut self, text: FrameText<'_>) -> Result<FrameId, &'static str> {
        let (function, file, line) = (self.string(text.function)?, self.string(text.file)?, text.line);
        let library = match text.kind {
            FrameKind::Python => None,
            FrameKind::Native { library } => Some(self.string(library)?),
        };
        let interned = self.interner.named_frame((function, file, line, library));
        self.defined(interned, |table, id| match library {
            None => table.define_frame(id, function, file, line),
            Some(library) => table.define_named_frame(id, (function, file, line), library),
        })
    }

    /// The stack that is `caller` with `frame` on top.
    pub(super) fn node(&mut self, caller: StackId, frame: FrameId) -> Result<StackId, &'static str> {
        let interned = self.interner.node(caller, frame);
        self.defined(interned, |table, id| table.define_node(id, caller, frame))
    }

    /// An id, which the table is told of if it is new.
    fn defined<T: Copy>(
        &mut self,
        interned: Result<Interned<T>, Full>,
        define: impl FnOnce(&mut StackTable, T) -> Result<(), &'static str>,
    ) -> Result<T, &'static str> {
        match interned {
            Ok(Interned::Known(id)) => Ok(id),
            Ok(Interned::New(id)) => define(&mut self.table, id).map(|()| id),
            Err(Full(what)) => Err(what),
        }
    }
}

fn python<'a>(function: &'a str, file: &'a str, line: u32) -> FrameText<'a> {
    FrameText { function, file, line, kind: FrameKind::Python }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A table of stacks given outermost frame first; stack `n` is the `n`th.
    fn table(order: &[usize], stacks: &[&[(&str, u32)]]) -> (StackTable, Vec<StackId>) {
        let mut union = StackUnion::default();
        let mut ids = vec![StackId::EMPTY; stacks.len()];
        for at in order {
            let mut id = StackId::EMPTY;
            for (function, line) in stacks[*at] {
                let frame = union.frame(python(function, "a.py", *line)).unwrap();
                id = union.node(id, frame).unwrap();
            }
            ids[*at] = id;
        }
        (union.into_table(), ids)
    }

    fn text(table: &StackTable, stack: StackId) -> Vec<(String, u32)> {
        table.frames(stack).map(|id| table.frame(id)).map(|f| (f.function.to_owned(), f.line)).collect()
    }

    #[test]
    fn equal_texts_are_one_stack_whatever_their_ids_were() {
        let stacks: &[&[(&str, u32)]] = &[&[("main", 1), ("f", 2)], &[("main", 1)], &[("g", 1), ("f", 2)]];
        let (one, one_ids) = table(&[0, 1, 2], stacks);
        let (two, two_ids) = table(&[2, 0, 1], stacks);
        assert_ne!(one_ids, two_ids);
        let mut union = StackUnion::default();
        let first = union.add(&one, StackId::EMPTY).unwrap();
        let second = union.add(&two, StackId::EMPTY).unwrap();
        let all = union.into_table();
        for at in 0..stacks.len() {
            assert_eq!(first.get(one_ids[at]), second.get(two_ids[at]));
            assert_eq!(text(&all, first.get(one_ids[at])), text(&one, one_ids[at]));
        }
        assert_eq!(first.get(StackId::EMPTY), StackId::EMPTY);
    }

    #[test]
    fn below_a_root_every_stack_has_it_outermost_also_the_empty_and_lost_ones() {
        let (one, ids) = table(&[0], &[&[("main", 1)]]);
        let mut union = StackUnion::default();
        let root = union.root("process 7").unwrap();
        let map = union.add(&one, root).unwrap();
        let all = union.into_table();
        assert_eq!(text(&all, map.get(ids[0])), [("main".to_owned(), 1), ("process 7".to_owned(), 0)]);
        assert_eq!(map.get(StackId::EMPTY), root);
        assert_eq!(text(&all, map.get(StackId(99))), [(LOST.to_owned(), 0), ("process 7".to_owned(), 0)]);
    }
}

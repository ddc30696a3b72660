//! What the figures of a diff are grouped by, and which of them are looked at: [`Grouping`], [`Filter`], [`Groups`].
//!
//! A group is named by words (paths, names, lines), never by an id or an address: so the groups of two captures of different
//! processes are the same where their code is.

use super::moved::Moved;
use super::package::package_of;
use crate::capture::{AllocatorKind, FrameId, FrameKind, FrameText, Site, StackId, StackTable};
use foldhash::fast::RandomState;
use std::collections::HashMap;
use std::sync::Arc;

/// What one group has in common.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Grouping {
    /// The line.
    #[default]
    Lineno,
    /// The line and its function.
    Site,
    /// The file.
    Filename,
    /// The function, with its file.
    Function,
    /// The whole stack.
    Traceback,
    /// The installed package, the standard library, or the application.
    Module,
    /// The function that gave the memory.
    Allocator,
    /// The thread's name.
    Thread,
}

impl Grouping {
    /// Whether a stack can belong to several groups, one for each of its frames.
    pub fn is_by_frame(self) -> bool {
        matches!(self, Self::Lineno | Self::Site | Self::Filename | Self::Function | Self::Module)
    }
}

/// What a pattern is held against.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Subject {
    /// A frame's file.
    File,
    /// A frame's function.
    Function,
    /// The package of a frame's code.
    Module,
    /// The thread's name.
    Thread,
}

/// A pattern with `*`, `?` and `[…]`.
#[derive(Clone, Debug)]
pub struct Pattern {
    /// What it is held against.
    pub subject: Subject,
    /// The pattern.
    pub glob: glob::Pattern,
}

/// Which allocations are looked at: those that match any of `include` (all, if there is none) and none of `exclude`.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// What to look at.
    pub include: Vec<Pattern>,
    /// What to leave out.
    pub exclude: Vec<Pattern>,
    /// Whether any frame of a stack may match; else only the innermost.
    pub all_frames: bool,
}

impl Filter {
    fn is_empty(&self) -> bool {
        self.include.is_empty() && self.exclude.is_empty()
    }

    fn takes(&self, row: &Site, stacks: &StackTable, moved: &Moved) -> bool {
        let matches = |pattern: &Pattern| match pattern.subject {
            Subject::Thread => pattern.glob.matches(&thread(row.tid, stacks)),
            subject => {
                let most = if self.all_frames { usize::MAX } else { 1 };
                let mut frames = stacks.frames(row.stack).take(most).map(|frame| stacks.frame(frame));
                frames.any(|frame| pattern.glob.matches(word(subject, frame, moved)))
            }
        };
        (self.include.is_empty() || self.include.iter().any(matches)) && !self.exclude.iter().any(matches)
    }
}

fn word<'a>(subject: Subject, frame: FrameText<'a>, moved: &'a Moved) -> &'a str {
    match subject {
        Subject::Function => frame.function,
        Subject::Module => package_of(&frame),
        Subject::File | Subject::Thread => moved.name(frame.file),
    }
}

/// A frame in words.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct FrameName {
    /// Its function's qualified name.
    pub function: Arc<str>,
    /// Its file.
    pub file: Arc<str>,
    /// Its line; 0 if unknown.
    pub line: u32,
    /// Of native code, the file that holds it (empty if none does).
    pub library: Option<Arc<str>>,
}

/// What a group has in common, in words. Empty words are not part of it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct GroupName {
    /// A function's qualified name. Of a line, the function if it is one for all of the group.
    pub function: Option<Arc<str>>,
    /// A file.
    pub file: Option<Arc<str>>,
    /// A line, if it is known.
    pub line: Option<u32>,
    /// Of native code, the file that holds it, if it is one for all of the group.
    pub library: Option<Arc<str>>,
    /// A package.
    pub module: Option<Arc<str>>,
    /// An allocator.
    pub allocator: Option<&'static str>,
    /// A thread.
    pub thread: Option<Arc<str>>,
    /// A stack, innermost frame first.
    pub traceback: Option<Vec<FrameName>>,
}

/// Number of a group.
pub type GroupId = u32;

type Word = u32;

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Frame {
    function: Word,
    file: Word,
    line: u32,
    library: Option<Word>,
}

/// What frames of a group need not have in common; `None` where they don't.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
struct Shared {
    function: Option<Word>,
    library: Option<Word>,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Key {
    NoStack,
    Line(Word, u32),
    Site(Frame),
    File(Word),
    Function(Word, Word),
    Module(Word),
    Allocator(AllocatorKind),
    Thread(Word),
    Stack(u32),
}

/// All groups of one or several captures.
pub struct Groups {
    grouping: Grouping,
    cumulative: bool,
    filter: Filter,
    words: Interner<Arc<str>>,
    keys: Interner<Key>,
    /// Of each group.
    shared: Vec<Shared>,
    /// Stacks of all captures as one tree: caller (0 for none) and frame; numbered from 1.
    nodes: Interner<(u32, Frame)>,
}

/// What is remembered of one capture, whose ids are its own.
#[derive(Default)]
pub struct Remembered {
    /// Where each stack's groups are in `groups`; nowhere if it was not met yet.
    by_stack: Vec<(u32, u32)>,
    groups: Vec<GroupId>,
    frames: HashMap<FrameId, Frame, RandomState>,
    nodes: HashMap<StackId, u32, RandomState>,
    of_row: [GroupId; 1],
    /// What its files are called in another.
    moved: Moved,
}

impl Remembered {
    /// Nothing yet, of a capture whose files are called otherwise where it is compared to.
    pub fn renaming(moved: &Moved) -> Self {
        Self { moved: moved.clone(), ..Self::default() }
    }
}

impl Groups {
    /// None yet. `cumulative`: a stack counts for the groups of all its frames, once each.
    pub fn new(grouping: Grouping, cumulative: bool, filter: Filter) -> Self {
        let cumulative = cumulative && grouping.is_by_frame();
        let (words, keys, nodes) = (Interner::default(), Interner::default(), Interner::default());
        Self { grouping, cumulative, filter, words, keys, shared: Vec::new(), nodes }
    }

    /// The groups that a row belongs to; none if the filter leaves it out.
    pub fn of<'r>(
        &mut self,
        row: &Site,
        stacks: &StackTable,
        remembered: &'r mut Remembered,
    ) -> &'r [GroupId] {
        if !self.filter.is_empty() && !self.filter.takes(row, stacks, &remembered.moved) {
            return &[];
        }
        let key = match self.grouping {
            Grouping::Allocator => Key::Allocator(row.allocator),
            Grouping::Thread => Key::Thread(self.words.id(&*thread(row.tid, stacks), |word| Arc::from(word))),
            _ => return self.of_stack(row.stack, stacks, remembered),
        };
        remembered.of_row = [self.group(key, Shared::default())];
        &remembered.of_row
    }

    fn of_stack<'r>(
        &mut self,
        stack: StackId,
        stacks: &StackTable,
        remembered: &'r mut Remembered,
    ) -> &'r [GroupId] {
        let at = stack.0 as usize;
        if at >= remembered.by_stack.len() {
            // A row's stack is one of the table's.
            remembered.by_stack.resize(at + 1, (0, 0));
        }
        if remembered.by_stack[at].1 == 0 {
            let groups = self.work_out(stack, stacks, remembered);
            remembered.by_stack[at] = (remembered.groups.len() as u32, groups.len() as u32);
            remembered.groups.extend(groups);
        }
        let (from, count) = remembered.by_stack[at];
        &remembered.groups[from as usize..][..count as usize]
    }

    fn work_out(&mut self, stack: StackId, stacks: &StackTable, seen: &mut Remembered) -> Vec<GroupId> {
        if stacks.node(stack).is_none() {
            return vec![self.group(Key::NoStack, Shared::default())];
        }
        if self.grouping == Grouping::Traceback {
            let node = self.node(stack, stacks, seen);
            return vec![self.group(Key::Stack(node), Shared::default())];
        }
        let mut groups = Vec::new();
        for id in stacks.frames(stack).take(if self.cumulative { usize::MAX } else { 1 }) {
            let frame = self.frame(id, stacks, seen);
            let Frame { function, file, line, library } = frame;
            let key = match self.grouping {
                Grouping::Filename => Key::File(file),
                Grouping::Function => Key::Function(function, file),
                Grouping::Module => {
                    let module = package_of(&stacks.frame(id));
                    Key::Module(self.words.id(module, |word| Arc::from(word)))
                }
                Grouping::Site => Key::Site(frame),
                // Where the source of native code is not known, all of a library would be one line.
                _ if library.is_some() && line == 0 => Key::Site(frame),
                _ => Key::Line(file, line),
            };
            groups.push(self.group(key, Shared { function: Some(function), library }));
        }
        groups.sort_unstable();
        groups.dedup();
        groups
    }

    fn group(&mut self, key: Key, shared: Shared) -> GroupId {
        let Shared { function: its_function, library: its_library } = shared;
        let id = self.keys.id(&key, |key| *key);
        match self.shared.get_mut(id as usize) {
            None => self.shared.push(shared),
            Some(known) => {
                let Shared { function, library } = known;
                *function = function.filter(|_| *function == its_function);
                *library = library.filter(|_| *library == its_library);
            }
        }
        id
    }

    fn frame(&mut self, id: FrameId, stacks: &StackTable, seen: &mut Remembered) -> Frame {
        let (words, moved) = (&mut self.words, &seen.moved);
        *seen.frames.entry(id).or_insert_with(|| {
            let FrameText { function, file, line, kind } = stacks.frame(id);
            let mut word = |word| words.id(word, |word: &str| Arc::from(word));
            let library = match kind {
                FrameKind::Python => None,
                FrameKind::Native { library } => Some(word(moved.name(library))),
            };
            Frame { function: word(function), file: word(moved.name(file)), line, library }
        })
    }

    /// The stack in the tree of all captures.
    fn node(&mut self, stack: StackId, stacks: &StackTable, seen: &mut Remembered) -> u32 {
        let (mut path, mut at, mut node) = (Vec::new(), stack, 0);
        while let Some((frame, caller)) = stacks.node(at) {
            if let Some(known) = seen.nodes.get(&at) {
                node = *known;
                break;
            }
            path.push((at, frame));
            at = caller;
        }
        for (at, frame) in path.into_iter().rev() {
            let frame = self.frame(frame, stacks, seen);
            node = self.nodes.id(&(node, frame), |node| *node) + 1;
            seen.nodes.insert(at, node);
        }
        node
    }

    fn frame_name(&self, Frame { function, file, line, library }: Frame) -> FrameName {
        let text = |word: Word| self.words.values[word as usize].clone();
        FrameName { function: text(function), file: text(file), line, library: library.map(text) }
    }

    /// A group in words.
    pub fn name(&self, id: GroupId) -> GroupName {
        let word = |word: Word| Some(self.words.values[word as usize].clone());
        let known = |line: u32| Some(line).filter(|line| *line > 0);
        let nothing = GroupName::default();
        let shared = self.shared[id as usize];
        let Shared { library, .. } = shared;
        let library = library.and_then(word);
        match self.keys.values[id as usize] {
            Key::NoStack => nothing,
            Key::Line(file, line) => {
                let function = shared.function.and_then(word);
                GroupName { function, file: word(file), line: known(line), library, ..nothing }
            }
            Key::Site(Frame { function, file, line, .. }) => {
                let (function, file) = (word(function), word(file));
                GroupName { function, file, line: known(line), library, ..nothing }
            }
            Key::File(file) => GroupName { file: word(file), ..nothing },
            Key::Function(function, file) => {
                GroupName { function: word(function), file: word(file), library, ..nothing }
            }
            Key::Module(module) => GroupName { module: word(module), ..nothing },
            Key::Allocator(kind) => GroupName { allocator: Some(kind.name()), ..nothing },
            Key::Thread(name) => GroupName { thread: word(name), ..nothing },
            Key::Stack(mut node) => {
                let mut traceback = Vec::new();
                while let Some(index) = node.checked_sub(1) {
                    let (caller, frame) = self.nodes.values[index as usize];
                    traceback.push(self.frame_name(frame));
                    node = caller;
                }
                GroupName { traceback: Some(traceback), ..nothing }
            }
        }
    }
}

/// The name by which a thread is known in every process: names that Python numbers in the order of their creation lose their
/// numbers (`Thread-12 (serve)` is `Thread-* (serve)`).
pub fn thread(tid: u32, stacks: &StackTable) -> std::borrow::Cow<'_, str> {
    let Some(name) = stacks.thread(tid) else { return "<unnamed>".into() };
    let Some(name) = [&name.python, &name.os].into_iter().find(|name| !name.is_empty()) else {
        return "<unnamed>".into();
    };
    let numbered = ["Thread-", "ThreadPoolExecutor-", "Dummy-"];
    let Some(prefix) = numbered.into_iter().find(|prefix| name.starts_with(prefix)) else {
        return name.as_str().into();
    };
    let numbers = |c: char| c.is_ascii_digit() || c == '_';
    format!("{prefix}*{}", name[prefix.len()..].trim_start_matches(numbers)).into()
}

/// Values numbered in the order they are seen.
struct Interner<T> {
    ids: HashMap<T, u32, RandomState>,
    values: Vec<T>,
}

impl<T> Default for Interner<T> {
    fn default() -> Self {
        Self { ids: HashMap::default(), values: Vec::new() }
    }
}

impl<T: Clone + Eq + std::hash::Hash> Interner<T> {
    fn id<Q>(&mut self, value: &Q, own: impl Fn(&Q) -> T) -> u32
    where
        Q: ?Sized + Eq + std::hash::Hash,
        T: std::borrow::Borrow<Q>,
    {
        if let Some(id) = self.ids.get(value) {
            return *id;
        }
        let (id, value) = (self.values.len() as u32, own(value));
        self.ids.insert(value.clone(), id);
        self.values.push(value);
        id
    }
}

#[cfg(test)]
#[path = "grouping_tests.rs"]
mod tests;

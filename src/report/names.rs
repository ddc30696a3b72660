//! Locations and threads as reports name them.

use super::text::escaped;
use crate::capture::{FrameId, StackTable};
use serde::Serialize;

/// What stands for allocations of threads without a Python stack.
pub(super) const NO_STACK: &str = "<no Python stack>";

/// A location for JSON: all `null` without a Python stack.
#[derive(Serialize, Clone)]
pub(super) struct Location<'a> {
    pub(super) function: Option<&'a str>,
    pub(super) file: Option<&'a str>,
    /// `null` if unknown.
    pub(super) line: Option<u32>,
}

pub(super) fn location(frame: Option<FrameId>, stacks: &StackTable) -> Location<'_> {
    let text = frame.map(|id| stacks.frame(id));
    Location {
        function: text.map(|text| text.function),
        file: text.map(|text| text.file),
        line: text.map(|text| text.line).filter(|line| *line > 0),
    }
}

/// `function (file:line)`, harmless.
pub(super) fn place(frame: Option<FrameId>, stacks: &StackTable) -> String {
    let Some(id) = frame else { return NO_STACK.to_owned() };
    let text = stacks.frame(id);
    match text.line {
        0 => format!("{} ({})", escaped(text.function), escaped(text.file)),
        line => format!("{} ({}:{line})", escaped(text.function), escaped(text.file)),
    }
}

/// `function (file)`, harmless.
pub(super) fn function(frame: Option<FrameId>, stacks: &StackTable) -> String {
    let Some(id) = frame else { return NO_STACK.to_owned() };
    let text = stacks.frame(id);
    format!("{} ({})", escaped(text.function), escaped(text.file))
}

/// The name a thread is best known by, if any: Python's, else the kernel's.
pub(super) fn thread_name(tid: u32, stacks: &StackTable) -> Option<&str> {
    let name = stacks.thread(tid)?;
    [name.python.as_str(), name.os.as_str()].into_iter().find(|name| !name.is_empty())
}

/// `1234 (MainThread)`, harmless.
pub(super) fn thread(tid: u32, stacks: &StackTable) -> String {
    match thread_name(tid, stacks) {
        Some(name) => format!("{tid} ({})", escaped(name)),
        None => tid.to_string(),
    }
}

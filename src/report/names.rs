//! Locations and threads as reports name them.

use super::text::escaped;
use crate::analysis::Findings;
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
        // Where processes are kept apart, the outermost frame is a process: it has no file.
        file: text.map(|text| text.file).filter(|file| !file.is_empty()),
        line: text.map(|text| text.line).filter(|line| *line > 0),
    }
}

/// `function (file:line)`, harmless.
pub(super) fn place(frame: Option<FrameId>, stacks: &StackTable) -> String {
    let Some(id) = frame else { return NO_STACK.to_owned() };
    let text = stacks.frame(id);
    match text.line {
        0 if text.file.is_empty() => escaped(text.function).into_owned(),
        0 => format!("{} ({})", escaped(text.function), escaped(text.file)),
        line => format!("{} ({}:{line})", escaped(text.function), escaped(text.file)),
    }
}

/// `function (file)`, harmless.
pub(super) fn function(frame: Option<FrameId>, stacks: &StackTable) -> String {
    let Some(id) = frame else { return NO_STACK.to_owned() };
    let text = stacks.frame(id);
    if text.file.is_empty() {
        return escaped(text.function).into_owned();
    }
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

/// The same; of several processes `12/1234 (MainThread)`, or the name alone where they were united by it.
pub(super) fn thread_found(tid: u32, findings: &Findings) -> String {
    let name = thread_name(tid, &findings.stacks).map(escaped);
    match (&findings.merged, ids(tid, findings), name) {
        (None, ..) => thread(tid, &findings.stacks),
        (Some(_), Some((pid, tid)), Some(name)) => format!("{pid}/{tid} ({name})"),
        (Some(_), Some((pid, tid)), None) => format!("{pid}/{tid}"),
        (Some(_), None, Some(name)) => name.into_owned(),
        (Some(_), None, None) => "<without a name>".to_owned(),
    }
}

/// Pid and thread id of a thread, where it is one.
pub(super) fn ids(tid: u32, findings: &Findings) -> Option<(u32, u32)> {
    match &findings.merged {
        None => Some((findings.header.pid, tid)),
        Some(merged) => merged.threads.get(tid.checked_sub(1)? as usize).copied(),
    }
}

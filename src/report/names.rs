//! Locations and threads as reports name them.

use super::text::escaped;
use crate::analysis::Findings;
use crate::capture::{FrameId, FrameKind, StackTable};
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
    #[serde(flatten)]
    pub(super) code: Option<NativeCode<'a>>,
}

/// Of a native frame, for JSON.
#[derive(Serialize, Clone, Copy)]
pub(super) struct NativeCode<'a> {
    kind: &'static str,
    /// The file that holds the code; `null` if none does.
    module: Option<&'a str>,
}

impl<'a> NativeCode<'a> {
    pub(super) fn of(library: &'a str) -> Self {
        Self { kind: "native", module: Some(library).filter(|library| !library.is_empty()) }
    }
}

pub(super) fn location(frame: Option<FrameId>, stacks: &StackTable) -> Location<'_> {
    let text = frame.map(|id| stacks.frame(id));
    Location {
        function: text.map(|text| text.function),
        // Where processes are kept apart, the outermost frame is a process: it has no file.
        file: text.map(|text| text.file).filter(|file| !file.is_empty()),
        line: text.map(|text| text.line).filter(|line| *line > 0),
        code: text.and_then(|text| match text.kind {
            FrameKind::Python => None,
            FrameKind::Native { library } => Some(NativeCode::of(library)),
        }),
    }
}

/// `function (file:line)`, harmless.
pub(super) fn place(frame: Option<FrameId>, stacks: &StackTable) -> String {
    let Some(id) = frame else { return NO_STACK.to_owned() };
    let text = stacks.frame(id);
    let library = match text.kind {
        FrameKind::Python => None,
        FrameKind::Native { library } => Some(library),
    };
    place_text(text.function, text.file, text.line, library)
}

/// A frame in words, harmless: `function (file:line)`; of native code `function at file.c:line [library]`.
pub(super) fn place_text(function: &str, file: &str, line: u32, library: Option<&str>) -> String {
    let name = escaped(function);
    match (library, line) {
        (Some(library), _) => {
            let source = (file != library).then(|| format!(" at {}{}", escaped(short(file)), at_line(line)));
            let library = short(library);
            // Code without a name is called by its place in the library.
            let holder = if function.ends_with(&format!(" in {library}")) || library.is_empty() {
                String::new()
            } else {
                format!(" [{}]", escaped(library))
            };
            format!("{name}{}{holder}", source.unwrap_or_default())
        }
        (None, 0) if file.is_empty() => name.into_owned(),
        (None, line) => format!("{name} ({}{})", escaped(file), at_line(line)),
    }
}

/// The last part of a path.
fn short(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

fn at_line(line: u32) -> String {
    if line > 0 { format!(":{line}") } else { String::new() }
}

/// Whether a frame is one of native code.
pub(super) fn is_native(frame: Option<FrameId>, stacks: &StackTable) -> bool {
    frame.is_some_and(|id| matches!(stacks.frame(id).kind, FrameKind::Native { .. }))
}

/// `function (file)`, of native code `function [library]`, harmless.
pub(super) fn function(frame: Option<FrameId>, stacks: &StackTable) -> String {
    let Some(id) = frame else { return NO_STACK.to_owned() };
    let text = stacks.frame(id);
    if let FrameKind::Native { library } = text.kind {
        return place_text(text.function, library, 0, Some(library));
    }
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

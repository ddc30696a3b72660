//! `heaptap stacks`: one look at the Python stack of every thread.
//!
//! Writes nothing into the target. Gathering ([`look`]) and printing are apart: what stands between reading the first and the
//! last thread is one call, so that holding the target still is a matter of what surrounds it.

use crate::cpython::{LayoutError, LocateError, Location, Python, RawFrame};
use crate::error::Exit;
use crate::image::{ImageError, modules};
use crate::inferior::maps::{self, FactError};
use crate::inferior::memory::ProcessMemory;
use crate::memory::{ReadError, RemoteMemory};
use crate::python_binary::binaries;
use serde::Serialize;
use std::collections::HashMap;
use std::io::{self, Write};

/// Frames shown of one thread.
const MAX_DEPTH: usize = 10_000;
/// Looks at a thread that moves, before its stack is shown as it was last seen.
const TRIES: usize = 200;

/// Arguments of `stacks`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  heaptap stacks --pid 4242\n  heaptap stacks --pid 4242 --json | jq '.threads[].name'"
)]
pub struct Args {
    /// The process to look at
    #[arg(long, value_name = "PID", value_parser = clap::value_parser!(i32).range(1..))]
    pub pid: i32,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Why there is nothing to show.
#[derive(Debug, thiserror::Error)]
pub enum StacksError {
    /// The process cannot be inspected.
    #[error("cannot inspect process {pid}")]
    Facts {
        /// The process.
        pid: i32,
        /// Why.
        #[source]
        source: FactError,
    },
    /// Its files cannot be used.
    #[error("cannot look into process {pid}")]
    Image {
        /// The process.
        pid: i32,
        /// Why.
        #[source]
        source: ImageError,
    },
    /// It is a kernel thread, or has exited and waits for its parent.
    #[error("process {pid} has no memory: it is {what}")]
    NoMemory {
        /// The process.
        pid: i32,
        /// Zombie or kernel thread.
        what: &'static str,
    },
    /// It is no CPython that can be read.
    #[error("process {pid} is refused")]
    Python {
        /// The process.
        pid: i32,
        /// Why.
        #[source]
        source: Box<LocateError>,
    },
    /// The layout does not fit it.
    #[error("process {pid} is refused")]
    Layout {
        /// The process.
        pid: i32,
        /// Why.
        #[source]
        source: Box<LayoutError>,
    },
    /// Its memory could not be read.
    #[error("cannot read the memory of process {pid}")]
    Read {
        /// The process.
        pid: i32,
        /// Why.
        #[source]
        source: ReadError,
    },
    /// The answer could not be printed.
    #[error("cannot print")]
    Print(#[from] io::Error),
}

impl StacksError {
    /// 3 where the target is refused, 1 where something failed.
    pub fn exit(&self) -> Exit {
        match self {
            Self::Image { source: ImageError::Architecture { .. } | ImageError::NotElf { .. }, .. }
            | Self::NoMemory { .. }
            | Self::Layout { .. } => Exit::Refused,
            Self::Python { source, .. } if !matches!(**source, LocateError::Read(_)) => Exit::Refused,
            Self::Python { .. }
            | Self::Facts { .. }
            | Self::Image { .. }
            | Self::Read { .. }
            | Self::Print(_) => Exit::Failed,
        }
    }
}

/// All threads of a process at one moment.
#[derive(Debug, Serialize)]
pub struct Look {
    /// The process.
    pub pid: i32,
    /// Its Python version.
    pub python: String,
    /// Its flavour.
    pub flavour: String,
    /// Where the offsets come from.
    pub layout: String,
    /// The runtime is being finalized.
    pub finalizing: bool,
    /// The threads, by thread id.
    pub threads: Vec<ThreadLook>,
}

/// One thread.
#[derive(Debug, Serialize)]
pub struct ThreadLook {
    /// Its id, in our pid namespace.
    pub tid: Option<i32>,
    /// The name the kernel has.
    pub os_name: Option<String>,
    /// The name `threading` has.
    pub name: Option<String>,
    /// It has a Python thread state; false: it runs no Python code.
    pub python: bool,
    /// It changed while it was read: the stack is what was seen last.
    pub moving: bool,
    /// There are more frames.
    pub truncated: bool,
    /// Innermost first.
    pub frames: Vec<FrameLook>,
}

/// One frame.
#[derive(Debug, Serialize)]
pub struct FrameLook {
    /// Qualified name (3.11+), plain name before.
    pub function: String,
    /// File.
    pub file: String,
    /// Line; absent where the instruction has none.
    pub line: Option<u32>,
}

/// Does what `args` say.
pub fn run(args: &Args) -> Result<(), StacksError> {
    let look = inspect(args.pid)?;
    let mut out = io::stdout().lock();
    let printed = if args.json {
        serde_json::to_writer_pretty(&mut out, &look).map_err(io::Error::from).and_then(|()| writeln!(out))
    } else {
        print(&mut out, &look)
    };
    match printed.and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

/// Finds the Python of process `pid` and looks at its threads.
pub fn inspect(pid: i32) -> Result<Look, StacksError> {
    let facts = |source| StacksError::Facts { pid, source };
    let status = maps::status(pid, pid).map_err(facts)?;
    if !status.has_memory {
        let what = if status.state == 'Z' { "a zombie" } else { "a kernel thread" };
        return Err(StacksError::NoMemory { pid, what });
    }
    let memory = ProcessMemory::new(pid);
    let mappings = maps::mappings(pid).map_err(facts)?;
    let modules = modules(pid, &mappings, &memory).map_err(|source| StacksError::Image { pid, source })?;
    let python = Python::locate(&memory, &binaries(&modules))
        .map_err(|source| StacksError::Python { pid, source: Box::new(source) })?;
    self_test(&python, pid, &memory)?;
    look(&python, pid, &memory)
}

/// A running target changes under the test: what fails once may be a race, what fails always is the layout.
fn self_test(python: &Python, pid: i32, memory: &dyn RemoteMemory) -> Result<(), StacksError> {
    let mut last = None;
    for _ in 0..TRIES {
        let tasks = maps::namespaced_tasks(pid).map_err(|source| StacksError::Facts { pid, source })?;
        let tids: Vec<i32> = tasks.iter().map(|(_, inner)| *inner).collect();
        match python.self_test(memory, &tids) {
            Ok(_) => return Ok(()),
            Err(error) => last = Some(error),
        }
    }
    match last {
        Some(source) => Err(StacksError::Layout { pid, source: Box::new(source) }),
        None => Ok(()),
    }
}

/// Looks at every thread. The target may run: each thread is read until two readings agree.
pub fn look(python: &Python, pid: i32, memory: &dyn RemoteMemory) -> Result<Look, StacksError> {
    let read = |source| StacksError::Read { pid, source };
    let tasks = maps::namespaced_tasks(pid).map_err(|source| StacksError::Facts { pid, source })?;
    let outer: HashMap<i32, i32> = tasks.iter().map(|(outer, inner)| (*inner, *outer)).collect();
    let mut codes = python.code_table();
    let mut threads = Vec::new();
    for thread in python.threads(memory).map_err(read)? {
        let tid = thread.tid.and_then(|inner| outer.get(&inner).copied());
        let mut seen = ThreadLook {
            tid,
            os_name: tid.and_then(|tid| maps::task_name(pid, tid)),
            name: thread.name,
            python: true,
            moving: true,
            truncated: false,
            frames: Vec::new(),
        };
        let (mut raw, mut before) = (Vec::new(), None);
        for _ in 0..TRIES {
            raw.clear();
            let walk = python.walk(memory, thread.tstate, &mut raw, MAX_DEPTH).ok();
            let mut locations = Vec::new();
            codes.resolve(memory, &raw, &mut locations);
            seen.truncated = walk.is_some_and(|w| w.truncated);
            seen.frames = locations.into_iter().map(frame).collect();
            let this: Option<Vec<RawFrame>> = walk.map(|_| raw.clone());
            if this.is_some() && this == before {
                seen.moving = false;
                break;
            }
            before = this;
        }
        threads.push(seen);
    }
    for (tid, _) in tasks {
        if !threads.iter().any(|t| t.tid == Some(tid)) {
            threads.push(ThreadLook {
                tid: Some(tid),
                os_name: maps::task_name(pid, tid),
                name: None,
                python: false,
                moving: false,
                truncated: false,
                frames: Vec::new(),
            });
        }
    }
    threads.sort_by_key(|t| t.tid);
    Ok(Look {
        pid,
        python: python.version.to_string(),
        flavour: python.flavour.to_string(),
        layout: python.layout_source.clone(),
        finalizing: !python.finalizing(memory).map_err(read)?.is_null(),
        threads,
    })
}

fn frame(location: Location) -> FrameLook {
    FrameLook {
        function: location.function.to_string(),
        file: location.file.to_string(),
        line: location.line,
    }
}

fn print(out: &mut impl Write, look: &Look) -> io::Result<()> {
    let finalizing = if look.finalizing { ", finalizing" } else { "" };
    writeln!(
        out,
        "process {}: CPython {} ({}{finalizing}), layout {}",
        look.pid, look.python, look.flavour, look.layout
    )?;
    for thread in &look.threads {
        let tid = thread.tid.map_or_else(|| "?".to_owned(), |tid| tid.to_string());
        write!(out, "\nthread {tid}")?;
        if let Some(name) = &thread.os_name {
            write!(out, " ({})", printable(name))?;
        }
        if let Some(name) = &thread.name {
            write!(out, " \"{}\"", printable(name))?;
        }
        match (thread.python, thread.frames.is_empty()) {
            (false, _) => write!(out, ": no Python state")?,
            (true, true) => write!(out, ": no Python frames")?,
            (true, false) => {}
        }
        writeln!(out, "{}", if thread.moving { " (moved while it was read)" } else { "" })?;
        for frame in &thread.frames {
            let line = frame.line.map_or_else(|| "?".to_owned(), |line| line.to_string());
            writeln!(out, "    {} ({}:{line})", printable(&frame.function), printable(&frame.file))?;
        }
        if thread.truncated {
            writeln!(out, "    … more than {MAX_DEPTH} frames")?;
        }
    }
    Ok(())
}

/// Names come from the target and may hold anything: control characters are escaped, lest they drive the terminal.
fn printable(text: &str) -> String {
    let hostile = |c: char| {
        c.is_control()
            || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    text.chars().flat_map(|c| if hostile(c) { c.escape_unicode().collect() } else { vec![c] }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_do_not_reach_the_terminal() {
        assert_eq!(printable("a\x1b[2Jé\n\u{202e}"), "a\\u{1b}[2Jé\\u{a}\\u{202e}");
    }

    #[test]
    fn a_thread_without_python_says_so() {
        let thread = |python| ThreadLook {
            tid: Some(7),
            os_name: Some("io".into()),
            name: None,
            python,
            moving: false,
            truncated: false,
            frames: Vec::new(),
        };
        let look = Look {
            pid: 1,
            python: "3.11.7".into(),
            flavour: "default build".into(),
            layout: "x".into(),
            finalizing: false,
            threads: vec![thread(false), thread(true)],
        };
        let mut out = Vec::new();
        print(&mut out, &look).unwrap();
        let text = String::from_utf8(out).unwrap();
        assert!(
            text.contains("thread 7 (io): no Python state\n")
                && text.contains("thread 7 (io): no Python frames\n")
        );
    }
}

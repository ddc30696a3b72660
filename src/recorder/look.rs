//! One look at the Python stack of every thread, for `stacks`.
//!
//! Writes nothing into the target. By default it is stopped for the look, some milliseconds; without a stop each thread
//! is read until two readings agree.

use super::RecordError;
use super::look_native::{NativeEyes, NativeLook, root};
use super::record::test_layout;
use crate::cpython::{CodeTable, Location, Python, RawFrame};
use crate::image::{modules, vdso};
use crate::inferior::memory::ProcessMemory;
use crate::inferior::{Inferior, facts, maps};
use crate::memory::RemoteMemory;
use crate::native::{Names, Stack};
use crate::python_binary::binaries;
use serde::Serialize;
use std::collections::HashMap;

/// Frames shown of one thread.
pub const MAX_DEPTH: usize = 10_000;
/// Looks at a thread that moves, before its stack is shown as it was last seen.
const TRIES: usize = 200;

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
    pub tid: i32,
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
    /// Its C frames with these among them, where they were asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub native: Option<NativeLook>,
}

/// One frame.
#[derive(Debug, Clone, Serialize)]
pub struct FrameLook {
    /// Qualified name (3.11+), plain name before.
    pub function: String,
    /// File.
    pub file: String,
    /// Line; absent where the instruction has none.
    pub line: Option<u32>,
}

/// How a process is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Manner {
    /// It runs meanwhile.
    Running,
    /// It is stopped for the look.
    Stopped,
    /// The same, and C frames are seen, too.
    Native,
}

/// Finds the Python of process `pid` and looks at its threads.
pub fn inspect(pid: i32, manner: Manner) -> Result<Look, RecordError> {
    facts::check_attachable(pid)?;
    let memory = ProcessMemory::new(pid);
    let maps = maps::mappings(pid)?;
    let mut modules = modules(maps::memory_holder(pid), &maps, &memory)?;
    let python = Python::locate(&memory, &binaries(&modules))?;
    if manner == Manner::Running {
        self_test(&python, pid, &memory)?;
        return Ok(look(&python, pid, &memory)?.0);
    }
    modules.extend(vdso(&maps, &memory));
    let eyes = (manner == Manner::Native).then(|| NativeEyes::open(modules, &python.binary));
    let mut inferior = Inferior::seize(pid)?;
    let mut stacks: HashMap<i32, Stack> = HashMap::new();
    let looked = inferior.stop_to_attach().map_err(RecordError::from).and_then(|()| {
        test_layout(&mut inferior, &python)?;
        for (eyes, tid) in
            eyes.iter().flat_map(|eyes| inferior.tids().into_iter().map(move |tid| (eyes, tid)))
        {
            // A thread that just ended has no registers any more.
            if let Ok(registers) = inferior.registers(tid) {
                stacks.insert(tid, eyes.see(&memory, &registers));
            }
        }
        look(&python, pid, &memory)
    });
    let let_go = inferior.detach();
    let (mut look, mut calls) = looked?;
    let_go?;
    if let Some(eyes) = eyes {
        let mut names = Names::new(&root(pid));
        for thread in &mut look.threads {
            let python = calls.remove(&thread.tid).unwrap_or_default();
            thread.native = stacks.get(&thread.tid).map(|stack| eyes.tell(&mut names, stack, python));
        }
    }
    Ok(look)
}

/// A thread's Python frames by call of the interpreter's loop.
type Calls = Vec<Vec<FrameLook>>;

/// A running target changes under the test: what fails once may be a race, what fails always is the layout.
fn self_test(python: &Python, pid: i32, memory: &dyn RemoteMemory) -> Result<(), RecordError> {
    for tries_left in (0..TRIES).rev() {
        let tids: Vec<i32> = maps::namespaced_tasks(pid)?.iter().map(|(_, inner)| *inner).collect();
        match python.self_test(memory, &tids) {
            Ok(_) => break,
            Err(_) if tries_left > 0 => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Looks at every thread; and their frames by call, by thread id. The target may run: each thread is read until two readings agree.
fn look(
    python: &Python,
    pid: i32,
    memory: &dyn RemoteMemory,
) -> Result<(Look, HashMap<i32, Calls>), RecordError> {
    let tasks = maps::namespaced_tasks(pid)?;
    let outer: HashMap<i32, i32> = tasks.iter().map(|(outer, inner)| (*inner, *outer)).collect();
    let mut codes = python.code_table();
    let (mut threads, mut calls_of) = (Vec::new(), HashMap::new());
    for thread in python.threads(memory)? {
        // One that is not born yet, or ended without CPython's knowledge and left its state behind, is no thread.
        let Some(tid) = thread.tid.and_then(|inner| outer.get(&inner).copied()) else { continue };
        let mut seen = ThreadLook {
            tid,
            os_name: maps::task_name(pid, tid),
            name: thread.name,
            python: true,
            moving: true,
            truncated: false,
            frames: Vec::new(),
            native: None,
        };
        let mut calls: Calls = Vec::new();
        let (mut raw, mut before) = (Vec::new(), None);
        for _ in 0..TRIES {
            raw.clear();
            let walk = python.walk(memory, thread.tstate, &mut raw, MAX_DEPTH).ok();
            calls = raw
                .split_inclusive(|frame| frame.entry)
                .map(|call| named(call, &mut codes, memory))
                .collect();
            seen.truncated = walk.is_some_and(|w| w.truncated);
            seen.frames = calls.concat();
            let this: Option<Vec<RawFrame>> = walk.map(|_| raw.clone());
            if this.is_some() && this == before {
                seen.moving = false;
                break;
            }
            before = this;
        }
        calls_of.insert(tid, calls);
        threads.push(seen);
    }
    for (tid, _) in tasks {
        if !threads.iter().any(|t| t.tid == tid) {
            threads.push(ThreadLook {
                tid,
                os_name: maps::task_name(pid, tid),
                name: None,
                python: false,
                moving: false,
                truncated: false,
                frames: Vec::new(),
                native: None,
            });
        }
    }
    threads.sort_by_key(|t| t.tid);
    let look = Look {
        pid,
        python: python.version.to_string(),
        flavour: python.flavour.to_string(),
        layout: python.layout_source.clone(),
        finalizing: !python.finalizing(memory)?.is_null(),
        threads,
    };
    Ok((look, calls_of))
}

fn named(raw: &[RawFrame], codes: &mut CodeTable, memory: &dyn RemoteMemory) -> Vec<FrameLook> {
    let mut locations = Vec::new();
    codes.resolve(memory, raw, &mut locations);
    locations.into_iter().map(frame).collect()
}

fn frame(location: Location) -> FrameLook {
    FrameLook {
        function: location.function.to_string(),
        file: location.file.to_string(),
        line: location.line,
    }
}

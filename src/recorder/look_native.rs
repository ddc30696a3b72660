//! The C frames of a look at every thread, with Python's among them.
//!
//! Rules are made before the target is stopped and names are looked up after it runs again: while it stands, stacks are walked, no more.

use super::look::FrameLook;
use crate::addr::RemoteAddr;
use crate::image::Module;
use crate::inferior::sys;
use crate::memory::RemoteMemory;
use crate::native::{Ended, Merged, Names, Place, Stack, Tables, merge, parts, walk};
use crate::unwind_abi::Registers;
use serde::Serialize;
use std::ops::Range;
use std::path::PathBuf;
use std::time::Instant;

/// CPython's loop. It is exported, so that every file has its name.
const LOOP: &str = "_PyEval_EvalFrameDefault";

/// A thread's C frames with Python's in their places.
#[derive(Debug, Serialize)]
pub struct NativeLook {
    /// Innermost first.
    pub frames: Vec<MergedLook>,
    /// There are more, but the last one's code does not tell who called it.
    pub cut: bool,
    /// So many C frames, the outermost, follow one whose code has no unwind data: frames may be missing before them.
    pub guessed: usize,
}

/// One frame of a merged stack.
#[derive(Debug, Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum MergedLook {
    /// Of Python.
    Python(FrameLook),
    /// Of C, C++, Rust or whatever else was compiled.
    Native(NativeFrame),
}

/// One frame of compiled code.
#[derive(Debug, Serialize)]
pub struct NativeFrame {
    /// Demangled; absent where nobody tells.
    pub function: Option<String>,
    /// Source file.
    pub file: Option<String>,
    /// Line.
    pub line: Option<u32>,
    /// The file that is mapped there; absent for code that no file holds.
    pub module: Option<String>,
    /// Where in the file (in memory where there is none), as its symbols have it.
    pub address: u64,
    /// It was inlined into the next one.
    pub inlined: bool,
    /// The file is Python's own.
    pub interpreter: bool,
}

/// What C frames of a process are seen with.
pub struct NativeEyes<'a> {
    modules: &'a [Module],
    tables: Tables<'a>,
    python: Option<usize>,
    loops: Vec<Range<RemoteAddr>>,
}

impl<'a> NativeEyes<'a> {
    /// Reads the unwind data of all files. `python`: the path of the one that holds the runtime.
    pub fn open(modules: &'a [Module], python: &str) -> Self {
        let (tables, start) = (Tables::of(modules), Instant::now());
        tables.prepare();
        tracing::debug!(files = modules.len(), rows = tables.rows(), took = ?start.elapsed(), "unwind data read");
        let python = modules.iter().position(|module| module.path().display().to_string() == python);
        let loops = python.map(|python| loops(&modules[python])).unwrap_or_default();
        Self { modules, tables, python, loops }
    }

    /// The C frames of a thread that stands still.
    pub fn see(&self, memory: &dyn RemoteMemory, registers: &sys::Registers) -> Stack {
        let (pc, sp, bp) = (registers.rip, registers.rsp, Some(registers.rbp));
        walk(&self.tables, memory, Registers { pc, sp, bp, is_return: false })
    }

    /// Puts Python's frames among them (by call of its loop) and names all.
    pub fn tell(&self, names: &Names, stack: &Stack, python: Vec<Vec<FrameLook>>) -> NativeLook {
        let is_loop = |at: &RemoteAddr| self.loops.iter().any(|part| part.contains(at));
        let native: Vec<bool> = stack.frames.iter().map(is_loop).collect();
        let mut frames = Vec::new();
        for merged in merge(&native, python) {
            match merged {
                Merged::Python(frame) => frames.push(MergedLook::Python(frame)),
                Merged::Native(number) => self.name(names, stack.frames[number], &mut frames),
            }
        }
        NativeLook { frames, cut: stack.ended == Ended::Cut, guessed: stack.guessed }
    }

    fn name(&self, names: &Names, at: RemoteAddr, frames: &mut Vec<MergedLook>) {
        let number = self.tables.module(at);
        let module = number.map(|number| &self.modules[number]);
        let places = number.map_or_else(|| vec![Place::default()], |number| names.places(number, at));
        let outermost = places.len() - 1;
        frames.extend(places.into_iter().enumerate().map(|(place, Place { function, file, line })| {
            MergedLook::Native(NativeFrame {
                function,
                file,
                line,
                module: module.map(|module| module.path().display().to_string()),
                address: module.map_or(at.0, |module| module.bias().to_image(at).0),
                inlined: place < outermost,
                interpreter: number.is_some() && number == self.python,
            })
        }));
    }
}

/// The root folder of a process, below which its own debugging information lies.
pub fn root(pid: i32) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/root"))
}

/// Where the loop's code is.
fn loops(module: &Module) -> Vec<Range<RemoteAddr>> {
    let symbol = module.file().symbol(LOOP).filter(|symbol| symbol.size > 0);
    symbol.map(|symbol| parts(module, module.bias().to_remote(symbol.addr), symbol.size)).unwrap_or_default()
}

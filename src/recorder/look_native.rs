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
#[derive(Debug)]
pub struct NativeEyes {
    tables: Tables,
    python: Option<usize>,
    loops: Vec<Range<RemoteAddr>>,
}

impl NativeEyes {
    /// Reads the unwind data of all files. `python`: the path of the one that holds the runtime.
    pub fn open(modules: Vec<Module>, python: &str) -> Self {
        let (tables, start) = (Tables::of(modules), Instant::now());
        tables.prepare();
        let mapped = tables.mapped();
        tracing::debug!(files = mapped.len(), rows = tables.rows(), took = ?start.elapsed(), "unwind data read");
        let is_python = |file: &usize| tables.file(*file).path().display().to_string() == python;
        let python = mapped.iter().map(|(file, _)| *file).find(is_python);
        let loops = python.map(|python| loops(tables.file(python))).unwrap_or_default();
        Self { tables, python, loops }
    }

    /// The code that can be seen.
    pub fn tables(&self) -> &Tables {
        &self.tables
    }

    /// The same, where other files are mapped now.
    pub fn update(&mut self, modules: Vec<Module>) {
        self.tables.update(modules);
        self.tables.prepare();
    }

    /// Whether the address lies in CPython's loop.
    pub fn is_loop(&self, at: RemoteAddr) -> bool {
        self.loops.iter().any(|part| part.contains(&at))
    }

    /// Whether the file with this number is Python's own.
    pub fn is_python(&self, file: usize) -> bool {
        self.python == Some(file)
    }

    /// The C frames of a thread that stands still.
    pub fn see(&self, memory: &dyn RemoteMemory, registers: &sys::Registers) -> Stack {
        let (pc, sp, bp) = (registers.rip, registers.rsp, Some(registers.rbp));
        walk(&self.tables, memory, Registers { pc, sp, bp, is_return: false })
    }

    /// Puts Python's frames among them (by call of its loop) and names all.
    pub fn tell(&self, names: &mut Names, stack: &Stack, python: Vec<Vec<FrameLook>>) -> NativeLook {
        let native: Vec<bool> = stack.frames.iter().map(|at| self.is_loop(*at)).collect();
        let mut frames = Vec::new();
        for merged in merge(&native, python) {
            match merged {
                Merged::Python(frame) => frames.push(MergedLook::Python(frame)),
                Merged::Native(number) => self.name(names, stack.frames[number], &mut frames),
            }
        }
        NativeLook { frames, cut: stack.ended == Ended::Cut, guessed: stack.guessed }
    }

    fn name(&self, names: &mut Names, at: RemoteAddr, frames: &mut Vec<MergedLook>) {
        let found = self.tables.place(at).map(|(file, image)| (file, image, self.tables.file(file)));
        let places = found.map_or_else(
            || vec![Place::default()],
            |(file, image, module)| names.places(file, module, image),
        );
        let outermost = places.len() - 1;
        frames.extend(places.into_iter().enumerate().map(|(place, Place { function, file, line })| {
            MergedLook::Native(NativeFrame {
                function,
                file,
                line,
                module: found.map(|(_, _, module)| module.path().display().to_string()),
                address: found.map_or(at.0, |(_, image, _)| image.0),
                inlined: place < outermost,
                interpreter: found.is_some_and(|(file, ..)| self.is_python(file)),
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

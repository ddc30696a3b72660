//! [`Tables`]: the unwind rules of all files that a process has mapped, and of the vdso.

use crate::addr::RemoteAddr;
use crate::image::{Module, UnwindRows};
use crate::unwind_abi::{Bp, Cfa, Rule};
use std::cell::OnceCell;

/// Code of one file.
struct Code {
    start: RemoteAddr,
    end: RemoteAddr,
    /// Number of its file among the modules.
    module: usize,
}

/// Rules of the code in a process. Each file's are made when the first frame in it is met.
pub struct Tables<'a> {
    modules: &'a [Module],
    code: Vec<Code>,
    rows: Vec<OnceCell<UnwindRows>>,
}

/// What is known of a place in the code.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Known {
    /// How its caller is found.
    pub rule: Rule,
    /// The rule is the convention of frame pointers, which the code need not keep: its file has no unwind data.
    pub guessed: bool,
}

impl<'a> Tables<'a> {
    /// Those of these files.
    pub fn of(modules: &'a [Module]) -> Self {
        let mut code: Vec<Code> = Vec::new();
        for (module, file) in modules.iter().enumerate() {
            let executable = file.ranges().iter().filter(|range| range.perms.execute);
            code.extend(executable.map(|range| Code { start: range.start, end: range.end, module }));
        }
        code.sort_by_key(|code| code.start);
        Self { modules, code, rows: modules.iter().map(|_| OnceCell::new()).collect() }
    }

    /// Makes the rules of all files now.
    pub fn prepare(&self) {
        for code in &self.code {
            let _ = self.at(code.start);
        }
    }

    /// Rows of the files looked into so far.
    pub fn rows(&self) -> usize {
        self.rows.iter().filter_map(OnceCell::get).map(UnwindRows::len).sum()
    }

    /// The file whose code is there.
    pub fn module(&self, at: RemoteAddr) -> Option<usize> {
        let after = self.code.partition_point(|code| code.start <= at);
        let code = &self.code[after.checked_sub(1)?];
        (at < code.end).then_some(code.module)
    }

    /// What is known of a place; `None` where no file has code.
    pub fn at(&self, at: RemoteAddr) -> Option<Known> {
        let number = self.module(at)?;
        let module = &self.modules[number];
        let rows = self.rows[number].get_or_init(|| UnwindRows::of(module.file()));
        if rows.is_empty() {
            return Some(Known { rule: frame_pointer(), guessed: true });
        }
        Some(Known { rule: rows.at(module.bias().to_image(at).0), guessed: false })
    }
}

/// The convention: rbp leads to the caller's, the return address lies above it.
fn frame_pointer() -> Rule {
    Rule::new(Cfa::Bp(16), Bp::Saved(16)).unwrap_or(Rule::UNKNOWN)
}

//! [`Tables`]: the unwind rules of all files that a process has mapped, and of the vdso.

use crate::addr::{ImageAddr, RemoteAddr};
use crate::image::{Module, UnwindRows};
use crate::unwind_abi::{Bp, Cfa, Rule};
use std::cell::OnceCell;
use std::ops::Range;
use std::sync::Arc;

/// The code that was mapped at one moment, by ascending address.
#[derive(Debug, Default)]
pub struct CodeMap(Vec<Code>);

impl CodeMap {
    /// The number of the file whose code is there.
    pub fn file(&self, at: RemoteAddr) -> Option<usize> {
        let after = self.0.partition_point(|code| code.start <= at);
        let code = &self.0[after.checked_sub(1)?];
        (at < code.end).then_some(code.file)
    }
}

/// Code of one file.
#[derive(Debug)]
struct Code {
    start: RemoteAddr,
    end: RemoteAddr,
    /// Number of its file.
    file: usize,
}

#[derive(Debug)]
struct File {
    module: Arc<Module>,
    rows: OnceCell<Arc<UnwindRows>>,
}

/// Rules of the code in a process. Each file's are made when the first frame in it is met. A file keeps its number when others come
/// and go.
#[derive(Debug, Default)]
pub struct Tables {
    files: Vec<File>,
    /// What is mapped now.
    code: Arc<CodeMap>,
}

/// What is known of a place in the code.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Known {
    /// How its caller is found.
    pub rule: Rule,
    /// The rule is the convention of frame pointers, which the code need not keep: its file has no unwind data.
    pub guessed: bool,
}

impl Tables {
    /// Those of these files.
    pub fn of(modules: impl IntoIterator<Item = Module>) -> Self {
        let mut tables = Self::default();
        tables.update(modules);
        tables
    }

    /// What is mapped now are these files.
    pub fn update(&mut self, modules: impl IntoIterator<Item = Module>) {
        let mut code = Vec::new();
        for module in modules {
            let file = self.number(module);
            let executable = self.files[file].module.ranges().iter().filter(|range| range.perms.execute);
            code.extend(executable.map(|range| Code { start: range.start, end: range.end, file }));
        }
        code.sort_by_key(|code| code.start);
        self.code = Arc::new(CodeMap(code));
    }

    fn number(&mut self, module: Module) -> usize {
        let same_file = |known: &Module| {
            known.path() == module.path()
                && known.build_id().is_some()
                && known.build_id() == module.build_id()
        };
        let mut rows = OnceCell::new();
        for (number, known) in self.files.iter().enumerate().filter(|(_, known)| same_file(&known.module)) {
            if known.module.bias() == module.bias() && known.module.ranges() == module.ranges() {
                return number;
            }
            rows = known.rows.clone();
        }
        self.files.push(File { module: Arc::new(module), rows });
        self.files.len() - 1
    }

    /// Makes the rules of all files now.
    pub fn prepare(&self) {
        for code in &self.code.0 {
            self.rows_of(code.file);
        }
    }

    /// Rows of the files looked into so far.
    pub fn rows(&self) -> usize {
        self.files.iter().filter_map(|file| file.rows.get()).map(|rows| rows.len()).sum()
    }

    /// All files, mapped now or before.
    pub fn modules(&self) -> impl Iterator<Item = &Module> + Clone {
        self.files.iter().map(|file| &*file.module)
    }

    /// A file.
    pub fn file(&self, number: usize) -> &Arc<Module> {
        &self.files[number].module
    }

    /// The files that are mapped now, and the numbers of the ranges of their code.
    pub fn mapped(&self) -> Vec<(usize, Vec<Range<RemoteAddr>>)> {
        let mut mapped: Vec<(usize, Vec<Range<RemoteAddr>>)> = Vec::new();
        for code in &self.code.0 {
            match mapped.iter_mut().find(|(file, _)| *file == code.file) {
                Some((_, ranges)) => ranges.push(code.start..code.end),
                None => mapped.push((code.file, vec![code.start..code.end])),
            }
        }
        mapped
    }

    /// The rows of a file, and the rule for all of its code if it has none.
    pub fn rows_of(&self, file: usize) -> (&Arc<UnwindRows>, Rule) {
        let File { module, rows } = &self.files[file];
        (rows.get_or_init(|| Arc::new(UnwindRows::of(module.file()))), frame_pointer())
    }

    /// The file whose code is there, and where in it.
    pub fn place(&self, at: RemoteAddr) -> Option<(usize, ImageAddr)> {
        self.place_in(&self.code, at)
    }

    /// The same, of code that was mapped at some moment.
    pub fn place_in(&self, code: &CodeMap, at: RemoteAddr) -> Option<(usize, ImageAddr)> {
        let file = code.file(at)?;
        Some((file, self.files[file].module.bias().to_image(at)))
    }

    /// What is mapped now.
    pub fn code(&self) -> &Arc<CodeMap> {
        &self.code
    }

    /// What is known of a place; `None` where no file has code.
    pub fn at(&self, at: RemoteAddr) -> Option<Known> {
        let (file, image) = self.place(at)?;
        let (rows, rule) = self.rows_of(file);
        if rows.is_empty() {
            return Some(Known { rule, guessed: true });
        }
        Some(Known { rule: rows.at(image.0), guessed: false })
    }
}

/// The convention: rbp leads to the caller's, the return address lies above it.
fn frame_pointer() -> Rule {
    Rule::new(Cfa::Bp(16), Bp::Saved(16)).unwrap_or(Rule::UNKNOWN)
}

//! [`Names`]: which function and line an address of code belongs to.
//!
//! From the file's own debugging information, else from that of its build id below `/usr/lib/debug`, else from its symbols. What nobody
//! tells stays unknown: the nearest symbol before an address that is beyond its end is no name for it.

use super::debug_info::DebugInfo;
use super::debuginfod::Debuginfod;
use super::symbolize::Symbolizer;
use crate::addr::ImageAddr;
use crate::image::Module;
use crate::image::elf::ElfFile;
use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};

/// A place in the code as its source has it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Place {
    /// The function, demangled.
    pub function: Option<String>,
    /// The source file.
    pub file: Option<String>,
    /// The line.
    pub line: Option<u32>,
}

/// Names of the code in a process. Each file is looked into when the first address of it is asked for.
pub struct Names {
    symbolizer: Symbolizer,
    /// By the number that the file has elsewhere.
    files: HashMap<usize, OfFile>,
}

/// What is known of the code in one file.
pub(super) struct OfFile {
    functions: Vec<Function>,
    debug: Option<DebugInfo>,
}

struct Function {
    start: u64,
    end: u64,
    name: Box<str>,
}

impl Names {
    /// None yet. `root` is the root folder of the process.
    pub fn new(root: &Path) -> Self {
        let folders = vec![root.join("usr/lib/debug"), PathBuf::from("/usr/lib/debug")];
        let symbolizer = Symbolizer::with(folders, Debuginfod::from_environment());
        Self { symbolizer, files: HashMap::new() }
    }

    /// What is there in file number `number`: the innermost inlined function first, that which it was inlined into last. Never empty.
    pub fn places(&mut self, number: usize, file: &Module, at: ImageAddr) -> Vec<Place> {
        let symbolizer = &self.symbolizer;
        let names = self
            .files
            .entry(number)
            .or_insert_with(|| symbolizer.read(Some(file.file()), &file.build_id().unwrap_or_default()));
        names.places(at)
    }
}

impl OfFile {
    /// Of the file itself and the one with its debugging information, either of which may not be there. `other` finds the file with
    /// a build id that has what several share of that information.
    pub(super) fn of_files(
        file: Option<&ElfFile>,
        separate: Option<&ElfFile>,
        other: impl Fn(&str) -> Option<ElfFile>,
    ) -> Self {
        let files = || file.into_iter().chain(separate);
        let debug = files().find_map(|file| DebugInfo::of(file, &other));
        let mut all: Vec<Function> = files().flat_map(functions).collect();
        all.sort_by_key(|function| function.start);
        Self { functions: all, debug }
    }

    /// What is at an address, innermost first. Never empty.
    pub(super) fn places(&self, at: ImageAddr) -> Vec<Place> {
        let mut places = self.debug.as_ref().map(|debug| debug.places(at.0)).unwrap_or_default();
        if places.is_empty() {
            places.push(Place::default());
        }
        if let Some(outermost) = places.last_mut().filter(|place| place.function.is_none()) {
            outermost.function = self.function(at).map(demangled);
        }
        places
    }

    fn function(&self, at: ImageAddr) -> Option<&str> {
        let after = self.functions.partition_point(|function| function.start <= at.0);
        // Of several with one start, some say how long they are.
        let mut before = self.functions[..after].iter().rev().take(16);
        before.find(|function| at.0 < function.end).map(|function| &*function.name)
    }
}

fn functions(file: &ElfFile) -> Vec<Function> {
    // One that does not say how long it is (assembly by hand) is no name for what lies behind it.
    let named = file.functions().into_iter().map(|(symbol, name)| Function {
        start: symbol.addr.0,
        end: symbol.addr.0.saturating_add(symbol.size.max(1)),
        name,
    });
    named.collect()
}

/// The file with the debugging information of this build id (GDB manual, "Separate Debug Files").
pub(super) fn separate(build_id: &str, folders: &[PathBuf]) -> Option<ElfFile> {
    let (first, rest) = build_id.split_at_checked(2)?;
    let paths =
        folders.iter().map(|folder| folder.join(".build-id").join(first).join(format!("{rest}.debug")));
    paths.into_iter().find_map(|path| {
        let file = ElfFile::new(File::open(&path).ok()?, &path).ok()?;
        (file.build_id().as_deref() == Some(build_id)).then_some(file)
    })
}

/// A linker's name as its language has it.
fn demangled(name: &str) -> String {
    // glibc's own tables have `malloc@@GLIBC_2.2.5`.
    let name = name.split_once('@').map_or(name, |(name, _)| name);
    if let Ok(rust) = rustc_demangle::try_demangle(name) {
        return format!("{rust:#}");
    }
    let cpp = cpp_demangle::Symbol::new(name).ok().and_then(|symbol| symbol.demangle().ok());
    cpp.unwrap_or_else(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_as_their_language_has_them() {
        let cases = [
            ("_ZN4core3fmt5Write9write_fmt17h0123456789abcdefE", "core::fmt::Write::write_fmt"),
            ("_ZN5torch8autograd6Engine7executeEv", "torch::autograd::Engine::execute()"),
            ("pthread_cond_wait@@GLIBC_2.3.2", "pthread_cond_wait"),
            ("_PyEval_EvalFrameDefault", "_PyEval_EvalFrameDefault"),
        ];
        for (name, expected) in cases {
            assert_eq!(demangled(name), expected);
        }
    }
}

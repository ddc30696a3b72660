//! Which entry points are to be observed, from what the process's modules define. Pure.
//!
//! The definition that counts is the first in the dynamic linker's lookup order: that is the one that the
//! loader bound for everybody (a preloaded jemalloc's `malloc`, not libc's). The mmap family is observed in libc
//! as well when a preloaded library defines it too: libc calls its own bodies directly.

use super::error::ProbeError;
use super::function::{Domain, Function, Member, SYMBOLS};
use super::head::Head;
use crate::addr::RemoteAddr;

/// Bytes of the file kept per entry point: more than the longest instruction (15).
pub const ENTRY_BYTES: usize = 16;

/// What the plan has to know of a module of the process.
pub trait Definitions {
    /// Path, for messages.
    fn path(&self) -> &str;
    /// Address of a function that this module defines, and its bytes as the symbol states them (0: it doesn't).
    fn function(&self, name: &str) -> Option<(RemoteAddr, u64)>;
    /// Where the next function that has a symbol begins.
    fn next_function(&self, behind: RemoteAddr) -> Option<RemoteAddr>;
    /// What the file holds at an address of this module.
    fn file_bytes(&self, addr: RemoteAddr, len: usize) -> Option<Vec<u8>>;
    /// Whether this is the C library.
    fn is_libc(&self) -> bool;
}

/// A function that gets a breakpoint or a jump.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EntryPoint {
    /// What it does.
    pub function: Function,
    /// The symbols that name it.
    pub names: Vec<&'static str>,
    /// Its address.
    pub address: RemoteAddr,
    /// The file it is from.
    pub module: String,
    /// The first bytes that the file has there.
    pub file_bytes: Vec<u8>,
    /// More of them, for a jump.
    pub head: Head,
}

/// A word of one of CPython's allocator tables that is to point to a thunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TableWord {
    /// What the function it points to does.
    pub domain: Domain,
    /// Which of the table's functions.
    pub member: Member,
    /// Address of the word.
    pub word: RemoteAddr,
    /// What it holds now.
    pub value: RemoteAddr,
}

impl TableWord {
    /// The function that it points to.
    pub fn function(&self) -> Function {
        Function::Python(self.domain, self.member)
    }
}

/// Everything that will be observed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// Functions of libc or of whatever replaces its allocator.
    pub entries: Vec<EntryPoint>,
    /// CPython's allocator tables, when asked for.
    pub words: Vec<TableWord>,
}

/// Plans the entry points of `modules`, which are in lookup order.
pub fn plan<M: Definitions>(pid: i32, modules: &[M], words: Vec<TableWord>) -> Result<Plan, ProbeError> {
    let mut entries: Vec<EntryPoint> = Vec::new();
    for (name, function) in SYMBOLS {
        let defining: Vec<_> = modules.iter().filter_map(|m| m.function(name).map(|at| (m, at))).collect();
        let libc = defining.iter().find(|(m, _)| function.is_mapping() && m.is_libc());
        for (module, at) in defining.first().into_iter().chain(libc) {
            add(&mut entries, name, *function, *module, *at);
        }
    }
    for (name, function) in [("malloc", Function::Malloc), ("free", Function::Free)] {
        if !entries.iter().any(|e| e.function == function) {
            return Err(ProbeError::NoAllocator { pid, name });
        }
    }
    Ok(Plan { entries, words })
}

/// One body may have several names (`free` and `cfree`): it is observed once, under the first.
fn add<M: Definitions>(
    entries: &mut Vec<EntryPoint>,
    name: &'static str,
    function: Function,
    module: &M,
    (address, size): (RemoteAddr, u64),
) {
    if let Some(known) = entries.iter_mut().find(|e| e.address == address) {
        if !known.names.contains(&name) {
            known.names.push(name);
        }
        return;
    }
    let Some(file_bytes) = module.file_bytes(address, ENTRY_BYTES) else { return };
    let next = module.next_function(address);
    let head = Head::read(address, size, next, &|at, len| module.file_bytes(at, len));
    let module = module.path().to_string();
    entries.push(EntryPoint { function, names: vec![name], address, module, file_bytes, head });
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    struct Fake {
        path: &'static str,
        symbols: HashMap<&'static str, u64>,
        libc: bool,
    }

    impl Definitions for Fake {
        fn path(&self) -> &str {
            self.path
        }
        fn function(&self, name: &str) -> Option<(RemoteAddr, u64)> {
            self.symbols.get(name).map(|a| (RemoteAddr(*a), 8))
        }
        fn next_function(&self, behind: RemoteAddr) -> Option<RemoteAddr> {
            self.symbols.values().filter(|a| **a > behind.0).min().map(|a| RemoteAddr(*a))
        }
        fn file_bytes(&self, _: RemoteAddr, len: usize) -> Option<Vec<u8>> {
            Some(vec![0x90; len])
        }
        fn is_libc(&self) -> bool {
            self.libc
        }
    }

    fn fake(path: &'static str, symbols: &[(&'static str, u64)], libc: bool) -> Fake {
        Fake { path, symbols: symbols.iter().copied().collect(), libc }
    }

    #[test]
    fn the_first_definition_in_lookup_order_counts() {
        let modules = [
            fake("jemalloc", &[("malloc", 0x10), ("free", 0x20)], false),
            fake("libc", &[("malloc", 0x30), ("free", 0x40), ("mmap", 0x50), ("mmap64", 0x50)], true),
        ];
        let plan = plan(1, &modules, vec![]).unwrap();
        let at: Vec<_> = plan.entries.iter().map(|e| (e.address.0, e.names.clone())).collect();
        assert_eq!(at, [(0x10, vec!["malloc"]), (0x20, vec!["free"]), (0x50, vec!["mmap", "mmap64"])]);
    }

    #[test]
    fn libcs_own_mappings_are_seen_beside_a_preloaded_librarys() {
        let modules = [
            fake("tcmalloc", &[("malloc", 0x10), ("free", 0x20), ("mmap", 0x25)], false),
            fake("libc", &[("malloc", 0x30), ("free", 0x40), ("mmap", 0x50)], true),
        ];
        let plan = plan(1, &modules, vec![]).unwrap();
        let mmaps: Vec<_> = plan.entries.iter().filter(|e| e.function == Function::Mmap).collect();
        assert_eq!(mmaps.len(), 2);
    }

    #[test]
    fn a_process_without_an_allocator_is_refused() {
        let modules = [fake("static", &[("malloc", 0x10)], false)];
        assert!(matches!(plan(7, &modules, vec![]), Err(ProbeError::NoAllocator { pid: 7, name: "free" })));
    }
}

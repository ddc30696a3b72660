//! What a process is, before anything is done to it: its modules, its Python, the entry points there are, and
//! whatever speaks against recording it. Reads only: `doctor` prints it, `attach` acts on it.

use super::RecordError;
use crate::addr::RemoteAddr;
use crate::cpython::allocators::{self, AllocatorTable};
use crate::cpython::{Binary, Flavour, Python};
use crate::image::libc::{Libc, LibcKind, libc_of};
use crate::image::{Module, modules};
use crate::inferior::memory::ProcessMemory;
use crate::inferior::{facts, maps};
use crate::mapping::Mapping;
use crate::probe::error::ProbeError;
use crate::probe::function::{Domain, Member};
use crate::probe::plan::{Definitions, Plan, TableWord, plan};
use crate::probe::stale::{self, Stale};
use crate::python_binary::binaries;

/// A process, examined.
pub struct Examined {
    /// Its id.
    pub pid: i32,
    /// Its memory map.
    pub maps: Vec<Mapping>,
    /// Its ELF files, in lookup order.
    pub modules: Vec<Module>,
    /// Its C library.
    pub libc: Option<Libc>,
    /// Its Python.
    pub python: Python,
    /// What is to be observed.
    pub plan: Plan,
    /// Regions of an earlier heaptap.
    pub stale: Vec<Stale>,
    /// How the application uses SIGTRAP, if it does.
    pub sigtrap: Option<String>,
    /// Whether a thread runs under a seccomp filter.
    pub seccomp: bool,
    /// Whether job control has it stopped: then it allocates nothing until it is continued.
    pub stopped: bool,
    /// The word that holds `PyCode_Type.tp_dealloc`, and what it holds when nothing of ours is in it.
    pub code_dealloc: (RemoteAddr, RemoteAddr),
    /// Small blocks of CPython's domains come from pymalloc or mimalloc at once; nobody stands between (tracemalloc, the debug
    /// allocators) or instead of them (`PYTHONMALLOC=malloc`).
    pub pass_on_tables: bool,
}

/// The kind of breakpoint that a process is examined for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A jump to the agent in the target.
    Jump,
    /// An int3 and ptrace.
    Trap,
}

/// A module, as the plan wants to see it.
struct ModuleDefinitions<'a> {
    module: &'a Module,
    path: String,
    is_libc: bool,
}

impl Definitions for ModuleDefinitions<'_> {
    fn path(&self) -> &str {
        &self.path
    }

    fn function(&self, name: &str) -> Option<(RemoteAddr, u64)> {
        let symbol = self.module.exported_symbol(name).filter(|s| s.is_function())?;
        Some((self.module.bias().to_remote(symbol.addr), symbol.size))
    }

    fn next_function(&self, behind: RemoteAddr) -> Option<RemoteAddr> {
        self.module.next_function(behind)
    }

    fn file_bytes(&self, addr: RemoteAddr, len: usize) -> Option<Vec<u8>> {
        self.module.file_bytes(addr, len)
    }

    fn is_libc(&self) -> bool {
        self.is_libc
    }
}

/// Examines `pid`. With `python_allocators` the plan includes CPython's allocator tables; a free-threaded build has nothing
/// else to be recorded by.
pub fn examine(pid: i32, kind: Kind, python_allocators: bool) -> Result<Examined, RecordError> {
    facts::check_attachable(pid)?;
    let memory = ProcessMemory::new(pid);
    let maps = maps::mappings(pid)?;
    let modules = modules(maps::memory_holder(pid), &maps, &memory)?;
    let python = Python::locate(&memory, &binaries(&modules))?;
    let libc = libc_of(&modules);
    let stale = stale::find_in(pid, &memory, &maps);
    let tables = python_allocators || (kind == Kind::Jump && python.flavour == Flavour::FreeThreaded);
    let tables = if tables { Some(allocators::find(&memory, &binaries(&modules), &python)?) } else { None };
    let words = tables.as_ref().map(|t| table_words(t, &stale)).unwrap_or_default();
    let pass_on_tables = tables.as_ref().is_some_and(|t| are_alone(t, &python, &modules));
    let libc_index = libc.as_ref().map(|l| l.module);
    let definitions: Vec<_> = modules
        .iter()
        .enumerate()
        .map(|(i, module)| ModuleDefinitions {
            module,
            path: module.path().display().to_string(),
            is_libc: Some(i) == libc_index,
        })
        .collect();
    let plan = plan(pid, &definitions, words)?;
    let seccomp = facts::has_seccomp(pid)?;
    // The handler of a killed heaptap is no use that the application makes of SIGTRAP.
    let sigtrap = if stale.iter().any(Stale::has_handler) { None } else { sigtrap_use(pid)? };
    let stopped = facts::state(pid, pid) == Some('T');
    let code_dealloc = code_dealloc(&python, &memory, &modules, &stale)?;
    Ok(Examined {
        pid,
        maps,
        modules,
        libc,
        python,
        plan,
        stale,
        sigtrap,
        seccomp,
        stopped,
        code_dealloc,
        pass_on_tables,
    })
}

/// What a killed heaptap left in the word is taken back before anything is planted.
fn code_dealloc(
    python: &Python,
    memory: &ProcessMemory,
    modules: &[Module],
    stale: &[Stale],
) -> Result<(RemoteAddr, RemoteAddr), RecordError> {
    let (word, value) = python.code_dealloc_word(memory, &binaries(modules))?;
    let before = stale.iter().find_map(|s| s.word_before(word, value));
    Ok((word, before.unwrap_or(value)))
}

/// See [`Examined::pass_on_tables`]. Whoever wraps the allocators is not CPython, or keeps what he wrapped behind a context.
fn are_alone(tables: &[AllocatorTable; 3], python: &Python, modules: &[Module]) -> bool {
    let home = modules.iter().find(|m| Binary::path(*m) == python.binary);
    let [raw, mem, object] = tables;
    [mem, object].iter().all(|table| {
        let own = home.is_some_and(|module| module.contains(table.malloc));
        own && table.ctx.is_null() && table.malloc != raw.malloc
    })
}

fn table_words(tables: &[AllocatorTable; 3], stale: &[Stale]) -> Vec<TableWord> {
    let mut words: Vec<TableWord> = tables.iter().flat_map(words_of).collect();
    // What a killed heaptap left is taken back before anything is planted.
    for word in &mut words {
        let before = stale.iter().find_map(|s| s.word_before(word.word, word.value));
        word.value = before.unwrap_or(word.value);
    }
    words
}

/// The four functions of a table; its first word is their context.
fn words_of(table: &AllocatorTable) -> [TableWord; 4] {
    let domain = match table.domain {
        allocators::Domain::Raw => Domain::Raw,
        allocators::Domain::Mem => Domain::Mem,
        allocators::Domain::Object => Domain::Object,
    };
    let word = |member, index: u64, value| TableWord {
        domain,
        member,
        word: table.address.offset(8 * index),
        value,
    };
    [
        word(Member::Malloc, 1, table.malloc),
        word(Member::Calloc, 2, table.calloc),
        word(Member::Realloc, 3, table.realloc),
        word(Member::Free, 4, table.free),
    ]
}

/// How the application uses SIGTRAP: then an int3 would change what it sees, or the kernel would reset what it set.
pub fn sigtrap_use(pid: i32) -> Result<Option<String>, RecordError> {
    let bit = 1_u64 << (libc::SIGTRAP - 1);
    for tid in maps::tasks(pid)? {
        let Ok(status) = maps::status(pid, tid) else { continue };
        // A leader that exited before its threads stays listed, with every signal blocked as glibc left it.
        if matches!(status.state, 'Z' | 'X') {
            continue;
        }
        if status.caught & bit != 0 {
            return Ok(Some("handles".into()));
        }
        if status.ignored & bit != 0 {
            return Ok(Some("ignores".into()));
        }
        if status.blocked & bit != 0
            && status.blocked & SIGCANCEL == 0
            && !blocked_for_a_moment(pid, tid, bit)
        {
            return Ok(Some(format!("blocks (thread {tid})")));
        }
    }
    Ok(None)
}

/// Signal 32, which only libc itself can block: pthread_sigmask(3) and sigprocmask(3) leave it out. It does so, with
/// nearly all others, for the moments in which a thread is born or ends, or a program is started.
const SIGCANCEL: u64 = 1 << 31;

/// An older libc blocks all but its own signals for such moments. What is still blocked after some looks is the
/// application's.
fn blocked_for_a_moment(pid: i32, tid: i32, bit: u64) -> bool {
    (0..20).any(|_| {
        std::thread::sleep(std::time::Duration::from_millis(1));
        maps::status(pid, tid).map_or(true, |s| s.blocked & bit == 0)
    })
}

impl Examined {
    /// Why this process can't be recorded though it can be looked at.
    pub fn check_recordable(&self, kind: Kind, unsafe_trap: bool) -> Result<(), RecordError> {
        let refuse = |why: String| RecordError::NotRecordable { pid: self.pid, why };
        if self.libc.is_none() {
            return Err(refuse("its C library is linked statically: no entry points are known".into()));
        }
        if kind == Kind::Jump {
            return Ok(());
        }
        if self.python.flavour == Flavour::FreeThreaded {
            return Err(refuse(format!(
                "CPython {} is a free-threaded build, which only `--breakpoints jump` records",
                self.python.version
            )));
        }
        if self.libc.as_ref().is_some_and(|libc| libc.kind == LibcKind::Musl) {
            return Err(refuse("it runs on musl, which only `--breakpoints jump` records".into()));
        }
        match &self.sigtrap {
            Some(how) if !unsafe_trap => Err(ProbeError::SigtrapInUse { how: how.clone() }.into()),
            _ => Ok(()),
        }
    }

    /// Name and version of the C library, such as `glibc 2.36`.
    pub fn libc_name(&self) -> String {
        match &self.libc {
            Some(libc) => {
                let kind = match libc.kind {
                    LibcKind::Glibc => "glibc",
                    LibcKind::Musl => "musl",
                };
                format!("{kind} {}", libc.version.as_deref().unwrap_or("of unknown version"))
            }
            None => "no C library".into(),
        }
    }

    /// Path of the module whose `malloc` the process calls.
    pub fn allocator_library(&self) -> String {
        let index = self.libc.as_ref().and_then(|l| l.malloc);
        index.map(|i| self.modules[i].path().display().to_string()).unwrap_or_default()
    }
}

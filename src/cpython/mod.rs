//! CPython seen from outside: which version, where its structures are, what its threads execute.
//!
//! All over [`RemoteMemory`] and the small trait [`Binary`]; knows no process, file or ptrace. [`Python::locate`] learns
//! everything that stays constant, once; [`Python::thread_state_of`], [`Python::walk`] and [`CodeTable::resolve`] are the
//! three steps of every stack.

pub mod allocators;
pub mod arenas;
pub mod binary;
pub mod code;
pub mod code_dealloc;
pub mod code_text;
pub mod collector;
mod disasm;
pub mod frame;
pub mod layout;
pub mod line_table;
mod locate;
pub mod object;
pub mod page_cache;
pub mod pymalloc;
pub mod self_test;
pub mod text;
pub mod thread_state;
pub mod threads;
pub mod version;

pub use allocators::{AllocatorTable, AllocatorsError, Domain};
pub use arenas::{ArenaAllocator, NoArenaAllocator};
pub use binary::{Binary, Span};
pub use code::{CodeTable, Location};
pub use code_dealloc::CodeDeallocError;
pub use collector::Collections;
pub use frame::{RawFrame, Walk, WalkError};
pub use layout::{Layout, LayoutError};
pub use locate::LocateError;
pub use page_cache::PageCache;
pub use pymalloc::{Arenas, Pymalloc};
pub use self_test::SelfTest;
pub use threads::PyThread;
pub use version::{Evidence, Flavour, PythonVersion};

use crate::addr::RemoteAddr;
use crate::memory::{ReadError, RemoteMemory};
use thread_state::{OwnState, PthreadFacts};

/// A CPython found in a process, with all that stays constant while it lives.
#[derive(Debug, Clone)]
pub struct Python {
    /// Its version.
    pub version: PythonVersion,
    /// Its flavour.
    pub flavour: Flavour,
    /// `_PyRuntime`.
    pub runtime: RemoteAddr,
    /// Where its structures keep their fields.
    pub layout: Layout,
    /// `cpython-layouts/3.11.toml` or `_Py_DebugOffsets`.
    pub layout_source: String,
    /// How each fact was learnt.
    pub evidence: Vec<Evidence>,
    /// Path of the executable or library that holds the runtime.
    pub binary: String,
    /// How a thread's own state is found.
    pub own_state: OwnState,
    /// What the C library says about threads.
    pub pthread: PthreadFacts,
    /// `PyCode_Type`.
    pub code_type: Option<RemoteAddr>,
}

impl Python {
    /// Finds the CPython among `binaries` (in lookup order). Reads only; an unsupported or unfit process is an error that says
    /// what was found and what to do. The layout is not yet tried on real threads: [`Python::self_test`].
    pub fn locate(memory: &dyn RemoteMemory, binaries: &[&dyn Binary]) -> Result<Self, LocateError> {
        locate::locate(memory, binaries)
    }

    /// Walks every thread and compares with what must hold. `tids`: the process's threads, as its own pid namespace numbers them.
    pub fn self_test(&self, memory: &dyn RemoteMemory, tids: &[i32]) -> Result<SelfTest, LayoutError> {
        self_test::run(self, memory, tids)
    }

    /// All threads that have a thread state.
    pub fn threads(&self, memory: &dyn RemoteMemory) -> Result<Vec<PyThread>, ReadError> {
        threads::threads(memory, &self.layout, self.runtime, &self.pthread)
    }

    /// The thread state that is finalizing the runtime; NULL while the runtime lives.
    pub fn finalizing(&self, memory: &dyn RemoteMemory) -> Result<RemoteAddr, ReadError> {
        memory.read_ptr(self.runtime.offset(self.layout.runtime_state.finalizing))
    }

    /// The main interpreter: the one with number 0, the last of the list.
    fn main_interpreter(&self, memory: &dyn RemoteMemory) -> Result<RemoteAddr, ReadError> {
        let interpreters = thread_state::interpreters(memory, &self.layout, self.runtime)?;
        Ok(interpreters.last().copied().unwrap_or(RemoteAddr::NULL))
    }

    /// The thread's own state; `None` for a thread without one, and for one whose state may be gone because the runtime is being
    /// finalized by another. `fs_base` is the thread's thread pointer.
    ///
    /// Four small reads. The answer is checked: the state must name the same thread pointer, so a stale slot (a thread that
    /// outlives `Py_Finalize`) is no stack rather than a wrong one.
    pub fn thread_state_of(
        &self,
        memory: &dyn RemoteMemory,
        _tid: i32,
        fs_base: u64,
    ) -> Result<Option<RemoteAddr>, ReadError> {
        if fs_base == 0 {
            return Ok(None);
        }
        let tstate = match self.own_state {
            OwnState::Lists => self.search(memory, fs_base)?,
            own_state => own_state.read(memory, fs_base)?,
        };
        if tstate.is_null() {
            return Ok(None);
        }
        let finalizing = self.finalizing(memory)?;
        if !finalizing.is_null() && finalizing != tstate {
            return Ok(None);
        }
        match memory.read_u64(tstate.offset(self.layout.thread_state.thread_id)) {
            Ok(thread_id) if thread_id == fs_base => Ok(Some(tstate)),
            Ok(_) | Err(ReadError::Unmapped { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn search(&self, memory: &dyn RemoteMemory, fs_base: u64) -> Result<RemoteAddr, ReadError> {
        let all = thread_state::all(memory, &self.layout, self.runtime)?;
        Ok(all.iter().find(|t| t.thread_id == fs_base).map_or(RemoteAddr::NULL, |t| t.addr))
    }

    /// Appends the frames of `tstate` to `out`, innermost first, at most `max_depth`.
    pub fn walk(
        &self,
        memory: &dyn RemoteMemory,
        tstate: RemoteAddr,
        out: &mut Vec<RawFrame>,
        max_depth: usize,
    ) -> Result<Walk, WalkError> {
        frame::walk(memory, &self.layout, tstate, out, max_depth)
    }

    /// The allocator tables of the three domains, raw, mem, object. `binaries` as for [`Python::locate`].
    pub fn allocators(
        &self,
        memory: &dyn RemoteMemory,
        binaries: &[&dyn Binary],
    ) -> Result<[AllocatorTable; 3], AllocatorsError> {
        allocators::find(memory, binaries, self)
    }

    /// Where pymalloc's arenas come from. `binaries` as for [`Python::locate`].
    pub fn arena_allocator(
        &self,
        memory: &dyn RemoteMemory,
        binaries: &[&dyn Binary],
    ) -> Result<ArenaAllocator, NoArenaAllocator> {
        arenas::find(memory, binaries, self)
    }

    /// How often the garbage collector has run: where that is counted, if the version does so where it is looked for.
    pub fn collections(&self, memory: &dyn RemoteMemory) -> Result<Option<Collections>, ReadError> {
        Collections::find(memory, self)
    }

    /// pymalloc, if it is in use and can be found. `binaries` as for [`Python::locate`].
    pub fn pymalloc(&self, memory: &dyn RemoteMemory, binaries: &[&dyn Binary]) -> Option<Pymalloc> {
        Pymalloc::find(memory, binaries, self)
    }

    /// The word that points to the function which frees code objects, and what it holds. `binaries` as for [`Python::locate`].
    pub fn code_dealloc_word(
        &self,
        memory: &dyn RemoteMemory,
        binaries: &[&dyn Binary],
    ) -> Result<(RemoteAddr, RemoteAddr), CodeDeallocError> {
        code_dealloc::find(memory, binaries, self)
    }

    /// An empty table of this process's code objects.
    pub fn code_table(&self) -> CodeTable {
        CodeTable::new(&self.layout, self.code_type)
    }
}

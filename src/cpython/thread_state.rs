//! Thread states: all of them by the interpreters' lists, and a thread's own by its thread-specific data.
//!
//! `tstate_current` is not used: it is NULL while the GIL is released, it may be another thread's, and reading it
//! races with its being freed. A thread's own slot is right with the GIL released too.

use super::binary::{Binary, find_symbol};
use super::disasm::{ThreadLocal, musl_tsd_offset, thread_local_returned};
use super::layout::Layout;
use crate::addr::RemoteAddr;
use crate::memory::{ReadError, RemoteMemory};

/// Interpreters and threads looked at; a longer list is a loop.
const MAX_LIST: usize = 65_536;
/// glibc's `struct pthread` (x86-64): `specific`, the pointers to blocks of 32 keys, where the descriptors that
/// `libthread_db` uses are not exported.
const GLIBC_SPECIFIC: u64 = 0x510;
const GLIBC_TID: u64 = 0x2d0;
/// musl's `struct pthread` (x86-64, since 1.2): `tid`.
const MUSL_TID: u64 = 0x30;

/// One thread state of the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ThreadStateRef {
    /// The `PyThreadState`.
    pub addr: RemoteAddr,
    /// Its interpreter.
    pub interpreter: RemoteAddr,
    /// `pthread_self()` of its thread, which on x86-64 Linux is the thread pointer (fs base). 0 if not bound yet.
    pub thread_id: u64,
    /// Thread id in the target's pid namespace, where CPython keeps it (3.11+).
    pub native_thread_id: Option<i32>,
}

/// How a thread's own state is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OwnState {
    /// glibc's thread-specific data: blocks of 32 entries {sequence, value}.
    Glibc {
        /// The key.
        key: u64,
        /// Offset of `specific` in `struct pthread`.
        blocks: u64,
    },
    /// musl's: `self->tsd[key]`.
    Musl {
        /// The key.
        key: u64,
        /// Offset of `tsd` in `struct pthread`.
        tsd: u64,
    },
    /// A thread-local variable at a constant distance from the thread pointer (3.15+).
    ThreadLocal {
        /// The distance, bytes.
        offset: i64,
    },
    /// A thread-local variable in a module's block, found through the thread's vector of blocks (3.15+, `dlopen`ed library).
    Dynamic {
        /// Module id.
        module: u64,
        /// Offset in the block.
        offset: u64,
        /// Bytes of an entry of the vector: 16 in glibc, 8 in musl.
        entry: u64,
    },
    /// By searching the interpreters' lists for the thread pointer.
    Lists,
}

const GLIBC_KEYS_PER_BLOCK: u64 = 32;
const GLIBC_KEY_ENTRY: u64 = 16;
const GLIBC_KEY_VALUE: u64 = 8;
const GLIBC_MAX_KEYS: u64 = 1024;
const MUSL_MAX_KEYS: u64 = 128;

/// What the C library says about its threads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PthreadFacts {
    /// It is glibc.
    pub glibc: bool,
    /// Offset of the thread id in `struct pthread`.
    pub tid: u64,
    /// glibc: offset of `specific`. musl: of `tsd`.
    pub specific: Option<u64>,
}

/// Asks the libraries: glibc exports descriptors {bits, count, offset} of `struct pthread` for debuggers; musl is asked by decoding
/// its `pthread_getspecific`.
pub fn pthread_facts(memory: &dyn RemoteMemory, binaries: &[&dyn Binary]) -> PthreadFacts {
    let offset_in = |name: &str| {
        let (_, at) = find_symbol(binaries, name)?;
        memory.read_u32(at.offset(8)).ok().map(u64::from).filter(|offset| *offset < 1 << 16)
    };
    if find_symbol(binaries, "gnu_get_libc_version").is_some() {
        return PthreadFacts {
            glibc: true,
            tid: offset_in("_thread_db_pthread_tid").unwrap_or(GLIBC_TID),
            specific: Some(offset_in("_thread_db_pthread_specific").unwrap_or(GLIBC_SPECIFIC)),
        };
    }
    let getspecific = find_symbol(binaries, "pthread_getspecific").map(|(_, at)| at);
    PthreadFacts {
        glibc: false,
        tid: MUSL_TID,
        specific: getspecific.and_then(|at| musl_tsd_offset(memory, at)),
    }
}

impl OwnState {
    /// Finds the way for one process, once. In words too, as evidence.
    pub fn find(
        memory: &dyn RemoteMemory,
        binaries: &[&dyn Binary],
        layout: &Layout,
        runtime: RemoteAddr,
        pthread: &PthreadFacts,
    ) -> (Self, String) {
        match layout.runtime_state.auto_tss_key {
            Some(at) => Self::by_key(memory, runtime.offset(at), pthread),
            None => Self::by_thread_local(memory, binaries, pthread),
        }
    }

    /// `Py_tss_t` {int is_initialized; pthread_key_t key}.
    fn by_key(memory: &dyn RemoteMemory, tss: RemoteAddr, pthread: &PthreadFacts) -> (Self, String) {
        let lists = |why: &str| (Self::Lists, format!("the interpreters' thread lists ({why})"));
        let (Ok(initialized), Ok(key)) = (memory.read_u32(tss), memory.read_u32(tss.offset(4))) else {
            return lists("autoTSSkey cannot be read");
        };
        let (key, limit) = (u64::from(key), if pthread.glibc { GLIBC_MAX_KEYS } else { MUSL_MAX_KEYS });
        if initialized == 0 || key >= limit {
            return lists("autoTSSkey is not initialized");
        }
        match (pthread.glibc, pthread.specific) {
            (true, Some(blocks)) => {
                (Self::Glibc { key, blocks }, format!("autoTSSkey, pthread key {key} (glibc)"))
            }
            (false, Some(tsd)) => (Self::Musl { key, tsd }, format!("autoTSSkey, pthread key {key} (musl)")),
            (_, None) => lists("the C library's thread-specific data were not found"),
        }
    }

    /// 3.15 keeps the state in `_Py_tss_gilstate`, which `PyGILState_GetThisThreadState` returns (Python/pystate.c). The
    /// variable's symbol is local, the function is exported.
    fn by_thread_local(
        memory: &dyn RemoteMemory,
        binaries: &[&dyn Binary],
        pthread: &PthreadFacts,
    ) -> (Self, String) {
        let found = find_symbol(binaries, "PyGILState_GetThisThreadState");
        match found.and_then(|(_, at)| thread_local_returned(memory, at)) {
            Some(ThreadLocal::FromThreadPointer(offset)) => (
                Self::ThreadLocal { offset },
                format!("thread-local variable at {offset} from the thread pointer"),
            ),
            Some(ThreadLocal::Dynamic(index)) => {
                if let (Ok(module @ 1..=4096), Ok(offset)) =
                    (memory.read_u64(index), memory.read_u64(index.offset(8)))
                {
                    let entry = if pthread.glibc { 16 } else { 8 };
                    let how = format!("thread-local variable at {offset:#x} in the block of module {module}");
                    return (Self::Dynamic { module, offset, entry }, how);
                }
                (
                    Self::Lists,
                    "the interpreters' thread lists (the thread-local variable's module is not loaded)"
                        .into(),
                )
            }
            None => (
                Self::Lists,
                "the interpreters' thread lists (the thread-local variable was not found)".into(),
            ),
        }
    }

    /// What the slot of the thread with thread pointer `fs_base` holds; NULL for a thread without Python. Not validated.
    pub fn read(&self, memory: &dyn RemoteMemory, fs_base: u64) -> Result<RemoteAddr, ReadError> {
        let thread = RemoteAddr(fs_base);
        match *self {
            Self::Glibc { key, blocks } => {
                let block = memory.read_ptr(thread.offset(blocks + 8 * (key / GLIBC_KEYS_PER_BLOCK)))?;
                if block.is_null() {
                    return Ok(RemoteAddr::NULL);
                }
                let entry = block.offset(GLIBC_KEY_ENTRY * (key % GLIBC_KEYS_PER_BLOCK));
                memory.read_ptr(entry.offset(GLIBC_KEY_VALUE))
            }
            Self::Musl { key, tsd } => {
                let array = memory.read_ptr(thread.offset(tsd))?;
                if array.is_null() { Ok(array) } else { memory.read_ptr(array.offset(8 * key)) }
            }
            Self::ThreadLocal { offset } => memory.read_ptr(RemoteAddr(fs_base.wrapping_add_signed(offset))),
            Self::Dynamic { module, offset, entry } => {
                // The vector: entry 0 is its generation, a block not allocated yet is -1 (glibc) or NULL.
                let vector = memory.read_ptr(thread.offset(8))?;
                let block = memory.read_ptr(vector.offset(module * entry))?;
                if block.is_null() || block.0 == u64::MAX {
                    Ok(RemoteAddr::NULL)
                } else {
                    memory.read_ptr(block.offset(offset))
                }
            }
            Self::Lists => Ok(RemoteAddr::NULL),
        }
    }
}

/// The interpreters of the runtime, newest first.
pub fn interpreters(
    memory: &dyn RemoteMemory,
    layout: &Layout,
    runtime: RemoteAddr,
) -> Result<Vec<RemoteAddr>, ReadError> {
    let head = memory.read_ptr(runtime.offset(layout.runtime_state.interpreters_head))?;
    list(memory, head, layout.interpreter_state.next)
}

/// The thread states of all interpreters, newest first in each.
pub fn all(
    memory: &dyn RemoteMemory,
    layout: &Layout,
    runtime: RemoteAddr,
) -> Result<Vec<ThreadStateRef>, ReadError> {
    let mut found = Vec::new();
    for interpreter in interpreters(memory, layout, runtime)? {
        let head = memory.read_ptr(interpreter.offset(layout.interpreter_state.threads_head))?;
        for addr in list(memory, head, layout.thread_state.next)? {
            found.push(read(memory, layout, addr)?);
        }
    }
    Ok(found)
}

/// The thread state at `addr`.
pub fn read(
    memory: &dyn RemoteMemory,
    layout: &Layout,
    addr: RemoteAddr,
) -> Result<ThreadStateRef, ReadError> {
    let fields = &layout.thread_state;
    let native = match fields.native_thread_id {
        Some(at) => Some(memory.read_u64(addr.offset(at))? as i32),
        None => None,
    };
    Ok(ThreadStateRef {
        addr,
        interpreter: memory.read_ptr(addr.offset(fields.interp))?,
        thread_id: memory.read_u64(addr.offset(fields.thread_id))?,
        native_thread_id: native,
    })
}

fn list(memory: &dyn RemoteMemory, head: RemoteAddr, next: u64) -> Result<Vec<RemoteAddr>, ReadError> {
    let mut found = Vec::new();
    let mut at = head;
    while !at.is_null() && found.len() < MAX_LIST {
        found.push(at);
        at = memory.read_ptr(at.offset(next))?;
    }
    // A list that changes while it is read may lead in a circle.
    let mut seen = std::collections::HashSet::new();
    found.retain(|addr| seen.insert(*addr));
    Ok(found)
}

//! The Python threads of a process, with the names `threading` knows them by.

use super::layout::Layout;
use super::object::Objects;
use super::text::ObjectError;
use super::thread_state::{self, PthreadFacts};
use crate::addr::RemoteAddr;
use crate::memory::{ReadError, RemoteMemory};
use std::collections::HashMap;

/// Characters of a thread's name that are kept.
const MAX_NAME: usize = 256;

/// A thread that has a thread state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PyThread {
    /// The thread state.
    pub tstate: RemoteAddr,
    /// The interpreter it belongs to.
    pub interpreter: RemoteAddr,
    /// Thread id, in the target's pid namespace.
    pub tid: Option<i32>,
    /// `threading.get_ident()`: the thread pointer.
    pub ident: u64,
    /// `threading.Thread.name`; `None` for a thread that `threading` doesn't know.
    pub name: Option<String>,
}

/// All threads, in the order of the interpreters' lists.
pub fn threads(
    memory: &dyn RemoteMemory,
    layout: &Layout,
    runtime: RemoteAddr,
    pthread: &PthreadFacts,
) -> Result<Vec<PyThread>, ReadError> {
    let states = thread_state::all(memory, layout, runtime)?;
    let mut names: HashMap<RemoteAddr, HashMap<u64, String>> = HashMap::new();
    let mut threads = Vec::with_capacity(states.len());
    for state in states {
        let names = names.entry(state.interpreter).or_insert_with(|| {
            thread_names(memory, layout, state.interpreter).unwrap_or_else(|error| {
                tracing::debug!(%error, "the names of threads cannot be read");
                HashMap::new()
            })
        });
        threads.push(PyThread {
            tstate: state.addr,
            interpreter: state.interpreter,
            tid: tid_of(memory, &state, pthread),
            ident: state.thread_id,
            name: names.get(&state.thread_id).cloned(),
        });
    }
    Ok(threads)
}

/// Before 3.11 only the C library knows: `struct pthread` is at the thread pointer and holds it.
fn tid_of(
    memory: &dyn RemoteMemory,
    state: &thread_state::ThreadStateRef,
    pthread: &PthreadFacts,
) -> Option<i32> {
    let tid = match state.native_thread_id {
        Some(tid) => tid,
        None if state.thread_id == 0 => return None,
        None => memory.read_u32(RemoteAddr(state.thread_id).offset(pthread.tid)).ok()? as i32,
    };
    (tid > 0).then_some(tid)
}

/// `sys.modules["threading"]._active`: {ident: Thread}; the name is `Thread._name`.
pub fn thread_names(
    memory: &dyn RemoteMemory,
    layout: &Layout,
    interpreter: RemoteAddr,
) -> Result<HashMap<u64, String>, ObjectError> {
    let objects = Objects::new(memory, layout);
    let mut names = HashMap::new();
    let modules = memory.read_ptr(interpreter.offset(layout.interpreter_state.imports_modules))?;
    if modules.is_null() {
        return Ok(names);
    }
    let Some(threading) = objects.dict_get(modules, "threading")? else { return Ok(names) };
    let Some(active) = objects.dict_get(objects.module_dict(threading)?, "_active")? else {
        return Ok(names);
    };
    for (ident, thread) in objects.dict_items(active)? {
        // One thread that is just being made or torn down must not hide the others.
        let name = objects.int(ident).and_then(|ident| {
            let name = objects.attribute(thread, "_name")?;
            Ok((ident, name.map(|name| objects.text(name, MAX_NAME)).transpose()?))
        });
        if let Ok((ident, Some(name))) = name {
            names.insert(ident, name);
        }
    }
    Ok(names)
}

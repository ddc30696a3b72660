//! The last check of a layout: a walk over the real threads, compared with what must hold.
//!
//! A wrong offset must be a refusal, never a wrong report. Reads only. On a process that runs, a thread may change under the
//! walk; the caller stops it, or tries again.
//!
//! A thread that left without CPython's knowledge (`pthread_exit` in an extension) has its state in the list for ever. On 3.11
//! to 3.13 frames of such a state are reached through its C stack, which is another thread's by now, or nobody's: they need not be right.

use super::Python;
use super::code::{CodeTable, Location};
use super::layout::LayoutError;
use super::thread_state::OwnState;
use super::threads::PyThread;
use super::{frame, thread_state};
use crate::memory::RemoteMemory;

/// Frames of one thread that are walked.
const MAX_DEPTH: usize = 100_000;

/// What the walk saw.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SelfTest {
    /// States of living threads whose links were right.
    pub threads: usize,
    /// Frames on all of them.
    pub frames: usize,
    /// The innermost frame of the thread with the deepest stack.
    pub sample: Option<Location>,
}

/// Walks all threads of `python`. `tids` are the thread ids of the process as its own pid namespace numbers them.
pub fn run(python: &Python, memory: &dyn RemoteMemory, tids: &[i32]) -> Result<SelfTest, LayoutError> {
    let layout = &python.layout;
    let wrong = |what: String| LayoutError::SelfTest {
        source_name: python.layout_source.clone(),
        version: python.version,
        what,
    };
    let interpreters = thread_state::interpreters(memory, layout, python.runtime)?;
    if let Some(at) = layout.interpreter_state.runtime {
        for interpreter in &interpreters {
            let back = memory.read_ptr(interpreter.offset(at))?;
            if back != python.runtime {
                return Err(wrong(format!(
                    "the interpreter at {interpreter} belongs to the runtime at {back}, not {}",
                    python.runtime
                )));
            }
        }
    }
    let threads = python.threads(memory)?;
    if threads.is_empty() {
        return Err(wrong("it has no thread states".into()));
    }
    own_states(python, memory, &threads).map_err(wrong)?;
    if let Some(stray) = threads.iter().find(|t| !interpreters.contains(&t.interpreter)) {
        let (at, interpreter) = (stray.tstate, stray.interpreter);
        return Err(wrong(format!("the thread state at {at} points to no interpreter ({interpreter})")));
    }
    if !threads.iter().any(|t| t.tid.is_some_and(|tid| tids.contains(&tid))) {
        let found: Vec<_> = threads.iter().map(|t| t.tid).collect();
        return Err(wrong(format!(
            "no thread state names a thread of the process (they name {found:?}, there are {tids:?})"
        )));
    }
    let mut codes = python.code_table();
    let mut report = SelfTest { threads: 0, frames: 0, sample: None };
    let (mut deepest, mut unread) = (0, None);
    for thread in &threads {
        let locations = match walk_one(python, memory, thread, &mut codes) {
            Ok(locations) => locations,
            Err(what) if is_left_behind(python, memory, thread, &threads, tids) => {
                tracing::debug!("a thread left its state behind: {what}");
                unread = Some(what);
                continue;
            }
            Err(what) => return Err(wrong(what)),
        };
        report.threads += usize::from(thread.tid.is_some_and(|tid| tids.contains(&tid)));
        report.frames += locations.len();
        if locations.len() > deepest {
            deepest = locations.len();
            report.sample = locations.into_iter().next();
        }
    }
    match unread {
        Some(what) if report.threads == 0 => Err(wrong(what)),
        _ => Ok(report),
    }
}

/// Whether the thread of a state has ended: it names none of the process, or one whose own state is another (its id or its stack
/// was given to a new thread).
fn is_left_behind(
    python: &Python,
    memory: &dyn RemoteMemory,
    thread: &PyThread,
    all: &[PyThread],
    tids: &[i32],
) -> bool {
    let has_same_tid = |other: &PyThread| other.tid == thread.tid && other.tstate != thread.tstate;
    !thread.tid.is_some_and(|tid| tids.contains(&tid))
        || (all.iter().any(has_same_tid) && python.own_state.read(memory, thread.ident) != Ok(thread.tstate))
}

/// Walks a thread to the end of its chain; every frame must run code.
fn walk_one(
    python: &Python,
    memory: &dyn RemoteMemory,
    thread: &PyThread,
    codes: &mut CodeTable,
) -> Result<Vec<Location>, String> {
    let at = thread.tstate;
    let mut frames = Vec::new();
    let walk = frame::walk(memory, &python.layout, at, &mut frames, MAX_DEPTH).map_err(|e| describe(&e))?;
    if walk.truncated {
        return Err(format!("the thread state at {at} has more than {MAX_DEPTH} frames"));
    }
    let mut locations = Vec::new();
    codes.resolve(memory, &frames, &mut locations);
    match locations.iter().position(CodeTable::is_unknown) {
        None => Ok(locations),
        Some(unread) => {
            let code = frames.get(unread).map_or_else(String::new, |f| format!(" at {}", f.code));
            Err(format!("frame {unread} of thread state {at} runs no code object{code}"))
        }
    }
}

/// The thread pointer of a thread is in its state, so its slot can be tried from outside: a wrong key would give every thread an
/// empty stack. (Not every slot must hold its state: a sub-interpreter's threads share one with the main interpreter's.)
fn own_states(python: &Python, memory: &dyn RemoteMemory, threads: &[PyThread]) -> Result<(), String> {
    if python.own_state == OwnState::Lists {
        return Ok(());
    }
    let bound: Vec<_> = threads.iter().filter(|t| t.ident != 0).collect();
    let right = |t: &&PyThread| python.own_state.read(memory, t.ident) == Ok(t.tstate);
    if bound.is_empty() || bound.iter().any(right) {
        return Ok(());
    }
    Err(format!("no thread's own state is where it should be ({:?})", python.own_state))
}

fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

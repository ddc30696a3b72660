//! One recording from outside: what is asked for, the order in which everything is checked and planted. What goes on from
//! then to the detach is [`super::session`]'s.
//!
//! Everything is checked before the first byte is written into the target; whatever fails, the target is let go
//! as it was found.

use super::RecordError;
use super::agent::AgentSource;
use super::examine::{Examined, Kind, examine};
use super::gauges::Instruments;
use super::header::header;
use super::ledger::Tally;
use super::native_code::NativeCode;
use super::plant::{self, JumpOptions};
use super::room;
use super::session::Session;
use super::snapshots::SnapshotOptions;
use super::trap::{StackReader, TrapSource};
use crate::capture::{CaptureWriter, Counters, EndReason, Header};
use crate::cpython::Python;
use crate::inferior::error::TraceError;
use crate::inferior::handle::Handle;
use crate::inferior::{Inferior, maps, sys};
use crate::probe::error::ProbeError;
use crate::probe::install;
use crate::probe::lift::LeftBehind;
use crate::probe::stale;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How often a signal of ours ends the wait for events, so that clock and requests are seen.
const TICK: Duration = Duration::from_millis(100);
/// How often the layout is tried, and how long the target runs in between.
const LAYOUT_TRIES: u32 = 5;
const LAYOUT_PAUSE: Duration = Duration::from_millis(2);

/// What is to be recorded.
#[derive(Debug, Clone)]
pub struct RecordOptions {
    /// The target.
    pub pid: i32,
    /// The capture.
    pub output: PathBuf,
    /// Write over an existing capture.
    pub force: bool,
    /// End after this time.
    pub duration: Option<Duration>,
    /// Observe CPython's allocator tables, too.
    pub python_allocators: bool,
    /// Record native frames, too.
    pub native: bool,
    /// Write the names of native frames into the capture at the end.
    pub bundle_symbols: bool,
    /// Plant traps even where the target uses SIGTRAP itself.
    pub unsafe_trap: bool,
    /// How the jump kind records; `None` for the trap kind.
    pub jump: Option<JumpOptions>,
    /// Take snapshots of what is live.
    pub snapshots: Option<SnapshotOptions>,
}

/// What the caller is told while it goes on.
pub trait Observer {
    /// The breakpoints are in.
    fn recording(&mut self, examined: &Examined);
    /// Now and then.
    fn progress(&mut self, progress: Progress);
}

/// How far it is.
#[derive(Debug, Clone, Copy)]
pub struct Progress {
    /// Since recording began.
    pub elapsed: Duration,
    /// The writer's counters.
    pub counters: Counters,
    /// Bytes live.
    pub live_bytes: u64,
    /// Bytes of the capture so far.
    pub file_bytes: u64,
}

/// A recording that ended.
#[derive(Debug, Clone)]
pub struct Summary {
    /// Why.
    pub reason: EndReason,
    /// How long.
    pub elapsed: Duration,
    /// What was counted.
    pub counters: Counters,
    /// What else was counted.
    pub tally: Tally,
    /// Stacks that could not be read.
    pub unreadable_stacks: u64,
    /// What could not be taken back.
    pub left: LeftBehind,
    /// Bytes of the capture.
    pub file_bytes: u64,
    /// Snapshots that were taken, and those of them that are in the capture.
    pub snapshots: Option<(u32, usize)>,
    /// Why recording ended early, when it did by an error. The target was let go all the same.
    pub failed: Option<String>,
}

/// Records a process from outside, until something ends it.
pub fn record(options: &RecordOptions, observer: &mut dyn Observer) -> Result<Summary, RecordError> {
    let kind = if options.jump.is_some() { Kind::Jump } else { Kind::Trap };
    let examined = examine(options.pid, kind, options.python_allocators)?;
    examined.check_recordable(kind, options.unsafe_trap)?;
    let native = native_code(options, &examined)?;
    let rows = native.as_ref().filter(|_| kind == Kind::Jump).map_or(0, NativeCode::needed);
    room::check(&examined, options.jump.as_ref(), rows)?;
    let (python, libc) = (&examined.python.version, examined.libc_name());
    tracing::info!(pid = options.pid, %python, libc, "the process is understood");
    sys::install_stop_signals(TICK).map_err(TraceError::Wait)?;
    let mut output = Output::prepare(options, header(&examined, options))?;
    let instruments = Instruments::of(&examined);
    // The session is made where the attach succeeded: neither kind's source is small.
    let ended = match &options.jump {
        Some(jump) => attach_jumps(options, jump, &examined, native, &mut output).map(|(source, writer)| {
            Session::new(source, writer, options, &examined).run(instruments, observer)
        }),
        None => attach(options, &examined, native, &mut output).map(|(source, writer)| {
            Session::new(source, writer, options, &examined).run(instruments, observer)
        }),
    };
    ended.unwrap_or_else(|error| {
        output.discard();
        Err(error)
    })
}

/// What native stacks are seen with, if they are wanted.
fn native_code(options: &RecordOptions, examined: &Examined) -> Result<Option<NativeCode>, RecordError> {
    if !options.native {
        return Ok(None);
    }
    if options.jump.is_some() && examined.seccomp {
        return Err(RecordError::NativeFiltered { pid: options.pid });
    }
    NativeCode::open(options.pid, &examined.python.binary).map(Some)
}

/// Plants the agent. On failure the target runs on as it was.
fn attach_jumps(
    options: &RecordOptions,
    jump: &JumpOptions,
    examined: &Examined,
    native: Option<NativeCode>,
    output: &mut Output,
) -> Result<(AgentSource, CaptureWriter), RecordError> {
    if let Some(alive) = examined.stale.iter().find(|s| s.controller_lives()) {
        return Err(ProbeError::ControllerAlive { pid: options.pid, controller: alive.controller.0 }.into());
    }
    let handle = Handle::open(options.pid);
    let planted = plant::plant(options, jump, examined, native.as_ref(), &mut || output.take())?;
    let (planted, writer) = planted;
    let (python, seccomp) = (examined.python.clone(), examined.seccomp);
    Ok((AgentSource::new(planted, handle, jump.max_cpu, (python, native), seccomp)?, writer))
}

/// The capture file, made before the target is stopped where that can't lose anything.
struct Output {
    path: PathBuf,
    force: bool,
    header: Header,
    writer: Option<CaptureWriter>,
    created: bool,
}

impl Output {
    fn prepare(options: &RecordOptions, header: Header) -> Result<Self, RecordError> {
        let mut output =
            Self { path: options.output.clone(), force: options.force, header, writer: None, created: false };
        // What --force would write over is kept until the target is known to be recordable.
        if !(options.force && exists(&output.path)) {
            output.writer = Some(CaptureWriter::create(&output.path, options.force, &output.header)?);
            output.created = true;
        }
        Ok(output)
    }

    fn take(&mut self) -> Result<CaptureWriter, RecordError> {
        match self.writer.take() {
            Some(writer) => Ok(writer),
            None => Ok(CaptureWriter::create(&self.path, self.force, &self.header)?),
        }
    }

    /// The attach was refused: the file that was made for it goes.
    fn discard(self) {
        drop(self.writer);
        let is_file = self.path.symlink_metadata().is_ok_and(|m| m.is_file());
        if self.created
            && is_file
            && let Err(e) = std::fs::remove_file(&self.path)
        {
            tracing::warn!("cannot remove {}: {e}", self.path.display());
        }
    }
}

fn exists(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

/// Stops the target, checks it, plants the probes. On failure the target runs on as it was.
fn attach(
    options: &RecordOptions,
    examined: &Examined,
    native: Option<NativeCode>,
    output: &mut Output,
) -> Result<(TrapSource, CaptureWriter), RecordError> {
    let mut inferior = Inferior::seize(options.pid)?;
    match plant(&mut inferior, options, examined, output) {
        Ok((installed, writer)) => {
            let reader = StackReader::new(examined.python.clone(), *inferior.memory(), native);
            Ok((TrapSource::new(inferior, installed, reader), writer))
        }
        Err(error) => {
            if let Err(e) = inferior.detach() {
                tracing::warn!("letting go of process {} after a refused attach: {e}", options.pid);
            }
            Err(error)
        }
    }
}

fn plant(
    inferior: &mut Inferior,
    options: &RecordOptions,
    examined: &Examined,
    output: &mut Output,
) -> Result<(install::Installed, CaptureWriter), RecordError> {
    inferior.stop_to_attach()?;
    test_layout(inferior, &examined.python)?;
    if examined.seccomp {
        inferior.suspend_filters().map_err(|errno| ProbeError::Seccomp { errno })?;
    }
    if !examined.stale.is_empty() {
        let left = stale::remove(inferior, &examined.stale)?;
        // What is only referred to does no harm to what comes now.
        if let Some(why) = left.why.first().filter(|_| left.busy) {
            return Err(RecordError::NotRecordable {
                pid: options.pid,
                why: format!("thunks of a killed heaptap can't be removed yet: {why}; try again"),
            });
        }
    }
    let writer = output.take()?;
    let how = install::Options { unsafe_trap: options.unsafe_trap, may_heal: !examined.seccomp };
    let installed = install::install(inferior, &examined.plan, how)?;
    Ok((installed, writer))
}

/// Tries the layout on the real threads. The world may have been stopped while a thread state was being linked: what fails
/// once is tried again on another moment, what fails always is the layout.
pub(super) fn test_layout(inferior: &mut Inferior, python: &Python) -> Result<(), RecordError> {
    for tries_left in (0..LAYOUT_TRIES).rev() {
        // Not only the threads that are traced: a leader that is gone keeps its thread state.
        let tids: Vec<i32> =
            maps::namespaced_tasks(inferior.pid())?.iter().map(|(_, inner)| *inner).collect();
        match python.self_test(inferior.memory(), &tids) {
            Ok(_) => break,
            Err(error) if tries_left == 0 => return Err(error.into()),
            Err(error) => tracing::debug!("the layout does not fit this moment: {error}"),
        }
        inferior.resume()?;
        std::thread::sleep(LAYOUT_PAUSE);
        inferior.stop_to_attach()?;
    }
    Ok(())
}

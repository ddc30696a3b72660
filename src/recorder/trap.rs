//! The source of the trap kind: every event is a stop of the thread that allocates; its registers and its Python
//! frames are read from outside.
//!
//! The stack is read when the call returns: it is the stack it had at the entry, and a failed call costs none.

use super::RecordError;
use super::ledger::{Ledger, Origin};
use super::locations::Locations;
use super::source::{Finished, RecordSource, SourceCounts, SourceEvent, gives_out};
use crate::capture::{CaptureWriter, StackId};
use crate::cpython::{CodeTable, Location, PageCache, Python, RawFrame};
use crate::inferior::error::TraceError;
use crate::inferior::memory::ProcessMemory;
use crate::inferior::sys::{Registers, Wait};
use crate::inferior::{Inferior, Notice, maps};
use crate::memory::RemoteMemory;
use crate::probe::install::Installed;
use std::time::Instant;

/// Frames of a stack that are kept; deeper ones are cut, and say so.
pub const MAX_DEPTH: usize = 1024;
/// Stands for those that were cut.
pub const DEEPER: &str = "<deeper frames not kept>";
/// Polls before the recorder sleeps in the kernel: a busy target's next stop is mostly a few µs away, and a
/// sleep costs two switches of context.
const SPINS: u32 = 200;

/// Reads the Python stacks of stopped threads.
pub struct StackReader {
    python: Python,
    codes: CodeTable,
    memory: ProcessMemory,
    frames: Vec<RawFrame>,
    stack: Vec<Location>,
    cut: Location,
    /// Stacks that could not be read though the thread has a Python state.
    pub unreadable: u64,
}

impl StackReader {
    /// A reader for the threads of `python`.
    pub fn new(python: Python, memory: ProcessMemory) -> Self {
        let codes = python.code_table();
        let cut = Location { function: DEEPER.into(), file: "".into(), line: None };
        Self { python, codes, memory, frames: Vec::new(), stack: Vec::new(), cut, unreadable: 0 }
    }

    /// Reads the stack of a stopped thread, innermost first; empty for a thread without a Python state.
    pub fn read(&mut self, tid: i32, regs: &Registers) -> &[Location] {
        self.frames.clear();
        self.stack.clear();
        let memory = PageCache::new(&self.memory);
        let walked = match self.python.thread_state_of(&memory, tid, regs.fs_base) {
            Ok(Some(tstate)) => {
                self.python.walk(&memory, tstate, &mut self.frames, MAX_DEPTH).map_err(|_| ())
            }
            Ok(None) => return &self.stack,
            Err(_) => Err(()),
        };
        match walked {
            Ok(walk) => {
                self.codes.resolve(&self.memory, &self.frames, &mut self.stack);
                if walk.truncated {
                    self.stack.push(self.cut.clone());
                }
            }
            Err(()) => self.unreadable += 1,
        }
        &self.stack
    }

    /// The interpreter.
    pub fn python(&self) -> &Python {
        &self.python
    }
}

/// Events by breakpoint traps.
pub struct TrapSource {
    inferior: Inferior,
    installed: Installed,
    reader: StackReader,
    locations: Locations,
    start: Instant,
    /// The thread that waits for [`RecordSource::proceed`].
    stopped: Option<i32>,
    spins: u32,
}

impl TrapSource {
    /// Takes over a process in which the probes are planted. It may be stopped.
    pub fn new(inferior: Inferior, installed: Installed, reader: StackReader) -> Self {
        let (locations, start) = (Locations::default(), Instant::now());
        Self { inferior, installed, reader, locations, start, stopped: None, spins: 0 }
    }

    /// The process.
    pub fn inferior(&self) -> &Inferior {
        &self.inferior
    }

    fn on_trap(&mut self, tid: i32) -> Result<SourceEvent, RecordError> {
        self.stopped = Some(tid);
        let Some((trap, regs)) = self.installed.trap_of(&self.inferior, tid)? else {
            // Not ours: the application gets its signal.
            self.proceed()?;
            return Ok(SourceEvent::Idle);
        };
        self.inferior.drop_signal(tid);
        let memory = *self.inferior.memory();
        let hit = self.installed.calls().hit(tid, trap, &regs, &memory);
        if let Some(to) = hit.goes_on {
            self.inferior.set_rip(tid, to)?;
        }
        self.repair_if_reset(tid)?;
        if gives_out(&hit.observation) {
            self.reader.read(tid, &regs);
        }
        Ok(SourceEvent::Call { tid, observation: hit.observation, interval: 0 })
    }

    /// An int3 met with SIGTRAP blocked made the kernel reset its disposition and unblock it. That the mask has
    /// other signals says that it may have been so; the process's caught signals say whether it was.
    fn repair_if_reset(&mut self, tid: i32) -> Result<(), RecordError> {
        let mask = self.inferior.mask(tid)?;
        if mask == 0 || !self.installed.has_handler() {
            return Ok(());
        }
        let pid = self.inferior.pid();
        let Ok(status) = maps::status(pid, tid) else { return Ok(()) };
        if status.caught & (1 << (libc::SIGTRAP - 1)) == 0 {
            let start = std::time::Instant::now();
            self.installed.repair(&mut self.inferior, tid, mask)?;
            tracing::debug!("put SIGTRAP back for thread {tid} in {:?}", start.elapsed());
        }
        Ok(())
    }
}

/// A request that finds its thread gone is no failure: its end is told by an event to come.
fn gone_is_idle(result: Result<SourceEvent, RecordError>) -> Result<SourceEvent, RecordError> {
    match result {
        Err(RecordError::Trace(TraceError::Gone { .. })) => Ok(SourceEvent::Idle),
        other => other,
    }
}

impl RecordSource for TrapSource {
    const COUNTS_CALLS: bool = true;

    fn start(&mut self) -> Result<(), RecordError> {
        self.start = Instant::now();
        Ok(self.inferior.resume()?)
    }

    fn next(&mut self) -> Result<SourceEvent, RecordError> {
        self.proceed()?;
        let how = if self.spins < SPINS { Wait::Poll } else { Wait::Block };
        let Some(notice) = self.inferior.next(how)? else {
            self.spins += 1;
            return Ok(SourceEvent::Idle);
        };
        self.spins = 0;
        match notice {
            Notice::Trap(tid) => gone_is_idle(self.on_trap(tid)),
            Notice::Forked(child) => {
                self.installed.free_child(&mut self.inferior, child)?;
                Ok(SourceEvent::Idle)
            }
            Notice::ThreadEnded(tid) => {
                self.installed.forget(tid);
                Ok(SourceEvent::ThreadEnded(tid))
            }
            Notice::Executed => Ok(SourceEvent::Executed),
            Notice::Ended(how) => Ok(SourceEvent::Ended(Some(how))),
        }
    }

    fn stack(&mut self, writer: &mut CaptureWriter) -> Result<Option<StackId>, RecordError> {
        self.locations.intern(&self.reader.stack, writer).map(Some)
    }

    fn time_ns(&mut self) -> u64 {
        self.start.elapsed().as_nanos() as u64
    }

    fn proceed(&mut self) -> Result<(), RecordError> {
        if let Some(tid) = self.stopped.take() {
            self.inferior.let_go(tid)?;
        }
        Ok(())
    }

    fn every_second(&mut self, _: &mut Ledger) -> Result<(), RecordError> {
        Ok(())
    }

    fn python(&self) -> &Python {
        self.reader.python()
    }

    fn memory(&self) -> &dyn RemoteMemory {
        self.inferior.memory()
    }

    fn unreadable_stacks(&self) -> u64 {
        self.reader.unreadable
    }

    fn counts(&self) -> SourceCounts {
        SourceCounts { extra_bytes: self.installed.extra_bytes(), ..SourceCounts::default() }
    }

    fn finish(self, ledger: &mut Ledger) -> Result<Finished, RecordError> {
        let counts = self.counts();
        let Self { mut inferior, mut installed, mut reader, mut locations, .. } = self;
        if inferior.has_ended() {
            return Ok(Finished { counts, ..Finished::default() });
        }
        let mut failed = None;
        let mut see = |tid, regs: &Registers, observation| {
            let mut stack = StackId::EMPTY;
            if gives_out(&observation) {
                stack = locations.intern(reader.read(tid, regs), ledger.writer())?;
            }
            ledger.observe(tid, observation, Origin { stack, interval: 0 })
        };
        let lifted = match inferior.stop_to_leave() {
            Ok(()) => installed.lift(&mut inferior, &mut |_, tid, regs, observation| {
                if let Err(error) = see(tid, regs, observation) {
                    failed.get_or_insert(error);
                }
            }),
            Err(error) => Err(error.into()),
        };
        let ended = inferior.has_ended();
        let let_go = inferior.detach();
        match lifted {
            Err(_) if ended => Ok(Finished { failed, counts, ..Finished::default() }),
            Err(error) => Err(error.into()),
            Ok(left) => {
                let_go?;
                Ok(Finished { left, failed, counts })
            }
        }
    }

    fn abandon(self) -> Result<(), RecordError> {
        Ok(self.inferior.detach()?)
    }
}

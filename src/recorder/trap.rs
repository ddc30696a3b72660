//! The source of the trap kind: every event is a stop of the thread that allocates; its registers and its Python
//! frames are read from outside.
//!
//! The stack is read when the call returns: it is the stack it had at the entry, and a failed call costs none.

use super::RecordError;
use super::ledger::{Ledger, Origin};
use super::locations::Locations;
use super::native_code::{NOW, NativeCode};
use super::source::{Finished, RecordSource, SourceCounts, SourceEvent, gives_out};
use crate::addr::RemoteAddr;
use crate::capture::{CaptureWriter, StackId};
use crate::cpython::{CodeTable, Location, PageCache, Python, RawFrame};
use crate::inferior::error::TraceError;
use crate::inferior::memory::ProcessMemory;
use crate::inferior::sys::{Registers, Wait};
use crate::inferior::{Inferior, Notice, maps};
use crate::memory::RemoteMemory;
use crate::native::{Ended, Stack, walk};
use crate::probe::install::Installed;
use crate::probe::ring_record::NativeEnd;
use crate::unwind_abi::Registers as FrameRegisters;
use std::time::Instant;

/// Frames of a stack that are kept; deeper ones are cut, and say so.
pub const MAX_DEPTH: usize = 1024;
/// Stands for those that were cut.
pub const DEEPER: &str = "<deeper frames not kept>";
/// Polls before the recorder sleeps in the kernel: a busy target's next stop is mostly a few µs away, and a
/// sleep costs two switches of context.
const SPINS: u32 = 200;

/// Bytes that a thunk has on the stack when its function has returned: below the return address of whoever called it.
const OF_THE_THUNK: u64 = 8;

/// Reads the stacks of stopped threads.
pub struct StackReader {
    python: Python,
    codes: CodeTable,
    memory: ProcessMemory,
    frames: Vec<RawFrame>,
    stack: Vec<Location>,
    /// How many of its locations each call of the interpreter's loop ran, the innermost first.
    calls: Vec<usize>,
    cut: Location,
    native_code: Option<NativeCode>,
    native: Option<Stack>,
    /// Stacks that could not be read though the thread has a Python state.
    pub unreadable: u64,
}

impl StackReader {
    /// A reader for the threads of `python`.
    pub fn new(python: Python, memory: ProcessMemory, native_code: Option<NativeCode>) -> Self {
        let codes = python.code_table();
        let cut = Location { function: DEEPER.into(), file: "".into(), line: None };
        Self {
            python,
            codes,
            memory,
            frames: Vec::new(),
            stack: Vec::new(),
            calls: Vec::new(),
            cut,
            native_code,
            native: None,
            unreadable: 0,
        }
    }

    /// Reads the stack of a thread that stands where a thunk sees its function return.
    pub fn read(&mut self, tid: i32, regs: &Registers) {
        self.frames.clear();
        self.stack.clear();
        self.calls.clear();
        let memory = PageCache::new(&self.memory);
        self.native = self.native_code.as_ref().and_then(|code| {
            let returns_to = RemoteAddr(regs.rsp).offset(OF_THE_THUNK);
            let pc = memory.read_u64(returns_to).ok()?;
            let (sp, bp) = (returns_to.0.wrapping_add(8), Some(regs.rbp));
            Some(walk(code.eyes().tables(), &memory, FrameRegisters { pc, sp, bp, is_return: true }))
        });
        let walked = match self.python.thread_state_of(&memory, tid, regs.fs_base) {
            Ok(Some(tstate)) => {
                self.python.walk(&memory, tstate, &mut self.frames, MAX_DEPTH).map_err(|_| ())
            }
            Ok(None) => return,
            Err(_) => Err(()),
        };
        match walked {
            Ok(walk) => {
                for call in self.frames.split_inclusive(|frame| frame.entry) {
                    let before = self.stack.len();
                    self.codes.resolve(&self.memory, call, &mut self.stack);
                    self.calls.push(self.stack.len() - before);
                }
                if walk.truncated {
                    self.calls.push(1);
                    self.stack.push(self.cut.clone());
                }
            }
            Err(()) => self.unreadable += 1,
        }
    }

    /// The capture's id of the stack that was read last.
    fn intern(
        &mut self,
        locations: &mut Locations,
        writer: &mut CaptureWriter,
    ) -> Result<StackId, RecordError> {
        let (Some(code), Some(native)) = (&mut self.native_code, &self.native) else {
            return locations.intern(&self.stack, writer);
        };
        let mut python = locations.frames(&self.stack, writer)?;
        let mut calls = Vec::new();
        for count in &self.calls {
            let (call, rest) = python.split_at(*count);
            calls.push(call.to_vec());
            python = rest;
        }
        let end = if native.ended == Ended::Whole { NativeEnd::Whole } else { NativeEnd::Cut };
        let addresses: Vec<u64> = native.frames.iter().map(|at| at.0).collect();
        let mut frames = Vec::new();
        code.stack((&addresses, end), NOW, calls, writer, &mut frames)?;
        Ok(writer.intern_stack(&frames)?)
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
        self.reader.intern(&mut self.locations, writer).map(Some)
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
        if let Some(code) = &mut self.reader.native_code {
            code.refresh();
        }
        Ok(())
    }

    fn take_native(&mut self) -> Option<NativeCode> {
        self.reader.native_code.take()
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
            return Ok(Finished { counts, native: reader.native_code, ..Finished::default() });
        }
        let mut failed = None;
        let mut see = |tid, regs: &Registers, observation| {
            let mut stack = StackId::EMPTY;
            if gives_out(&observation) {
                reader.read(tid, regs);
                stack = reader.intern(&mut locations, ledger.writer())?;
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
            Err(_) if ended => {
                Ok(Finished { failed, counts, native: reader.native_code, ..Finished::default() })
            }
            Err(error) => Err(error.into()),
            Ok(left) => {
                let_go?;
                Ok(Finished { left, failed, counts, native: reader.native_code })
            }
        }
    }

    fn abandon(self) -> Result<(), RecordError> {
        Ok(self.inferior.detach()?)
    }
}

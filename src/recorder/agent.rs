//! The source of the jump kind: the in-target agent writes events into rings, nobody traces the target.
//!
//! That the target ended or executed another program is told by its memory, which is gone then; what was published before is still
//! in the rings, which are ours, too.

use super::RecordError;
use super::clock::Clock;
use super::ledger::Ledger;
use super::merge::Merger;
use super::plant::Planted;
use super::reconcile::Reconciler;
use super::source::{Finished, RecordSource, SourceEvent, enter};
use super::told::Told;
use super::translate::{Translated, Translator};
use crate::agent_abi::{STATE_MAGIC, State, TRACKED_BUCKETS};
use crate::capture::{CaptureWriter, DropReason, StackId};
use crate::cpython::Python;
use crate::inferior::error::{AttachError, TraceError};
use crate::inferior::handle::Handle;
use crate::inferior::memory::ProcessMemory;
use crate::inferior::{Inferior, facts, maps};
use crate::memory::RemoteMemory;
use crate::probe::jump;
use crate::probe::lift::LeftBehind;
use crate::probe::load::Loaded;
use crate::probe::ring::{Heart, Missing, ticks};
use crate::probe::ring_record::{Event, What};
use std::mem::offset_of;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

/// Looks without an event before the recorder sleeps, and how it sleeps then: each time twice as long.
const LOOKS_BEFORE_SLEEP: u32 = 50;
const SHORTEST_SLEEP: Duration = Duration::from_micros(100);
const LONGEST_SLEEP: Duration = Duration::from_millis(4);
/// How often the target is asked whether it still is what it was.
const ASK_EVERY: Duration = Duration::from_millis(20);
/// How long a debugger that came during the recording is waited for, and between two looks.
const TRACER_PATIENCE: Duration = Duration::from_secs(2);
const TRACER_PAUSE: Duration = Duration::from_millis(20);

/// Events by the agent.
pub struct AgentSource {
    loaded: Loaded,
    /// Keeps the agent from taking us for dead.
    _heart: Heart,
    merger: Merger<Told>,
    reconciler: Reconciler,
    translator: Translator,
    clock: Clock,
    python: Python,
    memory: ProcessMemory,
    /// The memory of the program that was attached to: not that of one it executes later.
    mem_file: std::fs::File,
    /// Tells when it has ended, and how.
    handle: Handle,
    /// Its system calls are filtered.
    seccomp: bool,
    /// The event that [`RecordSource::next`] gave last, if it was a call.
    current: Option<(Event, Translated)>,
    idle: u32,
    asked: Instant,
    /// The target is gone, in this way; what is in the rings still has to be told.
    gone: Option<SourceEvent>,
    unknown_stacks: u64,
    /// Calls that the agent passed through: as counted there, and how many of them are told.
    passed: u64,
    passed_told: u64,
}

/// What has become of the target.
enum Condition {
    /// It runs, and the agent records.
    Recording,
    /// It runs, but the agent has switched itself off: we were silent for too long.
    SwitchedOff,
    /// The program that was attached to is no more.
    Gone(SourceEvent),
}

impl AgentSource {
    /// Takes over a process in which the agent is planted.
    pub fn new(planted: Planted, handle: Handle, python: Python, seccomp: bool) -> Result<Self, RecordError> {
        let Planted { loaded, rings, heart, settings, .. } = planted;
        let pid = loaded.pid;
        let told = Told::new(python.layout.meaning.line_table);
        let path = format!("/proc/{}/mem", maps::memory_holder(pid));
        let mem_file = std::fs::File::open(&path).map_err(|source| TraceError::Proc { path, source })?;
        Ok(Self {
            merger: Merger::new(rings, told, settings.exact),
            clock: Clock::start(settings.ticks_per_second),
            loaded,
            _heart: heart,
            reconciler: Reconciler::default(),
            translator: Translator::default(),
            python,
            memory: ProcessMemory::new(pid),
            mem_file,
            handle,
            seccomp,
            current: None,
            idle: 0,
            asked: Instant::now(),
            gone: None,
            unknown_stacks: 0,
            passed: 0,
            passed_told: 0,
        })
    }

    /// Looks for what was published; sleeps where there has been nothing for a while.
    fn look(&mut self) -> Result<SourceEvent, RecordError> {
        if let Some(event) = self.gone {
            return Ok(event);
        }
        let now = ticks();
        self.merger.rings().beat(now);
        let found = self.merger.look(now);
        if found.fresh == 0 {
            self.reconciler.all_told();
        }
        if found.fresh > 0 {
            self.idle = 0;
        } else {
            self.idle += 1;
        }
        if self.asked.elapsed() >= ASK_EVERY {
            self.asked = Instant::now();
            match self.condition() {
                Condition::Recording => {}
                Condition::SwitchedOff => return Err(RecordError::SwitchedOff { pid: self.loaded.pid }),
                Condition::Gone(event) => {
                    self.gone = Some(event);
                    self.merger.look_last(ticks());
                }
            }
        } else if self.idle > LOOKS_BEFORE_SLEEP {
            let doublings = (self.idle - LOOKS_BEFORE_SLEEP).min(8);
            std::thread::sleep((SHORTEST_SLEEP * (1 << doublings)).min(LONGEST_SLEEP));
        }
        Ok(SourceEvent::Idle)
    }

    /// A word of the agent's state; `None` once the program that was attached to has no memory any more.
    fn read_state(&self, at: usize) -> Option<u64> {
        let mut bytes = [0; 8];
        let read = self.mem_file.read_exact_at(&mut bytes, self.loaded.parts.state.0.0 + at as u64);
        read.ok().map(|()| u64::from_le_bytes(bytes))
    }

    /// Calls of signal handlers inside the agent, and of threads that it could not tell.
    fn count_passed(&mut self) {
        let counted = [offset_of!(State, in_agent), offset_of!(State, without_slot)];
        let passed = counted.into_iter().filter_map(|at| self.read_state(at)).fold(0, u64::saturating_add);
        self.passed = self.passed.max(passed);
    }

    /// Takes the hooks back, or where a debugger came meanwhile at least the agent's leave to record.
    fn lift(&self) -> Result<LeftBehind, RecordError> {
        let start = Instant::now();
        loop {
            let seized = Inferior::seize(self.loaded.pid);
            let is_gone = self.read_state(offset_of!(State, magic)).is_none();
            let error = match seized {
                // Another program by now, or none: nothing of ours is in it.
                Ok(inferior) if is_gone => {
                    inferior.detach()?;
                    return Ok(LeftBehind::default());
                }
                Err(_) if is_gone => return Ok(LeftBehind::default()),
                Ok(inferior) => return Ok(jump::lift(inferior, &self.loaded, self.seccomp)?),
                Err(error @ AttachError::AlreadyTraced { .. }) => error,
                Err(error) => return Err(error.into()),
            };
            if start.elapsed() > TRACER_PATIENCE {
                jump::switch_off(&self.loaded)?;
                let regions = self.loaded.regions.clone();
                return Ok(LeftBehind { regions, why: vec![error.to_string()], busy: true });
            }
            std::thread::sleep(TRACER_PAUSE);
        }
    }

    fn condition(&self) -> Condition {
        if self.read_state(offset_of!(State, magic)) == Some(STATE_MAGIC) {
            return match self.read_state(offset_of!(State, enabled)) {
                Some(enabled) if enabled as u32 == 0 => Condition::SwitchedOff,
                _ => Condition::Recording,
            };
        }
        // A process that ends has no memory any more a while before it has ended.
        match self.handle.end() {
            Some(how) => Condition::Gone(SourceEvent::Ended(how)),
            None if facts::has_memory(self.loaded.pid) => Condition::Gone(SourceEvent::Executed),
            None => Condition::Recording,
        }
    }

    /// Addresses of the samples that the agent knows; `None` if it is gone.
    fn table(&self) -> Option<Vec<u64>> {
        let mut bytes = vec![0; size_of::<[[u64; 8]; TRACKED_BUCKETS]>()];
        let at = self.loaded.parts.state.0.0 + offset_of!(State, tracked) as u64;
        self.mem_file.read_exact_at(&mut bytes, at).ok()?;
        let words = bytes.chunks_exact(8).filter_map(|word| word.try_into().ok().map(u64::from_le_bytes));
        Some(words.filter(|address| *address != 0).collect())
    }

    /// Before the agent's table goes: which samples it doesn't know any more.
    fn suspect(&mut self, ledger: &mut Ledger) -> Result<(), RecordError> {
        self.merger.look(ticks());
        self.tell_ready(ledger)?;
        if ledger.live().has_samples()
            && let Some(table) = self.table()
        {
            self.reconciler.suspect(ledger, &table);
        }
        Ok(())
    }

    /// Everything that is left in the rings.
    fn drain(&mut self, ledger: &mut Ledger) -> Result<(), RecordError> {
        self.merger.look_last(ticks());
        self.tell_ready(ledger)?;
        self.reconciler.settle(ledger)
    }

    fn tell_ready(&mut self, ledger: &mut Ledger) -> Result<(), RecordError> {
        while let Some(event) = self.ready() {
            match event {
                SourceEvent::Call { tid, observation, interval } => {
                    enter(self, ledger, (tid, observation, interval))?;
                }
                SourceEvent::Missing(count, reason) => ledger.writer().dropped(count, reason)?,
                _ => {}
            }
        }
        Ok(())
    }

    /// The next event that needs no look.
    fn ready(&mut self) -> Option<SourceEvent> {
        let Missing { full, unreadable } = self.merger.take_missing();
        if full > 0 {
            self.reconciler.dropped();
            return Some(SourceEvent::Missing(full, DropReason::BufferFull));
        }
        if unreadable > 0 {
            return Some(SourceEvent::Missing(unreadable, DropReason::Unreadable));
        }
        let passed = self.passed - self.passed_told;
        if passed > 0 {
            self.passed_told = self.passed;
            self.reconciler.dropped();
            return Some(SourceEvent::Missing(passed, DropReason::PassedThrough));
        }
        while let Some(event) = self.merger.peek().copied() {
            if let Some(translated) = self.translator.translate(&event) {
                self.current = Some((event, translated));
                let Translated { observation, interval, .. } = translated;
                return Some(SourceEvent::Call { tid: event.tid as i32, observation, interval });
            }
            self.merger.accept();
            if let What::Thread(tid) = event.what {
                return Some(SourceEvent::ThreadSeen(tid as i32));
            }
        }
        None
    }
}

impl RecordSource for AgentSource {
    const COUNTS_CALLS: bool = false;

    /// The target runs already.
    fn start(&mut self) -> Result<(), RecordError> {
        Ok(())
    }

    fn next(&mut self) -> Result<SourceEvent, RecordError> {
        match self.ready() {
            Some(event) => Ok(event),
            None => self.look(),
        }
    }

    fn stack(&mut self, writer: &mut CaptureWriter) -> Result<Option<StackId>, RecordError> {
        let Some((_, Translated { stack, .. })) = self.current else { return Ok(Some(StackId::EMPTY)) };
        if stack == 0 {
            return Ok(Some(StackId::EMPTY));
        }
        if let Some(id) = self.merger.told().stack_id(stack, true, writer)? {
            return Ok(Some(id));
        }
        // Told by another thread, in a ring that is behind.
        self.merger.define_ahead();
        if let Some(id) = self.merger.told().stack_id(stack, true, writer)? {
            return Ok(Some(id));
        }
        if self.merger.park() {
            return Ok(None);
        }
        if let Some(id) = self.merger.told().stack_id(stack, false, writer)? {
            return Ok(Some(id));
        }
        self.unknown_stacks += 1;
        self.merger.told().unknown_stack(writer).map(Some)
    }

    fn time_ns(&mut self) -> u64 {
        match &self.current {
            Some((event, _)) => self.clock.ns(event.stamp),
            None => 0,
        }
    }

    #[inline]
    fn proceed(&mut self) -> Result<(), RecordError> {
        if let Some((event, _)) = self.current.take() {
            self.translator.recorded(&event);
            self.merger.accept();
        }
        Ok(())
    }

    fn every_second(&mut self, ledger: &mut Ledger) -> Result<(), RecordError> {
        self.clock.refine();
        self.count_passed();
        let mut reconciler = std::mem::take(&mut self.reconciler);
        let stepped = reconciler.step(ledger, || self.table());
        self.reconciler = reconciler;
        stepped
    }

    fn python(&self) -> &Python {
        &self.python
    }

    fn memory(&self) -> &dyn RemoteMemory {
        &self.memory
    }

    fn unreadable_stacks(&self) -> u64 {
        self.unknown_stacks
    }

    fn finish(mut self, ledger: &mut Ledger) -> Result<Finished, RecordError> {
        self.count_passed();
        let suspected = self.suspect(ledger);
        let lifted = self.lift();
        // The target was let go; what it told until then is recorded whatever became of that.
        let failed = suspected.and_then(|()| self.drain(ledger)).err();
        Ok(Finished { left: lifted?, failed })
    }

    fn abandon(self) -> Result<(), RecordError> {
        Ok(())
    }
}

//! The source of the jump kind: the in-target agent writes events into rings, nobody traces the target.
//!
//! The loop: look what was published, tell it in order, sleep as long as the rings allow ([`super::nap`]). That the target ended or
//! executed another program is told by its memory, which is gone then ([`super::target_state`]); what was published before is
//! still in the rings, which are ours, too, and is told to the end.

use super::RecordError;
use super::clock::Clock;
use super::graves::Graves;
use super::guard::Guard;
use super::ledger::Ledger;
use super::merge::Merger;
use super::nap::Nap;
use super::native_code::NativeCode;
use super::plant::Planted;
use super::reconcile::Reconciler;
use super::source::{Finished, RecordSource, SourceCounts, SourceEvent, enter};
use super::tables::Tables;
use super::target_state::{Condition, TargetState};
use super::tids::Tids;
use super::told::Told;
use super::translate::{Translated, Translator};
use crate::capture::{CaptureWriter, DropReason, GapReason, StackId};
use crate::cpython::Python;
use crate::inferior::Inferior;
use crate::inferior::error::AttachError;
use crate::inferior::handle::Handle;
use crate::inferior::memory::ProcessMemory;
use crate::memory::RemoteMemory;
use crate::probe::jump;
use crate::probe::lift::LeftBehind;
use crate::probe::load::Loaded;
use crate::probe::region::copied_code;
use crate::probe::ring::{Heart, Missing, ticks};
use crate::probe::ring_record::{Event, What};
use std::time::{Duration, Instant};

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
    tids: Tids,
    python: Python,
    memory: ProcessMemory,
    target: TargetState,
    guard: Guard,
    graves: Graves,
    /// Every event is recorded.
    exact: bool,
    /// Its system calls are filtered.
    seccomp: bool,
    /// The event that [`RecordSource::next`] gave last, if it was a call.
    current: Option<(Event, Translated)>,
    nap: Nap,
    looked: Instant,
    /// When to look next.
    due: Instant,
    asked: Instant,
    /// The target is gone, in this way; what is in the rings still has to be told.
    gone: Option<SourceEvent>,
    unknown_stacks: u64,
    counts: SourceCounts,
    /// Calls that the agent passed through, of those counted the ones that are told.
    passed_told: u64,
    tables: Tables,
    /// It was told that not all code can be known any more.
    native_full: bool,
    /// Since when CPython's allocators have not been recorded.
    tables_lost: Option<Instant>,
}

impl AgentSource {
    /// Takes over a process in which the agent is planted.
    pub fn new(
        planted: Planted,
        handle: Handle,
        max_cpu: Option<f64>,
        (python, native): (Python, Option<NativeCode>),
        seccomp: bool,
    ) -> Result<Self, RecordError> {
        let Planted { loaded, rings, heart, settings, .. } = planted;
        let pid = loaded.pid;
        let mut told = Told::new(python.layout.meaning.line_table, native);
        if let (Some(code), Some((area, _))) = (told.native_code(), &loaded.native) {
            code.published(area.number());
        }
        let (now, memory) = (Instant::now(), ProcessMemory::new(pid));
        Ok(Self {
            tables: Tables::of(&loaded, &memory),
            tables_lost: None,
            native_full: false,
            nap: Nap::new(rings.ring_len(), (!settings.exact).then_some(settings.interval)),
            merger: Merger::new(rings, told, settings.exact),
            clock: Clock::start(settings.ticks_per_second),
            tids: Tids::new(pid),
            target: TargetState::open(pid, loaded.parts.state.0, handle)?,
            guard: Guard::new(settings.interval, max_cpu),
            graves: Graves::default(),
            loaded,
            _heart: heart,
            reconciler: Reconciler::default(),
            translator: Translator::default(),
            python,
            memory,
            exact: settings.exact,
            seccomp,
            current: None,
            looked: now,
            due: now,
            asked: now,
            gone: None,
            unknown_stacks: 0,
            counts: SourceCounts::default(),
            passed_told: 0,
        })
    }

    /// Looks for what was published, when that is due: everything that was found before has been told.
    fn look(&mut self) -> Result<SourceEvent, RecordError> {
        if let Some(event) = self.gone {
            return Ok(event);
        }
        let rest = self.due.saturating_duration_since(Instant::now());
        if !rest.is_zero() {
            std::thread::sleep(rest);
        }
        let now = ticks();
        self.merger.rings().beat(now);
        let found = self.merger.look(now);
        if found.fresh == 0 {
            self.reconciler.all_told();
        }
        let looked = Instant::now();
        self.due = looked + self.nap.after(found, looked - self.looked);
        self.looked = looked;
        self.publish_code();
        if looked - self.asked >= ASK_EVERY {
            self.asked = looked;
            self.ask()?;
        }
        Ok(SourceEvent::Idle)
    }

    fn ask(&mut self) -> Result<(), RecordError> {
        let gone = match self.target.condition() {
            Condition::Recording => return Ok(()),
            Condition::SwitchedOff => return Err(RecordError::SwitchedOff { pid: self.loaded.pid }),
            Condition::Executed => SourceEvent::Executed,
            Condition::Ended(how) => SourceEvent::Ended(how),
        };
        self.gone = Some(gone);
        self.merger.look_last(ticks());
        Ok(())
    }

    /// Reads what the agent counts, and samples less or more if it should.
    fn count(&mut self) {
        self.counts.interval = if self.exact { 0 } else { self.guard.interval() };
        // A target that is gone is told of elsewhere.
        let Ok(counts) = self.target.counts() else { return };
        self.counts.passed_through = counts.passed_through;
        self.counts.without_slot = counts.without_slot;
        self.graves.look(self.loaded.pid, self.loaded.parts.state.0, &counts);
        if !self.exact
            && let Some(interval) = self.guard.look(ticks(), counts.spent)
        {
            match self.target.set_interval(interval) {
                Ok(()) => self.counts.interval = interval,
                Err(error) => tracing::warn!("the sampling interval cannot be changed: {error}"),
            }
        }
    }

    /// Takes the hooks back, or where a debugger came meanwhile at least the agent's leave to record.
    fn lift(&self) -> Result<LeftBehind, RecordError> {
        let start = Instant::now();
        loop {
            let seized = Inferior::seize(self.loaded.pid);
            let is_gone = matches!(self.target.condition(), Condition::Executed | Condition::Ended(_));
            let error = match seized {
                // Another program by now, or none: nothing of ours is in it.
                Ok(inferior) if is_gone => {
                    inferior.detach()?;
                    return Ok(LeftBehind::default());
                }
                Err(_) if is_gone => return Ok(LeftBehind::default()),
                Ok(inferior) => return Ok(jump::lift(inferior, &self.loaded, self.seccomp)?),
                Err(AttachError::NoProcess { .. } | AttachError::Zombie { .. }) => {
                    return Ok(LeftBehind::default());
                }
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

    /// Tells the agent which code came and went.
    fn publish_code(&mut self) {
        let Some(code) = self.merger.told().native_code().filter(|_| self.gone.is_none()) else { return };
        code.watch();
        if !code.has_changed() {
            return;
        }
        let (mapped, area) = (code.mapped(), self.loaded.native.as_mut());
        let Some((area, _)) = area else { return };
        // No place for it yet: the next look tries again.
        let Some(published) = area.publish(&mapped, || self.target.is_quiet()) else { return };
        code.published(published.number);
        if let Err(error) = self.target.set_native_code(&published.writes, published.directory) {
            tracing::debug!("the agent cannot be told which code is mapped: {error}");
        }
        if let Some(full) = published.left_out
            && !std::mem::replace(&mut self.native_full, true)
        {
            tracing::warn!("stacks through code that is mapped from now on may be cut short: {full}");
        }
    }

    fn watch_tables(&mut self) {
        if let Some(since) = self.tables.lost_since(&self.memory) {
            tracing::warn!(
                "process {} has put other functions into CPython's allocator tables (tracemalloc.stop() does, where it was started \
                 before the attach): what they give out and take back is not recorded from here on. Attach anew to record it",
                self.loaded.pid
            );
            self.tables_lost = Some(since);
        }
    }

    fn measure(&mut self) {
        let mut ranges = self.loaded.code();
        ranges.extend([self.loaded.parts.state, self.loaded.parts.rings]);
        match self.target.resident(&ranges) {
            Ok(bytes) => self.counts.extra_bytes = bytes + copied_code(self.loaded.patches()),
            Err(error) => tracing::debug!("what is resident in the target cannot be told: {error}"),
        }
    }

    /// Before the agent's table goes: which samples it doesn't know any more.
    fn suspect(&mut self, ledger: &mut Ledger) -> Result<(), RecordError> {
        self.merger.look(ticks());
        self.tell_ready(ledger)?;
        if ledger.live().has_samples()
            && let Some(table) = self.target.tracked()
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
        let passed = self.counts.passed_through.saturating_add(self.counts.without_slot);
        if passed > self.passed_told {
            let count = passed - self.passed_told;
            self.passed_told = passed;
            self.reconciler.dropped();
            return Some(SourceEvent::Missing(count, DropReason::PassedThrough));
        }
        while let Some(event) = self.merger.peek().copied() {
            if let Some(mut translated) = self.translator.translate(&event) {
                if self.exact {
                    // A corrupt target may say otherwise.
                    translated.interval = 0;
                }
                self.current = Some((event, translated));
                let Translated { observation, interval, .. } = translated;
                let tid = self.tids.outer(event.tid);
                return Some(SourceEvent::Call { tid, observation, interval });
            }
            self.merger.accept();
            if let What::Thread(tid) = event.what {
                return Some(SourceEvent::ThreadSeen(self.tids.outer(tid)));
            }
        }
        None
    }
}

impl RecordSource for AgentSource {
    const COUNTS_CALLS: bool = false;

    /// The target runs already. It may be gone before the first second is over.
    fn start(&mut self) -> Result<(), RecordError> {
        self.measure();
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
        self.tids.refresh();
        self.count();
        self.measure();
        self.watch_tables();
        if let Some(code) = self.merger.told().native_code() {
            code.refresh();
        }
        let mut reconciler = std::mem::take(&mut self.reconciler);
        let stepped = reconciler.step(ledger, || self.target.tracked());
        self.reconciler = reconciler;
        stepped
    }

    fn take_native(&mut self) -> Option<NativeCode> {
        self.merger.told().take_native_code()
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

    fn counts(&self) -> SourceCounts {
        self.counts
    }

    fn finish(mut self, ledger: &mut Ledger) -> Result<Finished, RecordError> {
        self.count();
        self.measure();
        self.watch_tables();
        // Where nobody has asked since, the end of the recording would be silent about what is missing.
        let pid = self.loaded.pid;
        let is_off = matches!(self.target.condition(), Condition::SwitchedOff);
        let switched_off = is_off.then_some(RecordError::SwitchedOff { pid });
        let suspected = self.suspect(ledger);
        let lifted = self.lift();
        // The target was let go; what it told until then is recorded whatever became of that.
        let told = suspected.and_then(|()| self.drain(ledger)).and_then(|()| match self.tables_lost {
            Some(since) => {
                let lost_ns = since.elapsed().as_nanos() as u64;
                Ok(ledger.writer().gap(lost_ns, GapReason::TablesReplaced)?)
            }
            None => Ok(()),
        });
        let failed = told.err().or(switched_off);
        let native = self.merger.told().take_native_code();
        Ok(Finished { left: lifted?, failed, counts: self.counts, native })
    }

    fn abandon(self) -> Result<(), RecordError> {
        Ok(())
    }
}

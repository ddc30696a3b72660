//! One recording from attach to detach: the order of steps, the clock, the reasons to end.
//!
//! Everything is checked before the first byte is written into the target; whatever fails, the target is let go
//! as it was found.

use super::RecordError;
use super::agent::AgentSource;
use super::examine::{Examined, Kind, examine};
use super::gauges::{GaugeReader, Instruments};
use super::header::{PAGE_SIZE, executable, header, unix_ns};
use super::ledger::{Ledger, Tally};
use super::plant::{self, JumpOptions};
use super::room::{self, OomWatch};
use super::snapshots::{SnapshotOptions, Snapshots};
use super::source::{RecordSource, SourceCounts, SourceEvent, enter};
use super::thread_names::ThreadNames;
use super::trap::{StackReader, TrapSource};
use crate::capture::{CaptureWriter, Counters, EndReason, Header, SnapshotReason, Trailer};
use crate::cpython::Python;
use crate::inferior::error::TraceError;
use crate::inferior::handle::Handle;
use crate::inferior::stop::StopEvent;
use crate::inferior::{Inferior, facts, maps, sys};
use crate::probe::calls::Observation;
use crate::probe::error::ProbeError;
use crate::probe::install;
use crate::probe::lift::LeftBehind;
use crate::probe::stale;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How often a signal of ours ends the wait for events, so that clock and requests are seen.
const TICK: Duration = Duration::from_millis(100);
/// How often what was recorded is handed to the kernel.
const FLUSH_EVERY: Duration = Duration::from_secs(1);
/// How often the layout is tried, and how long the target runs in between.
const LAYOUT_TRIES: u32 = 5;
const LAYOUT_PAUSE: Duration = Duration::from_millis(2);
/// Events between two looks at the clock for the progress and the deadline.
const EVENTS_PER_LOOK: u32 = 64;
/// How often the progress is told.
const PROGRESS_EVERY: Duration = Duration::from_millis(50);

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
    room::check(&examined, options.jump.as_ref())?;
    let (python, libc) = (&examined.python.version, examined.libc_name());
    tracing::info!(pid = options.pid, %python, libc, "the process is understood");
    sys::install_stop_signals(TICK).map_err(TraceError::Wait)?;
    let mut output = Output::prepare(options, header(&examined, options))?;
    let instruments = Instruments::of(&examined);
    // The session is made where the attach succeeded: neither kind's source is small.
    let ended = match &options.jump {
        Some(jump) => attach_jumps(options, jump, &examined, &mut output).map(|(source, writer)| {
            Session::new(source, writer, options, &examined).run(instruments, observer)
        }),
        None => attach(options, &examined, &mut output).map(|(source, writer)| {
            Session::new(source, writer, options, &examined).run(instruments, observer)
        }),
    };
    ended.unwrap_or_else(|error| {
        output.discard();
        Err(error)
    })
}

/// Plants the agent. On failure the target runs on as it was.
fn attach_jumps(
    options: &RecordOptions,
    jump: &JumpOptions,
    examined: &Examined,
    output: &mut Output,
) -> Result<(AgentSource, CaptureWriter), RecordError> {
    if let Some(alive) = examined.stale.iter().find(|s| s.controller_lives()) {
        return Err(ProbeError::ControllerAlive { pid: options.pid, controller: alive.controller.0 }.into());
    }
    let handle = Handle::open(options.pid);
    let planted = plant::plant(options, jump, examined, &mut || output.take())?;
    let (planted, writer) = planted;
    let (python, seccomp) = (examined.python.clone(), examined.seccomp);
    Ok((AgentSource::new(planted, handle, jump.max_cpu, python, seccomp)?, writer))
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
    output: &mut Output,
) -> Result<(TrapSource, CaptureWriter), RecordError> {
    let mut inferior = Inferior::seize(options.pid)?;
    match plant(&mut inferior, options, examined, output) {
        Ok((installed, writer)) => {
            let reader = StackReader::new(examined.python.clone(), *inferior.memory());
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

/// A recording under way.
struct Session<'a, S> {
    source: S,
    ledger: Ledger,
    snapshots: Option<Snapshots>,
    names: ThreadNames,
    oom: OomWatch,
    gauges: Option<GaugeReader>,
    options: &'a RecordOptions,
    examined: &'a Examined,
    start: Instant,
    flushed: Instant,
    told: Option<Instant>,
    events_until_look: u32,
    /// Looks of the source that had told everything found before.
    idles: u64,
}

/// Why the loop ended.
enum End {
    /// The probes are to be lifted.
    Detach(EndReason),
    /// The process executed another program: only letting go is left.
    Executed,
    /// There is no process any more.
    Gone(EndReason),
    /// An error.
    Failed(RecordError),
}

impl<'a, S: RecordSource> Session<'a, S> {
    fn new(source: S, writer: CaptureWriter, options: &'a RecordOptions, examined: &'a Examined) -> Self {
        let now = Instant::now();
        Self {
            source,
            ledger: Ledger::new(writer, PAGE_SIZE),
            snapshots: None,
            names: ThreadNames::default(),
            oom: OomWatch::start(options.pid),
            gauges: None,
            options,
            examined,
            start: now,
            flushed: now,
            told: None,
            events_until_look: EVENTS_PER_LOOK,
            idles: 0,
        }
    }

    fn run(mut self, instruments: Instruments, observer: &mut dyn Observer) -> Result<Summary, RecordError> {
        let end = match self.source.start() {
            Ok(()) => {
                // A panic (ours, or the observer's) must not leave the target with our probes in it.
                let drained = catch_unwind(AssertUnwindSafe(|| {
                    observer.recording(self.examined);
                    self.take_gauges(instruments);
                    self.drain(observer)
                }));
                drained.unwrap_or_else(|panic| End::Failed(RecordError::Panicked { what: words(&*panic) }))
            }
            Err(error) => End::Failed(error),
        };
        self.close(end)
    }

    fn drain(&mut self, observer: &mut dyn Observer) -> End {
        if let Err(error) = self.begin_snapshots() {
            return End::Failed(error);
        }
        loop {
            let event = match self.source.next() {
                Ok(event) => event,
                Err(error) => return End::Failed(error),
            };
            let taken = match event {
                SourceEvent::Call { tid, observation, interval } => self.on_call(tid, observation, interval),
                SourceEvent::ThreadSeen(tid) => self.names.heard(self.options.pid, tid, &mut self.ledger),
                SourceEvent::ThreadEnded(tid) => {
                    self.ledger.forget(tid);
                    self.names.forget(tid);
                    Ok(())
                }
                SourceEvent::Missing(count, reason) => {
                    self.ledger.writer().dropped(count, reason).map_err(RecordError::from)
                }
                SourceEvent::Executed => return End::Executed,
                SourceEvent::Ended(event) => return End::Gone(reason(event)),
                SourceEvent::Idle => {
                    self.idles += 1;
                    self.events_until_look = 1;
                    Ok(())
                }
            };
            if let Err(error) = taken {
                return End::Failed(error);
            }
            self.events_until_look -= 1;
            if self.events_until_look > 0 && !sys::ticked() {
                continue;
            }
            self.events_until_look = EVENTS_PER_LOOK;
            match self.look_at_the_clock(observer) {
                Ok(None) => {}
                Ok(Some(reason)) => return End::Detach(reason),
                Err(error) => return End::Failed(error),
            }
        }
    }

    fn begin_snapshots(&mut self) -> Result<(), RecordError> {
        let RecordOptions { pid, output, snapshots: Some(options), .. } = self.options else { return Ok(()) };
        let mut snapshots = Snapshots::begin(options, *pid, output, &mut self.ledger)?;
        snapshots.take(SnapshotReason::Start, self.start.elapsed(), &mut self.ledger)?;
        self.snapshots = Some(snapshots);
        Ok(())
    }

    /// Gauges are beside the point: without them recording goes on.
    fn take_gauges(&mut self, instruments: Instruments) {
        match GaugeReader::start(instruments, self.start) {
            Ok(gauges) => self.gauges = Some(gauges),
            Err(error) => tracing::warn!("no gauges are taken: {error}"),
        }
    }

    fn on_call(&mut self, tid: i32, observation: Observation, interval: u64) -> Result<(), RecordError> {
        if S::COUNTS_CALLS {
            let (python, memory) = (self.source.python(), self.source.memory());
            self.names.saw(self.options.pid, tid, python, memory, &mut self.ledger)?;
        }
        enter(&mut self.source, &mut self.ledger, (tid, observation, interval))
    }

    /// Flushes, tells the progress, and answers why to end, if there is a reason.
    fn look_at_the_clock(&mut self, observer: &mut dyn Observer) -> Result<Option<EndReason>, RecordError> {
        let now = Instant::now();
        let elapsed = now - self.start;
        if now - self.flushed >= FLUSH_EVERY {
            self.flushed = now;
            let (python, memory) = (self.source.python(), self.source.memory());
            self.names.refresh(self.options.pid, python, memory, &mut self.ledger)?;
            self.ledger.writer().flush()?;
            self.source.every_second(&mut self.ledger)?;
            self.oom.look();
        } else if self.names.is_due(now) {
            let (python, memory) = (self.source.python(), self.source.memory());
            self.names.look_again(self.options.pid, python, memory, &mut self.ledger, now)?;
        }
        match &mut self.snapshots {
            Some(snapshots) => snapshots.look(now, elapsed, self.idles, &mut self.ledger)?,
            None if sys::snapshot_asked() => {
                tracing::warn!("SIGUSR1: no snapshots are taken; `attach --snapshot-every TIME` takes them");
            }
            None => {}
        }
        if let Some(gauges) = &mut self.gauges {
            gauges.look(&mut self.ledger)?;
        }
        if self.told.is_none_or(|told| now - told >= PROGRESS_EVERY) {
            self.told = Some(now);
            observer.progress(Progress {
                elapsed,
                counters: self.ledger.writer().counters(),
                live_bytes: self.ledger.live().live_bytes(),
                file_bytes: self.ledger.writer().bytes_written(),
            });
        }
        if let Some(signal) = sys::requested_stop() {
            return Ok(Some(EndReason::Interrupted { signal: signal_name(signal) }));
        }
        Ok(self.options.duration.filter(|d| elapsed >= *d).map(|_| EndReason::Duration))
    }

    /// Lets go of the target, whatever happened, then ends the capture.
    fn close(self, end: End) -> Result<Summary, RecordError> {
        let Self { source, mut ledger, mut snapshots, gauges, oom, start, options, .. } = self;
        let elapsed = start.elapsed();
        let still_there = matches!(end, End::Detach(_) | End::Failed(_));
        let gauges = gauges.map_or(Ok(()), |gauges| gauges.finish(still_there, &mut ledger));
        let unreadable_stacks = source.unreadable_stacks();
        let (mut counts, mut failed) = (source.counts(), None);
        let (reason, leaving) = match end {
            End::Gone(reason) => (oom.explain(reason), Leaving::Nothing),
            End::Executed => (EndReason::TargetExec { path: executable(options.pid) }, Leaving::Detach),
            End::Detach(reason) => (reason, Leaving::Lift),
            End::Failed(error) => {
                let message = error.to_string();
                failed = Some(error);
                (EndReason::ControllerError { message }, Leaving::Lift)
            }
        };
        // A capture that can't be written is no reason to stay in the target.
        failed = failed.or(gauges.err());
        let left = match leaving {
            Leaving::Nothing => LeftBehind::default(),
            Leaving::Detach => source.abandon().map(|()| LeftBehind::default())?,
            Leaving::Lift => {
                let finished = source.finish(&mut ledger)?;
                failed = failed.or(finished.failed);
                counts = finished.counts;
                finished.left
            }
        };
        // Whatever ended it, what is live is ours.
        if let Some(snapshots) = &mut snapshots
            && let Err(error) = snapshots.take(SnapshotReason::End, elapsed.max(start.elapsed()), &mut ledger)
        {
            failed.get_or_insert(error);
        }
        let snapshots = snapshots.map(|snapshots| (snapshots.taken(), ledger.writer().snapshots_kept()));
        let summary = finish(ledger, reason, elapsed, left, (unreadable_stacks, counts));
        let summary = summary.map(|summary| Summary { snapshots, ..summary });
        match (failed, summary) {
            (Some(error), Ok(summary)) => Ok(Summary { failed: Some(error.to_string()), ..summary }),
            (Some(error), Err(_)) => Err(error),
            (None, summary) => summary,
        }
    }
}

/// What letting go takes.
enum Leaving {
    /// There is nobody.
    Nothing,
    /// Nothing of ours is in it.
    Detach,
    /// The probes have to be lifted.
    Lift,
}

fn finish(
    ledger: Ledger,
    reason: EndReason,
    elapsed: Duration,
    left: LeftBehind,
    (unreadable_stacks, counts): (u64, SourceCounts),
) -> Result<Summary, RecordError> {
    let tally = ledger.tally();
    let mut ledger = ledger;
    let counters = Counters {
        unmaps_unknown: tally.unmaps_unknown,
        failed_allocations: tally.failed,
        peak_live_bytes: ledger.live().peak_bytes(),
        live_bytes: ledger.live().live_bytes(),
        live_blocks: ledger.live().live_blocks() as u64,
        interval_at_end: counts.interval,
        agent_passed_through: counts.passed_through,
        threads_without_slot: counts.without_slot,
        target_extra_bytes: counts.extra_bytes,
        controller_peak_bytes: facts::peak_resident(),
        ..ledger.writer().counters()
    };
    ledger.writer().flush()?;
    let writer = ledger.into_writer();
    let file_bytes = writer.bytes_written();
    let trailer = Trailer {
        end_unix_ns: unix_ns(),
        duration_ns: elapsed.as_nanos() as u64,
        reason: reason.clone(),
        counters,
    };
    writer.finish(trailer)?;
    Ok(Summary {
        reason,
        elapsed,
        counters,
        tally,
        unreadable_stacks,
        left,
        file_bytes,
        snapshots: None,
        failed: None,
    })
}

/// What a panic said.
fn words(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
    text.unwrap_or("no words").to_owned()
}

/// Why recording ended, when the process did.
fn reason(event: Option<StopEvent>) -> EndReason {
    match event {
        Some(StopEvent::Exited(code)) => EndReason::TargetExited { code },
        Some(StopEvent::Killed(signal)) => {
            EndReason::TargetKilled { signal: signal_name(signal), out_of_memory: false }
        }
        Some(_) => EndReason::Unknown,
        None => EndReason::TargetGone,
    }
}

/// `SIGTERM`, or `signal 34` for one without a name.
fn signal_name(signal: i32) -> String {
    nix::sys::signal::Signal::try_from(signal)
        .map_or_else(|_| format!("signal {signal}"), |s| s.as_str().to_string())
}

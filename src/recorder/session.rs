//! [`Session`]: a recording under way, whatever the kind: takes what the source tells, looks at the clock, lets go and ends the
//! capture.

use super::RecordError;
use super::examine::Examined;
use super::gauges::{GaugeReader, Instruments};
use super::header::{PAGE_SIZE, executable, unix_ns};
use super::ledger::Ledger;
use super::native_code::NativeCounts;
use super::record::{Observer, Progress, RecordOptions, Summary};
use super::room::OomWatch;
use super::snapshots::Snapshots;
use super::source::{RecordSource, SourceCounts, SourceEvent, enter};
use super::thread_names::ThreadNames;
use crate::capture::{CaptureWriter, Counters, EndReason, SnapshotReason, Trailer};
use crate::inferior::stop::StopEvent;
use crate::inferior::{facts, sys};
use crate::probe::calls::Observation;
use crate::probe::lift::LeftBehind;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

/// How often what was recorded is handed to the kernel.
const FLUSH_EVERY: Duration = Duration::from_secs(1);
/// Events between two looks at the clock for the progress and the deadline.
const EVENTS_PER_LOOK: u32 = 64;
/// How often the progress is told.
const PROGRESS_EVERY: Duration = Duration::from_millis(50);

/// A recording under way.
pub(super) struct Session<'a, S> {
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
    pub(super) fn new(
        source: S,
        writer: CaptureWriter,
        options: &'a RecordOptions,
        examined: &'a Examined,
    ) -> Self {
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

    pub(super) fn run(
        mut self,
        instruments: Instruments,
        observer: &mut dyn Observer,
    ) -> Result<Summary, RecordError> {
        let end = match self.source.start() {
            Ok(()) => {
                // A panic (ours, or the observer's) must not leave the target with our probes in it.
                let drained = catch_unwind(AssertUnwindSafe(|| {
                    // Who is told that it records can ask for a snapshot.
                    if let Err(error) = self.begin_snapshots() {
                        return End::Failed(error);
                    }
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
        let Self { mut source, mut ledger, mut snapshots, gauges, oom, start, options, .. } = self;
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
        let (left, native) = match leaving {
            Leaving::Nothing => (LeftBehind::default(), source.take_native()),
            Leaving::Detach => {
                let native = source.take_native();
                source.abandon()?;
                (LeftBehind::default(), native)
            }
            Leaving::Lift => {
                let finished = source.finish(&mut ledger)?;
                failed = failed.or(finished.failed);
                counts = finished.counts;
                (finished.left, finished.native)
            }
        };
        // Whatever ended it, what is live is ours.
        if let Some(snapshots) = &mut snapshots
            && let Err(error) = snapshots.take(SnapshotReason::End, elapsed.max(start.elapsed()), &mut ledger)
        {
            failed.get_or_insert(error);
        }
        if let Some(native) = native.as_ref().filter(|_| options.bundle_symbols)
            && let Err(error) = ledger.writer().symbols(&native.names())
        {
            failed.get_or_insert(error.into());
        }
        let native = native.map(|native| native.counts()).unwrap_or_default();
        let snapshots = snapshots.map(|snapshots| (snapshots.taken(), ledger.writer().snapshots_kept()));
        let summary = finish(ledger, reason, elapsed, left, (unreadable_stacks, counts, native));
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
    (unreadable_stacks, counts, native): (u64, SourceCounts, NativeCounts),
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
        native_stacks: native.stacks,
        native_cut: native.cut,
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

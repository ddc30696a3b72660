//! Who tells of allocations: the trait that both kinds of breakpoints stand behind.
//!
//! A source knows how events are gained and where their Python stacks come from. What becomes of them is the
//! [`super::ledger`]'s business.

use super::RecordError;
use super::ledger::{Ledger, Origin};
use super::native_code::NativeCode;
use crate::capture::{CaptureWriter, DropReason, StackId};
use crate::cpython::Python;
use crate::inferior::stop::StopEvent;
use crate::memory::RemoteMemory;
use crate::probe::calls::Observation;
use crate::probe::function::Answer;
use crate::probe::lift::LeftBehind;

/// Something that happened in the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SourceEvent {
    /// An allocator call began or ended; the stack of an allocation is [`RecordSource::stack`].
    Call {
        /// The thread.
        tid: i32,
        /// What it came to.
        observation: Observation,
        /// Mean interval of the sample that this is; 0 where every event is recorded.
        interval: u64,
    },
    /// A thread is heard of, maybe for the first time.
    ThreadSeen(i32),
    /// A thread ended; its id may be used again.
    ThreadEnded(i32),
    /// Events are missing here.
    Missing(u64, DropReason),
    /// The target executed another program: nothing of what was observed exists any more.
    Executed,
    /// The target ended; `None` where nobody told how.
    Ended(Option<StopEvent>),
    /// Nothing happened; it is time to look at the clock.
    Idle,
}

/// What a source counts beside events.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SourceCounts {
    /// The sampling interval in force; 0 where every event is recorded.
    pub interval: u64,
    /// Calls of signal handlers that were not recorded.
    pub passed_through: u64,
    /// Calls of threads that there was no room for.
    pub without_slot: u64,
    /// Resident memory that recording adds to the target, in bytes.
    pub extra_bytes: u64,
}

/// How a source left the target.
#[derive(Debug, Default)]
pub struct Finished {
    /// What could not be taken back.
    pub left: LeftBehind,
    /// The first error in recording what was told last. The target was let go all the same.
    pub failed: Option<RecordError>,
    /// What was counted until then.
    pub counts: SourceCounts,
    /// What native frames are, where they were recorded.
    pub native: Option<NativeCode>,
}

/// A source of events.
pub trait RecordSource {
    /// Calls are so slow and rare that each is a reason to look for its thread's name.
    const COUNTS_CALLS: bool;

    /// Lets the stopped world run.
    fn start(&mut self) -> Result<(), RecordError>;

    /// The next event. Returns [`SourceEvent::Idle`] now and then when there is none.
    fn next(&mut self) -> Result<SourceEvent, RecordError>;

    /// The Python stack of the last [`SourceEvent::Call`] that gave memory out. `None`: it is not known yet; the call will come
    /// again.
    fn stack(&mut self, writer: &mut CaptureWriter) -> Result<Option<StackId>, RecordError>;

    /// When that call was, in nanoseconds since the start of recording.
    fn time_ns(&mut self) -> u64;

    /// The last call is recorded: its thread may go on.
    fn proceed(&mut self) -> Result<(), RecordError>;

    /// About once a second has passed. `ledger` is told of what can be concluded by then.
    fn every_second(&mut self, ledger: &mut Ledger) -> Result<(), RecordError>;

    /// The interpreter.
    fn python(&self) -> &Python;

    /// The target's memory.
    fn memory(&self) -> &dyn RemoteMemory;

    /// Stacks that could not be read though the thread has a Python state.
    fn unreadable_stacks(&self) -> u64;

    /// What was counted, as of the last second.
    fn counts(&self) -> SourceCounts;

    /// What native frames are, where they were recorded, of a target that needs no letting go.
    fn take_native(&mut self) -> Option<NativeCode>;

    /// Takes everything back and lets go. `ledger` is told of calls that ended meanwhile.
    fn finish(self, ledger: &mut Ledger) -> Result<Finished, RecordError>;

    /// Lets go of a process that executed another program: nothing of ours is in it.
    fn abandon(self) -> Result<(), RecordError>;
}

/// Whether a call gave memory out.
pub fn gives_out(observation: &Observation) -> bool {
    matches!(observation, Observation::Ended { answer: Answer::Address(_), .. })
}

/// Enters a source's last call into the ledger.
#[inline]
pub fn enter(
    source: &mut impl RecordSource,
    ledger: &mut Ledger,
    (tid, observation, interval): (i32, Observation, u64),
) -> Result<(), RecordError> {
    let mut stack = StackId::EMPTY;
    if gives_out(&observation) {
        let Some(known) = source.stack(ledger.writer())? else { return Ok(()) };
        stack = known;
    }
    ledger.time(source.time_ns());
    ledger.observe(tid, observation, Origin { stack, interval })?;
    source.proceed()
}

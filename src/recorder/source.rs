//! Who tells of allocations: the trait that both kinds of breakpoints stand behind.
//!
//! A source knows how events are gained and where their Python stacks are read. What becomes of them is the
//! [`super::ledger`]'s business.

use crate::cpython::Location;
use crate::inferior::stop::StopEvent;
use crate::probe::calls::Observation;

/// Something that happened in the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SourceEvent {
    /// An allocator call began or ended; the stack of an allocation is [`RecordSource::stack`].
    Call {
        /// The thread.
        tid: i32,
        /// What it came to.
        observation: Observation,
    },
    /// A thread ended; its id may be used again.
    ThreadEnded(i32),
    /// The target executed another program: nothing of what was observed exists any more.
    Executed,
    /// The target ended.
    Ended(StopEvent),
    /// Nothing happened; it is time to look at the clock.
    Idle,
}

/// A source of events.
pub trait RecordSource {
    /// The next event. Returns [`SourceEvent::Idle`] now and then when there is none.
    fn next(&mut self) -> Result<SourceEvent, super::RecordError>;

    /// The Python stack of the last [`SourceEvent::Call`] that gave memory out, innermost frame first.
    fn stack(&self) -> &[Location];

    /// The last event's effect is recorded: the thread may go on.
    fn proceed(&mut self) -> Result<(), super::RecordError>;
}

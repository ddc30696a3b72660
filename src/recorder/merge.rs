//! [`Merger`]: the events of all rings in one order.
//!
//! # Which order
//!
//! A record that tells of something given back is published before the memory can be given out again, and one that tells of
//! something given out before anybody can have got the address. So what one thread does because of what another did is
//! published later, and an order that keeps to this replays right. Stamps of the time stamp counter give such an order, as
//! far as they go:
//!
//! * Rings are read one after the other. What is published in a ring behind our back may be the cause of what is found in
//!   the next. Both are stamped after the look began: what is younger than that (less [`MARGIN`], for rdtsc is not ordered
//!   with the stores around it) waits for the next look.
//! * A thread may be held up between its stamp and its publication for any time. Nothing is caused by what is not
//!   published: such an event comes late in time, and never too late. So nobody is waited for, dead or alive.
//! * rdtsc is not ordered with the loads before it either, and the counters of two sockets may differ a little: two events
//!   of which one caused the other may be stamped the wrong way round, when they are less than [`LOOK_AHEAD`] apart. That shows:
//!   a block is given out that lives, or one is given back that does not. [`Merger::postpone`] then finds what was to come first.
//!
//! Knows no clock and no ledger: the caller says what time it is and what it waits for.

use crate::addr::RemoteAddr;
use crate::probe::function::{Function, Member};
use crate::probe::ring::{Found, Missing, Rings};
use crate::probe::ring_record::{Definitions, Event, What};
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Ticks by which what is published may be stamped before a look at the rings began that did not see it: 20 µs at 5 GHz.
pub const MARGIN: u64 = 100_000;
/// Ticks by which cause and effect may be stamped the wrong way round: 2 µs at 5 GHz.
pub const LOOK_AHEAD: u64 = 10_000;
/// How often one event may be put off.
const MAX_PUT_OFF: u32 = 8;
/// Key of a lane without an event.
const NONE: u64 = u64::MAX;

/// What must come before an event, if it is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Awaited {
    /// The block at this address is given back.
    GivenBack(RemoteAddr),
    /// It is given out.
    GivenOut(RemoteAddr),
    /// A range that overlaps this one is given back.
    RangeGivenBack(RemoteAddr, u64),
}

impl Awaited {
    fn is(self, what: &What) -> bool {
        match (self, *what) {
            (Self::GivenBack(wanted), What::Freed { address, .. } | What::FreedInside { address, .. }) => {
                address == wanted
            }
            (Self::GivenBack(wanted), What::Begins { function, args }) => {
                is_realloc(function) && args[0] == wanted.0
            }
            (Self::GivenOut(wanted), What::Allocated { function, address, .. }) => {
                address == wanted && !function.is_mapping()
            }
            (Self::GivenOut(wanted), What::Ended { function, result, .. }) => {
                is_realloc(function) && result == wanted.0
            }
            (Self::RangeGivenBack(start, len), What::Begins { function, args }) => {
                function.is_mapping()
                    && args[0] < start.0.saturating_add(len)
                    && start.0 < args[0].saturating_add(args[1])
            }
            _ => false,
        }
    }
}

fn is_realloc(function: Function) -> bool {
    matches!(function, Function::Realloc | Function::Python(_, Member::Realloc))
}

/// A ring with its next event.
#[derive(Debug, Clone, Copy)]
struct Lane {
    /// When it is its turn; [`NONE`] if there is no event.
    key: u64,
    event: Event,
    put_off: u32,
}

/// Merges rings; definitions go to `told` as soon as they are met.
pub struct Merger<D> {
    rings: Rings,
    told: D,
    lanes: Vec<Lane>,
    /// The lanes that have an event, but for the current one.
    order: BinaryHeap<Reverse<(u64, u32)>>,
    current: Option<u32>,
    /// The current lane's turn lasts up to this key.
    until: u64,
    /// Keys up to this one may be given out.
    limit: u64,
}

impl<D: Definitions> Merger<D> {
    /// A merger of these rings.
    pub fn new(rings: Rings, told: D) -> Self {
        let event = Event { stamp: 0, tid: 0, what: What::Thread(0) };
        let lanes = vec![Lane { key: NONE, event, put_off: 0 }; rings.count()];
        Self { rings, told, lanes, order: BinaryHeap::new(), current: None, until: 0, limit: 0 }
    }

    /// The rings.
    pub fn rings(&self) -> &Rings {
        &self.rings
    }

    /// Who is told of definitions.
    pub fn told(&mut self) -> &mut D {
        &mut self.told
    }

    /// Looks what was published. `now` is the time stamp counter, read before this call.
    pub fn look(&mut self, now: u64) -> Found {
        self.rings.release();
        let found = self.rings.look(now);
        for lane in 0..self.lanes.len() {
            if self.lanes[lane].key == NONE && self.fetch(lane) {
                self.order.push(Reverse((self.lanes[lane].key, lane as u32)));
            }
        }
        self.limit = self.limit.max(now.saturating_sub(MARGIN + LOOK_AHEAD));
        // Others may have come before what the current lane has.
        self.until = 0;
        found
    }

    /// Nothing more will be published: what is there is all.
    pub fn look_last(&mut self, now: u64) -> Found {
        let found = self.look(now);
        self.limit = NONE - 1;
        found
    }

    /// The next event, if one may be given out.
    #[inline]
    pub fn peek(&mut self) -> Option<&Event> {
        let lane = match self.current {
            Some(lane) if self.lanes[lane as usize].key <= self.until => lane,
            _ => self.choose()?,
        };
        Some(&self.lanes[lane as usize].event)
    }

    /// The event that [`Merger::peek`] showed is done with.
    #[inline]
    pub fn accept(&mut self) {
        if let Some(lane) = self.current
            && !self.fetch(lane as usize)
        {
            self.current = None;
        }
    }

    /// Puts the event that [`Merger::peek`] showed off until `awaited` has been given out; false if that is not to come
    /// from another ring within [`LOOK_AHEAD`].
    pub fn postpone(&mut self, awaited: Awaited) -> bool {
        let Some(current) = self.current else { return false };
        let Lane { event, put_off, .. } = self.lanes[current as usize];
        if put_off >= MAX_PUT_OFF {
            return false;
        }
        let window = event.stamp.saturating_add(LOOK_AHEAD);
        let found =
            self.order.iter().filter_map(|Reverse((_, lane))| self.find(*lane, awaited, window)).min();
        let Some(turn) = found else { return false };
        let lane = &mut self.lanes[current as usize];
        lane.key = turn.max(lane.key).saturating_add(1).min(NONE - 1);
        lane.put_off += 1;
        self.order.push(Reverse((lane.key, current)));
        self.current = None;
        true
    }

    /// Takes the definitions that may belong before the event that [`Merger::peek`] showed and are met only later.
    pub fn define_ahead(&mut self) {
        let Some(current) = self.current else { return };
        let until = self.lanes[current as usize].event.stamp.saturating_add(LOOK_AHEAD);
        for lane in 0..self.lanes.len() {
            self.rings.define_ahead(lane, until, &mut self.told);
        }
    }

    /// What went missing since the last call.
    pub fn take_missing(&mut self) -> Missing {
        self.rings.take_missing()
    }

    /// The turn of what is awaited, if this lane has it with a stamp up to `window`.
    fn find(&self, lane: u32, awaited: Awaited, window: u64) -> Option<u64> {
        let Lane { key, event, .. } = self.lanes[lane as usize];
        if event.stamp > window {
            return None;
        }
        if awaited.is(&event.what) {
            return Some(key);
        }
        let mut turn = None;
        self.rings.ahead(lane as usize, |event| {
            if event.stamp <= window && awaited.is(&event.what) {
                turn = Some(event.stamp.max(key));
            }
            event.stamp <= window && turn.is_none()
        });
        turn
    }

    /// Brings a lane's next event in; false if there is none.
    #[inline]
    fn fetch(&mut self, lane: usize) -> bool {
        let next = self.rings.read(lane, &mut self.told);
        let lane = &mut self.lanes[lane];
        match next {
            Some(event) => {
                // A lane that was put off stays so: its thread did one thing after the other.
                let before = if lane.key == NONE { 0 } else { lane.key };
                *lane = Lane { key: event.stamp.clamp(before, NONE - 1), event, put_off: 0 };
                true
            }
            None => {
                lane.key = NONE;
                false
            }
        }
    }

    /// Makes the lane whose turn it is the current one.
    fn choose(&mut self) -> Option<u32> {
        if let Some(lane) = self.current.take() {
            self.order.push(Reverse((self.lanes[lane as usize].key, lane)));
        }
        let Reverse((key, lane)) = *self.order.peek()?;
        if key > self.limit {
            return None;
        }
        self.order.pop();
        self.current = Some(lane);
        self.until = self.order.peek().map_or(self.limit, |Reverse((next, _))| self.limit.min(*next));
        Some(lane)
    }
}

//! [`Merger`]: the events of all rings in one order.
//!
//! # Which order
//!
//! Two events about one address must stay in the order in which they happened, and so must those of one thread. The agent
//! numbers events by stripes of addresses ([`crate::agent_abi::STRIPES`]), in causal order: before a block is given back,
//! after it is given out. So an event's turn comes when all smaller numbers of its stripe have been told. Among those whose
//! turn it is, the earliest goes first; times are coarse, and only a wish.
//!
//! # Numbers that don't come
//!
//! A thread may be held up between taking a number and publishing its record, for a scheduler's while or (thrown out of the agent
//! by a signal handler, killed) for ever. Nobody waits for it: nothing is caused by what is not published, for the free has
//! not begun and nobody else has got the address. But rings are looked at one after the other, and what is not seen yet may be
//! published. So an event counts as *settled* when it was seen and every ring has been looked at once more: what came before it
//! is seen by now. When settled events wait for a number that nobody has, the stripe becomes *loose*: its events go by the order
//! of the numbers that are there, each once it and all smaller ones that are seen are settled. When the missing numbers have
//! come, or [`GIVEN_UP_AFTER`] has passed, the stripe goes by the numbers themselves again.
//!
//! Knows no clock and no ledger: the caller says what time it is.

use super::stripes::{Number, Stripes};
use crate::probe::ring::{Found, Missing, Rings};
use crate::probe::ring_record::{Definitions, Event, What};
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Ticks by which events wait for those of other threads that may be published a little later: 20 µs at 5 GHz.
pub const MARGIN: u64 = 100_000;
/// Ticks after which a number that does not come is no longer reckoned with, and after which events that wait for each other
/// (as only a corrupt target can make them) are told in any order: 1 s at 3 GHz.
pub const GIVEN_UP_AFTER: u64 = 3_000_000_000;

/// Where a ring's next event stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Turn {
    /// There is none.
    None,
    /// It waits for its time only.
    Ready,
    /// It waits for smaller numbers.
    Blocked,
    /// It waits for the next look, by the caller's wish.
    Parked,
}

/// A ring with its next event.
#[derive(Debug, Clone, Copy)]
struct Lane {
    event: Event,
    number: Option<Number>,
    turn: Turn,
}

/// Merges rings; definitions go to `told` as soon as they are met.
pub struct Merger<D> {
    rings: Rings,
    told: D,
    /// Whether events have numbers: every one is recorded.
    numbered: bool,
    stripes: Stripes,
    lanes: Vec<Lane>,
    /// The lanes that are ready, by time, but for the current one.
    order: BinaryHeap<Reverse<(u64, u32)>>,
    current: Option<u32>,
    /// The current lane's turn lasts up to this time.
    until: u64,
    /// Events up to this time may be told.
    limit: u64,
    blocked: Vec<u32>,
    parked: Vec<u32>,
    now: u64,
    /// Nothing more will be published.
    last: bool,
    /// The blocked lanes were looked into since the last look.
    looked_into: bool,
    /// When an event was last told, or there was none.
    moved: u64,
}

impl<D: Definitions> Merger<D> {
    /// A merger of these rings. `numbered`: every event is recorded, and has a number.
    pub fn new(rings: Rings, told: D, numbered: bool) -> Self {
        let event = Event { stamp: 0, tid: 0, number: 0, what: What::Thread(0) };
        let lanes = vec![Lane { event, number: None, turn: Turn::None }; rings.count()];
        Self {
            rings,
            told,
            numbered,
            stripes: Stripes::default(),
            lanes,
            order: BinaryHeap::new(),
            current: None,
            until: 0,
            limit: 0,
            blocked: Vec::new(),
            parked: Vec::new(),
            now: 0,
            last: false,
            looked_into: true,
            moved: 0,
        }
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
        self.now = self.now.max(now);
        self.limit = if self.last { u64::MAX } else { self.now.saturating_sub(MARGIN) };
        // Others may have come before what the current lane has.
        self.until = 0;
        self.looked_into = false;
        for lane in std::mem::take(&mut self.parked) {
            self.queue(lane);
        }
        for lane in 0..self.lanes.len() {
            if self.lanes[lane].turn == Turn::None && self.fetch(lane as u32) {
                self.order.push(Reverse((self.lanes[lane].event.stamp, lane as u32)));
            }
        }
        if self.stripes.any_loose() {
            self.stripes.give_up(self.now.saturating_sub(GIVEN_UP_AFTER));
            self.settle_loose();
        }
        found
    }

    /// Nothing more will be published: everything is told.
    pub fn look_last(&mut self, now: u64) -> Found {
        self.last = true;
        let found = self.look(now);
        // Twice, so that all of it is settled.
        self.look(now);
        found
    }

    /// The next event, if one may be told.
    #[inline]
    pub fn peek(&mut self) -> Option<&Event> {
        let lane = match self.current {
            Some(lane) if self.lanes[lane as usize].event.stamp <= self.until => lane,
            _ => self.choose()?,
        };
        Some(&self.lanes[lane as usize].event)
    }

    /// The event that [`Merger::peek`] showed is told.
    #[inline]
    pub fn accept(&mut self) {
        let Some(lane) = self.current else { return };
        if let Some(number) = self.lanes[lane as usize].number
            && self.stripes.told(number)
        {
            self.wake(number.stripe);
        }
        if !self.fetch(lane) {
            self.current = None;
        }
    }

    /// Leaves the event that [`Merger::peek`] showed until the next look, if there may be something published before it that
    /// was not seen yet.
    pub fn park(&mut self) -> bool {
        match self.current {
            Some(lane) if !self.rings.is_settled(lane as usize) => {
                self.lanes[lane as usize].turn = Turn::Parked;
                self.parked.push(lane);
                self.current = None;
                true
            }
            _ => false,
        }
    }

    /// Takes all definitions that were seen, ahead of their turn.
    pub fn define_ahead(&mut self) {
        self.rings.define_ahead(&mut self.told);
    }

    /// What went missing since the last call.
    pub fn take_missing(&mut self) -> Missing {
        self.rings.take_missing()
    }

    /// Brings a lane's next event in; false if there is none that is ready.
    #[inline]
    fn fetch(&mut self, index: u32) -> bool {
        let lane = &mut self.lanes[index as usize];
        let Some(event) = self.rings.read(index as usize, &mut self.told) else {
            lane.turn = Turn::None;
            return false;
        };
        let stripe = if self.numbered { event.what.stripe() } else { None };
        lane.number = stripe.map(|stripe| Number { stripe: stripe as u16, number: event.number });
        lane.event = event;
        lane.turn = Turn::Ready;
        match lane.number {
            Some(number) if !self.stripes.is_next(number) => {
                lane.turn = Turn::Blocked;
                self.stripes.wait(number.stripe);
                self.blocked.push(index);
                false
            }
            _ => true,
        }
    }

    /// Puts a lane whose event is ready among those that wait for their time.
    fn queue(&mut self, index: u32) {
        let lane = &mut self.lanes[index as usize];
        lane.turn = Turn::Ready;
        let stamp = lane.event.stamp;
        self.until = self.until.min(stamp);
        self.order.push(Reverse((stamp, index)));
    }

    /// Makes the earliest lane the current one.
    fn choose(&mut self) -> Option<u32> {
        if let Some(lane) = self.current.take() {
            self.order.push(Reverse((self.lanes[lane as usize].event.stamp, lane)));
        }
        loop {
            let first = self.order.peek().map(|Reverse(first)| *first);
            if let Some((_, lane)) = first.filter(|(stamp, _)| *stamp <= self.limit) {
                self.order.pop();
                (self.current, self.moved) = (Some(lane), self.now);
                let next = self.order.peek().map_or(self.limit, |Reverse((next, _))| *next);
                self.until = self.limit.min(next);
                return Some(lane);
            }
            if self.blocked.is_empty() {
                self.moved = self.now;
                return None;
            }
            if !self.unblock() {
                return None;
            }
        }
    }

    /// Lets go on what waited for `stripe` and need not any more.
    #[cold]
    fn wake(&mut self, stripe: u16) {
        let mut at = 0;
        while at < self.blocked.len() {
            let lane = self.blocked[at];
            match self.lanes[lane as usize].number {
                Some(number) if number.stripe == stripe && self.stripes.is_next(number) => {
                    self.blocked.swap_remove(at);
                    self.stripes.wait_no_more(stripe);
                    self.queue(lane);
                }
                _ => at += 1,
            }
        }
    }

    /// No lane is ready: finds the stripes of which a settled event waits for a number that nobody has. False if nothing can
    /// go on before the next look.
    #[cold]
    fn unblock(&mut self) -> bool {
        if !self.looked_into || self.last {
            self.looked_into = true;
            let is_stuck = |lane: &&u32| self.rings.is_settled(**lane as usize);
            let stuck =
                self.blocked.iter().filter(is_stuck).filter_map(|lane| self.lanes[*lane as usize].number);
            let mut stripes: Vec<u16> = stuck.map(|number| number.stripe).collect();
            stripes.sort_unstable();
            stripes.dedup();
            stripes.retain(|stripe| !self.stripes.is_loose(*stripe));
            let seen = self.seen(&stripes);
            for stripe in stripes {
                self.stripes.loosen(stripe, &seen, self.now);
                self.wake(stripe);
            }
            if !self.order.is_empty() {
                return true;
            }
        }
        let waited = self.now.saturating_sub(self.moved) > GIVEN_UP_AFTER;
        if !(self.last && self.order.is_empty() || waited) {
            return false;
        }
        // They wait for each other in a circle, which no order of events can make: the earliest goes first.
        let earliest = self.blocked.iter().copied().min_by_key(|lane| self.lanes[*lane as usize].event.stamp);
        let Some(number) = earliest.and_then(|lane| self.lanes[lane as usize].number) else { return false };
        tracing::debug!("events of the agent wait for each other: {number:?} goes first");
        self.stripes.force(number);
        self.wake(number.stripe);
        true
    }

    /// Lists anew what of the loose stripes may be told.
    #[cold]
    fn settle_loose(&mut self) {
        let stripes = self.stripes.loose();
        let seen = self.seen(&stripes);
        for stripe in stripes {
            self.stripes.settle(stripe, &seen, self.now);
            self.wake(stripe);
        }
    }

    /// All numbers of these stripes that are seen and not told, each with whether it is settled.
    fn seen(&self, stripes: &[u16]) -> Vec<(Number, bool)> {
        let mut seen = Vec::new();
        if stripes.is_empty() {
            return seen;
        }
        for (ring, lane) in self.lanes.iter().enumerate() {
            if let Some(number) =
                lane.number.filter(|n| lane.turn != Turn::None && stripes.contains(&n.stripe))
            {
                seen.push((number, self.rings.is_settled(ring)));
            }
            self.rings.ahead(ring, |what, number, settled| {
                if let Some(stripe) = what.stripe().filter(|stripe| stripes.contains(&(*stripe as u16))) {
                    seen.push((Number { stripe: stripe as u16, number }, settled));
                }
            });
        }
        seen
    }
}

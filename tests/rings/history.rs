//! A made-up history of threads that share an allocator, as the agent would record it. Every call is cut into the moments
//! between which other threads may get in: the number taken, the record published, the block given back or handed out.

use super::writer::{Numbers, RingFile, Writer, head};
use heaptap::agent_abi::{function as f, record};
use std::collections::{HashMap, VecDeque};

/// What the history is like.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    pub seed: u64,
    pub threads: usize,
    /// Moments.
    pub steps: usize,
    /// Moments between two looks of the controller, about.
    pub look_every: usize,
    /// Moments that pass at most between the looks at two rings.
    pub within_look: u64,
    /// Blocks that the allocator has: few are given out again soon.
    pub blocks: u64,
    /// Threads that die between taking a number and publishing it.
    pub deaths: u64,
}

/// What really happened.
#[derive(Debug, Default)]
pub struct Truth {
    pub given_out: u64,
    pub given_back: u64,
    /// Blocks with their sizes.
    pub live: HashMap<u64, u64>,
}

#[derive(Debug, Clone, Copy)]
enum Moment {
    /// The allocator hands a block to a realloc.
    Take,
    /// A record about the block at hand (`true`), or about this address.
    Number(u8, u8, Option<u64>),
    Publish,
    /// A block goes back to the allocator.
    Give(u64),
    /// The block at hand is the program's.
    Show,
    /// This block is the program's again: its realloc failed.
    Keep(u64),
}

struct Thread {
    writer: Writer,
    tid: u64,
    moments: VecDeque<Moment>,
    /// The block at hand, and its size.
    at_hand: (u64, u64),
    published: u64,
    told: bool,
}

pub struct History {
    plan: Plan,
    random: u64,
    numbers: Numbers,
    threads: Vec<Thread>,
    /// Free blocks, last given back first.
    pool: Vec<u64>,
    all: Vec<u64>,
    /// Blocks of the program.
    shown: Vec<(u64, u64)>,
    truth: Truth,
    now: u64,
    step: usize,
    deaths: u64,
    records: u64,
}

const SIZE: u64 = 48;

impl History {
    pub fn new(plan: Plan, file: &RingFile) -> Self {
        // Some share a stripe, others have one of their own.
        let all: Vec<u64> = (0..plan.blocks + plan.threads as u64)
            .map(|n| 0x5000_0000 + n * 64 + (n % 3) * 0x1_0000)
            .collect();
        let thread = |n: usize| Thread {
            // Ring 0 is left alone.
            writer: file.writer(n + 1),
            tid: 100 + n as u64,
            moments: VecDeque::new(),
            at_hand: (0, 0),
            published: 0,
            told: false,
        };
        Self {
            plan,
            random: plan.seed,
            numbers: Numbers::default(),
            threads: (0..plan.threads).map(thread).collect(),
            pool: all.clone(),
            all,
            shown: Vec::new(),
            truth: Truth::default(),
            now: 1_000_000_000,
            step: 0,
            deaths: plan.deaths,
            records: 0,
        }
    }

    pub fn goes_on(&self) -> bool {
        self.step < self.plan.steps
    }

    pub fn now(&self) -> u64 {
        self.now
    }

    pub fn truth(&self) -> &Truth {
        &self.truth
    }

    pub fn addresses(&self) -> impl Iterator<Item = u64> {
        self.all.clone().into_iter()
    }

    /// Events published.
    pub fn records(&self) -> u64 {
        self.records
    }

    pub fn is_look_due(&mut self) -> bool {
        self.below(self.plan.look_every as u64) == 0
    }

    /// The rings are looked at one after the other, and things happen meanwhile.
    pub fn show_heads(&mut self) {
        for n in 0..self.plan.threads {
            for _ in 0..self.below(self.plan.within_look) {
                self.step();
            }
            if let Some(thread) = self.threads.get(n) {
                thread.writer.publish(thread.published);
            }
        }
    }

    /// Everybody comes nearer to the end of what they do. True when all have come to it.
    pub fn end(&mut self) -> bool {
        self.deaths = 0;
        for n in 0..self.threads.len() {
            for _ in 0..10 {
                self.moment(n);
            }
        }
        for thread in &self.threads {
            thread.writer.publish(thread.published);
        }
        self.threads.iter().all(|thread| thread.moments.is_empty())
    }

    /// One moment of one thread.
    pub fn step(&mut self) {
        self.step += 1;
        self.now += 1 + self.below(2000);
        if self.threads.is_empty() {
            return;
        }
        // One is held up for a while, another runs on.
        let among =
            if self.step % 97 < 50 { 1 + self.threads.len() as u64 / 2 } else { self.threads.len() as u64 };
        let n = self.below(among) as usize;
        if self.threads[n].moments.is_empty() {
            self.begin(n);
        }
        self.moment(n);
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 11) % limit.max(1)
    }

    fn begin(&mut self, n: usize) {
        // Each realloc finds a block in the end.
        let room = self.pool.len() > self.threads.len();
        let choice = if room { self.below(10) } else { 3 + self.below(6) };
        let block = if choice < 3 {
            None
        } else if self.shown.is_empty() {
            if !room {
                return;
            }
            None
        } else {
            let at = self.below(self.shown.len() as u64) as usize;
            Some(self.shown.swap_remove(at).0)
        };
        let moments: &[Moment] = match block {
            None => &[Moment::Number(record::ALLOC, f::MALLOC, None), Moment::Publish, Moment::Show],
            Some(b) if choice < 7 => {
                &[Moment::Number(record::FREE, f::FREE, Some(b)), Moment::Publish, Moment::Give(b)]
            }
            Some(b) if choice == 7 => &[
                Moment::Number(record::BEGIN, f::REALLOC, Some(b)),
                Moment::Publish,
                Moment::Give(b),
                Moment::Take,
                Moment::Number(record::END, f::REALLOC, None),
                Moment::Publish,
                Moment::Show,
            ],
            Some(b) if choice == 8 => &[
                Moment::Number(record::BEGIN, f::REALLOC, Some(b)),
                Moment::Publish,
                Moment::Number(record::END, f::REALLOC, Some(0)),
                Moment::Publish,
                Moment::Keep(b),
            ],
            Some(b) => &[
                Moment::Number(record::FREE_INSIDE, f::FREE, Some(b)),
                Moment::Publish,
                Moment::Give(b),
                Moment::Number(record::ALLOC, f::CALLOC, None),
                Moment::Publish,
                Moment::Show,
            ],
        };
        self.threads[n].moments.extend(moments);
        if block.is_none() || choice == 9 {
            self.take(n, SIZE);
        }
    }

    /// A block for the thread; false if there is none now.
    fn take(&mut self, n: usize, size: u64) -> bool {
        let Some(address) = self.pool.pop() else { return false };
        self.threads[n].at_hand = (address, size);
        true
    }

    fn moment(&mut self, n: usize) {
        let Some(moment) = self.threads[n].moments.front().copied() else { return };
        match moment {
            Moment::Take => {
                let asked = self.threads[n].at_hand.1;
                if !self.take(n, asked) {
                    return;
                }
            }
            Moment::Number(kind, function, about) => {
                if !self.record(n, kind, function, about) {
                    return;
                }
                if self.deaths > 0 && kind != record::END && self.below(40) == 0 {
                    self.deaths -= 1;
                    self.die(n);
                    return;
                }
            }
            Moment::Publish => {
                let thread = &mut self.threads[n];
                thread.published = thread.writer.end;
                self.records += 1;
            }
            Moment::Give(block) => {
                self.truth.given_back += 1;
                self.truth.live.remove(&block);
                self.pool.push(block);
            }
            Moment::Show => {
                let (address, size) = self.threads[n].at_hand;
                self.truth.given_out += 1;
                self.truth.live.insert(address, size);
                self.shown.push((address, size));
            }
            Moment::Keep(block) => {
                let size = self.truth.live[&block];
                self.shown.push((block, size));
            }
        }
        self.threads[n].moments.pop_front();
    }

    /// Takes a number and writes the record; false if there is no room.
    fn record(&mut self, n: usize, kind: u8, function: u8, about: Option<u64>) -> bool {
        let wrong_by = self.below(6_000_000);
        let tells_time = self.below(3) == 0;
        let thread = &mut self.threads[n];
        let (address, size) = about.map_or(thread.at_hand, |address| (address, thread.at_hand.1));
        if !thread.writer.has_room(16) {
            return false;
        }
        if !std::mem::replace(&mut thread.told, true) {
            thread.writer.write(&[head(record::THREAD, 0, 0), thread.tid]);
            self.records += 1;
        }
        if tells_time {
            // A millisecond fast or slow.
            thread.writer.write(&[head(record::TIME, 0, 0), self.now + 3_000_000 - wrong_by]);
        }
        let number = if address == 0 { 0 } else { self.numbers.take(function, address) };
        let first = head(kind, function, number);
        match kind {
            record::ALLOC => thread.writer.write(&[first, address, size, 0]),
            record::BEGIN => {
                thread.at_hand.1 = size % 1000 + 7;
                thread.writer.write(&[first, address, thread.at_hand.1, 0]);
            }
            record::END => thread.writer.write(&[first, address, 0, 0]),
            _ => thread.writer.write(&[first, address]),
        }
        true
    }

    /// The thread is killed as it is about to publish: its call never comes to anything. A THREAD record of it that was not
    /// published is not there.
    fn die(&mut self, n: usize) {
        let thread = self.threads.remove(n);
        if thread.published == 0 {
            self.records -= 1;
        }
        thread.writer.publish(thread.published);
    }
}

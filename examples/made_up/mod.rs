//! A made-up server's allocator calls, the same on every run: for the examples that measure the recording side.

use heaptap::addr::RemoteAddr;
use heaptap::cpython::Location;
use heaptap::probe::calls::Observation;
use heaptap::probe::function::{Answer, Function, Request};
use std::collections::VecDeque;
use std::error::Error;
use std::sync::Arc;

/// Distinct stacks, of 20 to 40 frames: what a large web application shows.
pub const STACKS: u64 = 6000;
/// Threads that allocate, in bursts.
pub const THREADS: u64 = 8;
/// xorshift: the stream is the same on every run.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % limit
    }

    /// Small numbers often, large ones seldom.
    fn skewed(&mut self, limit: u64) -> u64 {
        let most = self.below(limit) + 1;
        let some = self.below(most) + 1;
        self.below(some)
    }
}

/// A heap with size classes whose freed blocks are given out again, last first, as malloc does.
#[derive(Default)]
struct Heap {
    free: Vec<Vec<u64>>,
    top: u64,
}

impl Heap {
    fn class(size: u64) -> usize {
        (size.max(24) + 8).div_ceil(16) as usize
    }

    fn allocate(&mut self, size: u64) -> u64 {
        let class = Self::class(size);
        self.free.resize(self.free.len().max(class + 1), Vec::new());
        self.free[class].pop().unwrap_or_else(|| {
            self.top += 16 * class as u64;
            0x5555_5600_0000 + self.top
        })
    }

    fn release(&mut self, address: u64, size: u64) {
        self.free[Self::class(size)].push(address);
    }
}

/// Makes the calls up: nine blocks of ten are freed soon, the tenth when `live_blocks` others are older.
pub struct Server {
    random: Random,
    /// Innermost frame first.
    pub stacks: Vec<Vec<Location>>,
    heap: Heap,
    soon: VecDeque<(u64, u64)>,
    late: Vec<(u64, u64)>,
    live_blocks: usize,
    tid: i32,
    /// Calls so far.
    pub events: u64,
}

impl Server {
    pub fn new(live_blocks: usize) -> Self {
        let mut random = Random(0x1234_5678_9abc_def1);
        let file: Arc<str> = "/srv/shop/handlers.py".into();
        let names: Vec<Arc<str>> = (0..1000).map(|n| format!("Shop.handler_{n}").into()).collect();
        let stacks = (0..STACKS)
            .map(|n| {
                let depth = 20 + random.below(20);
                let mut stack: Vec<Location> = (0..depth)
                    .map(|level| {
                        let which = if level < 12 { level } else { random.below(names.len() as u64) };
                        let function = Arc::clone(&names[which as usize]);
                        Location { function, file: Arc::clone(&file), line: Some(10 + (n % 90) as u32) }
                    })
                    .collect();
                stack.reverse();
                stack
            })
            .collect();
        let (heap, soon) = (Heap::default(), VecDeque::with_capacity(64));
        let late = Vec::with_capacity(live_blocks + 1);
        Self { random, stacks, heap, soon, late, live_blocks, tid: 1, events: 0 }
    }

    /// One allocation and the frees that follow it.
    pub fn step(&mut self, take: &mut impl Take) -> Result<(), Box<dyn Error>> {
        if self.events.is_multiple_of(50) {
            self.tid = 4242 + self.random.below(THREADS) as i32;
        }
        let size = 16 + self.random.skewed(2000);
        let address = self.heap.allocate(size);
        let stack = self.random.skewed(STACKS) as usize;
        let request = Request::Allocate { size: Some(size) };
        let answer = Answer::Address(RemoteAddr(address));
        let call = Observation::Ended { function: Function::Malloc, request, answer };
        take.call(self.events, self.tid, call, Some(stack))?;
        self.events += 1;
        if self.random.below(10) == 0 {
            self.late.push((address, size));
        } else {
            self.soon.push_back((address, size));
        }
        while self.soon.len() as u64 > 1 + self.random.below(30) {
            let at = self.random.below(self.soon.len() as u64) as usize;
            let Some(block) = self.soon.remove(at) else { break };
            self.free(block, take)?;
        }
        if self.late.len() > self.live_blocks {
            let at = self.random.below(self.late.len() as u64) as usize;
            let block = self.late.swap_remove(at);
            self.free(block, take)?;
        }
        Ok(())
    }

    fn free(&mut self, (address, size): (u64, u64), take: &mut impl Take) -> Result<(), Box<dyn Error>> {
        let freed = Observation::Freed { function: Function::Free, address: RemoteAddr(address) };
        take.call(self.events, self.tid, freed, None)?;
        self.heap.release(address, size);
        self.events += 1;
        Ok(())
    }
}

/// Who is told of calls.
pub trait Take {
    /// A call of thread `tid`; `stack` is an index into [`Server::stacks`] where memory was given out.
    fn call(
        &mut self,
        at: u64,
        tid: i32,
        call: Observation,
        stack: Option<usize>,
    ) -> Result<(), Box<dyn Error>>;
}

/// The most memory this process ever had resident, in bytes (`VmHWM` of proc_pid_status(5)).
pub fn peak_rss() -> Result<u64, Box<dyn Error>> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).ok_or("no VmHWM")?;
    let kilobytes: u64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(kilobytes * 1024)
}

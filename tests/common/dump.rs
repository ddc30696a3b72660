//! `heaptap dump --json` read back: one JSON object per line, and a naive replay of what was live when.
//!
//! The replay is written for obviousness, not speed: it is what the product's own live set is measured against.

use std::collections::{BTreeMap, HashMap};

use serde::Deserialize;

/// One frame of a recorded stack.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Deserialize)]
pub struct Frame {
    /// Qualified name from 3.11 on, plain name before.
    pub function: String,
    /// As the code object says.
    pub file: String,
    /// The line being executed.
    pub line: u32,
}

impl Frame {
    /// The file's name without its folders, which differ between machines and roots.
    pub fn base(&self) -> &str {
        self.file.rsplit('/').next().unwrap_or_default()
    }
}

/// An allocation, with what became of it.
#[derive(Clone, Debug)]
pub struct Allocation {
    /// `malloc`, `mmap`, `object_malloc`, …
    pub allocator: String,
    /// Requested bytes.
    pub size: u64,
    /// Where the block is.
    pub address: u64,
    /// Mean distance in bytes of the samples of which it is one; 0 where every event is recorded.
    pub interval: u64,
    /// Thread that allocated.
    pub tid: i64,
    /// Innermost frame first; empty for a thread without a Python state.
    pub stack: Vec<Frame>,
    /// Bytes of it that are still there at the end: `size`, 0, or between for a partly unmapped range.
    pub live: u64,
}

impl Allocation {
    /// True when nothing of it is left.
    pub fn is_freed(&self) -> bool {
        self.live == 0
    }
}

#[derive(Deserialize)]
struct Line {
    #[serde(rename = "record")]
    kind: String,
    id: Option<u64>,
    allocator: Option<String>,
    #[serde(rename = "bytes")]
    size: Option<u64>,
    address: Option<u64>,
    interval: Option<u64>,
    tid: Option<i64>,
    /// Of an allocation: the id of its stack, 0 for the empty one.
    stack: Option<u64>,
    /// Of a stack: the id of the frame on top, and of the stack below.
    frame: Option<u64>,
    caller: Option<u64>,
    function: Option<String>,
    file: Option<String>,
    line: Option<u32>,
}

/// A whole capture, replayed.
#[derive(Debug, Default)]
pub struct Dump {
    /// In the order of the capture.
    pub allocations: Vec<Allocation>,
    /// Addresses freed that no recorded allocation had.
    pub unknown_frees: Vec<u64>,
    /// What was live (index into `allocations`) when the live bytes were highest.
    pub high_water: Vec<usize>,
    /// Lines by their `type`.
    pub counts: BTreeMap<String, usize>,
    frames: HashMap<u64, Frame>,
    /// Frame on top and stack below, by id.
    stacks: HashMap<u64, (u64, u64)>,
    blocks: HashMap<u64, usize>,
    /// An address that was given out while it was live.
    doubled: Option<String>,
    ranges: BTreeMap<u64, (u64, usize)>,
    live: u64,
    peak: u64,
}

impl Dump {
    /// Reads what `dump --json` printed. Panics on a line that is not of the documented form.
    pub fn parse(text: &str) -> Dump {
        let mut dump = Dump::default();
        for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let parsed: Line = serde_json::from_str(line)
                .unwrap_or_else(|error| panic!("dump line {}: {error}: {line}", number + 1));
            *dump.counts.entry(parsed.kind.clone()).or_default() += 1;
            dump.apply(parsed, line);
        }
        // A free may be among the events that the capture tells as dropped.
        if let Some(doubled) = dump.doubled.take().filter(|_| !dump.counts.contains_key("drop")) {
            panic!("{doubled}");
        }
        dump
    }

    fn apply(&mut self, line: Line, text: &str) {
        let need = |field: Option<u64>| field.unwrap_or_else(|| panic!("a field is missing in {text}"));
        match line.kind.as_str() {
            "frame" => {
                let frame = Frame {
                    function: line.function.unwrap_or_else(|| panic!("no function in {text}")),
                    // What stands for stacks that were not kept is of no file.
                    file: line.file.unwrap_or_default(),
                    line: line.line.unwrap_or_default(),
                };
                self.frames.insert(need(line.id), frame);
            }
            "stack" => {
                self.stacks.insert(need(line.id), (need(line.frame), need(line.caller)));
            }
            "allocation" => {
                let stack = self.stack(need(line.stack));
                self.allocate(Allocation {
                    allocator: line.allocator.unwrap_or_else(|| panic!("no allocator in {text}")),
                    size: need(line.size),
                    address: need(line.address),
                    interval: line.interval.unwrap_or(0),
                    tid: line.tid.unwrap_or_else(|| panic!("no tid in {text}")),
                    stack,
                    live: need(line.size),
                });
            }
            "free" => self.free(need(line.address)),
            // Said to be older than the recording: a block of this recording that it hits stays live, and shows.
            "free_from_before" => self.unknown_frees.push(need(line.address)),
            "unmap" => self.unmap(need(line.address), need(line.size)),
            _ => {}
        }
    }

    /// The frames of a stack, innermost first.
    fn stack(&self, mut id: u64) -> Vec<Frame> {
        let mut frames = Vec::new();
        while id != 0 {
            let (frame, caller) = self.stacks[&id];
            frames.push(self.frames[&frame].clone());
            id = caller;
        }
        frames
    }

    fn allocate(&mut self, allocation: Allocation) {
        let index = self.allocations.len();
        self.live += allocation.size;
        if matches!(allocation.allocator.as_str(), "mmap" | "mremap") {
            self.ranges.insert(allocation.address, (allocation.address + allocation.size, index));
        } else if let Some(old) = self.blocks.insert(allocation.address, index)
            && self.allocations[old].interval == 0
        {
            self.doubled.get_or_insert(format!(
                "{:#x} was allocated twice without a free: {:?}",
                allocation.address, self.allocations[old]
            ));
        }
        self.allocations.push(allocation);
        if self.live > self.peak {
            self.peak = self.live;
            self.high_water = self.live_now();
        }
    }

    fn live_now(&self) -> Vec<usize> {
        self.blocks.values().copied().chain(self.ranges.values().map(|&(_, index)| index)).collect()
    }

    fn free(&mut self, address: u64) {
        match self.blocks.remove(&address) {
            Some(index) => {
                self.live -= self.allocations[index].live;
                self.allocations[index].live = 0;
            }
            None => self.unknown_frees.push(address),
        }
    }

    fn unmap(&mut self, start: u64, length: u64) {
        let end = start + length;
        let touched: Vec<u64> = self
            .ranges
            .range(..end)
            .filter(|(_, (stop, _))| *stop > start)
            .map(|(&first, _)| first)
            .collect();
        for first in touched {
            let (stop, index) = self.ranges.remove(&first).expect("it was just found");
            let gone = stop.min(end) - first.max(start);
            self.live -= gone;
            self.allocations[index].live -= gone;
            if first < start {
                self.ranges.insert(first, (start, index));
            }
            if stop > end {
                self.ranges.insert(end, (stop, index));
            }
        }
    }
}

//! [`LiveSet`]: what is allocated and not yet freed.
//!
//! The recorder asks it whose block a `free` is; the analysis replays records through it. It knows
//! allocation and release, and nothing of stacks beyond their ids. Memory is bounded by live blocks
//! (28 bytes each, plus the hash table's slack) and live mappings.

use super::allocator::AllocatorKind;
use super::mappings::{Mappings, Part};
use super::record::{Allocation, StackId, Unmap};
use super::weight::WeightedSum;
use crate::addr::RemoteAddr;
use foldhash::fast::RandomState;
use std::collections::HashMap;

/// A live block or mapping.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Block {
    /// Bytes asked for.
    pub size: u64,
    /// The stack that asked.
    pub stack: StackId,
    /// The function that gave it.
    pub allocator: AllocatorKind,
    /// The thread that asked.
    pub tid: u32,
    /// The sampling interval it was recorded with, as in [`Allocation`]; 0 for a mapping.
    pub interval: u64,
    /// When, in milliseconds since the start of recording (49 days, then the last of them).
    pub time_ms: u32,
}

/// What an allocation found in its place.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Displaced {
    /// Nothing, as it should be.
    Nothing,
    /// A block that was live at that address: its free was missed.
    Block(Block),
    /// Mappings, or parts of them, that a fixed mapping replaced. Not an error.
    Mappings(Vec<Part>),
}

/// [`Block`] in 20 bytes, aligned to 4 so that an entry of the table has 28.
#[derive(Clone, Copy)]
struct Packed {
    size: [u32; 2],
    stack: StackId,
    /// Index into `origins`.
    origin: u32,
    time_ms: u32,
}

/// What many blocks have in common: function, thread, sampling interval.
type Origin = (AllocatorKind, u32, u64);

/// The origins of the live blocks. They are few, so blocks hold an index; but a server may have a thread for each request, so
/// that one without blocks gives its place to another.
#[derive(Default)]
struct Origins {
    /// With the number of its blocks.
    entries: Vec<(Origin, u32)>,
    ids: HashMap<Origin, u32, RandomState>,
    /// Places to be taken.
    vacant: Vec<u32>,
    /// Origins without blocks that still have a place: they may be back at once.
    unused: usize,
    had_samples: bool,
}

impl Origins {
    /// So many unused ones are kept at least.
    const SPARE: usize = 1024;

    /// The index of `origin`, for one more block.
    fn take(&mut self, origin: Origin) -> u32 {
        if let Some(&id) = self.ids.get(&origin) {
            let count = &mut self.entries[id as usize].1;
            self.unused -= usize::from(*count == 0);
            *count += 1;
            return id;
        }
        if self.vacant.is_empty() && self.unused > Self::SPARE && self.unused > self.entries.len() / 2 {
            self.sweep();
        }
        self.had_samples |= origin.2 != 0;
        let id = match self.vacant.pop() {
            Some(id) => {
                self.entries[id as usize] = (origin, 1);
                id
            }
            None => {
                self.entries.push((origin, 1));
                self.entries.len() as u32 - 1
            }
        };
        self.ids.insert(origin, id);
        id
    }

    /// One block less has it.
    fn give_back(&mut self, id: u32) {
        let count = &mut self.entries[id as usize].1;
        *count -= 1;
        self.unused += usize::from(*count == 0);
    }

    fn get(&self, id: u32) -> Origin {
        self.entries[id as usize].0
    }

    /// Makes the places of all unused ones vacant.
    fn sweep(&mut self) {
        for (id, (origin, count)) in self.entries.iter().enumerate() {
            if *count == 0 && self.ids.remove(origin).is_some() {
                self.vacant.push(id as u32);
            }
        }
        self.unused = 0;
    }
}

/// The address as two halves, for its alignment.
type Key = [u32; 2];

/// The set of live blocks and mappings.
pub struct LiveSet {
    blocks: HashMap<Key, Packed, RandomState>,
    mappings: Mappings,
    origins: Origins,
    page_size: u64,
    sum: WeightedSum,
    peak_bytes: u64,
}

impl LiveSet {
    /// An empty set. `page_size` (bytes) is what unmapped lengths are rounded up to; 0 or 1 for no rounding.
    pub fn new(page_size: u64) -> Self {
        Self {
            blocks: HashMap::default(),
            mappings: Mappings::default(),
            origins: Origins::default(),
            page_size: page_size.max(1),
            sum: WeightedSum::default(),
            peak_bytes: 0,
        }
    }

    /// Adds a block, or a mapping if the allocator is ranged. `time_ns` is since the start.
    pub fn allocate(&mut self, event: &Allocation, time_ns: u64) -> Displaced {
        let time_ms = u32::try_from(time_ns / 1_000_000).unwrap_or(u32::MAX);
        let Allocation { allocator, tid, address, size, stack, interval } = *event;
        let displaced = if allocator.is_ranged() {
            let block = Block { size, stack, allocator, tid, interval: 0, time_ms };
            let parts = self.mappings.map(address.0, size, block);
            if parts.is_empty() { Displaced::Nothing } else { Displaced::Mappings(parts) }
        } else {
            let origin = self.origins.take((allocator, tid, interval));
            let packed = Packed { size: halves(size), stack, origin, time_ms };
            match self.blocks.insert(halves(address.0), packed) {
                None => Displaced::Nothing,
                Some(old) => Displaced::Block(self.forget(old)),
            }
        };
        if !allocator.is_ranged() {
            self.sum.add(size, interval);
        }
        self.peak_bytes = self.peak_bytes.max(self.live_bytes());
        displaced
    }

    /// Takes a block out; `None` if it is not one of ours.
    pub fn free(&mut self, address: RemoteAddr) -> Option<Block> {
        let packed = self.blocks.remove(&halves(address.0))?;
        Some(self.forget(packed))
    }

    /// Takes a range of mappings out; empty if none of it is ours.
    pub fn unmap(&mut self, event: &Unmap) -> Vec<Part> {
        let pages = event.len.checked_next_multiple_of(self.page_size).unwrap_or(event.len);
        self.mappings.unmap(event.address.0, pages)
    }

    /// The block at `address`, if one is live there.
    pub fn block(&self, address: RemoteAddr) -> Option<Block> {
        self.blocks.get(&halves(address.0)).map(|packed| self.unpack(*packed))
    }

    /// Whether a block is live at `address`.
    pub fn is_live(&self, address: RemoteAddr) -> bool {
        self.blocks.contains_key(&halves(address.0))
    }

    /// Bytes in blocks and mappings; of samples, what they stand for.
    pub fn live_bytes(&self) -> u64 {
        self.sum.bytes().saturating_add(self.mappings.bytes())
    }

    /// Blocks and mappings; of samples, what they stand for.
    pub fn live_blocks(&self) -> usize {
        let blocks = usize::try_from(self.sum.count()).unwrap_or(usize::MAX);
        blocks.saturating_add(self.mappings.count())
    }

    /// The most bytes that were live at once.
    pub fn peak_bytes(&self) -> u64 {
        self.peak_bytes
    }

    /// Every recorded block and mapping with its own live bytes, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (Block, u64)> + '_ {
        let blocks = self.blocks.values().map(|packed| {
            let block = self.unpack(*packed);
            (block, block.size)
        });
        blocks.chain(self.mappings.iter())
    }

    /// Whether a sample was ever among the blocks.
    pub fn has_samples(&self) -> bool {
        self.origins.had_samples
    }

    /// The live samples with their addresses, in no order.
    pub fn samples(&self) -> impl Iterator<Item = (RemoteAddr, Block)> + '_ {
        let blocks = self.blocks.iter().map(|(key, packed)| {
            (RemoteAddr(u64::from(key[0]) | u64::from(key[1]) << 32), self.unpack(*packed))
        });
        blocks.filter(|(_, block)| block.interval != 0)
    }

    /// What is known of a block that was taken out.
    fn forget(&mut self, packed: Packed) -> Block {
        let block = self.unpack(packed);
        self.sum.remove(block.size, block.interval);
        self.origins.give_back(packed.origin);
        block
    }

    fn unpack(&self, packed: Packed) -> Block {
        let (allocator, tid, interval) = self.origins.get(packed.origin);
        let size = u64::from(packed.size[0]) | u64::from(packed.size[1]) << 32;
        Block { size, stack: packed.stack, allocator, tid, interval, time_ms: packed.time_ms }
    }
}

const _: () = assert!(size_of::<(Key, Packed)>() == 28);

fn halves(value: u64) -> [u32; 2] {
    [value as u32, (value >> 32) as u32]
}

#[cfg(test)]
#[path = "live_set_tests.rs"]
mod tests;

//! glibc's heap, from outside: what it has from the kernel, and what of that is free.
//!
//! # Where it is, without symbols
//! `main_arena` and `mp_` are local symbols, and a stripped library has none. The exported `malloc_stats` prints from both:
//! it takes the address of the one (`lea`), and loads `mp_.mmapped_mem` and the word behind it, `mp_.max_mmapped_mem`. What it refers to
//! is decoded from its instructions and believed only if it looks like what it should be.
//!
//! # What an arena looks like
//! `struct malloc_state` (malloc/malloc.c) differs in its head: `have_fastchunks` came with 2.27, the fast bins went with 2.43. From
//! `bins` on it is the same in all: 127 circular lists, which point to the arena itself where they are empty. So the offset of `bins` is
//! looked for in the process, and gives all others: before it `top` and `last_remainder`, before those ten fast bins or none;
//! behind it `binmap`, `next`, `next_free`, `attached_threads`, `system_mem`, `max_system_mem`.
//!
//! # What is counted
//! As `mallinfo2` does: free are the top chunk, the bins and the fast bins of every arena; all else is in use, the blocks in the
//! threads' caches too (they are freed; at most some hundred KiB a thread).
//!
//! # Races
//! The target allocates meanwhile. `system_mem` is a word. Lists are walked all at once, a step per system call, and each chunk
//! must be one: its size possible, its neighbour pointing back. A walk in which a list breaks is done again; when it breaks too often, or there
//! are too many chunks, what is free is unknown for this moment. Lists that were whole each may be of moments some 100 µs apart.

use super::pace::Pace;
use crate::addr::RemoteAddr;
use crate::capture::Gauges;
use crate::image::Module;
use crate::memory::RemoteMemory;
use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic, OpKind};
use std::time::Instant;

/// Lists of an arena (`NBINS - 1`).
const BINS: u64 = 127;
/// `sizeof (struct malloc_state)` is less in every version.
const MOST_BYTES: usize = 2304;
/// Where the bins may begin.
const BINS_FROM: u64 = 16;
const BINS_TO: u64 = 160;
/// `NFASTBINS`.
const FAST_BINS: u64 = 10;
/// From `bins` to the fields behind it: `binmap` is 16 bytes.
const NEXT: u64 = BINS * 16 + 16;
const SYSTEM_MEM: u64 = NEXT + 24;
const MAX_SYSTEM_MEM: u64 = NEXT + 32;
/// glibc makes eight per processor.
const MOST_ARENAS: usize = 8192;
/// `MINSIZE`, and what sizes are multiples of.
const LEAST_CHUNK: u64 = 32;
const ALIGNMENT: u64 = 16;
/// An empty list points to the middle of the arena, which is aligned to a word only where no fast bins come first.
const WORD: u64 = 8;
/// The flags in a size: PREV_INUSE, IS_MMAPPED, NON_MAIN_ARENA.
const FLAGS: u64 = 7;
/// Chunks that are walked at a time at most: some 100 ms.
const MOST_CHUNKS: usize = 200_000;
/// Walks until one succeeds.
const TRIES: usize = 4;
/// Bytes of `malloc_stats` at most.
const MOST_CODE: u64 = 4096;

/// The heap of one process.
#[derive(Debug, Clone)]
pub struct Heap {
    main_arena: RemoteAddr,
    shape: Shape,
    mmapped_mem: RemoteAddr,
}

/// What differs between versions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Shape {
    /// Offset of `bins`.
    bins: u64,
    /// A fast bin's links are masked with their own address (2.32).
    masked: bool,
}

impl Shape {
    fn top(self) -> u64 {
        self.bins - 16
    }

    /// Offset of the first fast bin, where there are any.
    fn fast_bins(self) -> Option<u64> {
        self.top().checked_sub(8 * FAST_BINS).filter(|first| *first >= 8)
    }
}

/// One arena as it was read.
struct Arena {
    addr: RemoteAddr,
    bytes: Vec<u8>,
}

impl Arena {
    fn read(memory: &dyn RemoteMemory, addr: RemoteAddr) -> Option<Self> {
        // An arena of a thread lies at the start of its heap, the main one in the library's data: more follows in either.
        Some(Self { addr, bytes: memory.read_vec(addr, MOST_BYTES).ok()? })
    }

    fn word(&self, offset: u64) -> u64 {
        word(&self.bytes, offset as usize)
    }

    /// What a list points to that has nothing in it: itself, as if it were a chunk.
    fn bin(&self, shape: Shape, bin: u64) -> RemoteAddr {
        self.addr.offset(shape.bins + 16 * bin - 16)
    }

    /// Whether its bins may begin there: every list is empty both ways or not at all, and some are empty. That alone holds a list's
    /// length further on or back, too.
    fn fits(&self, bins: u64) -> bool {
        let shape = Shape { bins, masked: false };
        let mut empty = 0;
        let fits = (0..BINS).all(|bin| {
            let here = self.bin(shape, bin).0;
            let [fd, bk] = [0, 8].map(|at| self.word(bins + 16 * bin + at));
            empty += u32::from(fd == here);
            (fd == here) == (bk == here) && [fd, bk].iter().all(|to| *to != 0 && to % WORD == 0)
        });
        fits && empty >= 8
    }

    fn is_sound(&self, shape: Shape) -> bool {
        let (system, most) = (self.word(shape.bins + SYSTEM_MEM), self.word(shape.bins + MAX_SYSTEM_MEM));
        self.fits(shape.bins) && 0 < system && system <= most && most < 1 << 47
    }
}

impl Heap {
    /// The heap of the process that has `libc` loaded, of this version; `None` where it can't be found for certain.
    pub fn find(memory: &dyn RemoteMemory, libc: &Module, version: &str) -> Option<Self> {
        let mut numbers = version.split('.').map(|part| part.parse::<u32>().ok());
        let (major, minor) = (numbers.next()??, numbers.next()??);
        let stats = libc.exported_symbol("malloc_stats").filter(|s| s.is_function())?;
        let at = libc.bias().to_remote(stats.addr);
        let code = libc.file_bytes(at, stats.size.min(MOST_CODE) as usize)?;
        let refers = references(&code, at);
        let is_data = |at: &RemoteAddr| {
            libc.segments().any(|(start, len, segment)| segment.writable && at.since(start) < len)
        };
        let masked = (major, minor) >= (2, 32);
        let mut taken = refers.taken.iter().copied().filter(is_data);
        let (main_arena, shape) =
            taken.find_map(|at| Some((at, Shape { bins: bins(memory, at)?, masked })))?;
        let in_arena = |at: RemoteAddr| at.since(main_arena) < MOST_BYTES as u64;
        let mut words = refers.loaded.iter().filter(|at| is_data(at) && !in_arena(**at));
        let mmapped_mem = *words.find(|at| refers.loaded.contains(&at.offset(8)))?;
        let heap = Self { main_arena, shape, mmapped_mem };
        heap.mmapped(memory).is_some().then_some(heap)
    }

    /// Bytes of blocks that are mappings of their own: pages, from 2.43 on without the words before a block. Checked against the
    /// most that they ever were.
    fn mmapped(&self, memory: &dyn RemoteMemory) -> Option<u64> {
        let bytes = memory.read_vec(self.mmapped_mem, 16).ok()?;
        let (now, most) = (word(&bytes, 0), word(&bytes, 8));
        (now <= most && most < 1 << 47 && now.is_multiple_of(ALIGNMENT)).then_some(now)
    }

    /// Reads what it has; and, where `pace` allows, what of it is free.
    pub fn read(&self, memory: &dyn RemoteMemory, pace: &mut Pace, gauges: &mut Gauges) {
        let start = Instant::now();
        let walks = pace.is_due(start);
        for _ in 0..TRIES {
            let Some(arenas) = arenas(memory, self.main_arena, self.shape) else { continue };
            let Some(mmapped) = self.mmapped(memory) else { continue };
            let system = arenas.iter().map(|a| a.word(self.shape.bins + SYSTEM_MEM)).sum::<u64>();
            gauges.heap_held = Some(system + mmapped);
            let Some(free) = walks.then(|| self.free(memory, &arenas)) else { break };
            match free {
                Free::Known(free) if free <= system => {
                    gauges.heap_free = Some(free);
                    gauges.heap_in_use = Some(system - free + mmapped);
                    break;
                }
                Free::TooMany => break,
                Free::Known(_) | Free::Torn => {}
            }
        }
        if walks {
            pace.took(start.elapsed(), Instant::now());
        }
    }

    fn free(&self, memory: &dyn RemoteMemory, arenas: &[Arena]) -> Free {
        let Some(tops) = self.tops(memory, arenas) else { return Free::Torn };
        let mut lists: Vec<List> = arenas.iter().flat_map(|arena| self.lists(arena)).collect();
        let (mut sum, mut chunks) = (tops, 0);
        while !lists.is_empty() {
            chunks += lists.len();
            if chunks > MOST_CHUNKS {
                return Free::TooMany;
            }
            let mut bytes = vec![[0; 32]; lists.len()];
            let mut wanted: Vec<_> =
                lists.iter().zip(&mut bytes).map(|(list, bytes)| (list.chunk, &mut bytes[..])).collect();
            if memory.read_many(&mut wanted).contains(&false) {
                return Free::Torn;
            }
            let mut left = Vec::with_capacity(lists.len());
            for (mut list, bytes) in lists.into_iter().zip(&bytes) {
                match list.step(bytes, self.shape) {
                    Some((size, goes_on)) => {
                        sum += size;
                        if goes_on {
                            left.push(list);
                        }
                    }
                    None => return Free::Torn,
                }
            }
            lists = left;
        }
        Free::Known(sum)
    }

    /// Bytes of the top chunks. That of an arena that has nothing yet is its own first bin.
    fn tops(&self, memory: &dyn RemoteMemory, arenas: &[Arena]) -> Option<u64> {
        let tops = arenas.iter().filter_map(|arena| {
            let top = RemoteAddr(arena.word(self.shape.top()));
            let unborn = top == arena.bin(self.shape, 0) || top.is_null();
            (!unborn).then_some((top, arena.word(self.shape.bins + SYSTEM_MEM)))
        });
        tops.map(|(top, system)| {
            let size = memory.read_u64(top.offset(8)).ok()? & !FLAGS;
            (size.is_multiple_of(ALIGNMENT) && size <= system).then_some(size)
        })
        .sum()
    }

    fn lists(&self, arena: &Arena) -> Vec<List> {
        let bins = (0..BINS).map(|bin| {
            let head = arena.bin(self.shape, bin);
            let first = RemoteAddr(arena.word(self.shape.bins + 16 * bin));
            // The first list is of any size; so many that follow are of one size each (NSMALLBINS).
            let size = (1..63).contains(&bin).then_some((bin + 1) * ALIGNMENT);
            List { chunk: first, before: head, end: head, size, is_fast: false }
        });
        let fast =
            self.shape.fast_bins().into_iter().flat_map(|first| (0..FAST_BINS).map(move |bin| (first, bin)));
        let fast = fast.map(|(first, bin)| List {
            chunk: RemoteAddr(arena.word(first + 8 * bin)),
            before: RemoteAddr::NULL,
            end: RemoteAddr::NULL,
            size: Some(LEAST_CHUNK + bin * ALIGNMENT),
            is_fast: true,
        });
        bins.chain(fast).filter(|list| list.chunk != list.end).collect()
    }
}

/// Where the bins of the main arena begin, if it is one: with the right place alone, the ring of all arenas comes back to it.
fn bins(memory: &dyn RemoteMemory, main_arena: RemoteAddr) -> Option<u64> {
    let arena = Arena::read(memory, main_arena)?;
    let mut places = (BINS_FROM..BINS_TO).step_by(8).filter(|bins| arena.fits(*bins));
    places.find(|bins| arenas(memory, main_arena, Shape { bins: *bins, masked: false }).is_some())
}

/// All arenas; `None` if one of them is none.
fn arenas(memory: &dyn RemoteMemory, main_arena: RemoteAddr, shape: Shape) -> Option<Vec<Arena>> {
    let (mut arenas, mut next) = (Vec::new(), main_arena);
    while arenas.len() < MOST_ARENAS {
        let arena = Arena::read(memory, next).filter(|arena| arena.is_sound(shape))?;
        next = RemoteAddr(arena.word(shape.bins + NEXT));
        arenas.push(arena);
        if next == main_arena {
            return Some(arenas);
        }
    }
    None
}

/// What is free.
enum Free {
    Known(u64),
    /// It changed while it was read.
    Torn,
    /// It would take too long.
    TooMany,
}

/// A list of free chunks, part way.
struct List {
    /// The chunk that comes next.
    chunk: RemoteAddr,
    /// The one before.
    before: RemoteAddr,
    /// What the last one points to.
    end: RemoteAddr,
    /// The size of each, where all are of one.
    size: Option<u64>,
    is_fast: bool,
}

impl List {
    /// Takes the chunk, whose first words are `bytes` (size of the one before, size, next, previous): its size, and whether
    /// another follows. `None` if it is no chunk of this list.
    fn step(&mut self, bytes: &[u8; 32], shape: Shape) -> Option<(u64, bool)> {
        let [size, next, previous] = [8, 16, 24].map(|at| word(bytes, at));
        let size = size & !FLAGS;
        let possible =
            size >= LEAST_CHUNK && size.is_multiple_of(ALIGNMENT) && self.size.is_none_or(|all| size == all);
        if !possible
            || !self.chunk.0.is_multiple_of(ALIGNMENT)
            || (!self.is_fast && previous != self.before.0)
        {
            return None;
        }
        // PROTECT_PTR: the address of the link itself, its lowest 12 bits aside.
        let mask = if self.is_fast && shape.masked { self.chunk.offset(16).0 >> 12 } else { 0 };
        self.before = self.chunk;
        self.chunk = RemoteAddr(next ^ mask);
        Some((size, self.chunk != self.end))
    }
}

/// What a function refers to, relative to its instructions.
struct References {
    /// Addresses taken.
    taken: Vec<RemoteAddr>,
    /// Words of 8 bytes loaded.
    loaded: Vec<RemoteAddr>,
}

fn references(code: &[u8], at: RemoteAddr) -> References {
    let mut refers = References { taken: Vec::new(), loaded: Vec::new() };
    let decoder = Decoder::with_ip(64, code, at.0, DecoderOptions::NONE);
    let relative = |i: &Instruction| i.op1_kind() == OpKind::Memory && i.is_ip_rel_memory_operand();
    for i in decoder.into_iter().filter(|i| i.op_count() == 2 && relative(i)) {
        let address = RemoteAddr(i.ip_rel_memory_address());
        match i.mnemonic() {
            Mnemonic::Lea => refers.taken.push(address),
            Mnemonic::Mov if i.memory_size().size() == 8 => refers.loaded.push(address),
            _ => {}
        }
    }
    refers
}

fn word(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes)
}

#[cfg(test)]
#[path = "glibc_tests.rs"]
mod tests;

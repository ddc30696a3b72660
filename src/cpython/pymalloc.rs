//! pymalloc's arenas and how full they are, from outside: what `sys._debugmallocstats()` counts.
//!
//! An array of `struct arena_object` (Objects/obmalloc.c) tells of every arena how many of its pools are free; each pool that was ever
//! used says in its header how many of its blocks are in use. The array is a static variable up to 3.11, which the exported
//! `_Py_GetAllocatedBlocks` (3.8: `_PyObject_DebugMallocStats`) loads; then a part of the interpreter's state. Wherever it was found, it
//! is believed only if every arena in it is possible.
//!
//! The main interpreter's only: since 3.12 a subinterpreter may have arenas of its own. A free-threaded build has mimalloc instead.
//! The target runs: an array or pool that makes no sense at the moment is an answer of `None`.

use super::Python;
use super::binary::{Binary, find_symbol};
use super::disasm::loads;
use super::layout::ObmallocState;
use super::layout::tables::{ArenaObject, PoolHeader};
use super::text::word;
use crate::addr::RemoteAddr;
use crate::memory::RemoteMemory;

/// Arenas at most: 16 TiB.
const MOST_ARENAS: u32 = 1 << 24;
/// `INITIAL_ARENA_OBJECTS`; the array doubles from there.
const FIRST_ARENAS: u32 = 16;
/// `ALIGNMENT`: bytes from one class of sizes to the next.
const CLASS: u64 = 16;
/// `NB_SMALL_SIZE_CLASSES`.
const CLASSES: u64 = 32;
/// Bytes decoded of a function that refers to the arenas.
const CODE: usize = 1024;
/// Arenas read at a time.
const BATCH: usize = 1024;

/// pymalloc of the main interpreter.
#[derive(Debug, Clone, Copy)]
pub struct Pymalloc {
    arenas: RemoteAddr,
    maxarenas: RemoteAddr,
    object: ArenaObject,
    header: PoolHeader,
    arena_bytes: u64,
    pool_bytes: u64,
}

/// Bytes of arenas.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Arenas {
    /// All of them.
    pub bytes: u64,
    /// In pools that hold a block.
    pub pools: u64,
}

/// One arena.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Arena {
    /// The first pool of it.
    first_pool: u64,
    /// The first pool that was never used.
    unused: u64,
    pools: u64,
    pools_free: u64,
}

impl Pymalloc {
    /// See [`Python::pymalloc`].
    pub(super) fn find(memory: &dyn RemoteMemory, binaries: &[&dyn Binary], python: &Python) -> Option<Self> {
        let layout = &python.layout;
        let meaning = layout.meaning;
        let at = |arenas: RemoteAddr, maxarenas: RemoteAddr| {
            Some(Self {
                arenas,
                maxarenas,
                object: layout.arena_object?,
                header: layout.pool_header?,
                arena_bytes: meaning.arena_bytes?,
                pool_bytes: meaning.pool_bytes?,
            })
        };
        let state = match meaning.obmalloc? {
            ObmallocState::Static => {
                return candidates(memory, binaries)
                    .into_iter()
                    .find_map(|(arenas, max)| at(arenas, max).filter(|found| found.holds_any(memory)));
            }
            ObmallocState::Embedded => {
                python.main_interpreter(memory).ok()?.offset(layout.interpreter_state.obmalloc?)
            }
            ObmallocState::Pointer => {
                let word = python.main_interpreter(memory).ok()?.offset(layout.interpreter_state.obmalloc?);
                memory.read_ptr(word).ok()?
            }
        };
        let fields = layout.obmalloc?;
        at(state.offset(fields.arenas), state.offset(fields.maxarenas))
            .filter(|found| found.holds_any(memory))
    }

    /// Zeroes, too, look like an array without arenas: what is believed holds some.
    fn holds_any(&self, memory: &dyn RemoteMemory) -> bool {
        self.read_all(memory).is_some_and(|arenas| !arenas.is_empty())
    }

    /// What the arenas are; one read for a thousand of them.
    pub fn read(&self, memory: &dyn RemoteMemory) -> Option<Arenas> {
        let mut sum = Arenas::default();
        for arena in self.read_all(memory)? {
            sum.bytes += self.arena_bytes;
            sum.pools += (arena.pools - arena.pools_free) * self.pool_bytes;
        }
        Some(sum)
    }

    fn read_all(&self, memory: &dyn RemoteMemory) -> Option<Vec<Arena>> {
        let count = memory.read_u32(self.maxarenas).ok()?;
        let array = memory.read_ptr(self.arenas).ok()?;
        if count == 0 && array.is_null() {
            return Some(Vec::new());
        }
        if !(FIRST_ARENAS..=MOST_ARENAS).contains(&count) || !count.is_power_of_two() {
            return None;
        }
        let (mut arenas, mut bytes) = (Vec::new(), Vec::new());
        for from in (0..count as usize).step_by(BATCH) {
            let len = BATCH.min(count as usize - from);
            bytes.resize(len * self.object.size as usize, 0);
            memory.read(array.offset(from as u64 * self.object.size), &mut bytes).ok()?;
            for object in bytes.chunks_exact(self.object.size as usize) {
                if word(object, self.object.address, 8)? != 0 {
                    arenas.push(self.arena(object)?);
                }
            }
        }
        Some(arenas)
    }

    /// `None` if it can be no arena.
    fn arena(&self, object: &[u8]) -> Option<Arena> {
        let field = |offset, bytes| word(object, offset, bytes);
        let (address, unused) = (field(self.object.address, 8)?, field(self.object.pool_address, 8)?);
        let (free, all) = (field(self.object.nfreepools, 4)?, field(self.object.ntotalpools, 4)?);
        let first_pool = address.checked_next_multiple_of(self.pool_bytes)?;
        let expected = self.arena_bytes / self.pool_bytes - u64::from(first_pool != address);
        let inside = unused.checked_sub(first_pool).is_some_and(|used| used <= expected * self.pool_bytes);
        let possible = address % 4096 == 0 && inside && unused % self.pool_bytes == 0;
        (possible && all == expected && free <= all).then_some(Arena {
            first_pool,
            unused,
            pools: all,
            pools_free: free,
        })
    }

    /// Bytes of blocks that are in use. Reads the header of every pool that was ever used: some 0.5 µs each.
    pub fn in_use(&self, memory: &dyn RemoteMemory) -> Option<u64> {
        let mut sum = 0;
        for arenas in self.read_all(memory)?.chunks(16) {
            let pools: Vec<u64> = arenas
                .iter()
                .flat_map(|arena| (arena.first_pool..arena.unused).step_by(self.pool_bytes as usize))
                .collect();
            let mut headers = vec![0; pools.len() * self.header.size as usize];
            let mut wanted: Vec<_> = pools
                .iter()
                .zip(headers.chunks_exact_mut(self.header.size as usize))
                .map(|(pool, header)| (RemoteAddr(*pool), header))
                .collect();
            if memory.read_many(&mut wanted).contains(&false) {
                return None;
            }
            for header in headers.chunks_exact(self.header.size as usize) {
                sum += self.blocks(header)?;
            }
        }
        Some(sum)
    }

    fn blocks(&self, header: &[u8]) -> Option<u64> {
        let (blocks, class) = (word(header, self.header.r#ref, 4)?, word(header, self.header.szidx, 4)?);
        if blocks == 0 {
            return Some(0);
        }
        // Anything may stand where a pool was: no product of what was not looked at.
        let bytes = (class < CLASSES).then(|| blocks * (class + 1) * CLASS)?;
        (bytes <= self.pool_bytes - self.header.size).then_some(bytes)
    }
}

/// What may be the two variables (`arenas`, `maxarenas`): by their symbols, or by what loads them.
fn candidates(memory: &dyn RemoteMemory, binaries: &[&dyn Binary]) -> Vec<(RemoteAddr, RemoteAddr)> {
    let mut found = Vec::new();
    if let Some((home, _)) = find_symbol(binaries, "_PyRuntime")
        && let (Some(arenas), Some(maxarenas)) = (home.symbol("arenas"), home.symbol("maxarenas"))
    {
        found.push((arenas, maxarenas));
    }
    for function in ["_Py_GetAllocatedBlocks", "_PyObject_DebugMallocStats"] {
        let Some((_, at)) = find_symbol(binaries, function) else { continue };
        let loads = loads(memory, at, CODE);
        let of = |bytes: usize| loads.iter().filter(move |(_, size)| *size == bytes).map(|(at, _)| *at);
        found.extend(of(4).flat_map(|max| of(8).map(move |arenas| (arenas, max))));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::BytesMemory;

    const ARRAY: RemoteAddr = RemoteAddr(0x10_0000);
    const ARENA: u64 = 0x7000_0000_1000;
    const POOL: u64 = 1 << 14;

    fn pymalloc() -> Pymalloc {
        Pymalloc {
            arenas: RemoteAddr(0x1000),
            maxarenas: RemoteAddr(0x1008),
            object: ArenaObject { size: 48, address: 0, pool_address: 8, nfreepools: 16, ntotalpools: 20 },
            header: PoolHeader { size: 48, r#ref: 0, szidx: 36 },
            arena_bytes: 1 << 20,
            pool_bytes: POOL,
        }
    }

    /// One arena of 63 pools, two of which were used and one of those is free again.
    fn memory(free: u32) -> BytesMemory {
        let mut memory = BytesMemory::new();
        memory.map(RemoteAddr(0x1000), [ARRAY.0.to_le_bytes(), 16_u64.to_le_bytes()].concat());
        let first = ARENA.next_multiple_of(POOL);
        let mut array = [ARENA.to_le_bytes(), (first + 2 * POOL).to_le_bytes()].concat();
        array.extend([free.to_le_bytes(), 63_u32.to_le_bytes()].concat());
        array.resize(16 * 48, 0);
        memory.map(ARRAY, array);
        for (at, blocks) in [(first, 10_u8), (first + POOL, 0)] {
            let mut header = vec![0; 48];
            (header[0], header[36]) = (blocks, 3);
            memory.map(RemoteAddr(at), header);
        }
        memory
    }

    #[test]
    fn arenas_pools_and_blocks_are_counted() {
        let (pymalloc, memory) = (pymalloc(), memory(62));
        assert_eq!(pymalloc.read(&memory), Some(Arenas { bytes: 1 << 20, pools: POOL }));
        assert_eq!(pymalloc.in_use(&memory), Some(10 * 64));
    }

    #[test]
    fn what_cannot_be_is_unknown() {
        // More pools free than there are.
        assert_eq!(pymalloc().read(&memory(64)), None);
        // An array of a length that there never is.
        let other = Pymalloc { maxarenas: RemoteAddr(0x1000), ..pymalloc() };
        assert_eq!(other.read(&memory(62)), None);
        // A pool with more blocks than fit.
        let mut full = memory(62);
        full.map(RemoteAddr(ARENA.next_multiple_of(POOL)), vec![0xff; 48]);
        assert_eq!(pymalloc().in_use(&full), None);
        assert_eq!(pymalloc().in_use(&BytesMemory::new()), None);
    }
}

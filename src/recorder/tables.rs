//! [`Tables`]: whether CPython's allocators still lead through the thunks that were put into their tables.
//!
//! An application that wraps the tables while they are recorded (`tracemalloc.start()`) keeps a copy of what it found, to which its
//! functions' first argument leads (`PyMemAllocatorEx.ctx`): the thunks are called still, and what it takes back is that copy. One that
//! had wrapped them before the attach, and takes back what it had saved then (`tracemalloc.stop()`), takes the thunks out. From then
//! on nothing of that domain is seen, frees neither. That is told only where it is certain: the table holds a function that was in it, or in a
//! copy behind it, before the thunk was.

use crate::addr::RemoteAddr;
use crate::memory::RemoteMemory;
use crate::probe::load::Loaded;
use crate::probe::near::Hooked;
use std::time::Instant;

/// Bytes of what a first argument leads to in which a copy of a table is looked for: tracemalloc has it at the start, the
/// debug hooks (`debug_alloc_api_t`) behind a word.
const REACH: usize = 48;
/// Wrappers of wrappers.
const DEPTH: usize = 4;

/// One domain's table, by its word for malloc.
struct Table {
    word: RemoteAddr,
    thunk: RemoteAddr,
    /// Functions that it held before, and those behind them.
    before: Vec<RemoteAddr>,
}

/// See the module.
pub struct Tables {
    tables: Vec<Table>,
    /// When all of them were last seen to be ours, or wrapped.
    held: Instant,
    lost: bool,
}

impl Tables {
    /// Those that were hooked just now.
    pub fn of(loaded: &Loaded, memory: &dyn RemoteMemory) -> Self {
        let words: Vec<(RemoteAddr, RemoteAddr, RemoteAddr)> = loaded
            .hooks
            .iter()
            .filter_map(|hook| match hook.hooked {
                Hooked::Word { word, value } => Some((word, value, hook.thunk)),
                Hooked::Body(_) => None,
            })
            .collect();
        let is_hooked = |at: RemoteAddr| words.iter().any(|(word, ..)| *word == at);
        // malloc, calloc, realloc and free stand in a row behind their first argument; a type's destructor stands alone.
        let is_malloc =
            |word: RemoteAddr| !is_hooked(word.back(8)) && (1..4).all(|n| is_hooked(word.offset(8 * n)));
        let tables = words.iter().filter(|(word, ..)| is_malloc(*word)).map(|(word, value, thunk)| {
            let mut before = vec![*value];
            mallocs_behind(memory, ctx_of(memory, *word), DEPTH, &mut before);
            Table { word: *word, thunk: *thunk, before }
        });
        Self { tables: tables.collect(), held: Instant::now(), lost: false }
    }

    /// Looks; since when a table has been without its thunk (at the earliest), the first time that it is found to be.
    pub fn lost_since(&mut self, memory: &dyn RemoteMemory) -> Option<Instant> {
        if self.lost {
            return None;
        }
        if !self.tables.iter().any(|table| table.is_lost(memory)) {
            self.held = Instant::now();
            return None;
        }
        self.lost = true;
        Some(self.held)
    }
}

impl Table {
    fn is_lost(&self, memory: &dyn RemoteMemory) -> bool {
        let Ok(now) = memory.read_ptr(self.word) else { return false };
        if now == self.thunk || !self.before.contains(&now) {
            return false;
        }
        // The same wrapper may have been put around the thunk.
        let mut behind = Vec::new();
        mallocs_behind(memory, ctx_of(memory, self.word), DEPTH, &mut behind);
        !behind.contains(&self.thunk)
    }
}

/// The first argument of a table's functions, by the word of its malloc.
fn ctx_of(memory: &dyn RemoteMemory, malloc: RemoteAddr) -> RemoteAddr {
    memory.read_ptr(malloc.back(8)).unwrap_or(RemoteAddr::NULL)
}

/// Words of what may be copies of tables that a first argument leads to. Anything may be there: some of them are no functions.
fn mallocs_behind(memory: &dyn RemoteMemory, ctx: RemoteAddr, depth: usize, found: &mut Vec<RemoteAddr>) {
    if depth == 0 || ctx.is_null() {
        return;
    }
    let Ok(bytes) = memory.read_vec(ctx, REACH) else { return };
    let words: Vec<RemoteAddr> = bytes
        .chunks_exact(8)
        .map(|word| RemoteAddr(u64::from_le_bytes(word.try_into().unwrap_or_default())))
        .collect();
    // {ctx, malloc, calloc, realloc, free}, at the start or behind a word.
    for pair in words.windows(2).take(2) {
        if !pair[1].is_null() && !found.contains(&pair[1]) {
            found.push(pair[1]);
            mallocs_behind(memory, pair[0], depth - 1, found);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::BytesMemory;

    const TABLE: RemoteAddr = RemoteAddr(0x1000);
    const COPY: RemoteAddr = RemoteAddr(0x2000);
    const THUNK: RemoteAddr = RemoteAddr(0xa0);
    const PYMALLOC: RemoteAddr = RemoteAddr(0xb0);
    const TRACER: RemoteAddr = RemoteAddr(0xc0);

    fn memory(table: [RemoteAddr; 2], copy: [RemoteAddr; 2]) -> BytesMemory {
        let mut memory = BytesMemory::new();
        for (at, [ctx, malloc]) in [(TABLE, table), (COPY, copy)] {
            let words = [ctx, malloc, malloc, malloc, malloc, RemoteAddr::NULL];
            memory.map(at, words.iter().flat_map(|word| word.0.to_le_bytes()).collect::<Vec<u8>>());
        }
        memory
    }

    fn is_lost(table: [RemoteAddr; 2], copy: [RemoteAddr; 2]) -> bool {
        let hooked = Table { word: TABLE.offset(8), thunk: THUNK, before: vec![TRACER, PYMALLOC] };
        hooked.is_lost(&memory(table, copy))
    }

    #[test]
    fn a_table_is_lost_when_it_holds_what_was_there_before() {
        let null = RemoteAddr::NULL;
        // As it was planted; taken back.
        assert!(!is_lost([COPY, THUNK], [null, PYMALLOC]));
        assert!(is_lost([null, PYMALLOC], [null, PYMALLOC]));
        // Wrapped anew by the wrapper that was there before, or by one that nobody knows.
        assert!(!is_lost([COPY, TRACER], [null, THUNK]));
        assert!(!is_lost([null, RemoteAddr(0xd0)], [null, PYMALLOC]));
        assert!(is_lost([COPY, TRACER], [null, PYMALLOC]));
    }

    #[test]
    fn what_stands_behind_a_wrapper_is_found_and_loops_end() {
        let mut found = Vec::new();
        mallocs_behind(&memory([COPY, TRACER], [COPY, PYMALLOC]), TABLE, DEPTH, &mut found);
        assert_eq!(found[..2], [TRACER, PYMALLOC]);
    }
}

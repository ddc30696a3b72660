//! Whether the application keeps the address of a thunk: somebody who took a copy of CPython's allocator tables while they led
//! through us (tracemalloc, another profiler) may call what he found there for as long as he lives. tracemalloc does so even
//! after it was stopped: when it is started the next time its first block comes by the functions that it saved the last time
//! (`raw_malloc`, Python/tracemalloc.c).
//!
//! Nobody else has such an address, so it is looked for as a word: in the registers and at the tops of the stacks while the world is
//! stopped, and in the rest of the writable memory while it runs, for that may be gigabytes. Nothing leads to a thunk any
//! more by then: a new copy can only be made of a copy. One that is missed would have to be moved, and nothing left where it
//! was, from where has not been looked yet to where has been; and be in no register and near the top of no stack at the second stop.
//! Only pages that there are can hold one. More than can be looked at in the time that there is counts as kept.

use super::error::ProbeError;
use crate::addr::RemoteAddr;
use crate::inferior::error::TraceError;
use crate::inferior::{Inferior, maps};
use crate::mapping::Mapping;
use crate::memory::RemoteMemory;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Why a region stays, in words for the user.
pub const WHY: &str = "the application copied CPython's allocator tables meanwhile (as tracemalloc does) and may call through them";
/// How long the world may be stopped for a search of all memory, and how long one may take while it runs.
const STOPPED: Duration = Duration::from_millis(200);
const RUNNING: Duration = Duration::from_secs(5);
/// How long the world runs between two looks at whether a thread has put its copy somewhere, or a search is done.
const INTERVAL: Duration = Duration::from_millis(2);
const SEARCH_INTERVAL: Duration = Duration::from_millis(10);
/// Such looks, while a register or the top of a stack has a copy.
const LOOKS: u32 = 5;
const CHUNK: u64 = 1 << 20;
/// So near to a stack pointer memory changes all the time. Above it (and in the ABI's red zone below) are the calls under way,
/// which are looked at while the world is stopped; below it what earlier calls have left, which nobody uses.
const NEAR: u64 = 64 << 10;
const RED_ZONE: u64 = 128;
const PAGE: u64 = 4096;
/// In `/proc/PID/pagemap` (Documentation/admin-guide/mm/pagemap.rst): the page is in memory, or swapped; it is a file's (then the
/// application has not written to it).
const PRESENT: u64 = 3 << 62;
const OF_A_FILE: u64 = 1 << 61;

/// Whether a copy of one of `thunks` is left in a process that is stopped before and after, and may run meanwhile.
pub fn kept(inferior: &mut Inferior, thunks: &[u64]) -> Result<bool, ProbeError> {
    if thunks.is_empty() {
        return Ok(false);
    }
    let mut looks = LOOKS;
    while at_hand(inferior, thunks)? {
        looks -= 1;
        if looks == 0 {
            return Ok(true);
        }
        inferior.run_for(INTERVAL)?;
    }
    let search = Search::new(inferior, thunks)?;
    let done = AtomicBool::new(false);
    let found = std::thread::scope(|scope| {
        let memory = *inferior.memory();
        let (search, done) = (&search, &done);
        let searching = scope.spawn(move || {
            let found = search.run(&memory, RUNNING);
            done.store(true, Ordering::Release);
            found
        });
        let mut ran = Ok(());
        while ran.is_ok() && !done.load(Ordering::Acquire) {
            ran = inferior.run_for(SEARCH_INTERVAL);
        }
        // A search that panicked has found nothing out.
        ran.map(|()| searching.join().unwrap_or(true))
    })?;
    Ok(found || at_hand(inferior, thunks)?)
}

/// Whether writable memory of the stopped process, which stays so, holds one of `thunks` as an aligned word.
pub fn any(inferior: &Inferior, thunks: &[u64]) -> Result<bool, ProbeError> {
    if thunks.is_empty() {
        return Ok(false);
    }
    Ok(at_hand(inferior, thunks)? || Search::new(inferior, thunks)?.run(inferior.memory(), STOPPED))
}

fn mappings(pid: i32) -> Result<Vec<Mapping>, TraceError> {
    maps::mappings(pid)
        .map_err(|e| TraceError::Proc { path: format!("/proc/{pid}/maps"), source: std::io::Error::other(e) })
}

/// Stack pointers of the stopped threads.
fn stacks(inferior: &Inferior) -> Result<Vec<(i32, u64)>, TraceError> {
    let mut found = Vec::new();
    for tid in inferior.tids() {
        match inferior.registers(tid) {
            Ok(regs) => found.push((tid, regs.rsp)),
            Err(TraceError::Gone { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

/// Whether a stopped thread has a copy in a vector register (tables are copied by them) or near the top of its stack, where
/// also the registers are that a signal handler has interrupted. (Its general registers the caller has looked at.) A copy is of
/// a whole table, so that two of the words stand side by side: one alone is what an earlier call has left in a frame that is in use again
/// (unoptimised builds leave many), and nobody reads it.
fn at_hand(inferior: &Inferior, thunks: &[u64]) -> Result<bool, ProbeError> {
    let maps = mappings(inferior.pid())?;
    let wanted = Words::new(thunks);
    for (tid, rsp) in stacks(inferior)? {
        let vectors = match inferior.extended_state(tid) {
            Ok(state) => state.unwrap_or_default(),
            Err(TraceError::Gone { .. }) => continue,
            Err(error) => return Err(error.into()),
        };
        let from = RemoteAddr((rsp.saturating_sub(RED_ZONE)) & !7);
        let mapping = maps.iter().find(|m| m.contains(from));
        let end = mapping.map_or(from.0, |m| m.end.0.min(rsp.saturating_add(NEAR)));
        // What can't be read, the thread can't read either.
        let stack = inferior.memory().read_vec(from, end.saturating_sub(from.0) as usize).unwrap_or_default();
        if wanted.are_side_by_side_in(&vectors) || wanted.are_side_by_side_in(&stack) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The words that are looked for. They lie close together: nearly every other word is told from them by one comparison.
struct Words<'a> {
    all: &'a [u64],
    first: u64,
    span: u64,
}

impl<'a> Words<'a> {
    fn new(all: &'a [u64]) -> Self {
        let first = all.iter().copied().min().unwrap_or(0);
        Self { all, first, span: all.iter().copied().max().unwrap_or(0) - first }
    }

    fn are_in(&self, bytes: &[u8]) -> bool {
        let word = |w: &[u8]| u64::from_le_bytes(w.try_into().unwrap_or_default());
        // Without a way out of the inner loop the compiler does several words at once.
        bytes.chunks(512).any(|block| {
            let near = |w: &[u8]| word(w).wrapping_sub(self.first) <= self.span;
            block.chunks_exact(8).fold(false, |any, w| any | near(w))
                && (self.are_side_by_side_in(block)
                    || self.has_lone() && block.chunks_exact(8).any(|w| self.all.contains(&word(w))))
        })
    }
}

impl Words<'_> {
    /// Tables are of four functions, and a copy of one has at least two of them side by side, however it is cut. A word beside the
    /// tables' may be kept alone.
    fn has_lone(&self) -> bool {
        !self.all.len().is_multiple_of(4)
    }

    fn are_side_by_side_in(&self, bytes: &[u8]) -> bool {
        let mut before = false;
        bytes.chunks_exact(8).any(|w| {
            let word = u64::from_le_bytes(w.try_into().unwrap_or_default());
            let is_one = self.all.contains(&word);
            std::mem::replace(&mut before, is_one) && is_one
        })
    }
}

/// A search of all memory but what is near the stack pointers.
struct Search<'a> {
    wanted: Words<'a>,
    ranges: Vec<(u64, u64)>,
    /// Which pages there are; without it all are read.
    pagemap: Option<File>,
}

impl<'a> Search<'a> {
    fn new(inferior: &Inferior, thunks: &'a [u64]) -> Result<Self, ProbeError> {
        let pid = inferior.pid();
        let mut tops: Vec<u64> = stacks(inferior)?.into_iter().map(|(_, rsp)| rsp).collect();
        tops.sort_unstable();
        // Shared memory is no place for a function's address.
        let maps = mappings(pid)?;
        let writable = maps.iter().filter(|m| m.perms.write && m.perms.read && !m.perms.shared);
        let ranges = writable.flat_map(|m| without((m.start.0, m.end.0), &tops)).collect();
        let pagemap = File::open(format!("/proc/{}/pagemap", maps::memory_holder(pid))).ok();
        Ok(Self { wanted: Words::new(thunks), ranges, pagemap })
    }

    /// Whether one of the words was found, or not all could be looked at in this time.
    fn run(&self, memory: &dyn RemoteMemory, patience: Duration) -> bool {
        let until = Instant::now() + patience;
        for (start, end) in &self.ranges {
            let mut at = *start;
            while at < *end {
                if Instant::now() > until {
                    return true;
                }
                let next = (at / CHUNK * CHUNK + CHUNK).min(*end);
                let mut pages = self.resident(at, next).into_iter();
                if pages.any(|range| holds(memory, range, &self.wanted)) {
                    return true;
                }
                at = next;
            }
        }
        false
    }

    /// The pages that there are between two addresses at most [`CHUNK`] apart, neighbours as one range.
    fn resident(&self, start: u64, end: u64) -> Vec<(u64, u64)> {
        let first = start / PAGE;
        let mut entries = vec![0; ((end.div_ceil(PAGE) - first) * 8) as usize];
        let read = self.pagemap.as_ref().map(|file| file.read_exact_at(&mut entries, first * 8));
        if !matches!(read, Some(Ok(()))) {
            return vec![(start, end)];
        }
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        for (page, entry) in (first..).zip(entries.chunks_exact(8)) {
            let entry = u64::from_le_bytes(entry.try_into().unwrap_or_default());
            if entry & PRESENT == 0 || entry & OF_A_FILE != 0 {
                continue;
            }
            let (from, to) = ((page * PAGE).max(start), (page * PAGE + PAGE).min(end));
            match ranges.last_mut() {
                Some(last) if last.1 == from => last.1 = to,
                _ => ranges.push((from, to)),
            }
        }
        ranges
    }
}

/// A range without what is near to the stack pointers in it, which are sorted.
fn without((start, end): (u64, u64), tops: &[u64]) -> Vec<(u64, u64)> {
    let mut ranges = Vec::new();
    let mut from = start;
    for top in tops.iter().filter(|top| (start..end).contains(*top)) {
        let below = (top.saturating_sub(NEAR) & !7).max(start);
        if below > from {
            ranges.push((from, below));
        }
        from = from.max((top.saturating_add(NEAR) & !7).min(end));
    }
    if from < end {
        ranges.push((from, end));
    }
    ranges
}

fn holds(memory: &dyn RemoteMemory, (from, to): (u64, u64), wanted: &Words<'_>) -> bool {
    let mut at = RemoteAddr(from);
    while at.0 < to {
        let len = CHUNK.min(to - at.0);
        let found = match memory.read_vec(at, len as usize) {
            Ok(bytes) => wanted.are_in(&bytes),
            // A page that can't be read, the application can't read either: glibc 2.43 makes the guard pages of
            // stacks so (MADV_GUARD_INSTALL), within a mapping that is readable by its rights.
            Err(_) => pages(at, len)
                .any(|(at, len)| memory.read_vec(at, len).is_ok_and(|bytes| wanted.are_in(&bytes))),
        };
        if found {
            return true;
        }
        at = at.offset(len);
    }
    false
}

fn pages(from: RemoteAddr, len: u64) -> impl Iterator<Item = (RemoteAddr, usize)> {
    let end = from.0 + len;
    let mut at = from.0;
    std::iter::from_fn(move || {
        let len = (PAGE - at % PAGE).min(end - at);
        let page = (RemoteAddr(at), len as usize);
        at += len;
        (len > 0).then_some(page)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inferior::memory::ProcessMemory;
    use crate::memory::BytesMemory;

    #[test]
    fn a_word_is_found_beside_a_page_that_cannot_be_read() {
        let mut bytes = vec![0; PAGE as usize];
        bytes[64..72].copy_from_slice(&77_u64.to_le_bytes());
        let mut memory = BytesMemory::new();
        memory.map(RemoteAddr(0x10000), vec![0; PAGE as usize]);
        memory.map(RemoteAddr(0x12000), bytes);
        let search = |to, words: &[u64]| holds(&memory, (0x10000, to), &Words::new(words));
        assert!(search(0x13000, &[5, 77]));
        assert!(!search(0x13000, &[76]));
        assert!(!search(0x13000, &[70, 90]), "between two is none of them");
        assert!(!search(0x12000 + 64, &[77]), "behind the end");
    }

    #[test]
    fn what_is_near_a_stack_pointer_is_left_out() {
        let far = 10 * NEAR;
        assert_eq!(without((0, far), &[]), [(0, far)]);
        assert_eq!(without((0, far), &[far + 8]), [(0, far)]);
        let around = [(0, 4 * NEAR), (6 * NEAR, far)];
        assert_eq!(without((0, far), &[5 * NEAR]), around);
        assert_eq!(without((0, far), &[5 * NEAR, 5 * NEAR]), around);
        assert_eq!(without((0, far), &[8, far - 8]), [(NEAR + 8, far - NEAR - 8)]);
        assert!(without((0, NEAR), &[8]).is_empty());
    }

    #[test]
    fn a_copy_of_a_table_is_two_words_side_by_side() {
        let thunks = [0x7000_0010, 0x7000_0040, 0x7000_0070, 0x7000_00a0];
        let wanted = Words::new(&thunks);
        let bytes = |words: &[u64]| words.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>();
        assert!(wanted.are_side_by_side_in(&bytes(&[1, 0x7000_0010, 0x7000_0040, 2])));
        assert!(!wanted.are_side_by_side_in(&bytes(&[0x7000_0010, 1, 0x7000_0040, 2, 0x7000_0070])));
        assert!(!wanted.are_side_by_side_in(&bytes(&[1, 2, 0x7000_0018, 0x7000_0048])));
    }

    /// A large reservation of which one page was written: the rest is not there after the search either.
    #[test]
    fn only_pages_that_there_are_are_read() {
        const LEN: usize = 1 << 30;
        // Not written to, hence not there.
        let mut memory = vec![0_u8; LEN];
        let base = memory.as_ptr() as u64 & !7;
        let word = 0x1234_5678_9abc_def0_u64;
        let pid = std::process::id();
        let search = |words| {
            let pagemap = Some(File::open(format!("/proc/{pid}/pagemap")).unwrap());
            let ranges = vec![(base, base + LEN as u64)];
            let search = Search { wanted: Words::new(words), ranges, pagemap };
            let found = search.run(&ProcessMemory::new(pid as i32), RUNNING);
            let there: u64 = (base..base + (LEN as u64) - CHUNK)
                .step_by(CHUNK as usize)
                .flat_map(|at| search.resident(at, at + CHUNK))
                .map(|(from, to)| to - from)
                .sum();
            (found, there < 8 << 20)
        };
        let words = [word];
        assert_eq!(search(&words), (false, true), "not there yet");
        let at = LEN / 2 + (base as usize).wrapping_neg() % 8;
        memory[at..at + 8].copy_from_slice(&word.to_le_bytes());
        assert_eq!(search(&words), (true, true));
        assert_eq!(search(&[word + 8]), (false, true));
    }
}

//! The calling thread's native stack: from a hooked call's caller up to the thread's first function, by the rules that the controller has
//! made of every file's unwind data ([`Directory`]).
//!
//! A rule may be wrong and a register may hold anything, so no word is read that is not known to be readable. Nearly all lie on
//! the thread's own stack, between its stack pointer and its end: glibc and musl put a thread's control block at the end of its stack,
//! and the controller tells where the main thread's ends. Of that part each page is tried once, by a system call, when the stack first
//! reaches so far; it stays readable as long as the thread lives. Words elsewhere (a stack of a signal handler, of coroutines) are
//! tried each time, a few of them.

use crate::abi::{
    BLOCK, CodeRange, Directory, MAX_NATIVE_DEPTH, NATIVE_CUT, NATIVE_DEEPER, Slot, StackBounds, State, may,
};
use crate::hooks::Call;
use crate::{last_stack, machine};
use crate::python::{fold, half, word};
use crate::unwind_abi::{Registers, Rule, Step, step};

const PAGE: u64 = 4096;
/// Bytes of a thread's stack at most.
const MOST_OF_A_THREAD: u64 = 1 << 30;
/// The same of the main thread's.
const MOST_OF_THE_MAIN: u64 = 1 << 33;
/// Pages that are tried for one walk at most when a stack has grown (64 MiB), and pages elsewhere.
const MOST_PAGES: u64 = 1 << 14;
const MOST_ELSEWHERE: u32 = 64;
/// Rows that are looked through one by one.
const FEW_ROWS: u32 = 8;

/// Odd numbers without structure (digits of pi), other than those of Python's stacks.
const SEED: u64 = 0xba7c_9045_f12c_7f99;
const FACTOR: u64 = 0x24a1_9947_b391_6cf7;

/// A hash of the frames behind a hooked call; never 0.
///
/// # Safety
/// `slot` is the calling thread's, `call` is on its stack.
pub unsafe fn hash(state: *mut State, slot: *mut Slot, call: *const Call) -> u64 {
    // Where other code is mapped, the same addresses are another stack.
    let directory = directory(state);
    let number = (*directory).number.wrapping_mul(FACTOR);
    let hash = match last_stack::hash(state, slot, call, directory) {
        Some(hash) => hash ^ number,
        None => {
            let mut hash = SEED;
            let end = walk(state, slot, call, directory, |at| hash = fold(hash ^ at, FACTOR));
            hash ^ end ^ number
        }
    };
    if hash == 0 { 1 } else { hash }
}

/// Writes the frames behind [`hash`] to `out`, innermost first. How many they are, and how they end ([`NATIVE_CUT`], [`NATIVE_DEEPER`]).
///
/// # Safety
/// As for [`hash`]; `out` has room for [`MAX_NATIVE_DEPTH`] words.
pub unsafe fn frames(
    state: *mut State,
    slot: *mut Slot,
    call: *const Call,
    directory: *const Directory,
    out: *mut u64,
) -> (usize, u64) {
    let mut count = 0;
    let end = walk(state, slot, call, directory, |at| {
        out.add(count).write(at);
        count += 1;
    });
    (count, end)
}

#[inline(always)]
unsafe fn walk(
    state: *mut State,
    slot: *mut Slot,
    call: *const Call,
    directory: *const Directory,
    mut see: impl FnMut(u64),
) -> u64 {
    let mut frame = caller(call);
    let mut stack = Readable::of(state, slot, frame.sp);
    let mut range: *const CodeRange = core::ptr::null();
    let mut left = MAX_NATIVE_DEPTH;
    loop {
        let at = frame.at();
        if left == 0 {
            return NATIVE_DEEPER;
        }
        left -= 1;
        see(at);
        if range.is_null() || at.wrapping_sub((*range).start) >= (*range).end - (*range).start {
            range = find(directory, at);
            if range.is_null() {
                return NATIVE_CUT;
            }
        }
        match step(rule(range, at), &frame, |at| stack.read(at)) {
            Step::To(caller) => frame = caller,
            Step::End => return 0,
            Step::Cut => return NATIVE_CUT,
        }
    }
}

/// The code as the controller has told it last.
pub(crate) unsafe fn directory(state: *mut State) -> *const Directory {
    (&raw const (*state).native).read_volatile() as *const Directory
}

/// The frame that made a hooked call: behind the call's record lie its rbp and the return address, see `entry::heaptap_any`.
pub(crate) unsafe fn caller(call: *const Call) -> Registers {
    let saved = call as u64 + size_of::<Call>() as u64;
    Registers { pc: (*call).caller, sp: saved + 16, bp: Some(word(saved)), is_return: true }
}

/// The range that holds `at`; null where there is none.
pub(crate) unsafe fn find(directory: *const Directory, at: u64) -> *const CodeRange {
    let ranges = directory.add(1) as *const CodeRange;
    let (mut from, mut to) = (0, (*directory).count as usize);
    while from < to {
        let middle = (from + to) / 2;
        if (*ranges.add(middle)).end <= at {
            from = middle + 1;
        } else {
            to = middle;
        }
    }
    let found = ranges.add(from);
    if from < (*directory).count as usize && (*found).start <= at { found } else { core::ptr::null() }
}

/// What holds at an address of the range.
#[inline(always)]
pub(crate) unsafe fn rule(range: *const CodeRange, at: u64) -> Rule {
    if (*range).blocks == 0 {
        return Rule((*range).rule);
    }
    let from_first = at.wrapping_sub((*range).bias).wrapping_sub((*range).first as u64);
    let block = from_first / BLOCK as u64;
    if block >= (*range).blocks as u64 {
        return Rule::UNKNOWN;
    }
    let address = (from_first + (*range).first as u64) as u32;
    let index = (*range).index + 4 * block;
    let (mut from, mut to) = (half(index), half(index + 4));
    let start_of = |row: u32| half((*range).rows + 8 * row as u64);
    // The last row from `from` to `to` that begins at or before the address; `from` does.
    while to - from > FEW_ROWS {
        let middle = from + (to - from) / 2;
        if start_of(middle) <= address { from = middle } else { to = middle - 1 }
    }
    while from < to && start_of(from + 1) <= address {
        from += 1;
    }
    Rule(half((*range).rows + 8 * from as u64 + 4))
}

/// What of the memory is known to be readable during one walk.
pub(crate) struct Readable {
    state: *mut State,
    /// First byte of the known part of the stack, and how many words may begin in it.
    pub(crate) low: u64,
    pub(crate) len: u64,
    /// A page elsewhere that was tried last.
    page: u64,
    tried: u32,
}

impl Readable {
    #[inline(always)]
    pub(crate) unsafe fn of(state: *mut State, slot: *mut Slot, sp: u64) -> Self {
        let bounds = (&raw mut (*state).stack_bounds).cast::<StackBounds>().add((*slot).number as usize - 1);
        let mut is_own = sp >= (*bounds).low && sp < (*bounds).high;
        if !is_own && (sp < (*bounds).apart_from || sp >= (*bounds).apart_to) {
            is_own = learn(state, slot, bounds, sp);
        }
        let (low, high) = ((*bounds).low, (*bounds).high);
        let len = if is_own { high - low - 7 } else { 0 };
        Self { state, low, len, page: u64::MAX, tried: 0 }
    }

    #[inline(always)]
    pub(crate) unsafe fn read(&mut self, at: u64) -> Option<u64> {
        if at.wrapping_sub(self.low) < self.len { Some(word(at)) } else { self.read_elsewhere(at) }
    }

    #[cold]
    #[inline(never)]
    unsafe fn read_elsewhere(&mut self, at: u64) -> Option<u64> {
        let page = at & !(PAGE - 1);
        if at & 7 != 0 || (*self.state).flags & may::MAKE_CALLS == 0 {
            return None;
        }
        if page != self.page {
            if self.tried == MOST_ELSEWHERE || !machine::is_readable(page) {
                return None;
            }
            self.tried += 1;
            self.page = page;
        }
        Some(word(at))
    }
}

/// The stack has never been known so deep: tries the pages from `sp` up to those that are known, or to its end. Whether all of them can
/// be read: otherwise `sp` is on another stack.
#[cold]
#[inline(never)]
unsafe fn learn(state: *mut State, slot: *mut Slot, bounds: *mut StackBounds, sp: u64) -> bool {
    let (block, end) = ((*slot).key, (*state).stack_end);
    let high = if sp < block && block - sp < MOST_OF_A_THREAD {
        block
    } else if sp < end && end - sp < MOST_OF_THE_MAIN {
        end
    } else {
        0
    };
    let low = sp & !(PAGE - 1);
    let known = if (*bounds).high == high && (*bounds).low > low { (*bounds).low } else { high };
    let mut page = low;
    let mut left = if (*state).flags & may::MAKE_CALLS == 0 { 0 } else { MOST_PAGES };
    while page < known && left != 0 && machine::is_readable(page) {
        page += PAGE;
        left -= 1;
    }
    let is_own = high != 0 && page >= known;
    if is_own {
        (*bounds).low = low;
        (*bounds).high = high;
    } else {
        (*bounds).apart_from = low;
        (*bounds).apart_to = page + PAGE;
    }
    is_own
}

//! The calling thread's Python stack: its thread state, a hash of its frames, the frames themselves.
//!
//! Only the owning thread pushes and pops its frames, and CPython links a frame once it is filled, so a walk in the thread's own
//! context needs no lock and meets nothing half made. It follows pointers only; what a code object says of itself is
//! [`crate::codes`]'. Same rules as the controller's reader (`cpython::frame`, `cpython::thread_state`), which reads from
//! outside and so may try addresses that this must not touch.

use crate::abi::{ABSENT, CODE_GENERATIONS, MAX_DEPTH, PythonFacts, State, chain, own_state};
use core::sync::atomic::{AtomicU32, Ordering};

/// Where a thread state may be: an integer or a tagged word in the slot is none (a key that was deleted with the runtime and
/// given to another library).
const LOWEST: u64 = 1 << 16;
const HIGHEST: u64 = 1 << 47;
/// Units of an instruction pointer before the bytecode that still mean "not started": see `cpython::frame`.
const LASTI_MIN: i64 = -2;
const LASTI_MAX: i64 = 1 << 30;
/// The controller's `RawFrame::NO_LASTI`.
const NO_LASTI: i32 = i32::MAX;
/// Copies of the bytecode that a code object may have.
const MAX_COPIES: u64 = 1 << 20;
/// Frames without Python code met before the chain counts as a circle.
const MAX_SHIMS: u32 = 2 * MAX_DEPTH as u32;

/// Odd numbers without structure (digits of pi): seeds of the two lanes, and what is mixed into each factor.
const LANE_A: u64 = 0x243f_6a88_85a3_08d3;
const LANE_B: u64 = 0x1319_8a2e_0370_7345;
const FACTOR: u64 = 0xa409_3822_299f_31d1;
const END_A: u64 = 0x082e_fa98_ec4e_6c89;
const END_B: u64 = 0x4528_21e6_38d0_1377;
const CUT: u64 = 0xbe54_66cf_34e9_0c6d;
/// Fibonacci hashing, 32 bits.
const GENERATION_HASH: u32 = 0x9e37_79b1;

#[inline(always)]
pub(crate) unsafe fn word(at: u64) -> u64 {
    (at as *const u64).read_unaligned()
}

#[inline(always)]
pub(crate) unsafe fn half(at: u64) -> u32 {
    (at as *const u32).read_unaligned()
}

/// The thread's own state; 0 where there is none, and where it may be gone (the runtime is finalized by another thread) or is
/// another thread's (a stale slot).
///
/// # Safety
/// `fs` is the calling thread's thread pointer, and `facts` are this process's.
pub unsafe fn thread_state(facts: *const PythonFacts, fs: u64) -> u64 {
    let tstate = own_slot(facts, fs);
    if tstate & 7 != 0 || !(LOWEST..HIGHEST).contains(&tstate) {
        return 0;
    }
    // Before the state is touched: it is freed while the runtime is finalized.
    let finalizing = word((*facts).finalizing);
    if finalizing != 0 && finalizing != tstate {
        return 0;
    }
    if word(tstate + (*facts).thread_id as u64) == fs { tstate } else { 0 }
}

unsafe fn own_slot(facts: *const PythonFacts, fs: u64) -> u64 {
    let (a, b) = ((*facts).a, (*facts).b);
    match (*facts).own_state {
        own_state::GLIBC => {
            let block = word(fs + b + 8 * (a / 32));
            if block == 0 { 0 } else { word(block + 16 * (a % 32) + 8) }
        }
        own_state::MUSL => {
            let array = word(fs + b);
            if array == 0 { 0 } else { word(array + 8 * a) }
        }
        own_state::THREAD_LOCAL => word(fs.wrapping_add(a)),
        own_state::DYNAMIC => {
            let (vector, entry) = (word(fs + 8), (*facts).c);
            // The vector grows when the thread first uses a later module. glibc keeps its length before the first entry (of 16
            // bytes: generation), musl in it.
            let length = if entry == 16 { word(vector - 16) } else { word(vector) };
            if a > length {
                return 0;
            }
            let block = word(vector + a * entry);
            // Not allocated yet: NULL, or TLS_DTV_UNALLOCATED.
            if block == 0 || block == u64::MAX { 0 } else { word(block + b) }
        }
        _ => 0,
    }
}

#[inline(always)]
unsafe fn first_frame(facts: *const PythonFacts, tstate: u64) -> u64 {
    let first = word(tstate + (*facts).first_frame as u64);
    if (*facts).chain == chain::CFRAME && first != 0 {
        word(first + (*facts).cframe_frame as u64)
    } else {
        first
    }
}

/// Where a code object's generation is counted. Objects that share a place only seem new more often.
#[inline(always)]
pub fn generation_index(code: u64) -> usize {
    let shift = u32::BITS - CODE_GENERATIONS.trailing_zeros();
    ((code as u32).wrapping_mul(GENERATION_HASH) >> shift) as usize
}

/// The code object is being deallocated: another at its address is not the same.
///
/// # Safety
/// `state` is the agent's.
pub unsafe fn forget_code(state: *mut State, code: u64) {
    let generation = (&raw mut (*state).code_generations).cast::<u32>().add(generation_index(code));
    AtomicU32::from_ptr(generation).fetch_add(1, Ordering::Relaxed);
}

#[inline(always)]
unsafe fn generation(generations: *const u32, code: u64) -> u32 {
    // Written by any thread: the load is one instruction, whatever value it brings is one that was there.
    generations.add(generation_index(code)).read_volatile()
}

/// The high and the low half of the product of two numbers, folded.
#[inline(always)]
pub(crate) fn fold(a: u64, b: u64) -> u64 {
    let product = a as u128 * b as u128;
    product as u64 ^ (product >> 64) as u64
}

/// The shapes of a chain, known when compiled so that the loop has nothing to ask.
const FRAME_OBJECTS: u32 = 0;
const PLAIN: u32 = 1;
const WITH_SHIMS: u32 = 2;

/// A hash of the thread's whole stack: of each frame the code object, its generation and the instruction. 0: the stack is empty.
///
/// # Safety
/// `tstate` is what [`thread_state`] gave to the calling thread.
pub unsafe fn hash(state: *const State, tstate: u64) -> u64 {
    let facts = &raw const (*state).python;
    let first = first_frame(facts, tstate);
    if (*facts).chain == chain::FRAME_OBJECT {
        hash_chain::<FRAME_OBJECTS>(state, first)
    } else if (*facts).owner == ABSENT || (*facts).shim_owner > u8::MAX as u32 {
        hash_chain::<PLAIN>(state, first)
    } else {
        hash_chain::<WITH_SHIMS>(state, first)
    }
}

/// The walk is bound by the chain of `previous` pointers (a load from L1 per frame); everything else has to fit beside it. So
/// frames go by turns into two lanes, of which each has twice the time for its multiplication.
#[inline(always)]
unsafe fn hash_chain<const SHAPE: u32>(state: *const State, first: u64) -> u64 {
    let facts = &raw const (*state).python;
    let previous = (*facts).previous as u64;
    let code_at = (*facts).code as u64;
    let instruction = (*facts).instruction as u64;
    let owner = (*facts).owner as u64;
    let shim_owner = (*facts).shim_owner as u8;
    let mask = !((*facts).code_mask as u64);
    let generations = (&raw const (*state).code_generations).cast::<u32>();
    let (mut a, mut b) = (LANE_A, LANE_B);
    let mut at = first;
    let mut shims = MAX_SHIMS;

    // Moves `at` behind the next frame that runs Python code and gives (code, instruction); leaves the block at the end.
    macro_rules! next {
        ($end:lifetime) => {
            loop {
                if at == 0 {
                    break $end;
                }
                let frame = at;
                at = word(frame + previous);
                if SHAPE == FRAME_OBJECTS {
                    break (word(frame + code_at), half(frame + instruction) as u64);
                }
                let code = word(frame + code_at) & mask;
                let shim = SHAPE == WITH_SHIMS && ((frame + owner) as *const u8).read() >= shim_owner;
                if !shim && code != 0 {
                    break (code, word(frame + instruction));
                }
                shims -= 1;
                if shims == 0 {
                    break $end;
                }
            }
        };
    }
    macro_rules! mix {
        ($lane:ident, $frame:expr) => {{
            let (code, instruction) = $frame;
            let told_apart = (generation(generations, code) as u64).rotate_right(16);
            $lane = fold($lane ^ code ^ told_apart, instruction ^ FACTOR);
        }};
    }
    'end: {
        let mut pairs = MAX_DEPTH / 2;
        while pairs != 0 {
            mix!(a, next!('end));
            mix!(b, next!('end));
            pairs -= 1;
        }
        let _deeper: (u64, u64) = next!('end);
        b ^= CUT;
    }
    if a == LANE_A {
        return 0;
    }
    let hash = fold(a ^ END_A, b ^ END_B);
    if hash == 0 { 1 } else { hash }
}

/// Bit of a frame's code: a call of the interpreter's loop began with it.
const ENTRY: u64 = 1;

/// Writes the frames behind [`hash`] to `out` as pairs (code, instruction's offset | generation << 32), innermost first, at most
/// `max`; the code has [`ENTRY`]. How many they are, and whether there were more.
///
/// # Safety
/// As for [`hash`]; `out` has room for `2 * max` words.
pub unsafe fn frames(state: *const State, tstate: u64, out: *mut u64, max: usize) -> (usize, bool) {
    let facts = &raw const (*state).python;
    let generations = (&raw const (*state).code_generations).cast::<u32>();
    let mut at = first_frame(facts, tstate);
    let (mut count, mut shims) = (0, MAX_SHIMS);
    while at != 0 {
        let frame = at;
        at = word(frame + (*facts).previous as u64);
        let code = word(frame + (*facts).code as u64) & !((*facts).code_mask as u64);
        if runs_no_code(facts, frame, code) {
            // Behind the frames that a call of the loop ran lies its shim.
            if count > 0 && is_shim(facts, frame) {
                *out.add(2 * (count - 1)) |= ENTRY;
            }
            shims -= 1;
            if shims == 0 {
                break;
            }
            continue;
        }
        if count >= max {
            return (count, true);
        }
        let lasti = lasti(facts, frame, code) as u32 as u64;
        out.add(2 * count).write(code | if is_entry(facts, frame) { ENTRY } else { 0 });
        out.add(2 * count + 1).write(lasti | (generation(generations, code) as u64) << 32);
        count += 1;
    }
    (count, false)
}

unsafe fn is_entry(facts: *const PythonFacts, frame: u64) -> bool {
    let at = (*facts).is_entry;
    (*facts).chain == chain::FRAME_OBJECT || at != ABSENT && ((frame + at as u64) as *const u8).read() != 0
}

unsafe fn is_shim(facts: *const PythonFacts, frame: u64) -> bool {
    let owner = (*facts).owner;
    owner != ABSENT && ((frame + owner as u64) as *const u8).read() as u32 >= (*facts).shim_owner
}

unsafe fn runs_no_code(facts: *const PythonFacts, frame: u64, code: u64) -> bool {
    if (*facts).chain == chain::FRAME_OBJECT {
        return false;
    }
    is_shim(facts, frame) || code == 0
}

/// Byte offset of the instruction that the frame executes.
unsafe fn lasti(facts: *const PythonFacts, frame: u64, code: u64) -> i32 {
    let at = frame + (*facts).instruction as u64;
    if (*facts).chain == chain::FRAME_OBJECT {
        let lasti = half(at) as i32 as i64 * (*facts).lasti_unit as i64;
        return if lasti == lasti as i32 as i64 { lasti as i32 } else { NO_LASTI };
    }
    let start = bytecode(facts, frame, code);
    if start == 0 {
        return NO_LASTI;
    }
    let lasti = word(at).wrapping_sub(start) as i64;
    if (LASTI_MIN..LASTI_MAX).contains(&lasti) { lasti as i32 } else { NO_LASTI }
}

/// Where the bytecode that the frame executes begins. In free-threaded builds each thread may run a copy of its own
/// (`_PyCode_GetTLBCArray`: {size, pointers…}); a code object that never had copies has no array. 0: there is no such copy. An array
/// that another thread replaces is freed with delay.
unsafe fn bytecode(facts: *const PythonFacts, frame: u64, code: u64) -> u64 {
    let own = code + (*facts).bytecode as u64;
    if (*facts).co_tlbc == ABSENT || (*facts).tlbc_index == ABSENT || !is_code(facts, code) {
        return own;
    }
    let array = word(code + (*facts).co_tlbc as u64);
    if array == 0 {
        return own;
    }
    let index = half(frame + (*facts).tlbc_index as u64) as u64;
    if index < word(array) && index < MAX_COPIES { word(array + 8 + 8 * index) } else { 0 }
}

/// Whether `object`, which a frame executes, is a code object that may be read (a frame may name others, PEP 523).
///
/// # Safety
/// `object` is NULL or an object.
pub unsafe fn is_code(facts: *const PythonFacts, object: u64) -> bool {
    object != 0 && ((*facts).code_type == 0 || word(object + (*facts).ob_type as u64) == (*facts).code_type)
}

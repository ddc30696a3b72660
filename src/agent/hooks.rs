//! What a hooked call means: whether it is passed on, seen, or sampled, and which records it makes.
//!
//! A call counts once, at the outermost entry, as in the trap kind (the controller's `probe::calls`): `realloc` → `malloc` is one
//! reallocation. The thread's depth word says that a call is under way; the stack pointer kept with it tells a call that was
//! left by longjmp or cancellation from one that is. free and, when sampled, small mallocs are passed on by a jump: they leave
//! nothing on the stack, and calls to the mmap family made from within them are told by their return address.

use crate::abi::{
    Descriptor, INTERNAL_CALLERS, NOT_SAMPLED, Slot, StackBounds, State, function as f, may, record,
};
use crate::ring::Ring;
use crate::{machine, ring, sample, slot, stacks};
use core::sync::atomic::{AtomicU64, Ordering, compiler_fence};

/// Sizes from here on fail in any allocator.
const TOO_LARGE: u64 = 1 << 47;

/// A hooked call, on the stack of the thread that makes it.
#[repr(C, align(16))]
pub struct Call {
    /// rdi, rsi, rdx, rcx, r8, r9.
    pub args: [u64; 6],
    /// Its hook.
    pub descriptor: *const Descriptor,
    /// Its return address.
    pub caller: u64,
    /// rax at its return.
    pub result: u64,
    slot: *mut Slot,
    saved_rsp: u64,
    saved_depth: u32,
    /// What [`leave`] has to do.
    action: Action,
    /// Interval of its sample.
    interval: u64,
}

#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq)]
enum Action {
    /// Nothing but to count the depth.
    None,
    /// Memory may be given out: tell it.
    Allocates,
    /// The same, after a BEGIN.
    Ends,
    /// A sample.
    Samples,
    /// After a BEGIN; what is given out is not sampled.
    EndsUnsampled,
}

/// The calling thread's slot, marked as in the agent, for a call whose stack pointer is `rsp`; null where it has to be passed on.
/// [`idle`] must follow.
#[inline(always)]
pub unsafe fn begin_call(state: *mut State, rsp: u64, mapping: bool) -> *mut Slot {
    let slot = slot::find(state, mapping);
    if slot.is_null() {
        AtomicU64::from_ptr(&raw mut (*state).without_slot).fetch_add(1, Ordering::Relaxed);
        return slot;
    }
    let tid = (((*slot).key + (*state).tid_offset) as *const u32).read_volatile();
    if tid != (*slot).tid {
        // A new thread, in the place of one that ended.
        (*slot).tid = tid;
        (*slot).depth = 0;
        (*slot).in_agent = 0;
        let bounds = (&raw mut (*state).stack_bounds).cast::<StackBounds>().add((*slot).number as usize - 1);
        (*bounds).high = 0;
        (*bounds).apart_to = 0;
    }
    if (*slot).in_agent != 0 && !thrown_out(state, slot, rsp) {
        AtomicU64::from_ptr(&raw mut (*state).in_agent).fetch_add(1, Ordering::Relaxed);
        return core::ptr::null_mut();
    }
    busy(slot, rsp);
    slot
}

/// At the entry. 0: the call is passed on by a jump. 1: it is run from here, and [`leave`] called.
pub unsafe extern "C" fn enter(call: *mut Call) -> u64 {
    let descriptor = (*call).descriptor;
    let state = (*descriptor).state as *mut State;
    if (&raw const (*state).enabled).read_volatile() == 0 {
        return 0;
    }
    let function = (*descriptor).function as u8;
    let mapping = is_mapping(function);
    let rsp = call as u64;
    let slot = begin_call(state, rsp, mapping);
    if slot.is_null() {
        // Nobody tells it, but the table stays right: the controller finds the block missing there.
        if (*state).exact == 0 && (is_free(function) || is_realloc(function)) {
            sample::untrack(state, first_argument(call, function));
        }
        return 0;
    }
    let wrap = if is_inside(state, slot, rsp) {
        nested(state, slot, call, function);
        false
    } else if mapping && is_internal(state, (*call).caller) {
        false
    } else {
        (*call).slot = slot;
        (*call).saved_depth = (*slot).depth;
        (*call).saved_rsp = (*slot).depth_rsp;
        let wrap = if (*state).exact != 0 || mapping {
            enter_exact(state, slot, call, function)
        } else {
            enter_sampled(state, slot, call, function)
        };
        if wrap {
            (*slot).depth_rsp = rsp;
            (*slot).depth += 1;
        }
        wrap
    };
    idle(slot);
    wrap as u64
}

/// At the return of a call that [`enter`] answered 1 to. In a child forked meanwhile all of the state is zero.
pub unsafe extern "C" fn leave(call: *mut Call) {
    let state = (*(*call).descriptor).state as *mut State;
    let slot = (*call).slot;
    let action = (*call).action;
    if action != Action::None && (&raw const (*state).enabled).read_volatile() != 0 {
        busy(slot, call as u64);
        tell(state, slot, call, action);
        idle(slot);
    }
    compiler_fence(Ordering::SeqCst);
    (*slot).depth_rsp = (*call).saved_rsp;
    (&raw mut (*slot).depth).write_volatile((*call).saved_depth);
}

#[inline(always)]
pub unsafe fn busy(slot: *mut Slot, rsp: u64) {
    (*slot).agent_rsp = rsp;
    (&raw mut (*slot).in_agent).write_volatile(1);
    compiler_fence(Ordering::SeqCst);
}

#[inline(always)]
pub unsafe fn idle(slot: *mut Slot) {
    compiler_fence(Ordering::SeqCst);
    (&raw mut (*slot).in_agent).write_volatile(0);
}

/// The thread is entered while marked as being in the agent: a signal handler that allocates (false), or the thread left the
/// agent by a longjmp out of such a handler (true). A stack pointer above the agent's says the latter, unless the handler has
/// a stack of its own.
#[cold]
#[inline(never)]
unsafe fn thrown_out(state: *mut State, slot: *mut Slot, rsp: u64) -> bool {
    rsp > (*slot).agent_rsp
        && (*state).flags & may::MAKE_CALLS != 0
        && !machine::on_alternate_stack()
}

/// Whether the entry at `rsp` is made from within a call under way.
#[inline(always)]
pub unsafe fn is_inside(state: *mut State, slot: *mut Slot, rsp: u64) -> bool {
    (*slot).depth != 0 && (rsp < (*slot).depth_rsp || !was_left(state, slot))
}

/// The entry is above the call under way: that was left without a return, unless a signal handler runs on a stack of its own.
#[cold]
#[inline(never)]
unsafe fn was_left(state: *mut State, slot: *mut Slot) -> bool {
    if (*state).flags & may::MAKE_CALLS != 0 && machine::on_alternate_stack() {
        return false;
    }
    (*slot).depth = 0;
    true
}

/// A call inside a call: only a free of a block that the outer one is not about may count; the controller knows.
unsafe fn nested(state: *mut State, slot: *mut Slot, call: *mut Call, function: u8) {
    let first = first_argument(call, function);
    let frees = is_free(function) && first != 0;
    if (*state).exact != 0 {
        if frees && let Some(ring) = ring::acquire(state, slot) {
            ring.push_event(record::FREE_INSIDE, function, first, &[first]);
            ring.release();
        }
        return;
    }
    if frees {
        free_sampled(state, slot, function, first);
    } else if !is_mapping(function) {
        pass_over(state, slot, call, function);
    }
}

/// Bytes that are counted elsewhere, or not at all. A point that falls on them is forgotten and the next drawn from their end on; the
/// fast paths take them off `until` where none does. Anything else would leave a distance that is not exponential.
unsafe fn pass_over(state: *mut State, slot: *mut Slot, call: *mut Call, function: u8) {
    if let Some(size) = size(call, function)
        && size < TOO_LARGE
    {
        (*slot).until -= size as i64;
        if (*slot).until < 0 {
            sample::draw(state, slot);
        }
    }
}

unsafe fn is_internal(state: *mut State, caller: u64) -> bool {
    let ranges = (&raw const (*state).internal_callers).cast::<[u64; 2]>();
    let mut i = 0;
    while i < INTERNAL_CALLERS {
        let [first, last] = ranges.add(i).read();
        if first == 0 {
            return false;
        }
        if caller >= first && caller <= last {
            return true;
        }
        i += 1;
    }
    false
}

fn is_mapping(function: u8) -> bool {
    matches!(function, f::MMAP | f::MUNMAP | f::MREMAP)
}

fn is_python(function: u8) -> bool {
    function >= f::PYTHON
}

/// Member of a table: malloc, calloc, realloc, free.
fn member(function: u8) -> u8 {
    (function - f::PYTHON) & 3
}

fn is_free(function: u8) -> bool {
    function == f::FREE || (is_python(function) && member(function) == 3)
}

fn is_realloc(function: u8) -> bool {
    function == f::REALLOC || (is_python(function) && member(function) == 2)
}

/// Arguments as the C function has them: a table's come behind its context.
unsafe fn argument(call: *mut Call, function: u8, index: usize) -> u64 {
    let index = if is_python(function) { index + 1 } else { index };
    (&raw const (*call).args).cast::<u64>().add(index).read()
}

unsafe fn first_argument(call: *mut Call, function: u8) -> u64 {
    argument(call, function, 0)
}

/// Bytes asked for; `None` where a calloc overflows.
#[inline(always)]
unsafe fn size(call: *mut Call, function: u8) -> Option<u64> {
    let (a, b) = (argument(call, function, 0), argument(call, function, 1));
    match function {
        f::MALLOC | f::VALLOC | f::PVALLOC => Some(a),
        f::CALLOC => a.checked_mul(b),
        f::POSIX_MEMALIGN => Some(argument(call, function, 2)),
        f::REALLOC | f::ALIGNED_ALLOC | f::MEMALIGN | f::MMAP => Some(b),
        f::MREMAP => Some(argument(call, function, 2)),
        _ => match member(function) {
            0 => Some(a),
            1 => a.checked_mul(b),
            _ => Some(b),
        },
    }
}

/// BEGIN of a call that may give something back.
unsafe fn begin(state: *mut State, slot: *mut Slot, call: *mut Call, function: u8) -> bool {
    let words = [argument(call, function, 0), argument(call, function, 1), argument(call, function, 2)];
    let Some(ring) = ring::acquire(state, slot) else { return false };
    let told = ring.push_event(record::BEGIN, function, words[0], &words);
    ring.release();
    told
}

#[inline(always)]
unsafe fn enter_exact(state: *mut State, slot: *mut Slot, call: *mut Call, function: u8) -> bool {
    let gives_back = match function {
        f::MALLOC => false,
        f::FREE => {
            free_exact(state, slot, function, (*call).args[0]);
            return false;
        }
        f::MUNMAP | f::MREMAP => true,
        _ if is_free(function) => {
            // CPython's frees lead to those of other domains and of libc: they are inside.
            free_exact(state, slot, function, first_argument(call, function));
            (*call).action = Action::None;
            return true;
        }
        _ => is_realloc(function) && first_argument(call, function) != 0,
    };
    (*call).interval = 0;
    (*call).action = if gives_back && begin(state, slot, call, function) {
        Action::Ends
    } else if function == f::MUNMAP {
        Action::None
    } else {
        Action::Allocates
    };
    true
}

#[inline(always)]
unsafe fn free_exact(state: *mut State, slot: *mut Slot, function: u8, block: u64) {
    if block != 0 && let Some(ring) = ring::acquire(state, slot) {
        ring.push_event(record::FREE, function, block, &[block]);
        ring.release();
    }
}

unsafe fn free_sampled(state: *mut State, slot: *mut Slot, function: u8, block: u64) -> bool {
    if !sample::untrack(state, block) {
        return false;
    }
    free_exact(state, slot, function, block);
    true
}

unsafe fn enter_sampled(state: *mut State, slot: *mut Slot, call: *mut Call, function: u8) -> bool {
    (*call).action = Action::None;
    if is_free(function) {
        free_sampled(state, slot, function, first_argument(call, function));
        return false;
    }
    let mut sampled = false;
    if let Some(size) = size(call, function)
        && size < TOO_LARGE
    {
        (*slot).until -= size as i64;
        sampled = (*slot).until < 0;
    }
    if sampled {
        (*call).interval = (*slot).interval;
        sample::draw(state, slot);
        (*call).action = Action::Samples;
    }
    let old = first_argument(call, function);
    if is_realloc(function) && old != 0 && sample::untrack(state, old) {
        if begin(state, slot, call, function) {
            (*call).action = if sampled { Action::Ends } else { Action::EndsUnsampled };
        }
        // Otherwise an end says nothing; the controller finds the block missing in the table, and what is given out in its place
        // is a block like any other.
        return true;
    }
    // Only libc's malloc, glibc's calloc, and a small malloc of the object and mem domains call no other hooked function.
    let alone = function == f::MALLOC
        || (function == f::CALLOC && (*state).flags & may::PASS_ON_CALLOC != 0)
        || ((*state).flags & may::PASS_ON_TABLES != 0
            && function >= f::PYTHON + 4
            && member(function) == 0
            && argument(call, function, 0) <= 448);
    sampled || !alone
}

/// What came of a call, as the application sees it: the address given out; 0 where it failed or gave nothing.
unsafe fn address(call: *mut Call, function: u8) -> u64 {
    match function {
        f::POSIX_MEMALIGN if (*call).result as u32 != 0 => 0,
        f::POSIX_MEMALIGN => ((*call).args[0] as *const u64).read_unaligned(),
        _ => (*call).result,
    }
}

#[inline(always)]
unsafe fn tell(state: *mut State, slot: *mut Slot, call: *mut Call, action: Action) {
    let start = if (*state).exact == 0 { machine::ticks() } else { 0 };
    let function = (*(*call).descriptor).function as u8;
    let Some(ring) = ring::acquire(state, slot) else {
        not_told(state, call, function, action);
        return;
    };
    let address = address(call, function);
    // The stack of a failed call is nobody's; that of an unmap and of an unsampled block neither.
    let gives_out = address != 0 && function != f::MUNMAP && action != Action::EndsUnsampled;
    let stack = if gives_out { stacks::current(state, slot, ring, call) } else { Some(0) };
    let told = match stack {
        Some(stack) => write(state, call, ring, function, action, address, stack),
        None => false,
    };
    ring.release();
    if !told {
        not_told(state, call, function, action);
    }
    if (*state).exact == 0 {
        (*slot).spent += machine::ticks() - start;
    }
}

#[inline(always)]
unsafe fn write(
    state: *mut State,
    call: *mut Call,
    ring: Ring,
    function: u8,
    action: Action,
    address: u64,
    stack: u64,
) -> bool {
    let asked = match size(call, function) {
        Some(size) => size,
        None => 0,
    };
    match action {
        Action::None => true,
        Action::Allocates => ring.push_event(record::ALLOC, function, address, &[address, asked, stack]),
        Action::Samples if address == 0 => true,
        Action::Samples => {
            if !sample::track(state, address) {
                ring.count_drop();
                return false;
            }
            let words = [address, asked, stack, (*call).interval];
            let told = ring.push_event(record::SAMPLE, function, address, &words);
            if !told {
                sample::untrack(state, address);
            }
            told
        }
        Action::Ends | Action::EndsUnsampled => {
            let exact = (*state).exact != 0 || function == f::MUNMAP || function == f::MREMAP;
            let mut interval = (*call).interval;
            if action == Action::EndsUnsampled {
                interval = NOT_SAMPLED;
            }
            if !exact && address == 0 && asked != 0 {
                // It failed: the block is still there.
                sample::track(state, (*call).args[if is_python(function) { 1 } else { 0 }]);
            } else if !exact && action == Action::Ends && address != 0 && !sample::track(state, address) {
                ring.count_drop();
                interval = NOT_SAMPLED;
            }
            let told = ring.push_event(record::END, function, (*call).result, &[(*call).result, stack, interval]);
            if !told && !exact && action == Action::Ends && interval != NOT_SAMPLED {
                sample::untrack(state, address);
            }
            told
        }
    }
}

/// A sampled realloc of which nothing can be told keeps its block in the table if it failed.
#[cold]
unsafe fn not_told(state: *mut State, call: *mut Call, function: u8, action: Action) {
    if (*state).exact == 0 && action == Action::EndsUnsampled && (*call).result == 0 {
        sample::track(state, first_argument(call, function));
    }
}

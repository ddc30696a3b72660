//! malloc and free in exact mode: the two calls that most recordings consist of, by a short way of their own. What they do is what
//! [`crate::hooks`] does for any function.

use crate::abi::{Descriptor, State, function, record};
use crate::hooks::{begin_call, busy, idle, is_inside};
use crate::{ring, stacks};
use core::sync::atomic::{Ordering, compiler_fence};

/// malloc(size), entered with stack pointer `rsp`.
pub unsafe extern "C" fn malloc_exact(size: u64, descriptor: *const Descriptor, rsp: u64) -> u64 {
    let state = (*descriptor).state as *mut State;
    let original: unsafe extern "C" fn(u64) -> u64 = core::mem::transmute((*descriptor).original);
    let slot = begin_call(state, rsp, false);
    // Passed on from here, not by a jump: whoever keeps the thread in the agent, or calls from within, will be back here later
    // than this call.
    if slot.is_null() {
        return original(size);
    }
    if is_inside(state, slot, rsp) {
        idle(slot);
        return original(size);
    }
    let (saved_depth, saved_rsp) = ((*slot).depth, (*slot).depth_rsp);
    (*slot).depth_rsp = rsp;
    (&raw mut (*slot).depth).write_volatile(saved_depth + 1);
    idle(slot);
    let address = original(size);
    if (&raw const (*state).enabled).read_volatile() != 0 {
        busy(slot, rsp);
        if let Some(ring) = ring::acquire(state, slot) {
            let stack = if address == 0 { Some(0) } else { stacks::current(state, slot, ring, core::ptr::null()) };
            if let Some(stack) = stack {
                ring.push_event(record::ALLOC, function::MALLOC, address, &[address, size, stack]);
            }
            ring.release();
        }
        idle(slot);
    }
    compiler_fence(Ordering::SeqCst);
    (*slot).depth_rsp = saved_rsp;
    (&raw mut (*slot).depth).write_volatile(saved_depth);
    address
}

/// free(block), before it is passed on. `rsp` is the stack pointer at its entry.
pub unsafe extern "C" fn free_exact(block: u64, descriptor: *const Descriptor, rsp: u64) {
    let state = (*descriptor).state as *mut State;
    let slot = begin_call(state, rsp, false);
    if slot.is_null() {
        return;
    }
    let kind = if is_inside(state, slot, rsp) { record::FREE_INSIDE } else { record::FREE };
    if let Some(ring) = ring::acquire(state, slot) {
        ring.push_event(kind, function::FREE, block, &[block]);
        ring.release();
    }
    idle(slot);
}

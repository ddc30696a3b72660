//! Threads: finding the calling thread's [`Slot`] by its thread pointer.

use crate::abi::{
    RING_CONTROLS_AT, RingControl, SLOT_HASH, SLOT_PROBES, SLOTS, SLOTS_LOG2, Slot, State, TOMBSTONE, may,
    ring_data_at,
};
use crate::machine;
use crate::sample;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// The calling thread's slot, made if need be; null if there is no room for another or the thread can't be told.
///
/// # Safety
/// `state` is the agent's state; `mapping` says that the hooked function is of the mmap family, which threads without a
/// control block may call, too.
#[inline(always)]
pub unsafe fn find(state: *mut State, mapping: bool) -> *mut Slot {
    let pointer = if mapping { checked_thread_pointer(state) } else { machine::thread_pointer() };
    let home = ((pointer as u32).wrapping_mul(SLOT_HASH) >> (32 - SLOTS_LOG2)) as usize;
    let slot = (&raw mut (*state).slots).cast::<Slot>().add(home);
    if (*slot).key == pointer && pointer != 0 { slot } else { find_or_make(state, pointer, home) }
}

#[cold]
#[inline(never)]
unsafe fn find_or_make(state: *mut State, pointer: u64, home: usize) -> *mut Slot {
    if pointer == 0 {
        return core::ptr::null_mut();
    }
    let slots = (&raw mut (*state).slots).cast::<Slot>();
    // Nobody but its thread writes a key, so it is in none of the places if it isn't in those before the first that was never used. A
    // tombstone is taken only then: a thread has one slot, whatever was swept meanwhile.
    let mut grave: *mut Slot = core::ptr::null_mut();
    let mut i = 0;
    while i < SLOT_PROBES {
        let slot = slots.add((home + i) & (SLOTS - 1));
        let key = AtomicU64::from_ptr(&raw mut (*slot).key);
        let found = key.load(Ordering::Relaxed);
        if found == pointer {
            return slot;
        }
        if found == TOMBSTONE && grave.is_null() {
            grave = slot;
        }
        if found == 0 {
            if !grave.is_null() {
                break;
            }
            if key.compare_exchange(0, pointer, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
                begin(state, slot);
                return slot;
            }
        }
        i += 1;
    }
    if grave.is_null() {
        return grave;
    }
    let key = AtomicU64::from_ptr(&raw mut (*grave).key);
    if key.compare_exchange(TOMBSTONE, pointer, Ordering::Acquire, Ordering::Relaxed).is_ok() {
        return grave;
    }
    // Another thread was quicker. It will not be so for ever.
    find_or_make(state, pointer, home)
}

unsafe fn checked_thread_pointer(state: *mut State) -> u64 {
    if (*state).flags & may::READ_FS_BASE != 0 {
        machine::fs_base()
    } else if (*state).flags & may::MAKE_CALLS != 0 {
        machine::fs_base_by_call()
    } else {
        machine::thread_pointer()
    }
}

/// A slot taken for the first time. Nobody else uses it.
unsafe fn begin(state: *mut State, slot: *mut Slot) {
    let used = AtomicU32::from_ptr(&raw mut (*state).rings_used);
    // In the order in which threads come, so that the same seed means the same for a program of one thread.
    let ordinal = used.fetch_add(1, Ordering::Relaxed);
    let own = (*state).exact != 0 && ordinal < (*state).ring_count - 1;
    (*slot).ring = if own { ordinal + 1 } else { 0 };
    let index = slot.offset_from((&raw mut (*state).slots).cast::<Slot>()) as u64;
    let (rings, ring, count) = ((*state).rings, (*slot).ring as usize, (*state).ring_count as usize);
    (*slot).control = rings + (RING_CONTROLS_AT + ring * size_of::<RingControl>()) as u64;
    (*slot).data = rings + ring_data_at(count, (*state).ring_len as usize, ring) as u64;
    (*slot).number = index as u32 + 1;
    (*slot).random = ((*state).seed ^ u64::from(ordinal + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)) | 1;
    sample::draw(state, slot);
}

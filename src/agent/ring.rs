//! Writing records into a ring.
//!
//! A ring has one writer at a time: its thread, or for the shared ring 0 whoever holds its lock. What is written
//! exists from the store of `head` on; whatever becomes of the thread before, nothing half is left.

use crate::abi::{RING_CONTROLS_AT, RingControl, SharedControl, Slot, State, may, record, ring_data_at};
use crate::machine;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering, compiler_fence};

/// Tries for the lock of a shared ring.
const LOCK_TRIES: u32 = 2_000;
/// Waiting for room: looks before it starts to sleep, and how long it sleeps (ns).
const LOOKS_BEFORE_SLEEP: u32 = 200;
const SLEEP: u64 = 50_000;

/// A ring that the calling thread may write.
pub struct Ring {
    control: *mut RingControl,
    data: *mut u8,
    len: u64,
    state: *mut State,
    slot: *mut Slot,
}

/// The ring of `slot`'s thread; for a shared one with its lock held. `None` where that can't be had: the event is dropped
/// and counted. [`Ring::release`] must follow.
///
/// # Safety
/// The agent is enabled; `slot` is the calling thread's.
#[inline(always)]
pub unsafe fn acquire(state: *mut State, slot: *mut Slot) -> Option<Ring> {
    let rings = (*state).rings as *mut u8;
    let index = (*slot).ring as usize;
    let len = (*state).ring_len;
    let ring = Ring {
        control: rings.add(RING_CONTROLS_AT).cast::<RingControl>().add(index),
        data: rings.add(ring_data_at((*state).ring_count as usize, len as usize, index)),
        len,
        state,
        slot,
    };
    if index == 0 && !ring.lock() {
        ring.count_drop();
        return None;
    }
    let told = &raw mut (*ring.control).tid;
    if *told != (*slot).tid {
        let mut ring = ring;
        if !ring.push(record::THREAD, 0, &[u64::from((*slot).tid)]) {
            ring.release();
            return None;
        }
        *told = (*slot).tid;
        return Some(ring);
    }
    Some(ring)
}

impl Ring {
    /// Space for a stack's frames that only the ring's writer uses.
    pub unsafe fn scratch(&self) -> *mut u64 {
        self.data.add(self.len as usize).cast()
    }

    unsafe fn holder(&self) -> u32 {
        let slots = (&raw mut (*self.state).slots).cast::<Slot>();
        self.slot.offset_from(slots) as u32 + 1
    }

    #[cold]
    unsafe fn lock(&self) -> bool {
        let lock = AtomicU32::from_ptr(&raw mut (*self.control).lock);
        let me = self.holder();
        let mut tries = 0;
        loop {
            match lock.compare_exchange(0, me, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => return true,
                // Left behind when this thread was thrown out of the agent (longjmp from a signal handler).
                Err(holder) if holder == me => {
                    (*self.control).head &= !1;
                    return true;
                }
                Err(_) => {}
            }
            tries += 1;
            if tries > LOCK_TRIES {
                return false;
            }
            core::hint::spin_loop();
        }
    }

    /// Gives a shared ring back.
    #[inline(always)]
    pub unsafe fn release(&self) {
        if (*self.slot).ring == 0 {
            AtomicU32::from_ptr(&raw mut (*self.control).lock).store(0, Ordering::Release);
        }
    }

    #[cold]
    unsafe fn count_drop(&self) {
        AtomicU64::from_ptr(&raw mut (*self.control).dropped).fetch_add(1, Ordering::Relaxed);
        (*self.slot).dropped += 1;
    }

    /// Appends a record of these words behind the first; false if it had to be dropped.
    #[inline(always)]
    pub unsafe fn push<const N: usize>(&mut self, kind: u8, function: u8, words: &[u64; N]) -> bool {
        self.push_with(kind, function, words, core::ptr::null(), 0)
    }

    /// A piece of a code object's text.
    pub unsafe fn push_code(&mut self, head: &[u64; 4], bytes: *const u8, len: usize) -> bool {
        self.push_with(record::CODE, 0, head, bytes, len)
    }

    /// Appends a record of words and `len` bytes behind them.
    #[inline(always)]
    pub unsafe fn push_with<const N: usize>(
        &mut self,
        kind: u8,
        function: u8,
        words: &[u64; N],
        bytes: *const u8,
        len: usize,
    ) -> bool {
        let need = ((1 + N) * 8 + ((len + 7) & !7)) as u64;
        let head = (*self.control).head & !1;
        let at = head & (self.len - 1);
        // Records do not wrap: what is left at the end is padded.
        let pad = if at + need > self.len { self.len - at } else { 0 };
        if head + pad + need - (*self.slot).tail > self.len && !self.make_room(head + pad + need) {
            self.count_drop();
            return false;
        }
        let head_word = &raw mut (*self.control).head;
        head_word.write_volatile(head | 1);
        compiler_fence(Ordering::SeqCst);
        let now = machine::ticks();
        let first = now << 16 | u64::from(function) << 8;
        if pad != 0 {
            self.data.add(at as usize).cast::<u64>().write(first | u64::from(record::PAD));
        }
        let to = self.data.add(if pad != 0 { 0 } else { at as usize }).cast::<u64>();
        to.write(first | u64::from(kind));
        let mut i = 0;
        while i < N {
            to.add(1 + i).write(*words.as_ptr().add(i));
            i += 1;
        }
        if len != 0 {
            copy(to.add(1 + N).cast(), bytes, len);
        }
        AtomicU64::from_ptr(head_word).store(head + pad + need, Ordering::Release);
        if now.wrapping_sub(self.heartbeat()) as i64 > (*self.state).dead_after as i64 {
            self.switch_off();
        }
        true
    }

    unsafe fn heartbeat(&self) -> u64 {
        let shared = (*self.state).rings as *const SharedControl;
        (&raw const (*shared).heartbeat).read_volatile()
    }

    /// The controller is dead: from now on every hook passes its calls on.
    #[cold]
    unsafe fn switch_off(&self) {
        (&raw mut (*self.state).enabled).write_volatile(0);
    }

    /// Reads the controller's position, and in exact mode waits for it to move, for a bounded time. Whether there is room up
    /// to `end`.
    #[cold]
    #[inline(never)]
    unsafe fn make_room(&mut self, end: u64) -> bool {
        let tail = AtomicU64::from_ptr(&raw mut (*self.control).tail);
        let slot = self.slot;
        let before = (*slot).tail;
        (*slot).tail = tail.load(Ordering::Acquire);
        if end - (*slot).tail <= self.len {
            (*slot).gave_up = 0;
            return true;
        }
        let state = self.state;
        let waited_in_vain = (*slot).gave_up != 0 && before == (*slot).tail;
        if (*state).exact == 0 || waited_in_vain {
            return false;
        }
        let start = machine::ticks();
        let mut looks = 0_u32;
        loop {
            (*slot).tail = tail.load(Ordering::Acquire);
            if end - (*slot).tail <= self.len {
                (*slot).gave_up = 0;
                return true;
            }
            let now = machine::ticks();
            let silence = now.wrapping_sub(self.heartbeat()) as i64;
            if silence > (*state).dead_after as i64 {
                self.switch_off();
            }
            let enabled = (&raw const (*state).enabled).read_volatile();
            if now - start > (*state).max_wait || silence > (*state).patience as i64 || enabled == 0 {
                (*slot).gave_up = 1;
                return false;
            }
            if looks < LOOKS_BEFORE_SLEEP || (*state).flags & may::MAKE_CALLS == 0 {
                looks += 1;
                core::hint::spin_loop();
            } else {
                machine::sleep(SLEEP);
            }
        }
    }
}

/// `rep movsb`: no vector register.
#[inline(always)]
unsafe fn copy(to: *mut u8, from: *const u8, len: usize) {
    core::arch::asm!("rep movsb", inout("rdi") to => _, inout("rsi") from => _, inout("rcx") len => _,
        options(nostack, preserves_flags));
}

//! Writing records into a ring.
//!
//! A ring has one writer at a time: its thread, or for the shared ring 0 whoever holds its lock. What is written
//! exists from the store of `head` on; whatever becomes of the thread before, nothing half is left.
//!
//! Time is coarse and cheap: the controller's heartbeat, told when it moves. Where threads take turns (as the GIL makes them)
//! each turn is told by the time stamp counter, so that what one did before another stays before it. Threads that
//! record at once on several processors would pay for that at every event: after a few turns it waits for the next heartbeat.

use crate::abi::{
    MAPPING_STRIPE, RingControl, SharedControl, Slot, State, Stripe, function, may, record, stripe,
};
use crate::machine;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Tries for the lock of a shared ring.
const LOCK_TRIES: u32 = 2_000;
/// Sleeps for it after those (exact).
const LOCK_SLEEPS: u32 = 200;
/// The same for a sample.
const SAMPLE_SLEEPS: u32 = 20;
/// Waiting for room: looks before it starts to sleep, and how long it sleeps (ns).
const LOOKS_BEFORE_SLEEP: u32 = 200;
const SLEEP: u64 = 50_000;
/// Turns told per heartbeat.
const TURNS: u32 = 4;
/// How far before the place that is written the cache lines are fetched. They were last read by the controller on another
/// processor; the locked instructions of an event wait for every store before them, and so for each such line.
const FETCH_AHEAD: u64 = 1024;
/// Records between two looks for a controller that has fallen silent (exact; a sample always looks).
const LOOK_EVERY: u32 = 4096;

/// A ring that the calling thread may write: its slot's. Two words, to be passed in registers.
#[derive(Clone, Copy)]
pub struct Ring {
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
    let ring = Ring { state, slot };
    if (*slot).ring == 0 && !ring.lock() {
        ring.count_drop();
        return None;
    }
    let epoch = ring.heartbeat();
    let in_turn = (&raw const (*state).last).read_volatile() == (*slot).number;
    if epoch == (*slot).epoch && in_turn && (*ring.control()).tid == (*slot).tid || ring.preface(epoch) {
        Some(ring)
    } else {
        ring.release();
        None
    }
}

impl Ring {
    #[inline(always)]
    unsafe fn control(self) -> *mut RingControl {
        (*self.slot).control as *mut RingControl
    }

    #[inline(always)]
    unsafe fn data(self) -> *mut u8 {
        (*self.slot).data as *mut u8
    }

    #[inline(always)]
    unsafe fn len(self) -> u64 {
        (*self.state).ring_len
    }

    /// Space for a stack's frames that only the ring's writer uses.
    pub unsafe fn scratch(self) -> *mut u64 {
        self.data().add(self.len() as usize).cast()
    }

    /// Tells whose records follow, and of when they are, as far as that has changed. False for want of room.
    #[cold]
    #[inline(never)]
    unsafe fn preface(self, epoch: u64) -> bool {
        let (state, slot) = (self.state, self.slot);
        if (*self.control()).tid != (*slot).tid {
            if !self.push(record::THREAD, 0, 0, &[u64::from((*slot).tid)]) {
                return false;
            }
            (*self.control()).tid = (*slot).tid;
        }
        let mut time = 0;
        if epoch != (*slot).epoch {
            (*slot).epoch = epoch;
            (*slot).turns = 0;
            time = epoch;
        }
        let last = &raw mut (*state).last;
        if (*state).exact == 0 {
            time = machine::ticks();
            self.look(time);
        } else if last.read_volatile() != (*slot).number && (*slot).turns < TURNS {
            (*slot).turns += 1;
            last.write_volatile((*slot).number);
            time = machine::ticks();
        }
        time == 0 || self.push(record::TIME, 0, 0, &[time])
    }

    #[cold]
    unsafe fn lock(self) -> bool {
        let lock = AtomicU32::from_ptr(&raw mut (*self.control()).lock);
        let me = (*self.slot).number;
        let mut tries = 0;
        loop {
            match lock.compare_exchange(0, me, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => return true,
                // Left behind when this thread was thrown out of the agent (longjmp from a signal handler).
                Err(holder) if holder == me => return true,
                Err(holder) if tries >= LOCK_TRIES => {
                    let took = self.is_orphan(holder)
                        && lock.compare_exchange(holder, me, Ordering::Acquire, Ordering::Relaxed).is_ok();
                    if took || !self.may_sleep(tries - LOCK_TRIES) {
                        return took;
                    }
                    machine::sleep(SLEEP);
                }
                Err(_) => core::hint::spin_loop(),
            }
            tries += 1;
        }
    }

    /// Whether the thread that holds the lock ended with it (cancelled in the middle of the agent).
    #[cold]
    unsafe fn is_orphan(self, holder: u32) -> bool {
        let state = self.state;
        let slot = (&raw const (*state).slots).cast::<Slot>().add(holder as usize - 1);
        let tid = (&raw const (*slot).tid).read_volatile();
        (*state).flags & may::MAKE_CALLS != 0 && machine::is_gone(tid)
    }

    /// Whether a thread that slept so often for the lock may sleep once more. A sample is rare, and whoever holds the lock was
    /// interrupted; but a sample less is better than a thread that waits for long.
    unsafe fn may_sleep(self, slept: u32) -> bool {
        let state = self.state;
        let most = if (*state).exact != 0 { LOCK_SLEEPS } else { SAMPLE_SLEEPS };
        (*state).flags & may::MAKE_CALLS != 0
            && slept < most
            && (&raw const (*state).enabled).read_volatile() != 0
    }

    /// Gives a shared ring back.
    #[inline(always)]
    pub unsafe fn release(self) {
        if (*self.slot).ring == 0 {
            AtomicU32::from_ptr(&raw mut (*self.control()).lock).store(0, Ordering::Release);
        }
    }

    /// An event that can't be told.
    #[cold]
    pub unsafe fn count_drop(self) {
        AtomicU64::from_ptr(&raw mut (*self.control()).dropped).fetch_add(1, Ordering::Relaxed);
        (*self.slot).dropped += 1;
    }

    /// An event about `address`, with its number in the address's stripe; false if it had to be dropped.
    #[inline(always)]
    pub unsafe fn push_event<const N: usize>(
        self,
        kind: u8,
        function: u8,
        address: u64,
        words: &[u64; N],
    ) -> bool {
        if (*self.state).exact == 0 || address == 0 || address == u64::MAX {
            return self.push(kind, function, 0, words);
        }
        // The number is taken when there is room for certain: a drop leaves no gap.
        let to = self.room((1 + N) as u64 * 8);
        if to.is_null() {
            return false;
        }
        let stripes = (&raw mut (*self.state).stripes).cast::<Stripe>();
        let mapping = matches!(function, function::MMAP | function::MUNMAP | function::MREMAP);
        let which = if mapping { MAPPING_STRIPE } else { stripe(address) };
        let number = AtomicU32::from_ptr(&raw mut (*stripes.add(which)).next).fetch_add(1, Ordering::Relaxed);
        self.write(kind, function, number, words, to);
        self.publish((1 + N) as u64 * 8);
        true
    }

    /// Appends a record of these words behind the first; false if it had to be dropped.
    #[inline(always)]
    unsafe fn push<const N: usize>(self, kind: u8, function: u8, number: u32, words: &[u64; N]) -> bool {
        let need = (1 + N) as u64 * 8;
        let to = self.room(need);
        if to.is_null() {
            return false;
        }
        self.write(kind, function, number, words, to);
        self.publish(need);
        true
    }

    /// A record of words and `len` bytes behind them: a piece of a code object's text, the frames of a stack.
    #[cold]
    #[inline(never)]
    pub unsafe fn push_bytes(self, kind: u8, words: &[u64; 4], count: usize, bytes: *const u8, len: usize) -> bool {
        let need = ((1 + count) * 8 + ((len + 7) & !7)) as u64;
        let to = self.room(need);
        if to.is_null() {
            return false;
        }
        to.write(u64::from(kind));
        let mut i = 0;
        while i < count {
            // Volatile, lest the loop becomes a call of memcpy.
            to.add(1 + i).write_volatile(*words.as_ptr().add(i));
            i += 1;
        }
        copy(to.add(1 + count).cast(), bytes, len);
        self.publish(need);
        true
    }

    /// Where a record of `need` bytes goes; null where there is no room.
    #[inline(always)]
    unsafe fn room(self, need: u64) -> *mut u64 {
        let head = (*self.control()).head;
        let at = head & (self.len() - 1);
        // What exceeds the room or the end of the data: both by one look that is nearly always in vain.
        if at + need > self.len() || head + need - (*self.slot).tail > self.len() {
            return self.room_made(need);
        }
        machine::fetch_to_write(self.data().add((head + FETCH_AHEAD & (self.len() - 1)) as usize));
        self.data().add(at as usize).cast()
    }

    /// Records do not wrap: what is left at the end is padded. And a full ring is waited for.
    #[cold]
    #[inline(never)]
    unsafe fn room_made(self, need: u64) -> *mut u64 {
        let head = (*self.control()).head;
        let at = head & (self.len() - 1);
        let pad = if at + need > self.len() { self.len() - at } else { 0 };
        let end = head + pad + need;
        if end - (*self.slot).tail > self.len() && !self.make_room(end) {
            self.count_drop();
            return core::ptr::null_mut();
        }
        if pad != 0 {
            self.data().add(at as usize).cast::<u64>().write(u64::from(record::PAD));
            // A padding alone is a record like any other.
            AtomicU64::from_ptr(&raw mut (*self.control()).head).store(head + pad, Ordering::Release);
            return self.data().cast();
        }
        self.data().add(at as usize).cast()
    }

    #[inline(always)]
    unsafe fn write<const N: usize>(
        self,
        kind: u8,
        function: u8,
        number: u32,
        words: &[u64; N],
        to: *mut u64,
    ) {
        to.write(u64::from(number) << 32 | u64::from(function) << 8 | u64::from(kind));
        let mut i = 0;
        while i < N {
            // Volatile, lest the loop becomes a call of memcpy.
            to.add(1 + i).write_volatile(*words.as_ptr().add(i));
            i += 1;
        }
    }

    #[inline(always)]
    unsafe fn publish(self, len: u64) {
        let head = &raw mut (*self.control()).head;
        AtomicU64::from_ptr(head).store(*head + len, Ordering::Release);
        let slot = self.slot;
        if (*slot).until_look == 0 {
            (*slot).until_look = LOOK_EVERY;
            self.look(machine::ticks());
        }
        (*slot).until_look -= 1;
    }

    unsafe fn heartbeat(self) -> u64 {
        let shared = (*self.state).rings as *const SharedControl;
        (&raw const (*shared).heartbeat).read_volatile()
    }

    /// Switches the agent off when the controller is dead: from then on every hook passes its calls on.
    #[cold]
    #[inline(never)]
    unsafe fn look(self, now: u64) {
        if now.wrapping_sub(self.heartbeat()) as i64 > (*self.state).dead_after as i64 {
            (&raw mut (*self.state).enabled).write_volatile(0);
        }
    }

    /// Reads the controller's position, and in exact mode waits for it to move, for a bounded time. Whether there is room up
    /// to `end`.
    #[cold]
    #[inline(never)]
    unsafe fn make_room(self, end: u64) -> bool {
        let tail = AtomicU64::from_ptr(&raw mut (*self.control()).tail);
        let slot = self.slot;
        let before = (*slot).tail;
        (*slot).tail = tail.load(Ordering::Acquire);
        if end - (*slot).tail <= self.len() {
            (*slot).gave_up = 0;
            return true;
        }
        let state = self.state;
        let waited_in_vain = (*slot).gave_up != 0 && before == (*slot).tail;
        if (*state).exact == 0 || waited_in_vain {
            self.look(machine::ticks());
            return false;
        }
        let start = machine::ticks();
        let mut looks = 0_u32;
        loop {
            (*slot).tail = tail.load(Ordering::Acquire);
            if end - (*slot).tail <= self.len() {
                (*slot).gave_up = 0;
                return true;
            }
            let now = machine::ticks();
            self.look(now);
            let silence = now.wrapping_sub(self.heartbeat()) as i64;
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

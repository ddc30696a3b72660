//! The calling thread's stack as a hash, told with its frames and code objects the first time: Python's frames, and where they are
//! wanted the native ones.

use crate::abi::{MAX_DEPTH, STACKS_SEEN, Slot, State, record};
use crate::hooks::Call;
use crate::ring::Ring;
use crate::{codes, machine, native, python};

/// Bits of a packed frame's generation.
const GENERATION_SHIFT: u32 = 32;
/// Bit of a frame's code object: see [`record::STACK`].
const ENTRY: u64 = 1;
/// Mixes a native stack's hash into that of the Python stack (digits of pi).
const BOTH: u64 = 0x0d95_748f_728e_b658;

/// The hash of the calling thread's stack; 0 where it has none. `None`: it could not be told for want of room. `call`: the hooked call,
/// where it has a record ([`crate::entry::heaptap_any`]); without one there are no native frames.
///
/// # Safety
/// The thread has a control block; the ring is its to write, the slot its own.
#[inline(always)]
pub unsafe fn current(state: *mut State, slot: *mut Slot, ring: Ring, call: *const Call) -> Option<u64> {
    let tstate = python::thread_state(&(*state).python, machine::thread_pointer());
    let mut hash = if tstate == 0 { 0 } else { python::hash(state, tstate) };
    let call = if (*state).native == 0 { core::ptr::null() } else { call };
    if !call.is_null() {
        hash = with_native(state, slot, call, hash);
    }
    if hash == 0 {
        return Some(0);
    }
    let seen = (&raw mut (*state).stacks_seen).cast::<u64>().add(hash as usize & (STACKS_SEEN - 1));
    if seen.read_volatile() == hash {
        return Some(hash);
    }
    if tell(state, slot, tstate, hash, ring, call) {
        seen.write_volatile(hash);
        Some(hash)
    } else {
        None
    }
}

#[inline(never)]
unsafe fn with_native(state: *mut State, slot: *mut Slot, call: *const Call, python: u64) -> u64 {
    let hash = python::fold(native::hash(state, slot, call) ^ BOTH, python ^ BOTH.rotate_left(32));
    if hash == 0 { 1 } else { hash }
}

#[cold]
#[inline(never)]
unsafe fn tell(
    state: *mut State,
    slot: *mut Slot,
    tstate: u64,
    hash: u64,
    ring: Ring,
    call: *const Call,
) -> bool {
    let frames = ring.scratch();
    if !call.is_null() {
        let directory = native::directory(state);
        let (count, end) = native::frames(state, slot, call, directory, frames);
        let head = [hash, count as u64 | end, (*directory).number, 0];
        if !ring.push_bytes(record::NATIVE, &head, 3, frames.cast(), count * 8) {
            return false;
        }
    }
    let (count, cut) =
        if tstate == 0 { (0, false) } else { python::frames(state, tstate, frames, MAX_DEPTH) };
    let mut i = 0;
    while i < count {
        let code = frames.add(2 * i).read() & !ENTRY;
        let generation = (frames.add(2 * i + 1).read() >> GENERATION_SHIFT) as u32;
        if !codes::is_told(state, code, generation) {
            let mut emit = |head: &[u64; 4], bytes: *const u8, len: usize| ring.push_bytes(record::CODE, head, 4, bytes, len);
            if !codes::tell(state, code, generation, &mut emit) {
                return false;
            }
            codes::mark_told(state, code, generation);
        }
        i += 1;
    }
    let counted = count as u64 | (cut as u64) << 63;
    ring.push_bytes(record::STACK, &[hash, counted, 0, 0], 2, frames.cast(), count * 16)
}

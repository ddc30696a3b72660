//! The calling thread's Python stack as a hash, told with its frames and code objects the first time.

use crate::abi::{MAX_DEPTH, STACKS_SEEN, State, record};
use crate::ring::Ring;
use crate::{codes, machine, python};

/// Bits of a packed frame's generation.
const GENERATION_SHIFT: u32 = 32;

/// The hash of the calling thread's stack; 0 where it has none. `None`: it could not be told for want of room.
///
/// # Safety
/// The thread has a control block; the ring is its to write.
pub unsafe fn current(state: *mut State, ring: Ring) -> Option<u64> {
    let tstate = python::thread_state(&(*state).python, machine::thread_pointer());
    if tstate == 0 {
        return Some(0);
    }
    let hash = python::hash(state, tstate);
    if hash == 0 {
        return Some(0);
    }
    let seen = (&raw mut (*state).stacks_seen).cast::<u64>().add(hash as usize & (STACKS_SEEN - 1));
    if seen.read_volatile() == hash {
        return Some(hash);
    }
    if tell(state, tstate, hash, ring) {
        seen.write_volatile(hash);
        Some(hash)
    } else {
        None
    }
}

#[cold]
#[inline(never)]
unsafe fn tell(state: *mut State, tstate: u64, hash: u64, ring: Ring) -> bool {
    let frames = ring.scratch();
    let (count, cut) = python::frames(state, tstate, frames, MAX_DEPTH);
    let mut i = 0;
    while i < count {
        let code = frames.add(2 * i).read();
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

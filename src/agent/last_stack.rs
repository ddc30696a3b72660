//! A native stack that is like the thread's last one: its hash without a walk through the part that both have in common.
//!
//! A walk is a function of the first frame's registers and of the words that it reads. So where a frame has the registers that a frame of
//! the last stack had, and the words that led from there outward are what they were, the rest is what it was: two loads and no look-up
//! for a frame, none of which waits for another. Frames whose caller was found otherwise than by a return address and a saved rbp (by a
//! signal's handler, or a word that says where the stack was) are walked each time.

use crate::abi::{CodeRange, Directory, LAST_FRAMES, LastFrame, LastStack, NATIVE_CUT, Slot, State};
use crate::hooks::Call;
use crate::native::{self, Readable};
use crate::python::{fold, word};
use crate::unwind_abi::{Bp, Cfa, Registers, Rule, Step, step};

/// Flags of a frame: its rbp is known; it has called; the words that lead to its caller are known; its code alone says that there is no
/// caller, or that none is known.
const HAS_BP: u32 = 1;
const IS_RETURN: u32 = 2;
const LINKED: u32 = 4;
const LAST: u32 = 8;

/// Odd numbers without structure (digits of pi), other than those of a plain walk.
const SEED: u64 = 0x6921_9b1d_4dc6_2b81;
const FACTOR: u64 = 0x636f_4f1d_9f8b_3c57;

/// The hash of the frames behind a hooked call. `None`: the thread's last stack is not kept, or there are too many frames.
///
/// # Safety
/// As for [`native::hash`].
pub unsafe fn hash(
    state: *mut State,
    slot: *mut Slot,
    call: *const Call,
    directory: *const Directory,
) -> Option<u64> {
    if (*state).last_stacks == 0 || (*slot).ring == 0 {
        return None;
    }
    let last = ((*state).last_stacks as *mut LastStack).add((*slot).ring as usize - 1);
    if (*last).directory != (*directory).number {
        (*last).directory = (*directory).number;
        (*last).count = 0;
    }
    let frames = (&raw mut (*last).frames).cast::<LastFrame>();
    let count = (*last).count as usize;
    let mut frame = native::caller(call);
    let mut stack = Readable::of(state, slot, frame.sp);
    // New frames lie at the end until it is known what they are put on.
    let mut fresh = LAST_FRAMES;
    let mut candidate = count;
    let mut range: *const CodeRange = core::ptr::null();
    let (mut kept, mut hash);
    loop {
        while candidate != 0 && (*frames.add(candidate - 1)).sp < frame.sp {
            candidate -= 1;
        }
        if candidate != 0 && is_same(frames.add(candidate - 1), &frame) {
            let changed = first_changed(frames, candidate - 1, &stack);
            if changed == candidate {
                kept = candidate;
                hash = (*frames.add(candidate - 1)).hash;
                break;
            }
            candidate = changed;
        }
        if fresh - 1 <= count {
            (*last).count = 0;
            return None;
        }
        fresh -= 1;
        let entry = frames.add(fresh);
        write(entry, &frame);
        let at = frame.at();
        if range.is_null() || at.wrapping_sub((*range).start) >= (*range).end - (*range).start {
            range = native::find(directory, at);
        }
        let rule = if range.is_null() { Rule::UNKNOWN } else { native::rule(range, at) };
        match step(rule, &frame, |at| stack.read(at)) {
            Step::To(caller) => {
                link(entry, rule, &caller);
                frame = caller;
            }
            end => {
                if matches!(rule.cfa(), Cfa::Outermost | Cfa::Unknown) {
                    (*entry).flags |= LAST;
                }
                kept = 0;
                hash = if end == Step::End { SEED } else { SEED ^ NATIVE_CUT };
                break;
            }
        }
    }
    while fresh < LAST_FRAMES {
        let mut entry = frames.add(fresh).read();
        hash = fold(hash ^ entry.pc.wrapping_sub((entry.flags & IS_RETURN != 0) as u64), FACTOR);
        entry.hash = hash;
        frames.add(kept).write(entry);
        kept += 1;
        fresh += 1;
    }
    (*last).count = kept as u64;
    Some(hash)
}

#[inline(always)]
unsafe fn is_same(known: *const LastFrame, frame: &Registers) -> bool {
    let bp = match frame.bp {
        Some(bp) => (*known).flags & HAS_BP != 0 && (*known).bp == bp,
        None => (*known).flags & HAS_BP == 0,
    };
    (*known).sp == frame.sp
        && (*known).pc == frame.pc
        && ((*known).flags & IS_RETURN != 0) == frame.is_return
        && bp
}

/// From frame `from` outward: the first (by index; the outermost is 0) whose caller is not known to be what it was. `from + 1`: all are.
#[inline(always)]
unsafe fn first_changed(frames: *const LastFrame, from: usize, stack: &Readable) -> usize {
    // What is read lies between the stack pointers of the first and the last: they ascend.
    let outermost = frames;
    if (*outermost).flags & LAST == 0 || (*outermost).sp.wrapping_sub(stack.low) >= stack.len {
        return 0;
    }
    let mut i = from;
    while i != 0 {
        let (frame, caller) = (frames.add(i), frames.add(i - 1));
        let below = (*frame).bp_below;
        let same = (*frame).flags & LINKED != 0
            && word((*caller).sp - 8) == (*caller).pc
            && (below == 0 || word((*caller).sp - below as u64) == (*caller).bp);
        if !same {
            return i;
        }
        i -= 1;
    }
    from + 1
}

#[inline(always)]
unsafe fn write(entry: *mut LastFrame, frame: &Registers) {
    let (bp, has_bp) = match frame.bp {
        Some(bp) => (bp, HAS_BP),
        None => (0, 0),
    };
    let flags = has_bp | if frame.is_return { IS_RETURN } else { 0 };
    entry.write(LastFrame { sp: frame.sp, pc: frame.pc, bp, hash: 0, bp_below: 0, flags });
}

/// Notes which words led from a frame to its caller, if they are the usual ones.
#[inline(always)]
unsafe fn link(entry: *mut LastFrame, rule: Rule, caller: &Registers) {
    let below = match rule.bp() {
        Bp::Saved(below) => below,
        Bp::Kept | Bp::Lost => 0,
        Bp::AtBp => return,
    };
    let usual = matches!(rule.cfa(), Cfa::Sp(_) | Cfa::Bp(_) | Cfa::Plt(_));
    // Above the frame's own rsp: readable as long as that is.
    let is_above = caller.sp.wrapping_sub(below as u64) >= (*entry).sp && caller.sp > (*entry).sp;
    if usual && is_above && (below == 0 || caller.bp.is_some()) {
        (*entry).bp_below = below;
        (*entry).flags |= LINKED;
    }
}

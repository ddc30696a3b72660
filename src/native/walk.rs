//! [`walk`]: up a thread's C stack by the rules of its code.

use super::closure;
use super::tables::Tables;
use crate::addr::RemoteAddr;
use crate::memory::RemoteMemory;
use crate::unwind_abi::{Registers, Step, step};

/// Frames of one stack at most. With frames that lie ever higher there is no circle, but a stack may be gigabytes.
const MOST_FRAMES: usize = 100_000;

/// How a stack ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ended {
    /// At the thread's first function.
    Whole,
    /// The code of the last frame says nothing of its caller, or its caller can't be.
    Cut,
}

/// The frames of a thread, innermost first.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Stack {
    /// An address within the instruction that each executes.
    pub frames: Vec<RemoteAddr>,
    /// How it ended.
    pub ended: Ended,
    /// So many of the frames, the outermost, are found by a frame pointer that need not have been one.
    pub guessed: usize,
}

/// Walks the stack of a thread that stands still with these registers.
pub fn walk(tables: &Tables, memory: &dyn RemoteMemory, mut frame: Registers) -> Stack {
    let mut stack = Stack { frames: Vec::new(), ended: Ended::Cut, guessed: 0 };
    let mut guessed = false;
    while stack.frames.len() < MOST_FRAMES {
        let at = RemoteAddr(frame.at());
        let Some(known) = tables.at(at) else {
            let caller = closure::caller(memory, &frame);
            // A pointer to no code may have been called; a frame found from one that called is no frame.
            if stack.frames.is_empty() || caller.is_some() {
                stack.frames.push(at);
            }
            match caller {
                Some(caller) => frame = caller,
                None => return stack,
            }
            continue;
        };
        stack.frames.push(at);
        stack.guessed += usize::from(guessed);
        guessed |= known.guessed;
        match step(known.rule, &frame, |at| memory.read_u64(RemoteAddr(at)).ok()) {
            Step::To(caller) => frame = caller,
            Step::End => {
                stack.ended = Ended::Whole;
                return stack;
            }
            Step::Cut => return stack,
        }
    }
    stack
}

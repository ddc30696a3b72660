//! The agent's walker alone, as an image that a test loads into an interpreter and calls there: `tests/agent_walk.rs` builds it
//! as `build.rs` builds the agent, `fixtures/stacks/in_target_walk.py` calls it.
#![no_std]
#![allow(unsafe_op_in_unsafe_fn, reason = "as in the agent")]

#[path = "../../src/agent_abi.rs"]
#[allow(dead_code)]
mod abi;
#[path = "../../src/agent/codes.rs"]
mod codes;
#[path = "../../src/agent/machine.rs"]
#[allow(dead_code)]
mod machine;
#[path = "../../src/agent/python.rs"]
mod python;

use abi::{Descriptor, State};
use core::arch::naked_asm;
use core::mem::offset_of;

unsafe extern "C" {
    fn the_image_must_not_panic() -> !;
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    // SAFETY: never linked, as in the agent.
    unsafe { the_image_must_not_panic() }
}

/// Bytes of a state, all zero at first.
#[unsafe(no_mangle)]
extern "C" fn walk_state_len() -> usize {
    size_of::<State>()
}

/// Where in it the facts are.
#[unsafe(no_mangle)]
extern "C" fn walk_facts_at() -> usize {
    offset_of!(State, python)
}

/// The calling thread's own state.
#[unsafe(no_mangle)]
unsafe extern "C" fn walk_thread_state(state: *mut State) -> u64 {
    python::thread_state(&raw const (*state).python, machine::thread_pointer())
}

/// The hash of the calling thread's stack.
#[unsafe(no_mangle)]
unsafe extern "C" fn walk_hash(state: *mut State) -> u64 {
    match walk_thread_state(state) {
        0 => 0,
        tstate => python::hash(state, tstate),
    }
}

/// Its frames; their count, bit 63 for "there were more".
#[unsafe(no_mangle)]
unsafe extern "C" fn walk_frames(state: *mut State, out: *mut u64, max: usize) -> u64 {
    match walk_thread_state(state) {
        0 => 0,
        tstate => {
            let (count, cut) = python::frames(state, tstate, out, max);
            // Bit 0 of a frame's code tells of the interpreter's loop: see agent_abi.
            let mut i = 0;
            while i < count {
                *out.add(2 * i) &= !1;
                i += 1;
            }
            count as u64 | (cut as u64) << 63
        }
    }
}

/// The records of a code object one after the other, padded to words. Their bytes; `u64::MAX` when there was no room (and then
/// nothing may follow).
#[unsafe(no_mangle)]
unsafe extern "C" fn walk_tell(
    state: *mut State,
    code: u64,
    generation: u32,
    out: *mut u8,
    len: usize,
) -> u64 {
    let (mut at, mut refused) = (0, false);
    let told = codes::tell(state, code, generation, &mut |words, bytes, count| {
        let need = 32 + ((count + 7) & !7);
        if refused || at + need > len {
            refused = true;
            return false;
        }
        let record = out.add(at).cast::<u64>();
        let mut i = 0;
        while i < 4 {
            record.add(i).write_unaligned(*words.as_ptr().add(i));
            i += 1;
        }
        let mut i = 0;
        while i < count {
            out.add(at + 32 + i).write_volatile(bytes.add(i).read());
            i += 1;
        }
        at += need;
        true
    });
    if told == refused {
        u64::MAX - 1
    } else if told {
        at as u64
    } else {
        u64::MAX
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn walk_is_told(state: *mut State, code: u64, generation: u32) -> u32 {
    codes::is_told(state, code, generation) as u32
}

#[unsafe(no_mangle)]
unsafe extern "C" fn walk_mark_told(state: *mut State, code: u64, generation: u32) {
    codes::mark_told(state, code, generation);
}

/// In the place of `PyCode_Type.tp_dealloc`, entered from a thunk that passes its descriptor in r11, as in the agent.
#[unsafe(no_mangle)]
#[unsafe(naked)]
unsafe extern "C" fn walk_code_dealloc() {
    naked_asm!(
        "push rdi",
        "push r11",
        "sub rsp, 8",
        "mov rsi, rdi",
        "mov rdi, [r11 + {state}]",
        "call {forget}",
        "add rsp, 8",
        "pop r11",
        "pop rdi",
        "jmp [r11 + {original}]",
        state = const offset_of!(Descriptor, state),
        original = const offset_of!(Descriptor, original),
        forget = sym forget,
    )
}

unsafe extern "C" fn forget(state: *mut State, code: u64) {
    python::forget_code(state, code);
}

/// Start routine of a thread without Python: leaves there what its own state is, plus one.
#[unsafe(no_mangle)]
unsafe extern "C" fn walk_foreign_thread(argument: *mut u64) -> u64 {
    let state = argument.read() as *mut State;
    argument.write_volatile(walk_thread_state(state) + walk_hash(state) + 1);
    0
}

/// Ticks that so many hashes take.
#[unsafe(no_mangle)]
unsafe extern "C" fn walk_time(state: *mut State, rounds: u64) -> u64 {
    let tstate = walk_thread_state(state);
    let start = machine::ticks();
    let mut i = 0;
    while i < rounds {
        core::hint::black_box(python::hash(core::hint::black_box(state), tstate));
        i += 1;
    }
    machine::ticks() - start
}

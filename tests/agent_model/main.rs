//! The agent's walker over made-up memory: what no interpreter shows on request. Chains that are too deep or lead in a circle,
//! slots that hold anything, strings of every storage kind, the strength of the stack hash.
//!
//! The agent's own sources, compiled into this test. `tests/agent_walk.rs` runs them in real interpreters.
#![allow(unsafe_code, reason = "the agent's code is, and this calls it")]

#[path = "../../src/agent_abi.rs"]
#[allow(dead_code, clippy::wrong_self_convention)]
mod abi;
#[path = "../../src/agent/codes.rs"]
#[allow(unsafe_op_in_unsafe_fn)]
mod codes;
#[path = "../../src/agent/python.rs"]
#[allow(unsafe_op_in_unsafe_fn)]
mod python;

#[path = "../random/mod.rs"]
mod random;

mod hashes;
mod own_states;
mod stacks;
mod texts;

use abi::{PythonFacts, State};
use std::alloc::{Layout, alloc_zeroed};

/// A state with these facts and nothing else. Never given back.
pub fn state(facts: PythonFacts) -> *mut State {
    // SAFETY: the layout is not empty, and zero is a state.
    let state = unsafe { alloc_zeroed(Layout::new::<State>()) }.cast::<State>();
    assert!(!state.is_null());
    // SAFETY: just allocated.
    unsafe { (*state).python = facts };
    state
}

/// Facts that are all 0.
pub fn facts() -> PythonFacts {
    // SAFETY: numbers only.
    unsafe { std::mem::zeroed() }
}

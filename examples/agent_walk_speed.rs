//! What the agent's walk of a Python stack costs, in ns per frame: `cargo run --release --example agent_walk_speed`.
//!
//! The agent's own source, compiled into this program, over chains that lie in memory as CPython's do: frames of 3.11 and later
//! one behind the other on the thread's data stack, frame objects of 3.10 and before in pymalloc's pools. Every frame runs
//! a code object of its own.
#![allow(unsafe_code, reason = "the agent's code is, and so is what stands for CPython's structures here")]

#[path = "../src/agent_abi.rs"]
#[allow(dead_code, clippy::wrong_self_convention)]
mod abi;
#[path = "../src/agent/python.rs"]
#[allow(dead_code, unsafe_op_in_unsafe_fn)]
mod python;

use abi::{ABSENT, PythonFacts, State, chain};
use std::alloc::{Layout, alloc_zeroed};
use std::hint::black_box;
use std::time::Instant;

const DEPTHS: [usize; 3] = [5, 22, 102];
const ROUNDS: usize = 41;

/// A CPython as far as the walk sees it, with the bytes from one frame to the next.
struct Shape {
    name: &'static str,
    facts: PythonFacts,
    stride: usize,
    /// Frames to a 4 KiB page; 0: they go on over its end.
    per_page: usize,
    /// Every so many frames one that runs no code (a C function that called back); 0 for none.
    shim_every: usize,
}

fn shapes() -> Vec<Shape> {
    // SAFETY: numbers only; zero is one.
    let zero: PythonFacts = unsafe { std::mem::zeroed() };
    let frame_object = PythonFacts {
        chain: chain::FRAME_OBJECT,
        first_frame: 24,
        previous: 24,
        code: 32,
        instruction: 104,
        owner: ABSENT,
        ..zero
    };
    let cframe = PythonFacts {
        chain: chain::CURRENT_FRAME,
        first_frame: 72,
        previous: 48,
        code: 32,
        instruction: 56,
        owner: 69,
        shim_owner: 256,
        ..zero
    };
    let shims = PythonFacts { previous: 8, code: 0, owner: 70, shim_owner: 3, ..cframe };
    let tagged = PythonFacts { owner: 74, code_mask: 7, ..shims };
    let shape = |name, facts, stride, shim_every| Shape { name, facts, stride, per_page: 0, shim_every };
    vec![
        // pymalloc's pools: deep stacks do not stay in the first-level cache, of which each page has the same sets.
        Shape { per_page: 8, ..shape("frame objects (3.8 to 3.10)", frame_object, 480, 0) },
        shape("frames (3.11)", cframe, 112, 0),
        shape("frames with owners (3.12, 3.13)", shims, 112, 0),
        shape("the same, each fifth a shim", shims, 112, 5),
        shape("tagged (3.14 and later)", tagged, 120, 0),
    ]
}

/// A thread state with so many frames that run code; its address. Never given back.
fn stack(shape: &Shape, depth: usize) -> u64 {
    let facts = &shape.facts;
    let shims = depth.checked_div(shape.shim_every).unwrap_or(0);
    let memory = Box::leak(vec![0_u64; 1024 + (depth + shims) * shape.stride / 4].into_boxed_slice());
    let base = (memory.as_ptr() as u64).next_multiple_of(4096);
    let skipped = (base - memory.as_ptr() as u64) as usize / 8;
    let memory = &mut memory[skipped..];
    let mut set = |at: u64, value: u64| memory[((at - base) / 8) as usize] |= value << (8 * (at & 7));
    let (mut last, mut at) = (base + u64::from(facts.first_frame), base + 256);
    for number in 0..depth as u64 {
        let mut link = |at: u64, set: &mut dyn FnMut(u64, u64)| {
            set(last, at);
            last = at + u64::from(facts.previous);
        };
        link(at, &mut set);
        let code = 0x7f12_3450_0000 + number * 0x2a0;
        set(at + u64::from(facts.code), code);
        let frame_object = facts.chain == chain::FRAME_OBJECT;
        set(at + u64::from(facts.instruction), if frame_object { 40 } else { code + 240 });
        at += shape.stride as u64;
        if shape.per_page != 0 && (number + 1).is_multiple_of(shape.per_page as u64) {
            at = at.next_multiple_of(4096) + 64;
        }
        if shape.shim_every != 0 && (number + 1).is_multiple_of(shape.shim_every as u64) {
            link(at, &mut set);
            set(at + u64::from(facts.owner), u64::from(facts.shim_owner));
            at += shape.stride as u64;
        }
    }
    base
}

fn nanoseconds(state: *const State, tstate: u64) -> f64 {
    let mut best: Vec<f64> = (0..ROUNDS)
        .map(|_| {
            let calls = 2_000;
            let start = Instant::now();
            for _ in 0..calls {
                // SAFETY: the state and the stack are this program's, whole and left alone.
                black_box(unsafe { python::hash(black_box(state), black_box(tstate)) });
            }
            start.elapsed().as_nanos() as f64 / f64::from(calls)
        })
        .collect();
    best.sort_by(f64::total_cmp);
    best[ROUNDS / 2]
}

fn main() {
    println!(
        "{:<34}{:>22}{:>22}{:>22}",
        "median ns per walk (per frame)", "depth 5", "depth 22", "depth 102"
    );
    for shape in shapes() {
        // SAFETY: a layout that is not empty; zero is a state.
        let state = unsafe { alloc_zeroed(Layout::new::<State>()) }.cast::<State>();
        assert!(!state.is_null(), "no memory");
        // SAFETY: just allocated, nobody else's.
        unsafe { (*state).python = shape.facts };
        let mut line = format!("{:<34}", shape.name);
        for depth in DEPTHS {
            let ns = nanoseconds(state, stack(&shape, depth));
            line += &format!("{:>22}", format!("{ns:.1} ({:.2})", ns / depth as f64));
        }
        println!("{line}");
    }
}

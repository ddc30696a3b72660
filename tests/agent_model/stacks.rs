//! Chains of frames in made-up memory, and what is told of their frames.

use crate::abi::{ABSENT, MAX_DEPTH, PythonFacts, State, chain};
use crate::{facts, python, state};

/// 3.10's frames, 3.11's, those of 3.12 and 3.13, and tagged ones: (facts, words of a frame).
pub fn shapes() -> [PythonFacts; 4] {
    let old = PythonFacts {
        chain: chain::FRAME_OBJECT,
        first_frame: 24,
        previous: 24,
        code: 32,
        instruction: 96,
        lasti_unit: 2,
        owner: ABSENT,
        shim_owner: 256,
        co_tlbc: ABSENT,
        tlbc_index: ABSENT,
        is_entry: ABSENT,
        ob_type: 8,
        ..facts()
    };
    let new =
        PythonFacts { chain: chain::CURRENT_FRAME, previous: 48, instruction: 56, bytecode: 184, ..old };
    let plain = PythonFacts { chain: chain::CFRAME, first_frame: 56, cframe_frame: 8, owner: 69, ..new };
    let shims = PythonFacts { first_frame: 72, previous: 8, code: 0, owner: 70, shim_owner: 3, ..new };
    [old, plain, shims, PythonFacts { owner: 74, code_mask: 7, ..shims }]
}

const FRAME: usize = 16;
/// Frames are this many words apart, behind the thread state and a `_PyCFrame`.
const FIRST: usize = 64;

#[derive(Clone, Copy)]
pub enum Made {
    /// (code, instruction)
    Runs(u64, u64),
    Shim,
    NoCode,
}

/// A thread state and its frames, innermost first, in memory of their own.
pub struct Stack {
    words: Vec<u64>,
    facts: PythonFacts,
}

impl Stack {
    pub fn new(facts: PythonFacts, frames: &[Made]) -> Self {
        let mut stack = Self { words: vec![0; FIRST + FRAME * frames.len()], facts };
        let mut link = stack.tstate() + u64::from(facts.first_frame);
        if facts.chain == chain::CFRAME {
            let cframe = stack.tstate() + 256;
            stack.set(link, cframe);
            link = cframe + u64::from(facts.cframe_frame);
        }
        for (number, made) in frames.iter().enumerate() {
            let at = stack.frame(number);
            stack.set(link, at);
            link = at + u64::from(facts.previous);
            stack.fill(at, *made);
        }
        stack
    }

    fn fill(&mut self, at: u64, made: Made) {
        let facts = self.facts;
        let (code, instruction, owner) = match made {
            Made::Runs(code, instruction) => (code, instruction, 1),
            Made::Shim => (0x5555_0000, 77, u64::from(facts.shim_owner)),
            Made::NoCode => (0, 0, 1),
        };
        self.set(at + u64::from(facts.code), code | u64::from(facts.code_mask & 1));
        self.set(at + u64::from(facts.instruction), instruction);
        if facts.owner != ABSENT {
            self.set(at + u64::from(facts.owner), owner);
        }
    }

    fn tstate(&self) -> u64 {
        self.words.as_ptr() as u64
    }

    fn frame(&self, number: usize) -> u64 {
        self.tstate() + 8 * (FIRST + FRAME * number) as u64
    }

    fn set(&mut self, at: u64, value: u64) {
        let index = ((at - self.tstate()) / 8) as usize;
        self.words[index] |= value << (8 * (at & 7));
    }

    fn link(&mut self, from: usize, to: u64) {
        let at = self.frame(from) + u64::from(self.facts.previous);
        let index = ((at - self.tstate()) / 8) as usize;
        self.words[index] = to;
    }

    pub fn hash(&self, state: *mut State) -> u64 {
        // SAFETY: the chain is this stack's memory, or ends in NULL.
        unsafe { python::hash(state, self.tstate()) }
    }

    pub fn frames(&self, state: *mut State, max: usize) -> (Vec<u64>, bool) {
        let mut out = vec![0; 2 * max + 2];
        // SAFETY: as above; there is room for one more than allowed.
        let (count, cut) = unsafe { python::frames(state, self.tstate(), out.as_mut_ptr(), max) };
        assert_eq!(out[2 * max..], [0, 0], "written beyond the room");
        out.truncate(2 * count);
        (out, cut)
    }
}

pub const CODE: u64 = 0x7f00_0000_1000;

/// Frames that each run a code object of their own.
pub fn running(facts: &PythonFacts, count: usize) -> Vec<Made> {
    let base = |code| if facts.chain == chain::FRAME_OBJECT { 0 } else { code + u64::from(facts.bytecode) };
    let code = |number: usize| CODE + 0x200 * number as u64;
    (0..count).map(|n| Made::Runs(code(n), base(code(n)) + 2 * n as u64)).collect()
}

#[test]
fn every_shape_tells_its_frames() {
    for facts in shapes() {
        let state = state(facts);
        let stack = Stack::new(facts, &running(&facts, 5));
        // SAFETY: the state is this test's.
        unsafe { python::forget_code(state, CODE + 0x200) };
        let unit = u64::from(facts.lasti_unit);
        let expected: Vec<u64> = (0..5)
            .flat_map(|n| {
                let lasti = if facts.chain == chain::FRAME_OBJECT { 2 * n * unit } else { 2 * n };
                let entry = u64::from(facts.chain == chain::FRAME_OBJECT);
                [CODE + 0x200 * n + entry, lasti | u64::from(n == 1) << 32]
            })
            .collect();
        assert_eq!(stack.frames(state, MAX_DEPTH), (expected.clone(), false));
        assert_eq!(stack.frames(state, 5), (expected.clone(), false));
        assert_eq!(stack.frames(state, 3), (expected[..6].to_vec(), true));
        assert_eq!(stack.frames(state, 0), (vec![], true));
        let empty = Stack::new(facts, &[]);
        assert_eq!((empty.hash(state), empty.frames(state, 9)), (0, (vec![], false)));
    }
}

#[test]
fn the_frames_that_calls_of_the_loop_began_with_are_told() {
    let entries = |facts, made: &[Made]| -> Vec<u64> {
        let told = Stack::new(facts, made).frames(state(facts), 9).0;
        told.chunks_exact(2).map(|frame| frame[0] & 1).collect()
    };
    let [old, plain, shims, tagged] = shapes();
    let runs = |instruction| Made::Runs(CODE, instruction);
    assert_eq!(entries(old, &[runs(0), runs(0)]), [1, 1]);
    // A shim ends what a call ran; one that is not of the interpreter's loop has run nothing.
    let called = [runs(0), runs(0), Made::Shim, Made::Shim, runs(0), Made::Shim];
    assert_eq!(entries(shims, &called), [0, 1, 1]);
    assert_eq!(entries(tagged, &called), [0, 1, 1]);
    assert_eq!(entries(shims, &[Made::Shim, runs(0), Made::NoCode, runs(0)]), [0, 0]);
    // 3.11 says so in the frame: here in the last byte of the instruction's word.
    let marked = PythonFacts { is_entry: plain.instruction + 7, ..plain };
    assert_eq!(entries(marked, &[runs(0), runs(1 << 56), runs(0)]), [0, 1, 0]);
}

#[test]
fn an_instruction_outside_the_bytecode_has_no_offset() {
    let lasti = |facts, instruction| {
        let stack = Stack::new(facts, &[Made::Runs(CODE, instruction)]);
        stack.frames(state(facts), 1).0[1] as u32 as i32
    };
    let [old, new, ..] = shapes();
    assert_eq!([lasti(old, 0xffff_ffff), lasti(old, 21), lasti(old, 1 << 30)], [-2, 42, i32::MAX]);
    let start = CODE + u64::from(new.bytecode);
    assert_eq!([lasti(new, start - 2), lasti(new, start), lasti(new, start + 600)], [-2, 0, 600]);
    assert_eq!([start - 4, start + (1 << 30), 0].map(|at| lasti(new, at)), [i32::MAX; 3]);
}

#[test]
fn a_copy_of_the_bytecode_is_measured_from_its_own_start() {
    // A code object: type, array of copies.
    let copies = [3_u64, 0x1000, 0x2000, 0];
    let code = [0_u64, 0xc0de, copies.as_ptr() as u64, 0];
    let never_copied = [0_u64, 0xc0de, 0, 0];
    let [.., tagged] = shapes();
    let facts = PythonFacts { code_type: 0xc0de, co_tlbc: 16, tlbc_index: 80, ..tagged };
    let lasti = |code: &[u64], instruction, index| {
        let address = code.as_ptr() as u64;
        let mut stack = Stack::new(facts, &[Made::Runs(address, instruction)]);
        let at = stack.frame(0) + 80;
        stack.set(at, index);
        stack.frames(state(facts), 1).0[1] as u32 as i32
    };
    assert_eq!([lasti(&code, 0x1010, 0), lasti(&code, 0x2020, 1)], [16, 32]);
    // No such copy; and a frame that runs something else.
    assert_eq!([lasti(&code, 0x2020, 3), lasti(&code, 0x2020, 0xffff_ffff)], [i32::MAX; 2]);
    let own = never_copied.as_ptr() as u64 + u64::from(facts.bytecode);
    assert_eq!(lasti(&never_copied, own + 8, 1), 8);
    let other = [0_u64, 0xbad, 1, 1];
    assert_eq!(lasti(&other, other.as_ptr() as u64 + u64::from(facts.bytecode) + 4, 0), 4);
}

#[test]
fn frames_that_run_no_code_count_for_nothing() {
    for facts in shapes().into_iter().filter(|f| f.shim_owner != 256) {
        let state = state(facts);
        let frames = running(&facts, 6);
        let alone = Stack::new(facts, &frames);
        let mut mixed = vec![Made::Shim, Made::NoCode];
        for frame in &frames {
            mixed.extend([*frame, Made::Shim, Made::Shim, Made::NoCode]);
        }
        let mixed = Stack::new(facts, &mixed);
        assert_eq!(mixed.hash(state), alone.hash(state));
        // But they tell where a call of the loop began: bit 0 of the code.
        let frames = |stack: &Stack| -> Vec<u64> {
            let told = stack.frames(state, MAX_DEPTH).0;
            told.iter().enumerate().map(|(n, word)| if n % 2 == 0 { word & !1 } else { *word }).collect()
        };
        assert_eq!(frames(&mixed), frames(&alone));
        let nothing = Stack::new(facts, &[Made::Shim, Made::NoCode, Made::Shim]);
        assert_eq!((nothing.hash(state), nothing.frames(state, 4)), (0, (vec![], false)));
    }
}

#[test]
fn a_chain_that_is_too_deep_or_a_circle_ends() {
    for facts in shapes() {
        let state = state(facts);
        let full = Stack::new(facts, &running(&facts, MAX_DEPTH));
        let deeper = Stack::new(facts, &running(&facts, MAX_DEPTH + 1));
        let deepest = Stack::new(facts, &running(&facts, MAX_DEPTH + 700));
        assert!(!full.frames(state, MAX_DEPTH).1);
        assert!(deeper.frames(state, MAX_DEPTH).1);
        assert_ne!(full.hash(state), deeper.hash(state), "whether it was cut is part of it");
        assert_eq!(deeper.hash(state), deepest.hash(state), "what was cut is not");
        assert_eq!(deeper.frames(state, MAX_DEPTH), deepest.frames(state, MAX_DEPTH));
        for back_to in 0..3 {
            let mut circle = Stack::new(facts, &running(&facts, 3));
            circle.link(2, circle.frame(back_to));
            assert_ne!(circle.hash(state), 0);
            let (frames, cut) = circle.frames(state, MAX_DEPTH);
            assert_eq!((frames.len(), cut), (2 * MAX_DEPTH, true));
        }
        if facts.shim_owner != 256 {
            let mut shims = Stack::new(facts, &[running(&facts, 1)[0], Made::Shim, Made::NoCode]);
            let straight = shims.hash(state);
            shims.link(2, shims.frame(1));
            assert_eq!((shims.hash(state), shims.frames(state, 9).0.len()), (straight, 2));
        }
    }
}

#[test]
fn an_unlinked_cframe_is_an_empty_stack() {
    let [_, cframes, ..] = shapes();
    let mut stack = Stack::new(cframes, &running(&cframes, 2));
    stack.words[cframes.first_frame as usize / 8] = 0;
    let state = state(cframes);
    assert_eq!((stack.hash(state), stack.frames(state, 9)), (0, (vec![], false)));
}

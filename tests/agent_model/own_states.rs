//! Where a thread's own state is, and when what is there is none.

use crate::abi::{PythonFacts, own_state};
use crate::{facts, python};

/// Thread blocks made of words; the address of one is a thread pointer.
#[test]
fn a_thread_has_a_state_where_the_facts_say_and_only_its_own() {
    let finalizing = 0_u64;
    let mut block = vec![0_u64; 64];
    let fs = block.as_ptr() as u64;
    let tstate = [0, 0, fs];
    let at = tstate.as_ptr() as u64;
    let base = PythonFacts { finalizing: &raw const finalizing as u64, thread_id: 16, ..facts() };
    // SAFETY: the block and what it points to are this test's.
    let found = |facts: &PythonFacts| unsafe { python::thread_state(facts, fs) };

    let glibc = PythonFacts { own_state: own_state::GLIBC, a: 37, b: 64, ..base };
    assert_eq!(found(&glibc), 0, "no block of keys");
    let keys = (0..64).map(|i| if i == 2 * 5 + 1 { at } else { 0 }).collect::<Vec<u64>>();
    block[8 + 1] = keys.as_ptr() as u64;
    assert_eq!([found(&glibc), found(&PythonFacts { a: 36, ..glibc })], [at, 0]);

    let musl = PythonFacts { own_state: own_state::MUSL, a: 3, b: 128, ..base };
    assert_eq!(found(&musl), 0, "no keys");
    let values = [0, 0, 0, at];
    block[16] = values.as_ptr() as u64;
    assert_eq!([found(&musl), found(&PythonFacts { a: 1, ..musl })], [at, 0]);

    let local = PythonFacts { own_state: own_state::THREAD_LOCAL, a: 24, ..base };
    block[3] = at;
    assert_eq!(found(&local), at);
    for nonsense in [1, 8, 5000, at + 4, at | 1 << 63, u64::MAX, u64::MAX - 7] {
        block[3] = nonsense;
        assert_eq!(found(&local), 0, "{nonsense:#x} is taken for a state");
    }
    assert_eq!(found(&PythonFacts { own_state: own_state::NONE, ..local }), 0);
}

#[test]
fn a_thread_local_of_a_library_is_found_once_its_block_is_there() {
    let finalizing = 0_u64;
    let mut block = vec![0_u64; 8];
    let fs = block.as_ptr() as u64;
    let tstate = [0, 0, fs];
    let variables = [0, tstate.as_ptr() as u64];
    let base = PythonFacts {
        own_state: own_state::DYNAMIC,
        finalizing: &raw const finalizing as u64,
        thread_id: 16,
        a: 2,
        b: 8,
        ..facts()
    };
    // SAFETY: as above.
    let found = |facts: &PythonFacts| unsafe { python::thread_state(facts, fs) };
    // glibc: the length stands before the first entry, of two words each; musl: it is the first word, entries of one.
    for (entry, first, at, length_at) in [(16, 2, 2 + 4, 0), (8, 0, 2, 0)] {
        let facts = PythonFacts { c: entry, ..base };
        let mut vector = vec![0_u64; 16];
        vector[length_at] = 9;
        let fill = |vector: &mut Vec<u64>, block: &mut Vec<u64>, value| {
            vector[at] = value;
            block[1] = vector[first..].as_ptr() as u64;
        };
        for absent in [0, u64::MAX] {
            fill(&mut vector, &mut block, absent);
            assert_eq!(found(&facts), 0, "not allocated yet");
        }
        fill(&mut vector, &mut block, variables.as_ptr() as u64);
        assert_eq!(found(&facts), tstate.as_ptr() as u64);
        vector[length_at] = 1;
        assert_eq!(found(&facts), 0, "a vector that has no such entry yet");
    }
}

#[test]
fn a_stale_or_dying_state_is_none() {
    let mut block = [0_u64; 4];
    let fs = block.as_mut_ptr() as u64;
    let mut tstate = [0, 0, fs];
    let at = tstate.as_mut_ptr() as u64;
    // SAFETY: the first word of the block.
    unsafe { (fs as *mut u64).write_volatile(at) };
    let mut finalizing = 0_u64;
    let word = &raw mut finalizing;
    let facts =
        PythonFacts { own_state: own_state::THREAD_LOCAL, finalizing: word as u64, thread_id: 16, ..facts() };
    // SAFETY: all of it is this test's.
    let found = |finalizer: u64| unsafe {
        word.write_volatile(finalizer);
        python::thread_state(&facts, fs)
    };
    assert_eq!([found(0), found(at), found(at + 8)], [at, at, 0]);
    // SAFETY: the third word of the state above.
    unsafe { (at as *mut u64).add(2).write_volatile(fs + 64) };
    assert_eq!(found(0), 0, "a state that names another thread");
}

/// glibc's own vector, of which the length and the entries are nowhere promised.
#[cfg(target_env = "gnu")]
#[test]
fn the_real_vector_of_a_thread_has_the_shape_that_is_assumed() {
    use std::cell::Cell;
    thread_local! {
        static VARIABLE: Cell<u64> = const { Cell::new(0) };
    }
    let look = || {
        let fs: u64;
        // SAFETY: the first word of the thread's control block is its address (x86-64 TLS ABI).
        unsafe { std::arch::asm!("mov {}, fs:[0]", out(reg) fs, options(nostack, readonly)) };
        let tstate = [0, 0, fs];
        VARIABLE.set(tstate.as_ptr() as u64);
        let variable = VARIABLE.with(|v| v.as_ptr() as u64);
        let finalizing = 0_u64;
        // The executable is module 1. Its block is part of what lies below the control block.
        // SAFETY: the vector is there as long as the thread is.
        let (vector, block) = unsafe {
            let vector = python::word(fs + 8);
            (vector, python::word(vector + 16))
        };
        let offset = variable.wrapping_sub(block);
        assert!(offset < 1 << 16, "the block at {block:#x} does not hold {variable:#x}");
        let facts = PythonFacts {
            own_state: own_state::DYNAMIC,
            finalizing: &raw const finalizing as u64,
            thread_id: 16,
            a: 1,
            b: offset,
            c: 16,
            ..facts()
        };
        // SAFETY: this thread's own pointer.
        let found = |facts: &PythonFacts| unsafe { python::thread_state(facts, fs) };
        assert_eq!(found(&facts), tstate.as_ptr() as u64, "by the vector at {vector:#x}");
        // Modules that this thread's vector has no room for.
        for module in [5_000, 1 << 40] {
            assert_eq!(found(&PythonFacts { a: module, ..facts }), 0);
        }
        VARIABLE.set(0);
    };
    look();
    std::thread::spawn(look).join().unwrap();
}

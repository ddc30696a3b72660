//! The strength of the stack hash.

use crate::abi::{self, PythonFacts, chain};
use crate::random::Random;
use crate::stacks::{CODE, Made, Stack, running, shapes};
use crate::{python, state};
use std::collections::{HashMap, HashSet};

/// Hashes of `count` stacks that differ as those of a program do: few code objects near each other, few instructions each,
/// stacks that share most of their frames, neighbours swapped, repeated, left out.
fn related(facts: PythonFacts, count: usize, seed: u64) -> Vec<u64> {
    let state = state(facts);
    let mut random = Random(seed);
    let (mut seen, mut hashes) = (HashSet::new(), Vec::with_capacity(count));
    let mut numbers: Vec<(u16, u16)> = vec![(0, 0); 12];
    while hashes.len() < count {
        match random.below(5) {
            0 => numbers.push((random.below(40) as u16, random.below(12) as u16)),
            1 if numbers.len() > 2 => drop(numbers.remove(random.below(2))),
            2 => {
                let (a, b) = (random.below(numbers.len()), random.below(numbers.len()));
                numbers.swap(a, b);
            }
            3 => {
                let at = random.below(numbers.len());
                numbers[at].1 = (numbers[at].1 + 1) % 12;
            }
            _ => {
                let at = random.below(numbers.len());
                numbers[at].0 = (numbers[at].0 + 1) % 40;
            }
        }
        if numbers.len() > 24 {
            numbers.truncate(8);
        }
        if !seen.insert(numbers.clone()) {
            continue;
        }
        let frames: Vec<Made> = numbers
            .iter()
            .map(|(code, instruction)| {
                let address = CODE + 0xc0 * u64::from(*code);
                let offset = 2 * u64::from(*instruction);
                let old = facts.chain == chain::FRAME_OBJECT;
                Made::Runs(address, if old { offset } else { address + 184 + offset })
            })
            .collect();
        hashes.push(Stack::new(facts, &frames).hash(state));
    }
    hashes
}

/// Pairs that are equal in the bits from `shift` on that are kept.
fn collisions(hashes: &[u64], shift: u32, bits: u32) -> u64 {
    let mut seen: HashMap<u64, u64> = HashMap::with_capacity(hashes.len());
    hashes
        .iter()
        .map(|hash| {
            let count = seen.entry(hash >> shift & ((1 << bits) - 1)).or_default();
            *count += 1;
            *count - 1
        })
        .sum()
}

#[test]
fn stacks_that_are_alike_hash_as_if_by_chance() {
    let count = 400_000;
    for facts in shapes() {
        let hashes = related(facts, count, 1);
        let mut sorted = hashes.clone();
        sorted.sort_unstable();
        sorted.dedup();
        assert_eq!(sorted.len(), count, "two of {count} stacks share a hash");
        // 8 × 10^10 pairs: so many of them fall together in 32 bits by chance, whichever 32.
        let expected = (count as f64).powi(2) / 2.0 / 2_f64.powi(32);
        for shift in [0, 7, 16, 32] {
            let found = collisions(&hashes, shift, 32) as f64;
            assert!(
                (found - expected).abs() < 6.0 * expected.sqrt(),
                "{found} pairs agree in the bits from {shift} on, {expected:.1} would by chance"
            );
        }
        // The agent's table of stacks is indexed by the low bits: no bit of those is biased.
        for bit in 0..64 {
            let ones = hashes.iter().filter(|h| *h >> bit & 1 != 0).count() as f64;
            let (mean, sigma) = (count as f64 / 2.0, (count as f64).sqrt() / 2.0);
            assert!((ones - mean).abs() < 6.0 * sigma, "bit {bit}: {ones} of {count}");
        }
    }
}

#[test]
fn every_bit_of_a_frame_changes_about_half_of_the_hash() {
    for facts in shapes() {
        let state = state(facts);
        let base = running(&facts, 9);
        let before = Stack::new(facts, &base).hash(state);
        let bits = if facts.chain == chain::FRAME_OBJECT { 16 } else { 47 };
        let (mut flips, mut trials) = (0, 0);
        for at in 0..9 {
            let Made::Runs(code, instruction) = base[at] else { unreachable!() };
            let changed = (3..47)
                .map(|bit| Made::Runs(code ^ 1 << bit, instruction))
                .chain((0..bits).map(|bit| Made::Runs(code, instruction ^ 1 << bit)));
            for frame in changed {
                let mut frames = base.clone();
                frames[at] = frame;
                let different = (Stack::new(facts, &frames).hash(state) ^ before).count_ones();
                assert!((8..=56).contains(&different), "frame {at}: {different} bits");
                flips += different;
                trials += 1;
            }
        }
        let mean = f64::from(flips) / f64::from(trials);
        assert!((31.0..33.0).contains(&mean), "{mean} bits on average");
    }
}

#[test]
fn a_new_generation_is_a_new_stack() {
    for facts in shapes() {
        let state = state(facts);
        let stack = Stack::new(facts, &running(&facts, 3));
        let mut seen = HashSet::from([stack.hash(state)]);
        for _ in 0..70_000 {
            // SAFETY: the state is this test's.
            unsafe { python::forget_code(state, CODE + 0x200) };
            assert!(seen.insert(stack.hash(state)), "a hash comes back after {} generations", seen.len());
        }
        let packed = stack.frames(state, 3).0[3];
        assert_eq!(packed >> 32, 70_000);
    }
    // Objects near each other are counted in different places, mostly.
    let mut places: Vec<usize> = (0..1000).map(|n| python::generation_index(CODE + 0xc0 * n)).collect();
    assert!(places.iter().all(|place| *place < abi::CODE_GENERATIONS));
    places.sort_unstable();
    places.dedup();
    assert!(places.len() > 850, "{} places", places.len());
}

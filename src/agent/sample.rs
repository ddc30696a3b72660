//! Sampling by bytes, and the table of the blocks that were sampled.
//!
//! A Poisson process runs over each thread's bytes: the distances between its points are exponential with mean `interval`.
//! An allocation with a point in it is sampled: one of s bytes with probability 1 - exp(-s / interval), independently of all others. Where
//! bytes are passed over (a nested call), a point that falls on them is forgotten and the next drawn: the process has no memory.

use crate::abi::{FILTER_HASH, FILTER_LOG2, Slot, State, TRACKED_BUCKETS};
use core::sync::atomic::{AtomicU8, AtomicU64, Ordering};

/// ln 2 in units of 2^-32.
const LN_2: u128 = 2_977_044_472;

/// Draws the distance to the thread's next point, with the interval that is in force now.
///
/// # Safety
/// `slot` is the calling thread's.
pub unsafe fn draw(state: *mut State, slot: *mut Slot) {
    let interval = (&raw const (*state).interval).read_volatile();
    (*slot).interval = interval;
    // xorshift64* (Vigna 2016).
    let mut x = (*slot).random;
    x ^= x >> 12;
    x ^= x << 25;
    x ^= x >> 27;
    (*slot).random = x;
    let bits = minus_log2(x.wrapping_mul(0x2545_f491_4f6c_dd1d) | 1);
    let bytes = (u128::from(bits) * u128::from(interval & 0xffff_ffff_ffff) * LN_2) >> 64;
    (*slot).until = bytes as u64 as i64;
}

/// -log2(x / 2^64) in units of 2^-32, for x > 0: the whole part by counting zeros, the rest bit by bit by squaring.
fn minus_log2(x: u64) -> u64 {
    let zeros = x.leading_zeros();
    let mut mantissa = x << zeros;
    let mut fraction = 0_u64;
    let mut i = 0;
    while i < 32 {
        let square = u128::from(mantissa) * u128::from(mantissa);
        fraction <<= 1;
        if square >> 127 != 0 {
            fraction |= 1;
            mantissa = (square >> 64) as u64;
        } else {
            mantissa = (square >> 63) as u64;
        }
        i += 1;
    }
    // log2(x) = 63 - zeros + fraction
    (u64::from(zeros) << 32) + (1 << 32) - fraction
}

fn filter_index(address: u64) -> usize {
    ((address as u32 >> 4).wrapping_mul(FILTER_HASH as u32) >> (32 - FILTER_LOG2)) as usize
}

unsafe fn filter(state: *mut State, address: u64) -> &'static AtomicU8 {
    AtomicU8::from_ptr((&raw mut (*state).filter).cast::<u8>().add(filter_index(address)))
}

/// The two buckets of an address.
unsafe fn buckets(state: *mut State, address: u64) -> [*mut u64; 2] {
    let hash = (address >> 4).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let table = (&raw mut (*state).tracked).cast::<u64>();
    let mask = TRACKED_BUCKETS as u64 - 1;
    [table.add((hash >> 50 & mask) as usize * 8), table.add((hash >> 30 & mask) as usize * 8)]
}

/// Puts one entry in the place of another somewhere in the buckets of `address`.
unsafe fn replace(state: *mut State, address: u64, old: u64, new: u64) -> bool {
    for bucket in buckets(state, address) {
        let mut i = 0;
        while i < 8 {
            let entry = AtomicU64::from_ptr(bucket.add(i));
            if entry.load(Ordering::Relaxed) == old
                && entry.compare_exchange(old, new, Ordering::Relaxed, Ordering::Relaxed).is_ok()
            {
                return true;
            }
            i += 1;
        }
    }
    false
}

/// Remembers a sampled block; false when both its buckets are full.
///
/// # Safety
/// The block has not been handed to the application yet.
pub unsafe fn track(state: *mut State, address: u64) -> bool {
    if !replace(state, address, 0, address) {
        return false;
    }
    let _ = filter(state, address).fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| {
        if n == u8::MAX { None } else { Some(n + 1) }
    });
    true
}

/// Forgets a block that is about to be given back; whether it was a sampled one.
///
/// # Safety
/// `state` is the agent's.
pub unsafe fn untrack(state: *mut State, address: u64) -> bool {
    // 0 is what an empty entry holds.
    if address == 0
        || filter(state, address).load(Ordering::Relaxed) == 0
        || !replace(state, address, address, 0)
    {
        return false;
    }
    // A counter that was full says nothing any more: it stays.
    let _ = filter(state, address).fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| {
        if n == u8::MAX || n == 0 { None } else { Some(n - 1) }
    });
    true
}

//! Where an address was last: the writer's own help, of which nothing is in the file.

/// Twice the addresses that a record can name, so that few displace another. That costs a longer record, never a
/// wrong one: who asks compares what is found.
const SLOTS: usize = 2 * super::format::NEAR_ADDRESSES;

/// Numbers by address; what is put last displaces what has its slot. Never emptied.
pub(super) struct Finder {
    numbers: Box<[u32]>,
}

impl Finder {
    pub(super) fn new() -> Self {
        Self { numbers: vec![0; SLOTS].into() }
    }

    pub(super) fn put(&mut self, address: u64, number: u32) {
        self.numbers[slot(address)] = number;
    }

    /// The number that this address may have.
    pub(super) fn find(&self, address: u64) -> u32 {
        self.numbers[slot(address)]
    }
}

fn slot(address: u64) -> usize {
    // Fibonacci hashing: the high bits of the product are well mixed.
    (address.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 47) as usize
}

const _: () = assert!(SLOTS == 1 << 17);

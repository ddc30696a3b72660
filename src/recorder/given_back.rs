//! [`GivenBack`]: addresses that were freed lately and not given out since.
//!
//! glibc frees some blocks twice without fault: when a thread ends, `tcache_thread_shutdown` (malloc/malloc.c) hands
//! every block in the thread's cache, each freed by the program before, to `__libc_free` once more. Such a free is no
//! event of the program, and no free of a block from before the attach. A server with a thread per request makes
//! thousands of them a minute.
//!
//! A table of fixed size in which a newer address takes an older one's place: what it forgets is called unknown, as it
//! would be without the table. It never calls a free of a live block a second one, because an address given out is
//! taken out of it.

use crate::addr::RemoteAddr;

/// Slots of 8 bytes: 512 KiB. A thread's cache holds at most some hundred blocks.
const BITS: u32 = 16;

/// Addresses freed lately.
pub struct GivenBack {
    slots: Box<[u64]>,
}

impl Default for GivenBack {
    fn default() -> Self {
        Self { slots: vec![0; 1 << BITS].into_boxed_slice() }
    }
}

impl GivenBack {
    /// The block at `address` was freed.
    pub fn freed(&mut self, address: RemoteAddr) {
        *self.slot(address) = address.0;
    }

    /// A block was given out at `address`.
    pub fn allocated(&mut self, address: RemoteAddr) {
        let slot = self.slot(address);
        if *slot == address.0 {
            *slot = 0;
        }
    }

    /// True if the block at `address` was freed and the address not given out since.
    pub fn holds(&mut self, address: RemoteAddr) -> bool {
        address.0 != 0 && *self.slot(address) == address.0
    }

    fn slot(&mut self, address: RemoteAddr) -> &mut u64 {
        // Fibonacci hashing of what tells blocks apart: they are 16 bytes from each other at least.
        let hash = (address.0 >> 4).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - BITS);
        &mut self.slots[hash as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_held_from_its_free_until_it_is_given_out() {
        let mut table = GivenBack::default();
        let (one, other) = (RemoteAddr(0x7f00_0000_1010), RemoteAddr(0x7f00_0000_1020));
        assert!(!table.holds(one) && !table.holds(RemoteAddr(0)));
        table.freed(one);
        table.allocated(other);
        assert!(table.holds(one) && !table.holds(other));
        table.allocated(one);
        assert!(!table.holds(one));
    }

    #[test]
    fn neighbouring_blocks_rarely_share_a_slot() {
        let mut table = GivenBack::default();
        let blocks = (0..4096).map(|n| RemoteAddr(0x7f12_3456_7010 + 32 * n));
        blocks.clone().for_each(|block| table.freed(block));
        let held = blocks.filter(|block| table.holds(*block)).count();
        assert!(held > 3900, "{held} of 4096");
    }
}

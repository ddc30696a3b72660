//! A made-up heap: what is free is counted, and what can be no heap is not believed.

use super::*;
use crate::memory::BytesMemory;

const MAIN: RemoteAddr = RemoteAddr(0x7000_0000);
const BLOCKS: RemoteAddr = RemoteAddr(0x1000_0000);
const MMAPPED: RemoteAddr = RemoteAddr(0x7001_0000);

/// One arena with its bins at this offset, and the chunks that the tests link.
struct Made {
    arena: Vec<u8>,
    blocks: Vec<u8>,
    shape: Shape,
}

impl Made {
    fn new(bins: u64, masked: bool) -> Self {
        let shape = Shape { bins, masked };
        let mut made = Self { arena: vec![0; MOST_BYTES], blocks: vec![0; 1 << 16], shape };
        for bin in 0..BINS {
            let head = MAIN.0 + bins + 16 * bin - 16;
            made.put(bins + 16 * bin, head);
            made.put(bins + 16 * bin + 8, head);
        }
        made.put(shape.top(), BLOCKS.0 + 0x8000);
        made.block(0x8000, 0x8001, 0, 0);
        made.put(bins + NEXT, MAIN.0);
        made.put(bins + SYSTEM_MEM, 0x21000);
        made.put(bins + MAX_SYSTEM_MEM, 0x22000);
        made
    }

    fn put(&mut self, at: u64, word: u64) {
        self.arena[at as usize..at as usize + 8].copy_from_slice(&word.to_le_bytes());
    }

    /// A chunk at an offset of the blocks.
    fn block(&mut self, at: usize, size: u64, next: u64, previous: u64) {
        for (i, word) in [0, size, next, previous].iter().enumerate() {
            self.blocks[at + 8 * i..at + 8 * i + 8].copy_from_slice(&word.to_le_bytes());
        }
    }

    /// Two chunks of 48 bytes in their bin.
    fn two_in_a_bin(&mut self) {
        let (bin, a, b) = (2, BLOCKS.0 + 0x100, BLOCKS.0 + 0x200);
        let head = MAIN.0 + self.shape.bins + 16 * bin - 16;
        self.put(self.shape.bins + 16 * bin, a);
        self.put(self.shape.bins + 16 * bin + 8, b);
        self.block(0x100, 48 | 1, b, head);
        self.block(0x200, 48 | 5, head, a);
    }

    fn memory(&self) -> BytesMemory {
        let mut memory = BytesMemory::new();
        memory.map(MAIN, self.arena.clone());
        memory.map(BLOCKS, self.blocks.clone());
        memory.map(MMAPPED, [0x5000_u64.to_le_bytes(), 0x9000_u64.to_le_bytes()].concat());
        memory
    }

    fn gauges(&self) -> Gauges {
        let heap = Heap { main_arena: MAIN, shape: self.shape, mmapped_mem: MMAPPED };
        let mut gauges = Gauges::default();
        heap.read(&self.memory(), &mut Pace::default(), &mut gauges);
        gauges
    }
}

/// Both heads that there were, and the one without fast bins.
const SHAPES: [u64; 4] = [104, 112, 24, 32];

#[test]
fn the_place_of_the_bins_is_found_whatever_the_head() {
    for bins_at in SHAPES {
        let mut made = Made::new(bins_at, true);
        made.two_in_a_bin();
        // A last remainder makes the word pair before the bins look like one of them.
        made.put(made.shape.top() + 8, BLOCKS.0 + 0x100);
        assert_eq!(bins(&made.memory(), MAIN), Some(bins_at));
        assert_eq!(made.shape.fast_bins().is_some(), bins_at > 100);
    }
    assert_eq!(bins(&Made::new(112, true).memory(), MAIN.offset(16)), None);
}

#[test]
fn top_bins_and_fast_bins_are_free() {
    for bins_at in SHAPES {
        let mut made = Made::new(bins_at, true);
        made.two_in_a_bin();
        let mut free = 0x8000 + 2 * 48;
        if let Some(fast) = made.shape.fast_bins() {
            // Two chunks of 32 bytes; links are masked with their own address.
            let (a, b) = (BLOCKS.0 + 0x300, BLOCKS.0 + 0x400);
            made.put(fast, a);
            made.block(0x300, 32 | 1, b ^ ((a + 16) >> 12), 0);
            made.block(0x400, 32 | 1, (b + 16) >> 12, 0);
            free += 64;
        }
        let gauges = made.gauges();
        assert_eq!(gauges.heap_free, Some(free));
        assert_eq!(gauges.heap_in_use, Some(0x21000 - free + 0x5000));
        assert_eq!(gauges.heap_held, Some(0x26000));
    }
}

#[test]
fn a_list_that_breaks_makes_what_is_free_unknown() {
    let breaks: [fn(&mut Made); 4] = [
        // A neighbour that does not point back.
        |made| made.block(0x200, 48 | 1, MAIN.0 + made.shape.bins + 16, BLOCKS.0 + 0x300),
        // A size of another list.
        |made| made.block(0x100, 64 | 1, BLOCKS.0 + 0x200, MAIN.0 + made.shape.bins + 16),
        // A link to nowhere.
        |made| made.block(0x200, 48 | 1, 0xdead_0000, BLOCKS.0 + 0x100),
        // A top larger than all there is.
        |made| made.block(0x8000, 0x100_0001, 0, 0),
    ];
    for break_it in breaks {
        let mut made = Made::new(112, true);
        made.two_in_a_bin();
        break_it(&mut made);
        let gauges = made.gauges();
        assert_eq!((gauges.heap_free, gauges.heap_in_use), (None, None));
        assert_eq!(gauges.heap_held, Some(0x26000));
    }
}

#[test]
fn a_list_without_end_ends() {
    let mut made = Made::new(112, true);
    let fast = made.shape.fast_bins().unwrap();
    made.put(fast, BLOCKS.0 + 0x300);
    made.block(0x300, 32, (BLOCKS.0 + 0x300) ^ ((BLOCKS.0 + 0x310) >> 12), 0);
    assert_eq!(made.gauges().heap_free, None);
}

#[test]
fn what_a_function_refers_to() {
    // lea 0x100(%rip),%rbx; mov 0x200(%rip),%r12; mov 0x300(%rip),%edx; mov %rax,0x400(%rip)
    let code = [
        0x48, 0x8d, 0x1d, 0, 1, 0, 0, 0x4c, 0x8b, 0x25, 0, 2, 0, 0, 0x8b, 0x15, 0, 3, 0, 0, 0x48, 0x89, 0x05,
        0, 4, 0, 0,
    ];
    let refers = references(&code, RemoteAddr(0x1000));
    assert_eq!(refers.taken, [RemoteAddr(0x1107)]);
    assert_eq!(refers.loaded, [RemoteAddr(0x120e)]);
}

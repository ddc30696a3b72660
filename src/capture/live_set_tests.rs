//! [`LiveSet`] against a model that remembers every byte of every mapping.

use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;

fn alloc(allocator: AllocatorKind, address: u64, size: u64, stack: u32) -> Allocation {
    Allocation {
        allocator,
        tid: 1 + stack % 3,
        address: RemoteAddr(address),
        size,
        stack: StackId(stack),
        interval: 0,
    }
}

fn unmap(address: u64, len: u64) -> Unmap {
    Unmap { tid: 1, address: RemoteAddr(address), len }
}

/// One map entry per byte: slow and obvious.
#[derive(Default)]
struct Model {
    blocks: BTreeMap<u64, (u64, u32)>,
    bytes: BTreeMap<u64, (u64, u32)>,
    mappings: u64,
    peak: u64,
}

impl Model {
    fn live(&self) -> u64 {
        self.blocks.values().map(|(size, _)| size).sum::<u64>() + self.bytes.len() as u64
    }

    fn count(&self) -> usize {
        let owners: std::collections::BTreeSet<u64> = self.bytes.values().map(|(owner, _)| *owner).collect();
        self.blocks.len() + owners.len()
    }

    fn by_stack(&self) -> BTreeMap<u32, u64> {
        let mut sums = BTreeMap::new();
        for (size, stack) in self.blocks.values() {
            *sums.entry(*stack).or_default() += size;
        }
        for (_, stack) in self.bytes.values() {
            *sums.entry(*stack).or_default() += 1;
        }
        sums.retain(|_, bytes| *bytes > 0);
        sums
    }
}

#[derive(Clone, Debug)]
enum Step {
    Malloc(u64, u64, u32),
    Free(u64),
    Map(u64, u64, u32),
    Unmap(u64, u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0u64..8, 0u64..50, 0u32..5).prop_map(|(a, s, k)| Step::Malloc(a, s, k)),
        (0u64..8).prop_map(Step::Free),
        (0u64..40, 1u64..20, 0u32..5).prop_map(|(a, s, k)| Step::Map(a, s, k)),
        (0u64..45, 0u64..25).prop_map(|(a, s)| Step::Unmap(a, s)),
    ]
}

proptest! {
    #[test]
    fn it_equals_the_naive_model(steps in prop::collection::vec(step(), 0..80)) {
        let mut set = LiveSet::new(1);
        let mut model = Model::default();
        for step in steps {
            match step {
                Step::Malloc(address, size, stack) => {
                    let displaced = set.allocate(&alloc(AllocatorKind::Malloc, address, size, stack), 0);
                    let old = model.blocks.insert(address, (size, stack));
                    prop_assert_eq!(matches!(displaced, Displaced::Block(_)), old.is_some());
                }
                Step::Free(address) => {
                    let freed = set.free(RemoteAddr(address)).map(|block| (block.size, block.stack.0));
                    prop_assert_eq!(freed, model.blocks.remove(&address));
                }
                Step::Map(address, size, stack) => {
                    set.allocate(&alloc(AllocatorKind::Mmap, address, size, stack), 0);
                    model.mappings += 1;
                    for byte in address..address + size {
                        model.bytes.insert(byte, (model.mappings, stack));
                    }
                }
                Step::Unmap(address, len) => {
                    let given: u64 = set.unmap(&unmap(address, len)).iter().map(|part| part.bytes).sum();
                    let taken = (address..address + len).filter(|byte| model.bytes.remove(byte).is_some());
                    prop_assert_eq!(given, taken.count() as u64);
                }
            }
            model.peak = model.peak.max(model.live());
            prop_assert_eq!(set.live_bytes(), model.live());
            prop_assert_eq!(set.live_blocks(), model.count());
            prop_assert_eq!(set.peak_bytes(), model.peak);
        }
        let mut by_stack = BTreeMap::new();
        for (block, bytes) in set.iter() {
            *by_stack.entry(block.stack.0).or_default() += bytes;
        }
        by_stack.retain(|_, bytes: &mut u64| *bytes > 0);
        prop_assert_eq!(by_stack, model.by_stack());
    }

    #[test]
    fn wild_numbers_do_not_overflow(ranges in prop::collection::vec((any::<bool>(), any::<u64>(), any::<u64>()), 0..30)) {
        let mut set = LiveSet::new(4096);
        for (map, address, size) in ranges {
            if map {
                set.allocate(&alloc(AllocatorKind::Mmap, address, size, 0), u64::MAX);
                set.allocate(&alloc(AllocatorKind::Malloc, address, size, 0), u64::MAX);
            } else {
                set.unmap(&unmap(address, size));
            }
        }
    }
}

#[test]
fn a_mapping_with_a_hole_is_one_mapping_until_nothing_is_left() {
    let mut set = LiveSet::new(4096);
    set.allocate(&alloc(AllocatorKind::Mmap, 0x10000, 0x5000, 1), 0);
    let parts = set.unmap(&unmap(0x12000, 1));
    assert_eq!((parts[0].bytes, parts[0].ended), (0x1000, false));
    assert_eq!((set.live_bytes(), set.live_blocks()), (0x4000, 1));
    let parts = set.unmap(&unmap(0, u64::MAX));
    assert_eq!(parts.iter().map(|part| part.ended).collect::<Vec<_>>(), [false, true]);
    assert_eq!((set.live_bytes(), set.live_blocks()), (0, 0));
}

#[test]
fn an_allocation_over_a_live_block_tells_of_the_missed_free() {
    let mut set = LiveSet::new(4096);
    assert_eq!(set.allocate(&alloc(AllocatorKind::Malloc, 16, 10, 1), 2_000_000), Displaced::Nothing);
    match set.allocate(&alloc(AllocatorKind::Calloc, 16, 20, 2), 0) {
        Displaced::Block(old) => assert_eq!((old.size, old.stack, old.time_ms), (10, StackId(1), 2)),
        other => panic!("{other:?}"),
    }
    assert_eq!((set.live_bytes(), set.live_blocks(), set.peak_bytes()), (20, 1, 20));
}

#[test]
fn samples_count_for_what_they_stand_for() {
    let sample = |size, interval| Allocation { interval, ..alloc(AllocatorKind::Malloc, size, size, 1) };
    let mut set = LiveSet::new(4096);
    set.allocate(&sample(64, 0), 0);
    set.allocate(&sample(1 << 18, 1 << 19), 0);
    // 2.5415 of 256 KiB.
    assert_eq!((set.live_bytes(), set.live_blocks()), (64 + 666_237, 1 + 3));
    set.allocate(&sample(16, 1 << 19), 0);
    assert_eq!((set.live_bytes(), set.live_blocks()), (64 + 666_237 + (1 << 19) + 8, 1 + 3 + 32768));
    let peak = set.live_bytes();
    // In the place of a block with another interval.
    set.allocate(&Allocation { interval: 1 << 20, ..sample(64, 0) }, 0);
    set.allocate(&sample(64, 0), 0);
    assert_eq!(set.live_bytes(), peak);
    assert_eq!(set.block(RemoteAddr(16)).unwrap().interval, 1 << 19);
    // A mapping is certain, whatever it is told with.
    set.allocate(&Allocation { interval: 7, ..alloc(AllocatorKind::Mmap, 0x10000, 0x1000, 1) }, 0);
    assert_eq!(set.live_bytes(), peak + 0x1000);
    set.unmap(&unmap(0x10000, 0x1000));
    for address in [16, 1 << 18, 64] {
        assert!(set.free(RemoteAddr(address)).is_some());
    }
    assert_eq!((set.live_bytes(), set.live_blocks()), (0, 0));
}

#[test]
fn threads_that_come_and_go_take_no_room() {
    let mut live = LiveSet::new(4096);
    let sampled = |tid: u32, address: u64| Allocation {
        tid,
        interval: 100,
        ..alloc(AllocatorKind::Malloc, address, 8, tid)
    };
    for tid in 0..100_000 {
        // One thread in a hundred leaves a block behind.
        live.allocate(&sampled(tid, 0x1000), 0);
        if tid % 100 == 0 {
            live.allocate(&sampled(tid, 0x10_0000 + u64::from(tid) * 16), 0);
        }
        assert_eq!(live.free(RemoteAddr(0x1000)).map(|block| block.tid), Some(tid));
    }
    // 1,000 in use and as many in waiting, not 100,000.
    assert!(live.origins.entries.len() < 5_000, "{}", live.origins.entries.len());
    assert!(live.origins.ids.len() < 5_000 && live.has_samples());
    for tid in (0..100_000).step_by(100) {
        let block = live.free(RemoteAddr(0x10_0000 + u64::from(tid) * 16)).unwrap();
        assert_eq!((block.tid, block.interval, block.stack), (tid, 100, StackId(tid)));
    }
    assert_eq!((live.live_bytes(), live.origins.unused), (0, live.origins.ids.len()));
}

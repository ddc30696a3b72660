//! Truncated, flipped and made-up captures through the reader and every report: an error or a partial
//! report, never a panic.

mod script;

use proptest::prelude::*;
use script::use_up::{use_up, with_chunks};
use std::sync::LazyLock;

static SHOP: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("shop.heaptap");
    script::shop(&path);
    std::fs::read(path).unwrap()
});

static NATIVE: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("native.heaptap");
    script::native::shop_native(&path);
    std::fs::read(path).unwrap()
});

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn truncated_captures_do_no_harm(cut: prop::sample::Index, native: bool) {
        let whole = if native { &*NATIVE } else { &*SHOP };
        use_up(&whole[..cut.index(whole.len())]);
    }

    #[test]
    fn flipped_bits_do_no_harm(
        flips in prop::collection::vec(any::<prop::sample::Index>(), 1..6),
        native: bool,
    ) {
        let mut bytes = if native { NATIVE.clone() } else { SHOP.clone() };
        for flip in flips {
            let bit = flip.index(bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
        use_up(&bytes);
    }

    #[test]
    fn made_up_records_do_no_harm(
        columns in prop::collection::vec(prop_oneof![any::<u8>(), 0u8..8], 120),
        native: bool,
        symbols in prop::collection::vec(prop_oneof![any::<u8>(), 0u8..4], 0..60),
        events in prop::collection::vec(prop_oneof![any::<u8>(), 0x20u8..0x2e, 0u8..8, 0x80u8..0x84], 0..300),
    ) {
        // A string, a frame, a stack and a thread first, so that some of what follows has a meaning.
        let start = [0x20, 0, 1, b'f', 0x21, 0, 0, 0, 1, 0x22, 2, 0, 0, 0x24, 2, 0x2a, 100];
        // A module, and a native frame of it that calls that function.
        let code = [0x2b, 0, 1, b'm', 0, 0x2c, 2, 1, 7, 0, 0x22, 0, 1, 1];
        let code = if native { &code[..] } else { &[] };
        let events = [&[40, 40, 40][..], &columns, &start, code, &events].concat();
        use_up(&with_chunks(native, &[(2, &events), (6, &symbols)]));
    }
}

#[test]
fn stacks_as_deep_as_a_file_can_hold_do_no_harm() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("deep.heaptap");
    let mut script = script::Script::create(&path, &script::header());
    let recursive = vec![("descend", "a.py", 1); 100_000];
    let deep = script.stack(&recursive);
    let deeper = script.stack(&[&recursive[..], &[("leaf", "a.py", 2)]].concat());
    script.allocate(heaptap::capture::AllocatorKind::Malloc, 1, 16, 10, deep);
    script.allocate(heaptap::capture::AllocatorKind::Malloc, 1, 32, 10, deeper);
    // And one that branches at every level.
    for depth in (10..3000).step_by(10) {
        let stack = script.stack(&[&recursive[..depth], &[("branch", "a.py", 3)]].concat());
        script.allocate(heaptap::capture::AllocatorKind::Malloc, 1, 64 * depth as u64, 10, stack);
    }
    script.finish();
    use_up(&std::fs::read(&path).unwrap());
}

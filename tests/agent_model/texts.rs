//! What is told of code objects made of a few words.

use crate::abi::{PythonFacts, State, part};
use crate::stacks::CODE;
use crate::{codes, facts, state};

/// `str` as 3.12 lays it out: state 32, length 16, data behind 40 or 56 bytes, pointer at 56.
fn text_facts() -> PythonFacts {
    PythonFacts {
        ob_type: 8,
        code_type: 0xc0de,
        co_name: 16,
        co_filename: 24,
        co_linetable: 32,
        co_firstlineno: 40,
        co_firsttraceable: 44,
        bytes_size: 16,
        bytes_data: 32,
        str_length: 16,
        str_state: 32,
        str_ascii_data: 40,
        str_compact_data: 56,
        str_data: 56,
        str_kind_bit: 2,
        str_compact_bit: 5,
        str_ascii_bit: 6,
        ..facts()
    }
}

/// A `str` whose `data` follow its header, or stand elsewhere (`data` then is the pointer to them).
fn text(width: u32, compact: bool, ascii: bool, length: u64, data: &[u8]) -> Vec<u64> {
    let start = if compact && ascii { 40 } else { 56 };
    let mut bytes = vec![0; start];
    bytes[16..24].copy_from_slice(&length.to_le_bytes());
    let state = 1 | width << 2 | u32::from(compact) << 5 | u32::from(ascii) << 6;
    bytes[32..36].copy_from_slice(&state.to_le_bytes());
    bytes.extend_from_slice(data);
    bytes.resize(bytes.len().next_multiple_of(8), 0xee);
    bytes.chunks_exact(8).map(|w| u64::from_le_bytes(w.try_into().unwrap())).collect()
}

/// A `bytes` of this length.
fn line_table(length: u64, data: &[u8]) -> Vec<u64> {
    let mut bytes = vec![0; 32];
    bytes[16..24].copy_from_slice(&length.to_le_bytes());
    bytes.extend_from_slice(data);
    bytes.resize(bytes.len().next_multiple_of(8), 0xee);
    bytes.chunks_exact(8).map(|w| u64::from_le_bytes(w.try_into().unwrap())).collect()
}

type Parts = Vec<(u32, u64, Vec<u8>)>;

fn code_object(references: u64, name: u64, file: u64, lines: u64) -> [u64; 6] {
    [references, 0xc0de, name, file, lines, 17 | 3 << 32]
}

/// The parts that are told of a code object, pieces put together, and how many pieces; `None` if refused.
fn told(state: *mut State, code: u64, refuse_at: usize) -> (Option<Parts>, usize) {
    let (mut parts, mut pieces): (Parts, usize) = (Vec::new(), 0);
    let mut emit = |words: &[u64; 4], bytes: *const u8, len: usize| {
        assert!(pieces < refuse_at, "told on after a refusal");
        if pieces + 1 == refuse_at {
            pieces += 1;
            return false;
        }
        pieces += 1;
        let [its_code, part, total, place] = *words;
        assert_eq!((its_code, part & 0xffff_ffff, place >> 32), (code, 7, len as u64));
        let part = (part >> 32) as u32;
        if place & 0xffff_ffff == 0 {
            parts.push((part, total, Vec::new()));
        }
        let last = parts.last_mut().unwrap();
        assert_eq!((last.0, last.1, last.2.len() as u64), (part, total, place & 0xffff_ffff));
        if len != 0 {
            // SAFETY: the piece is of the objects that this test made.
            last.2.extend(unsafe { std::slice::from_raw_parts(bytes, len) });
        }
        true
    };
    // SAFETY: the code object and all it leads to are the test's.
    let done = unsafe { codes::tell(state, code, 7, &mut emit) };
    (done.then_some(parts), pieces)
}

#[test]
fn every_kind_of_string_is_told() {
    let state = state(text_facts());
    let far = [0x6f_u8, 0x66, 0x66];
    let elsewhere = (far.as_ptr() as u64).to_le_bytes();
    let long = vec![b'n'; 5000];
    let wide: Vec<u8> = (0..6000_u32).flat_map(|n| (0x1_f400 + n % 64).to_le_bytes()).collect();
    // (name, its part, its bytes)
    let cases = [
        (text(1, true, true, 5, b"ascii"), part::NAME_1, b"ascii".to_vec()),
        (text(1, true, false, 2, &[0xe9, 0x61]), part::NAME_1, vec![0xe9, 0x61]),
        (text(2, true, false, 2, &[0x2d, 0x4e, 0x87, 0x65]), part::NAME_2, vec![0x2d, 0x4e, 0x87, 0x65]),
        (text(4, true, false, 6000, &wide), part::NAME_4, wide[..4 * 4097].to_vec()),
        (text(1, true, true, 5000, &long), part::NAME_1, long[..4097].to_vec()),
        (text(1, false, false, 3, &elsewhere), part::NAME_1, b"off".to_vec()),
        (text(1, false, true, 3, &elsewhere), part::NAME_1, b"off".to_vec()),
        (text(1, true, true, 0, b""), part::NAME_1, vec![]),
        // Not there, contradictory, or of a length that cannot be.
        (text(1, false, false, 3, &[0; 8]), part::NAME_1, vec![]),
        (text(0, false, false, 3, &elsewhere), part::NAME_1, vec![]),
        (text(3, true, false, 1, b"abc"), part::NAME_1, vec![]),
        (text(2, true, true, 1, b"ab"), part::NAME_1, vec![]),
        (text(1, true, true, u64::MAX, b"ab"), part::NAME_1, vec![]),
    ];
    let file = text(1, true, true, 2, b"/f");
    let lines = line_table(3, b"\x80\x01\x02");
    for (name, part, bytes) in cases {
        let code = code_object(1, name.as_ptr() as u64, file.as_ptr() as u64, lines.as_ptr() as u64);
        let (parts, _) = told(state, code.as_ptr() as u64, usize::MAX);
        let expected = [
            (part::NUMBERS, vec![17, 0, 0, 0, 3, 0, 0, 0]),
            (part, bytes),
            (part::FILE_1, b"/f".to_vec()),
            (part::LINES, b"\x80\x01\x02".to_vec()),
        ];
        assert_eq!(parts.unwrap(), expected.map(|(part, bytes)| (part, bytes.len() as u64, bytes)));
    }
}

#[test]
fn large_parts_come_in_pieces_and_a_refusal_ends_it() {
    let state = state(text_facts());
    let table: Vec<u8> = (0..70_000_u32).map(|n| n as u8).collect();
    let name = text(1, true, true, 4, b"name");
    let file = text(2, true, false, 3, b"\x01\x04\x02\x04\x03\x04");
    let lines = line_table(70_000, &table);
    let code = code_object(2, name.as_ptr() as u64, file.as_ptr() as u64, lines.as_ptr() as u64);
    let at = code.as_ptr() as u64;
    let (parts, pieces) = told(state, at, usize::MAX);
    let parts = parts.unwrap();
    assert_eq!(pieces, 3 + 70_000_usize.div_ceil(8 << 10));
    assert_eq!((parts[2].0, parts[3].0, &parts[3].2), (part::FILE_2, part::LINES, &table));
    for refuse_at in 1..=pieces {
        assert_eq!(told(state, at, refuse_at), (None, refuse_at));
    }
    for length in [(4 << 20) + 1, u64::MAX, 1 << 63] {
        let code = code_object(2, name.as_ptr() as u64, file.as_ptr() as u64, {
            let lines = Box::leak(line_table(length, b"x").into_boxed_slice());
            lines.as_ptr() as u64
        });
        let (parts, _) = told(state, code.as_ptr() as u64, usize::MAX);
        assert_eq!(parts.unwrap().last(), Some(&(part::LINES, 0, vec![])), "a table of {length} bytes");
    }
    let code = code_object(2, 0, 0, 0);
    let (parts, _) = told(state, code.as_ptr() as u64, usize::MAX);
    let empty = |part| (part, 0, vec![]);
    assert_eq!(parts.unwrap()[1..], [part::NAME_1, part::FILE_1, part::LINES].map(empty));
}

#[test]
fn what_is_no_living_code_object_is_unknown() {
    let state = state(text_facts());
    // Nothing that they point to may be touched.
    let other_type = [1, 0xbad, 1, 1, 1, 1_u64];
    let dying = code_object(0, 1, 1, 1);
    for at in [0, other_type.as_ptr() as u64, dying.as_ptr() as u64] {
        let (parts, _) = told(state, at, usize::MAX);
        let unknown = b"<unknown>".to_vec();
        let expected = [
            (part::NUMBERS, 8, vec![0; 8]),
            (part::NAME_1, 9, unknown.clone()),
            (part::FILE_1, 9, unknown),
            (part::LINES, 0, vec![]),
        ];
        assert_eq!(parts.unwrap(), expected);
    }
}

#[test]
fn told_is_what_was_marked_and_nothing_else() {
    let state = state(facts());
    // SAFETY: the state is this test's.
    let is_told = |code, generation| unsafe { codes::is_told(state, code, generation) };
    // SAFETY: as above.
    let mark = |code, generation| unsafe { codes::mark_told(state, code, generation) };
    assert!(!is_told(0, 0) && !is_told(CODE, 0), "nothing is told of at first");
    for (code, generation) in [(CODE, 0), (CODE, 1), (0, 0), (CODE + 16, u32::MAX)] {
        assert!(!is_told(code, generation));
        mark(code, generation);
        mark(code, generation);
        assert!(is_told(code, generation));
    }
    assert!(is_told(CODE, 0) && !is_told(CODE, 2) && !is_told(CODE + 16, 0));
    // A large program's code objects: most are remembered, none is taken for another.
    let codes: Vec<u64> = (0..3000).map(|n| CODE + 0x1_0000 + 0x130 * n / 16 * 16).collect();
    for code in &codes {
        assert!(!is_told(*code, 5), "{code:#x} was never marked");
        mark(*code, 5);
        assert!(is_told(*code, 5), "the one marked last");
    }
    let kept = codes.iter().filter(|code| is_told(**code, 5)).count();
    assert!(kept > 2500, "{kept} of {} are remembered", codes.len());
    assert!(codes.iter().all(|code| !is_told(*code, 4) && !is_told(*code + 16, 5)));
}

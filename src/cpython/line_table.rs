//! From an instruction to its line: the three formats of a code object's line table.
//!
//! Bytes in, lines out. References: `Objects/lnotab_notes.txt` (3.8 to 3.10), `Objects/locations.md` (3.11,
//! later `InternalDocs/code_objects.md`). The bytes are untrusted: whatever they hold, decoding ends.

use super::layout::LineTableFormat;

/// The line of the instruction at byte offset `lasti`; `None` if the instruction has none.
///
/// A frame that has not started (`lasti` < 0) is on the first line.
pub fn line_at(format: LineTableFormat, table: &[u8], first_line: i32, lasti: i32) -> Option<i32> {
    if lasti < 0 {
        return Some(first_line);
    }
    match format {
        LineTableFormat::Lnotab => Some(lnotab(table, first_line, lasti)),
        LineTableFormat::Linetable => linetable(table, first_line, lasti),
        LineTableFormat::Locations => locations(table, first_line, lasti),
    }
}

/// Pairs (address increment u8, line increment i8): the last line whose address is not beyond `lasti`.
fn lnotab(table: &[u8], first_line: i32, lasti: i32) -> i32 {
    let (mut line, mut addr) = (first_line, 0_i32);
    for pair in table.chunks_exact(2) {
        addr = addr.saturating_add(i32::from(pair[0]));
        if addr > lasti {
            break;
        }
        line = line.wrapping_add(i32::from(pair[1] as i8));
    }
    line
}

/// PEP 626: pairs (length in bytes u8, line increment i8), -128 for a stretch without line.
fn linetable(table: &[u8], first_line: i32, lasti: i32) -> Option<i32> {
    let (mut line, mut end) = (first_line, 0_i32);
    for pair in table.chunks_exact(2) {
        let delta = pair[1] as i8;
        if delta != -128 {
            line = line.wrapping_add(i32::from(delta));
        }
        end = end.saturating_add(i32::from(pair[0]));
        if end > lasti {
            return (delta != -128).then_some(line);
        }
    }
    None
}

/// PEP 657: entries of a byte `1ccccnnn` (kind c, n+1 code units of 2 bytes) and what the kind calls for.
fn locations(table: &[u8], first_line: i32, lasti: i32) -> Option<i32> {
    let (mut line, mut end, mut at) = (first_line, 0_i32, 0);
    while let Some(&head) = table.get(at) {
        at += 1;
        let kind = head >> 3 & 15;
        let delta = match kind {
            13 | 14 => signed_varint(table, at),
            10..=12 => i32::from(kind) - 10,
            _ => 0,
        };
        line = line.wrapping_add(delta);
        end = end.saturating_add((i32::from(head & 7) + 1) * 2);
        if end > lasti {
            return (kind != 15).then_some(line);
        }
        // Only the first byte of an entry has the top bit set.
        while table.get(at).is_some_and(|b| b & 0x80 == 0) {
            at += 1;
        }
    }
    None
}

/// Six bits a byte, lowest first, bit 6 continues; the sign is the lowest bit of the whole.
fn signed_varint(table: &[u8], mut at: usize) -> i32 {
    let (mut value, mut shift) = (0_u64, 0);
    while let Some(&byte) = table.get(at) {
        value |= u64::from(byte & 63) << shift;
        shift += 6;
        at += 1;
        if byte & 64 == 0 || shift > 36 {
            break;
        }
    }
    let magnitude = (value >> 1) as i32;
    if value & 1 != 0 { magnitude.wrapping_neg() } else { magnitude }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn lnotab_steps_forwards_and_backwards() {
        // Line 10 at 0, 12 at 6, 11 at 10.
        let table = [6, 2, 4, 0xff];
        let at = |lasti| line_at(LineTableFormat::Lnotab, &table, 10, lasti);
        assert_eq!(
            [at(-1), at(0), at(5), at(6), at(9), at(10), at(500)].map(Option::unwrap),
            [10, 10, 10, 12, 12, 11, 11]
        );
    }

    #[test]
    fn linetable_knows_stretches_without_line() {
        let table = [4, 1, 2, 0x80, 6, 0xff];
        let at = |lasti| line_at(LineTableFormat::Linetable, &table, 10, lasti);
        assert_eq!(
            [at(0), at(2), at(4), at(6), at(10), at(12)],
            [Some(11), Some(11), None, Some(10), Some(10), None]
        );
    }

    #[test]
    fn locations_of_every_kind() {
        // short (1 unit), one-line +2 (2 units), none (1), no-columns svarint -3 (1), long svarint +70 (1)
        let table = [
            0x80,
            5,
            0x80 | 12 << 3 | 1,
            1,
            2,
            0x80 | 15 << 3,
            0x80 | 13 << 3,
            7,
            0x80 | 14 << 3,
            0x40 | 12,
            2,
            0,
            1,
            2,
        ];
        let at = |lasti| line_at(LineTableFormat::Locations, &table, 10, lasti);
        assert_eq!(
            [at(0), at(2), at(4), at(6), at(8), at(10), at(12)],
            [Some(10), Some(12), Some(12), None, Some(9), Some(79), None]
        );
    }

    proptest! {
        #[test]
        fn any_bytes_end(table in proptest::collection::vec(any::<u8>(), 0..400), first: i32, lasti: i32) {
            for format in [LineTableFormat::Lnotab, LineTableFormat::Linetable, LineTableFormat::Locations] {
                line_at(format, &table, first, lasti);
            }
        }
    }
}

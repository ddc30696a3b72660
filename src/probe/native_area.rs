//! [`NativeArea`]: the code of a process and its unwind rows, laid out for the agent ([`Directory`]) in the memory behind its state.
//!
//! Says what is to be written where; whoever has the process's memory writes it. Nothing is written over that a thread may be reading: rows
//! stay until the end (and are used again should their file come back), and directories lie in two places by turns, of which the
//! older one is used anew when no thread is in the agent.

use crate::addr::{Bias, RemoteAddr};
use crate::agent_abi::{BLOCK, CodeRange, Directory};
use crate::image::UnwindRows;
use crate::unwind_abi::Rule;
use std::collections::HashMap;
use std::sync::Arc;

/// Bytes of each of the two places for directories: some 4,600 ranges.
const DIRECTORIES: u64 = 256 << 10;
/// Room for the rows of files that are mapped later; or as much again as the first ones take.
const TO_COME: u64 = 8 << 20;

/// Code of one file where it is mapped.
#[derive(Debug, Clone)]
pub struct MappedCode {
    /// What to add to the file's addresses.
    pub bias: Bias,
    /// First byte and one past the last of each range with code.
    pub ranges: Vec<(RemoteAddr, RemoteAddr)>,
    /// The file's rows. The same rows are written once.
    pub rows: Arc<UnwindRows>,
    /// The rule for all of it, if there are none.
    pub rule: Rule,
}

/// There is no room for what a process has mapped since recording began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{needed} bytes are needed for unwind data and {left} are left")]
pub struct Full {
    /// Bytes needed.
    pub needed: u64,
    /// Bytes that are left.
    pub left: u64,
}

/// Bytes, and where they belong.
pub type Write = (RemoteAddr, Vec<u8>);

/// What is to be written for some code to be known.
#[derive(Debug)]
pub struct Published {
    /// In this order.
    pub writes: Vec<Write>,
    /// Where the directory then is that names all of it.
    pub directory: RemoteAddr,
    /// Its number.
    pub number: u64,
    /// Some of it had no room, and is not known.
    pub left_out: Option<Full>,
}

/// Where a file's rows lie.
#[derive(Debug, Clone, Copy)]
struct Placed {
    rows: u64,
    index: u64,
    first: u32,
    blocks: u32,
}

#[derive(Debug)]
struct Space {
    next: u64,
    end: u64,
}

impl Space {
    fn take(&mut self, needed: u64) -> Result<u64, Full> {
        let (at, left) = (self.next, self.end - self.next);
        if needed.next_multiple_of(64) > left {
            return Err(Full { needed, left });
        }
        self.next += needed.next_multiple_of(64);
        Ok(at)
    }
}

/// See the module.
#[derive(Debug)]
pub struct NativeArea {
    base: u64,
    directories: Space,
    /// Directories go to the second of their places.
    second: bool,
    /// Number of the latest.
    number: u64,
    rows: Space,
    /// By the address of the rows, which are kept beside it.
    placed: HashMap<usize, (Placed, Arc<UnwindRows>)>,
}

impl NativeArea {
    /// An empty area of `len` bytes, [`NativeArea::len_for`] of what comes first.
    pub fn new(base: RemoteAddr, len: u64) -> Self {
        let rows = base.0 + 2 * DIRECTORIES;
        Self {
            base: base.0,
            directories: Space { next: base.0, end: base.0 + DIRECTORIES },
            second: false,
            number: 0,
            rows: Space { next: rows, end: (base.0 + len).max(rows) },
            placed: HashMap::new(),
        }
    }

    /// Number of the directory that was published last.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Bytes of an area for this code, and for what may be mapped later. What is not used is never touched.
    pub fn len_for(code: &[MappedCode]) -> u64 {
        let rows = Self::needed(code);
        2 * DIRECTORIES + rows + rows.max(TO_COME)
    }

    /// Bytes that this code takes.
    pub fn needed(code: &[MappedCode]) -> u64 {
        let mut area = Self::new(RemoteAddr(4096), u64::MAX / 2);
        let (rows, directories) = (area.rows.next, area.directories.next);
        area.publish(code, || true);
        area.rows.next - rows + area.directories.next - directories
    }

    /// What is to be written for this code to be known, and no other. `None`: not now, there is no place for a directory before
    /// `is_quiet` (no thread is in the agent).
    pub fn publish(&mut self, code: &[MappedCode], is_quiet: impl FnOnce() -> bool) -> Option<Published> {
        let count: usize = code.iter().map(|code| code.ranges.len()).sum();
        let most = (DIRECTORIES as usize - size_of::<Directory>()) / size_of::<CodeRange>();
        let len = (size_of::<Directory>() + count.min(most) * size_of::<CodeRange>()) as u64;
        let directory = match self.directories.take(len) {
            Ok(at) => at,
            Err(_) if is_quiet() => {
                self.second = !self.second;
                let from = self.base + if self.second { DIRECTORIES } else { 0 };
                self.directories = Space { next: from, end: from + DIRECTORIES };
                self.directories.take(len).ok()?
            }
            Err(_) => return None,
        };
        let (mut writes, mut ranges, mut left_out) = (Vec::new(), Vec::new(), None);
        for code in code {
            match self.place(&code.rows, &mut writes) {
                Ok(placed) => ranges.extend(code.ranges.iter().map(|range| range_of(code, *range, placed))),
                Err(full) => left_out = Some(full),
            }
        }
        ranges.sort_by_key(|range| range.start);
        ranges.dedup_by(|next, before| next.start < before.end);
        if ranges.len() > most {
            left_out = Some(Full { needed: len, left: DIRECTORIES });
            ranges.truncate(most);
        }
        self.number += 1;
        let mut bytes = [ranges.len() as u64, self.number].map(u64::to_le_bytes).concat();
        ranges.iter().for_each(|range| put(&mut bytes, range));
        writes.push((RemoteAddr(directory), bytes));
        Some(Published { writes, directory: RemoteAddr(directory), number: self.number, left_out })
    }

    fn place(&mut self, rows: &Arc<UnwindRows>, writes: &mut Vec<Write>) -> Result<Placed, Full> {
        if let Some((placed, _)) = self.placed.get(&(Arc::as_ptr(rows) as usize)) {
            return Ok(*placed);
        }
        let mut placed = Placed { rows: 0, index: 0, first: 0, blocks: 0 };
        if let Some((first, _)) = rows.rows().next() {
            let (bytes, index) = packed(rows, first);
            let index_at = (bytes.len() as u64).next_multiple_of(64);
            placed.rows = self.rows.take(index_at + 4 * index.len() as u64)?;
            placed.index = placed.rows + index_at;
            placed.first = first;
            placed.blocks = index.len() as u32 - 1;
            writes.push((RemoteAddr(placed.rows), bytes));
            writes.push((RemoteAddr(placed.index), index.iter().flat_map(|row| row.to_le_bytes()).collect()));
        }
        self.placed.insert(Arc::as_ptr(rows) as usize, (placed, Arc::clone(rows)));
        Ok(placed)
    }
}

fn range_of(code: &MappedCode, (start, end): (RemoteAddr, RemoteAddr), placed: Placed) -> CodeRange {
    CodeRange {
        start: start.0,
        end: end.0,
        bias: code.bias.0,
        rows: placed.rows,
        index: placed.index,
        first: placed.first,
        blocks: placed.blocks,
        rule: code.rule.0,
        reserved: 0,
    }
}

/// The rows' bytes, and the index: for each block from the first row on the row that holds where it begins, and the last row.
fn packed(rows: &UnwindRows, first: u32) -> (Vec<u8>, Vec<u32>) {
    let (mut bytes, mut index) = (Vec::with_capacity(rows.len() * 8), Vec::new());
    let mut block = u64::from(first);
    for (number, (start, rule)) in rows.rows().enumerate() {
        while block < u64::from(start) {
            index.push(number as u32 - 1);
            block += u64::from(BLOCK);
        }
        if block == u64::from(start) {
            index.push(number as u32);
            block += u64::from(BLOCK);
        }
        bytes.extend(start.to_le_bytes());
        bytes.extend(rule.0.to_le_bytes());
    }
    index.push(rows.len() as u32 - 1);
    (bytes, index)
}

fn put(bytes: &mut Vec<u8>, range: &CodeRange) {
    for word in [range.start, range.end, range.bias, range.rows, range.index] {
        bytes.extend(word.to_le_bytes());
    }
    for half in [range.first, range.blocks, range.rule, range.reserved] {
        bytes.extend(half.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::unwind_abi::{Bp, Cfa};
    use proptest::prelude::*;

    fn rows(starts: &[u32]) -> UnwindRows {
        let rule = |n: usize| Rule::new(Cfa::Sp(8 * (1 + n as u32 % 1000)), Bp::Kept).unwrap();
        UnwindRows::from_rows(starts.iter().enumerate().map(|(n, start)| (*start, rule(n))))
    }

    /// As the agent does it.
    fn found(bytes: &[u8], index: &[u32], first: u32, address: u32) -> Rule {
        let half = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let Some(block) = address.checked_sub(first).map(|from| (from / BLOCK) as usize) else {
            return Rule::UNKNOWN;
        };
        if block + 1 >= index.len() {
            return Rule::UNKNOWN;
        }
        let (from, to) = (index[block], index[block + 1]);
        assert!(half(8 * from as usize) <= address, "the first row of the block is behind the address");
        let row = (from..=to).rev().find(|row| half(8 * *row as usize) <= address).unwrap();
        assert!(row == to || half(8 * (row as usize + 1)) > address);
        Rule(half(8 * row as usize + 4))
    }

    proptest! {
        #[test]
        fn each_address_has_the_rule_of_its_row(
            mut starts in proptest::collection::btree_set(0_u32..5000, 1..60), more in 0_u32..6000
        ) {
            // The last row of a file says that nothing is known any more: what lies beyond needs no block.
            let end = starts.last().unwrap() + 1 + more / 10;
            starts.insert(end);
            let starts: Vec<u32> = starts.into_iter().collect();
            let rows = rows(&starts);
            let (bytes, index) = packed(&rows, starts[0]);
            for address in 0..end {
                prop_assert_eq!(found(&bytes, &index, starts[0], address), rows.at(u64::from(address)), "{}", address);
            }
        }
    }

    fn code(rows: &Arc<UnwindRows>, at: u64) -> MappedCode {
        let ranges = vec![(RemoteAddr(at), RemoteAddr(at + 0x1000))];
        MappedCode { bias: Bias(at), ranges, rows: Arc::clone(rows), rule: Rule::UNKNOWN }
    }

    #[test]
    fn rows_are_written_once_and_what_has_no_room_is_left_out() {
        let file = Arc::new(rows(&[0x100, 0x180, 0x900]));
        let mut area = NativeArea::new(RemoteAddr(0x1000), 2 * DIRECTORIES + 128);
        let first = area.publish(&[code(&file, 0x10_0000)], || true).unwrap();
        assert_eq!(first.writes.len(), 3);
        assert_eq!(first.writes.last().unwrap().0, first.directory);
        // The same file twice: a directory alone.
        let both = area.publish(&[code(&file, 0x20_0000), code(&file, 0x10_0000)], || true).unwrap();
        assert_eq!((both.writes.len(), both.left_out), (1, None));
        let begins = |count: u64, number: u64, at: u64| [count, number, at].map(u64::to_le_bytes).concat();
        assert_eq!(both.writes[0].1[..24], begins(2, 2, 0x10_0000));
        // Another has no room: what is mapped beside it is known all the same.
        let other = Arc::new(rows(&[0x100, 0x180, 0x900]));
        let more = area.publish(&[code(&other, 0x30_0000), code(&file, 0x40_0000)], || true).unwrap();
        assert_eq!(more.writes[0].1[..24], begins(1, 3, 0x40_0000));
        assert!(more.left_out.is_some());
    }

    #[test]
    fn directories_lie_in_two_places_by_turns() {
        let file = Arc::new(rows(&[0x100, 0x180]));
        let code: Vec<MappedCode> = (1..2000).map(|n| code(&file, n << 20)).collect();
        let base = 0x1000;
        let mut area = NativeArea::new(RemoteAddr(base), NativeArea::len_for(&code));
        let mut at =
            |quiet: bool| area.publish(&code, || quiet).map(|published| published.directory.0 - base);
        // Two of them have room in one place; the other is used when nobody can be reading there any more.
        let second = Some(at(false).unwrap() + DIRECTORIES);
        assert!(at(false).unwrap() < DIRECTORIES);
        assert_eq!(at(false), None);
        assert_eq!(at(true), second);
        assert!(at(false) > second);
        assert_eq!(at(false), None);
        assert_eq!(at(true), Some(0));
    }
}

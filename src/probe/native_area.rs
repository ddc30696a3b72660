//! [`NativeArea`]: the code of a process and its unwind rows, laid out for the agent ([`Directory`]) in the memory behind its state.
//!
//! Says what is to be written where; whoever has the process's memory writes it. Nothing that was written is written over: a thread may be
//! reading it. So what is no longer mapped stays until the end, and is used again should the same file come back.

use crate::addr::{Bias, RemoteAddr};
use crate::agent_abi::{BLOCK, CodeRange, Directory};
use crate::image::UnwindRows;
use crate::unwind_abi::Rule;
use std::collections::HashMap;
use std::sync::Arc;

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
#[error("{needed} bytes of unwind rows are needed and {left} are left")]
pub struct Full {
    /// Bytes needed.
    pub needed: u64,
    /// Bytes that are left.
    pub left: u64,
}

/// Bytes, and where they belong.
pub type Write = (RemoteAddr, Vec<u8>);

/// Where a file's rows lie.
#[derive(Debug, Clone, Copy)]
struct Placed {
    rows: u64,
    index: u64,
    first: u32,
    blocks: u32,
}

/// See the module.
#[derive(Debug)]
pub struct NativeArea {
    next: u64,
    end: u64,
    /// By the address of the rows, which are kept beside it.
    placed: HashMap<usize, (Placed, Arc<UnwindRows>)>,
}

impl NativeArea {
    /// An empty area of `len` bytes.
    pub fn new(base: RemoteAddr, len: u64) -> Self {
        Self { next: base.0, end: base.0 + len, placed: HashMap::new() }
    }

    /// Bytes that this code takes in an empty area.
    pub fn needed(code: &[MappedCode]) -> u64 {
        let mut area = Self::new(RemoteAddr(4096), u64::MAX / 2);
        let from = area.next;
        area.publish(code).map_or(0, |_| area.next - from)
    }

    /// What is to be written for this code to be known, and where the directory then is that names all of it.
    pub fn publish(&mut self, code: &[MappedCode]) -> Result<(Vec<Write>, RemoteAddr), Full> {
        let mut writes = Vec::new();
        let mut ranges = Vec::new();
        for code in code {
            let placed = self.place(&code.rows, &mut writes)?;
            ranges.extend(code.ranges.iter().map(|(start, end)| CodeRange {
                start: start.0,
                end: end.0,
                bias: code.bias.0,
                rows: placed.rows,
                index: placed.index,
                first: placed.first,
                blocks: placed.blocks,
                rule: code.rule.0,
                reserved: 0,
            }));
        }
        ranges.sort_by_key(|range| range.start);
        ranges.dedup_by(|next, before| next.start < before.end);
        let mut bytes = (ranges.len() as u64).to_le_bytes().to_vec();
        debug_assert_eq!(bytes.len(), size_of::<Directory>());
        ranges.iter().for_each(|range| put(&mut bytes, range));
        let directory = self.take(bytes, &mut writes)?;
        Ok((writes, RemoteAddr(directory)))
    }

    fn place(&mut self, rows: &Arc<UnwindRows>, writes: &mut Vec<Write>) -> Result<Placed, Full> {
        if let Some((placed, _)) = self.placed.get(&(Arc::as_ptr(rows) as usize)) {
            return Ok(*placed);
        }
        let mut placed = Placed { rows: 0, index: 0, first: 0, blocks: 0 };
        if let Some((first, _)) = rows.rows().next() {
            let (bytes, index) = packed(rows, first);
            placed.first = first;
            placed.blocks = index.len() as u32 - 1;
            placed.rows = self.take(bytes, writes)?;
            placed.index = self.take(index.iter().flat_map(|row| row.to_le_bytes()).collect(), writes)?;
        }
        self.placed.insert(Arc::as_ptr(rows) as usize, (placed, Arc::clone(rows)));
        Ok(placed)
    }

    fn take(&mut self, bytes: Vec<u8>, writes: &mut Vec<Write>) -> Result<u64, Full> {
        let (needed, left) = (bytes.len() as u64, self.end - self.next);
        if needed.next_multiple_of(64) > left {
            return Err(Full { needed, left });
        }
        let at = self.next;
        self.next += needed.next_multiple_of(64);
        writes.push((RemoteAddr(at), bytes));
        Ok(at)
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

    #[test]
    fn what_is_known_is_written_once_and_a_full_area_says_so() {
        let file = Arc::new(rows(&[0x100, 0x180, 0x900]));
        let code = |at: u64| MappedCode {
            bias: Bias(at),
            ranges: vec![(RemoteAddr(at), RemoteAddr(at + 0x1000))],
            rows: Arc::clone(&file),
            rule: Rule::UNKNOWN,
        };
        let needed = NativeArea::needed(&[code(0x10_0000)]);
        let mut area = NativeArea::new(RemoteAddr(0x1000), needed + 128);
        let (writes, directory) = area.publish(&[code(0x10_0000)]).unwrap();
        assert_eq!(writes.last().unwrap().0, directory);
        // The same file twice: a directory alone.
        let (writes, _) = area.publish(&[code(0x20_0000), code(0x10_0000)]).unwrap();
        assert_eq!(writes.len(), 1);
        assert_eq!(&writes[0].1[..16], [2_u64.to_le_bytes(), 0x10_0000_u64.to_le_bytes()].concat());
        assert!(area.publish(&[code(0x30_0000)]).is_err());
    }
}

//! Live mappings as intervals: `munmap` takes back any part of any number of them.
//!
//! Knows ranges and whose they are; blocks of `malloc` are in `live_set`.

use super::live_set::Block;
use foldhash::fast::RandomState;
use std::collections::{BTreeMap, HashMap};

/// A part of a mapping that was given back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Part {
    /// The mapping, with its size when mapped.
    pub mapping: Block,
    /// Bytes given back.
    pub bytes: u64,
    /// True if nothing is left of the mapping.
    pub ended: bool,
}

/// A piece of a mapping; several have one owner when its middle was unmapped.
struct Piece {
    end: u64,
    owner: u64,
}

struct Owner {
    mapping: Block,
    pieces: u32,
}

#[derive(Default)]
pub(super) struct Mappings {
    /// By first byte; pieces never overlap and are never empty.
    pieces: BTreeMap<u64, Piece>,
    owners: HashMap<u64, Owner, RandomState>,
    next_owner: u64,
    bytes: u64,
}

impl Mappings {
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) fn count(&self) -> usize {
        self.owners.len()
    }

    /// Maps `[start, start + size)`, cut at the end of the address space. What was mapped there is
    /// replaced (`MAP_FIXED`) and returned.
    pub(super) fn map(&mut self, start: u64, size: u64, mapping: Block) -> Vec<Part> {
        let replaced = self.unmap(start, size);
        let end = start.saturating_add(size);
        if end > start {
            self.pieces.insert(start, Piece { end, owner: self.next_owner });
            self.owners.insert(self.next_owner, Owner { mapping, pieces: 1 });
            self.next_owner += 1;
            self.bytes = self.bytes.saturating_add(end - start);
        }
        replaced
    }

    /// Takes `[start, start + len)` out.
    pub(super) fn unmap(&mut self, start: u64, len: u64) -> Vec<Part> {
        let end = start.saturating_add(len);
        let mut parts = Vec::new();
        if start >= end {
            return parts;
        }
        let before = self.pieces.range(..start).next_back().filter(|(_, piece)| piece.end > start);
        let mut at = before.map_or(start, |(&first, _)| first);
        // `at` passes `end` with a piece that reaches beyond it; then nothing is left to take.
        while at < end {
            let Some((&first, _)) = self.pieces.range(at..end).next() else { break };
            let Some(piece) = self.pieces.remove(&first) else { break };
            at = piece.end;
            parts.push(self.take(first, piece, start, end));
        }
        parts
    }

    /// Every live mapping with its bytes left, in no order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (Block, u64)> + '_ {
        let mut left: HashMap<u64, u64, RandomState> = HashMap::default();
        for (first, piece) in &self.pieces {
            *left.entry(piece.owner).or_default() += piece.end - first;
        }
        left.into_iter().filter_map(|(owner, bytes)| Some((self.owners.get(&owner)?.mapping, bytes)))
    }

    /// Puts back what of `piece` lies outside `[start, end)`.
    fn take(&mut self, first: u64, piece: Piece, start: u64, end: u64) -> Part {
        let Piece { end: last, owner } = piece;
        let mut pieces_more = -1i64;
        if first < start {
            self.pieces.insert(first, Piece { end: start, owner });
            pieces_more += 1;
        }
        if end < last {
            self.pieces.insert(end, Piece { end: last, owner });
            pieces_more += 1;
        }
        let bytes = last.min(end) - first.max(start);
        self.bytes -= bytes;
        let Some(entry) = self.owners.get_mut(&owner) else {
            unreachable!("a piece has an owner while it is in the map");
        };
        entry.pieces = (i64::from(entry.pieces) + pieces_more) as u32;
        let mapping = entry.mapping;
        let ended = entry.pieces == 0;
        if ended {
            self.owners.remove(&owner);
        }
        Part { mapping, bytes, ended }
    }
}

//! The first bytes of a function, and what leads into them: what has to be known before they are overwritten by more than
//! a byte. Pure, over a closure that reads the file.
//!
//! A compiler moves unlikely parts of a function out of its symbol's range (`free.cold`): branches out of the range are
//! followed, too. What only a computed jump reaches is seen because the whole range is decoded.

use crate::addr::RemoteAddr;
use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, OpKind};
use std::collections::{BTreeSet, HashSet};

/// Bytes that a detour may have to know: a kept instruction, and whole ones until 5 bytes are covered (15 bytes each at most).
pub const HEAD_BYTES: usize = 64;
/// Bytes of a function that are decoded; the longest of an allocator (jemalloc's `realloc`) has 8 KiB.
const BODY_BYTES: u64 = 64 << 10;
/// Instructions followed outside the symbol's range (all of them, where the file states no size).
const FOLLOWED: usize = 2048;
const RUN_BYTES: usize = 256;

/// Reads a file's bytes at an address; `None` where it has not all of them.
pub type Read<'a> = &'a dyn Fn(RemoteAddr, usize) -> Option<Vec<u8>>;

/// The beginning of a function.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Head {
    /// The file's bytes from the entry on: [`HEAD_BYTES`], or fewer where the function ends before.
    pub bytes: Vec<u8>,
    /// Offsets into them, the entry's own apart, that a direct branch or call of the function leads to.
    pub targets: BTreeSet<usize>,
}

impl Head {
    /// Reads the function at `entry`. `size`: bytes of it as its symbol states, 0 for unknown. `next`: where another function
    /// begins.
    pub fn read(entry: RemoteAddr, size: u64, next: Option<RemoteAddr>, read: Read<'_>) -> Self {
        let stated = if size == 0 { u64::MAX } else { size };
        let until_next = next.map_or(u64::MAX, |next| next.since(entry));
        let len = (HEAD_BYTES as u64).min(stated).min(until_next) as usize;
        let bytes = read_up_to(read, entry, len);
        let mut search =
            Search { entry, len: bytes.len() as u64, targets: BTreeSet::new(), outside: Vec::new() };
        let body = if size == 0 {
            search.outside.push(entry.0);
            Vec::new()
        } else {
            read_up_to(read, entry, size.min(BODY_BYTES) as usize)
        };
        let mut decoder = Decoder::with_ip(64, &body, entry.0, DecoderOptions::NONE);
        for instruction in &mut decoder {
            search.note(&instruction, body.len() as u64);
        }
        search.follow(body.len() as u64, read);
        Self { bytes, targets: search.targets }
    }
}

/// Where a direct branch or call leads.
pub fn target(instruction: &Instruction) -> Option<RemoteAddr> {
    let direct = instruction.op_count() == 1 && instruction.op0_kind() == OpKind::NearBranch64;
    direct.then(|| RemoteAddr(instruction.near_branch_target()))
}

/// `len` bytes; fewer where the file's segment ends before.
pub(super) fn read_up_to(read: Read<'_>, at: RemoteAddr, len: usize) -> Vec<u8> {
    if let Some(bytes) = read(at, len) {
        return bytes;
    }
    // The longest that can be read, by halving: a function at the very end of a segment is rare.
    let (mut can, mut cannot) = (0, len);
    while can + 1 < cannot {
        let middle = can.midpoint(cannot);
        if read(at, middle).is_some() {
            can = middle;
        } else {
            cannot = middle;
        }
    }
    read(at, can).unwrap_or_default()
}

struct Search {
    entry: RemoteAddr,
    len: u64,
    targets: BTreeSet<usize>,
    outside: Vec<u64>,
}

impl Search {
    fn note(&mut self, instruction: &Instruction, body: u64) {
        let Some(target) = target(instruction) else { return };
        let offset = target.since(self.entry);
        if offset > 0 && offset < self.len {
            self.targets.insert(offset as usize);
        }
        if offset >= body && instruction.flow_control() != FlowControl::Call {
            self.outside.push(target.0);
        }
    }

    /// Decodes what lies outside the first `body` bytes, from each branch on to where control never goes on.
    fn follow(&mut self, body: u64, read: Read<'_>) {
        let mut seen = HashSet::new();
        while let Some(mut at) = self.outside.pop() {
            'run: loop {
                let bytes = read_up_to(read, RemoteAddr(at), RUN_BYTES);
                let mut decoder = Decoder::with_ip(64, &bytes, at, DecoderOptions::NONE);
                let mut went_on = false;
                while decoder.can_decode() {
                    let instruction = decoder.decode();
                    if instruction.is_invalid() {
                        // Cut off by the end of what was read, or no code.
                        break;
                    }
                    if seen.len() >= FOLLOWED || !seen.insert(instruction.ip()) {
                        break 'run;
                    }
                    self.note(&instruction, body);
                    if never_goes_on(&instruction) {
                        break 'run;
                    }
                    (at, went_on) = (instruction.next_ip(), true);
                }
                if !went_on {
                    break;
                }
            }
        }
    }
}

/// Whether the next instruction is never executed because of this one.
pub fn never_goes_on(instruction: &Instruction) -> bool {
    matches!(
        instruction.flow_control(),
        FlowControl::UnconditionalBranch
            | FlowControl::IndirectBranch
            | FlowControl::Return
            | FlowControl::Interrupt
            | FlowControl::Exception
    )
}

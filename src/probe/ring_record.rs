//! Records of a ring, decoded: words in, events and definitions out. Pure; trusts nothing.

use super::function::{Domain, Function, Member};
use crate::addr::RemoteAddr;
use crate::agent_abi::{
    MAPPING_STRIPE, MAX_DEPTH, MAX_NATIVE_DEPTH, NATIVE_CUT, NATIVE_DEEPER, function, record, stripe,
};
use std::sync::atomic::{AtomicU64, Ordering};

/// What a thread did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event {
    /// The time stamp counter, coarse: see [`record::TIME`].
    pub stamp: u64,
    /// The thread, as its own pid namespace numbers it.
    pub tid: u32,
    /// Its number in its stripe, where it has one: see [`What::stripe`].
    pub number: u32,
    /// What.
    pub what: What,
}

/// The kinds of events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// The events that follow in this ring are of another thread than those before.
    Thread(u32),
    /// A block is given back, for certain.
    Freed {
        /// By which function.
        function: Function,
        /// Which.
        address: RemoteAddr,
    },
    /// A block is given back inside another call.
    FreedInside {
        /// By which function.
        function: Function,
        /// Which.
        address: RemoteAddr,
    },
    /// A call that gives memory out ended.
    Allocated {
        /// Which function.
        function: Function,
        /// What it gave.
        address: RemoteAddr,
        /// Bytes asked for.
        size: u64,
        /// Hash of the stack; 0 for none.
        stack: u64,
        /// Interval of the sample; 0 where every event is recorded.
        interval: u64,
    },
    /// A call that may give something back begins.
    Begins {
        /// Which function.
        function: Function,
        /// Its arguments, see [`record::BEGIN`].
        args: [u64; 3],
    },
    /// It ended.
    Ended {
        /// Which function.
        function: Function,
        /// What it returned.
        result: u64,
        /// Hash of the stack; 0 for none.
        stack: u64,
        /// See [`record::END`].
        interval: u64,
    },
}

impl What {
    /// Where the event's number is from, in a recording of every event; `None` for an event without one. As the agent has it.
    #[inline]
    pub fn stripe(&self) -> Option<usize> {
        let (function, address) = match *self {
            Self::Freed { function, address }
            | Self::FreedInside { function, address }
            | Self::Allocated { function, address, .. } => (function, address.0),
            Self::Begins { function, args } => (function, args[0]),
            Self::Ended { function, result, .. } => (function, result),
            Self::Thread(_) => return None,
        };
        match address {
            0 | u64::MAX => None,
            _ if function.is_mapping() => Some(MAPPING_STRIPE),
            _ => Some(stripe(address)),
        }
    }
}

/// A frame of a stack, as told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ToldFrame {
    /// The code object.
    pub code: u64,
    /// Which of those that had this address.
    pub generation: u32,
    /// Byte offset of the instruction, see [`crate::cpython::RawFrame`].
    pub lasti: i32,
    /// A call of the interpreter's loop began with it.
    pub entry: bool,
}

/// How the native frames of a stack end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NativeEnd {
    /// With the thread's first function.
    Whole,
    /// The last one's code does not tell who called it.
    Cut,
    /// There are more than are kept.
    Deeper,
}

/// A piece of a code object's text, see [`record::CODE`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CodePiece<'a> {
    /// The code object.
    pub code: u64,
    /// Which of those that had this address.
    pub generation: u32,
    /// One of [`crate::agent_abi::part`].
    pub part: u32,
    /// Bytes of the whole part.
    pub total: u64,
    /// Where in it this piece lies.
    pub offset: u32,
    /// The piece.
    pub bytes: &'a [u8],
}

/// Who is told of definitions. The same may be told more than once.
pub trait Definitions {
    /// The frames behind a stack's hash, innermost first; `cut`: deeper ones were left out.
    fn stack(&mut self, hash: u64, frames: impl ExactSizeIterator<Item = ToldFrame>, cut: bool);
    /// The native frames of the stack with this hash, innermost first; told before the stack itself.
    /// `directory`: the number of the one by which they were found.
    fn native(
        &mut self,
        hash: u64,
        directory: u64,
        addresses: impl ExactSizeIterator<Item = u64>,
        end: NativeEnd,
    );
    /// A piece of a code object.
    fn code(&mut self, piece: CodePiece<'_>);
}

/// What is in a ring and makes no sense.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unreadable {
    /// The end of what is published.
    #[error("unreadable: what is published went from {from:#x} to {to:#x}")]
    End {
        /// Where it was.
        from: u64,
        /// Where it is said to be.
        to: u64,
    },
    /// No such kind.
    #[error("unreadable: a record of the unknown kind {kind}")]
    Kind {
        /// The kind.
        kind: u8,
    },
    /// No such function.
    #[error("unreadable: a record of kind {kind} of the unknown function {function}")]
    Function {
        /// The kind.
        kind: u8,
        /// The function.
        function: u8,
    },
    /// The record is longer than what was published.
    #[error("unreadable: a record of kind {kind} with {words} words, of which {there} are there")]
    Length {
        /// The kind.
        kind: u8,
        /// Words that it should have.
        words: u64,
        /// Words that were published.
        there: usize,
    },
}

/// A record whose place is known to lie within what is published.
#[derive(Debug, Clone, Copy)]
pub(super) struct Decoded {
    /// Bytes of it.
    pub(super) len: u64,
    /// The event's number.
    pub(super) number: u32,
    /// The event, if it is one.
    pub(super) what: Option<What>,
    definition: Definition,
}

#[derive(Debug, Clone, Copy)]
enum Definition {
    None,
    /// Of the records that follow.
    Time(u64),
    /// Hash, frames, whether deeper ones were left out.
    Stack(u64, usize, bool),
    /// Hash, directory, frames, how they end.
    Native(u64, u64, usize, NativeEnd),
    /// The four words behind the first; the bytes follow.
    Code([u64; 4]),
}

impl Decoded {
    /// The time of what follows, if this record tells it.
    #[inline]
    pub(super) fn time(&self) -> Option<u64> {
        match self.definition {
            Definition::Time(time) => Some(time),
            _ => None,
        }
    }

    /// Tells what it defines, if it does. `words` is what [`decode`] was given.
    pub(super) fn define(&self, words: &[AtomicU64], scratch: &mut Vec<u8>, told: &mut impl Definitions) {
        match self.definition {
            Definition::None | Definition::Time(_) => {}
            Definition::Stack(hash, count, cut) => {
                let frames = words[3..][..2 * count].chunks_exact(2).map(|frame| {
                    let packed = frame[1].load(Ordering::Relaxed);
                    let code = frame[0].load(Ordering::Relaxed);
                    ToldFrame {
                        code: code & !1,
                        generation: (packed >> 32) as u32,
                        lasti: packed as u32 as i32,
                        entry: code & 1 != 0,
                    }
                });
                told.stack(hash, frames, cut);
            }
            Definition::Native(hash, directory, count, end) => {
                let addresses = words[4..][..count].iter().map(|word| word.load(Ordering::Relaxed));
                told.native(hash, directory, addresses, end);
            }
            Definition::Code([code, which, total, place]) => {
                let len = (place >> 32) as usize;
                scratch.clear();
                for word in &words[5..][..len.div_ceil(8)] {
                    scratch.extend_from_slice(&word.load(Ordering::Relaxed).to_le_bytes());
                }
                told.code(CodePiece {
                    code,
                    generation: which as u32,
                    part: (which >> 32) as u32,
                    total,
                    offset: place as u32,
                    bytes: &scratch[..len],
                });
            }
        }
    }
}

/// Decodes the record at the start of `words`, which are all that is published in one piece from position `at` on.
#[inline]
pub(super) fn decode(words: &[AtomicU64], at: u64, ring_len: u64) -> Result<Decoded, Unreadable> {
    let word = |i: usize| words[i].load(Ordering::Relaxed);
    let Some(first) = words.first().map(|first| first.load(Ordering::Relaxed)) else {
        return Err(Unreadable::Length { kind: 0, words: 1, there: 0 });
    };
    let (kind, number) = (first as u8, (first >> 32) as u32);
    let need = |count: u64| {
        let length = Unreadable::Length { kind, words: count, there: words.len() };
        if count <= words.len() as u64 { Ok(count * 8) } else { Err(length) }
    };
    let function = || {
        let number = (first >> 8) as u8;
        function_of(number).ok_or(Unreadable::Function { kind, function: number })
    };
    let event = |len, what| Ok(Decoded { len, number, what: Some(what), definition: Definition::None });
    match kind {
        record::ALLOC | record::SAMPLE => {
            let sampled = kind == record::SAMPLE;
            let len = need(4 + u64::from(sampled))?;
            let interval = if sampled { word(4) } else { 0 };
            let (address, size, stack) = (RemoteAddr(word(1)), word(2), word(3));
            event(len, What::Allocated { function: function()?, address, size, stack, interval })
        }
        record::FREE => {
            let len = need(2)?;
            event(len, What::Freed { function: function()?, address: RemoteAddr(word(1)) })
        }
        record::FREE_INSIDE => {
            let len = need(2)?;
            event(len, What::FreedInside { function: function()?, address: RemoteAddr(word(1)) })
        }
        record::BEGIN => {
            let len = need(4)?;
            event(len, What::Begins { function: function()?, args: [word(1), word(2), word(3)] })
        }
        record::END => {
            let len = need(4)?;
            let (result, stack, interval) = (word(1), word(2), word(3));
            event(len, What::Ended { function: function()?, result, stack, interval })
        }
        record::THREAD => event(need(2)?, What::Thread(word(1) as u32)),
        _ => decode_other(words, first, at, ring_len),
    }
}

/// The rest of [`decode`]: what is rare.
#[inline(never)]
fn decode_other(words: &[AtomicU64], first: u64, at: u64, ring_len: u64) -> Result<Decoded, Unreadable> {
    let kind = first as u8;
    let need = |count: u64| {
        let length = Unreadable::Length { kind, words: count, there: words.len() };
        if count <= words.len() as u64 { Ok(count * 8) } else { Err(length) }
    };
    let word = |i: usize| words[i].load(Ordering::Relaxed);
    let (len, definition) = match kind {
        record::TIME => (need(2)?, Definition::Time(word(1))),
        record::PAD => (need((ring_len - at % ring_len) / 8)?, Definition::None),
        record::STACK => {
            need(3)?;
            let (hash, counted) = (word(1), word(2));
            let count = counted & !(1 << 63);
            if count > MAX_DEPTH as u64 {
                return Err(Unreadable::Length { kind, words: count, there: words.len() });
            }
            (need(3 + 2 * count)?, Definition::Stack(hash, count as usize, counted >> 63 != 0))
        }
        record::NATIVE => {
            need(4)?;
            let (hash, counted, directory) = (word(1), word(2), word(3));
            let count = counted & !(NATIVE_CUT | NATIVE_DEEPER);
            if count > MAX_NATIVE_DEPTH as u64 {
                return Err(Unreadable::Length { kind, words: count, there: words.len() });
            }
            let end = match counted & (NATIVE_CUT | NATIVE_DEEPER) {
                0 => NativeEnd::Whole,
                NATIVE_DEEPER => NativeEnd::Deeper,
                _ => NativeEnd::Cut,
            };
            (need(4 + count)?, Definition::Native(hash, directory, count as usize, end))
        }
        record::CODE => {
            need(5)?;
            let head = [word(1), word(2), word(3), word(4)];
            (need(5 + (head[3] >> 32).div_ceil(8))?, Definition::Code(head))
        }
        _ => return Err(Unreadable::Kind { kind }),
    };
    Ok(Decoded { len, number: 0, what: None, definition })
}

/// The function that a record's or a hook's number stands for.
pub fn function_of(number: u8) -> Option<Function> {
    Some(match number {
        function::MALLOC => Function::Malloc,
        function::CALLOC => Function::Calloc,
        function::REALLOC => Function::Realloc,
        function::FREE => Function::Free,
        function::POSIX_MEMALIGN => Function::PosixMemalign,
        function::ALIGNED_ALLOC => Function::AlignedAlloc,
        function::MEMALIGN => Function::Memalign,
        function::VALLOC => Function::Valloc,
        function::PVALLOC => Function::Pvalloc,
        function::MMAP => Function::Mmap,
        function::MUNMAP => Function::Munmap,
        function::MREMAP => Function::Mremap,
        _ => {
            let place = number.checked_sub(function::PYTHON)?;
            let domain = [Domain::Raw, Domain::Mem, Domain::Object].get(usize::from(place / 4))?;
            let members = [Member::Malloc, Member::Calloc, Member::Realloc, Member::Free];
            Function::Python(*domain, members[usize::from(place % 4)])
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn words(values: &[u64]) -> Vec<AtomicU64> {
        values.iter().map(|v| AtomicU64::new(*v)).collect()
    }

    #[test]
    fn an_event_is_decoded_and_its_length_checked() {
        let record = words(&[7 << 32 | 1 << 8 | u64::from(record::ALLOC), 0x1000, 64, 5]);
        let decoded = decode(&record, 0, 1 << 16).unwrap();
        let (function, address) = (Function::Calloc, RemoteAddr(0x1000));
        let what = What::Allocated { function, address, size: 64, stack: 5, interval: 0 };
        assert_eq!((decoded.len, decoded.number, decoded.what), (32, 7, Some(what)));
        let short = decode(&record[..3], 0, 1 << 16).unwrap_err();
        assert_eq!(short, Unreadable::Length { kind: record::ALLOC, words: 4, there: 3 });
        let unknown = words(&[99 << 8 | u64::from(record::FREE), 1]);
        assert_eq!(
            decode(&unknown, 0, 1 << 16).unwrap_err(),
            Unreadable::Function { kind: record::FREE, function: 99 }
        );
    }

    #[test]
    fn every_function_has_a_number() {
        let known = (0..=255).filter_map(function_of).count();
        assert_eq!(known, 12 + 3 * 4);
        assert_eq!(function_of(function::PYTHON + 6), Some(Function::Python(Domain::Mem, Member::Realloc)));
        assert_eq!(function_of(function::CODE_DEALLOC), None);
    }

    /// Counts what it is told.
    #[derive(Default)]
    struct Told(usize);

    impl Definitions for Told {
        fn stack(&mut self, _: u64, frames: impl ExactSizeIterator<Item = ToldFrame>, _: bool) {
            self.0 += frames.count();
        }
        fn native(&mut self, _: u64, _: u64, addresses: impl ExactSizeIterator<Item = u64>, _: NativeEnd) {
            self.0 += addresses.count();
        }
        fn code(&mut self, piece: CodePiece<'_>) {
            self.0 += piece.bytes.len();
        }
    }

    proptest! {
        #[test]
        fn any_words_are_decoded_or_refused(
            kind in 0_u64..14,
            function in 0_u64..64,
            rest in proptest::collection::vec(prop_oneof![any::<u64>(), 0_u64..80, (0_u64..80).prop_map(|n| n << 32)], 0..40),
            at in 0_u64..64,
        ) {
            let mut values = vec![function << 8 | kind];
            values.extend(rest);
            let values = words(&values);
            let mut told = Told::default();
            if let Ok(decoded) = decode(&values, at * 8, 512) {
                prop_assert!(decoded.len >= 8 && decoded.len <= values.len() as u64 * 8);
                decoded.define(&values, &mut Vec::new(), &mut told);
                prop_assert!(told.0 <= values.len() * 8);
            }
        }
    }
}

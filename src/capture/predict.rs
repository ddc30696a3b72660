//! What will come next: programs repeat themselves, and what is expected need not be written.
//!
//! Writer and reader keep one of these each and tell it the same events, so that both expect the same (the
//! rules are drawn in `format`). It knows the events of its chunk only; nothing of what is left over from the
//! chunk before can be seen in what it says, so that a lost chunk changes nothing in the next. Memory is
//! bounded by the constants below (5.3 MiB) and grows with the events of the chunk up to there.

use super::format::{CHUNK_EVENTS, EXPECTED_EVENTS, NEAR_ADDRESSES, place};
use super::record::StackId;
use super::varint::{unzigzag, zigzag};

/// Slots for contexts (four allocations in a row): a hash of 24 bits, of which 16 choose the slot.
const CONTEXTS: usize = 1 << 16;
/// Slots for what came after an event of some kind at some stack.
const HABITS: usize = 1 << 10;
/// Bits that hold any position of a chunk.
const POSITION_BITS: u32 = 24;
/// No place's number.
const NONE: u32 = u32::MAX;

/// The class of an event, the high bits of its [`Shape`]'s `op`.
pub(super) mod class {
    pub(in crate::capture) const ALLOCATION: u8 = 0;
    pub(in crate::capture) const FREE: u8 = 1;
    pub(in crate::capture) const FREE_UNKNOWN: u8 = 2;
    pub(in crate::capture) const UNMAP: u8 = 3;
}

/// An event without its thread and its address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Shape {
    /// Class * 32 + kind.
    pub(super) op: u8,
    /// 0 where events of this class have none.
    pub(super) stack: StackId,
    /// 0 where events of this class have none.
    pub(super) size: u64,
}

impl Shape {
    pub(super) fn of(class: u8, kind: u8) -> Self {
        Self { op: class << 5 | kind, stack: StackId::EMPTY, size: 0 }
    }

    pub(super) fn class(self) -> u8 {
        self.op >> 5
    }

    pub(super) fn kind(self) -> u8 {
        self.op & 31
    }
}

/// How an address is told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Place {
    /// For an allocation, that of the n-th last event that is none; for all else, that of the n-th last allocation. 0 is
    /// the latest.
    Back(u32),
    /// So many units of 16 bytes from the address before.
    Units(i64),
}

impl Place {
    /// As it is written.
    pub(super) fn number(self) -> u64 {
        match self {
            Self::Back(back) => u64::from(back) * 2 + place::FIRST,
            Self::Units(units) => zigzag(units) * 2 + 1 + place::FIRST,
        }
    }

    /// Of what was written. A number below [`place::FIRST`] is none, nor is one that no event can have.
    pub(super) fn of(number: u64) -> Option<Self> {
        let number = number.checked_sub(place::FIRST)?;
        if number & 1 == 0 {
            u32::try_from(number >> 1).ok().map(Self::Back)
        } else {
            Some(Self::Units(unzigzag(number >> 1)))
        }
    }
}

/// An event as it is kept: 16 bytes.
#[derive(Clone, Copy)]
struct Kept {
    size: u32,
    stack: u32,
    /// The number of its [`Place`]; [`NONE`] if that has more bits.
    place: u32,
    /// The low byte is the op; above it the hash of the context that ends with this allocation (0 for all else).
    op_and_context: u32,
}

impl Kept {
    /// Of no class there is: nothing is like it.
    const NOTHING: Self = Self { size: 0, stack: 0, place: NONE, op_and_context: 0xff };

    fn new(shape: Shape, place: Option<Place>, context: u32) -> Self {
        let Ok(size) = u32::try_from(shape.size) else { return Self::NOTHING };
        let place = place.and_then(|place| u32::try_from(place.number()).ok()).unwrap_or(NONE);
        Self { size, stack: shape.stack.0, place, op_and_context: context << 8 | u32::from(shape.op) }
    }

    fn place(self) -> Option<Place> {
        if self.place == NONE { None } else { Place::of(u64::from(self.place)) }
    }

    fn shape(self) -> Shape {
        Shape { op: self.op_and_context as u8, stack: StackId(self.stack), size: u64::from(self.size) }
    }
}

/// The last addresses of a sort.
struct Near {
    addresses: Vec<u64>,
    count: u32,
}

impl Near {
    fn new() -> Self {
        Self { addresses: Vec::new(), count: 0 }
    }

    fn push(&mut self, address: u64) {
        let at = self.count as usize % NEAR_ADDRESSES;
        match self.addresses.get_mut(at) {
            Some(slot) => *slot = address,
            None => self.addresses.push(address),
        }
        self.count += 1;
    }

    fn get(&self, back: u32) -> Option<u64> {
        if back as usize >= NEAR_ADDRESSES {
            return None;
        }
        let number = self.count.checked_sub(back + 1)?;
        self.addresses.get(number as usize % NEAR_ADDRESSES).copied()
    }
}

pub(super) struct Predictor {
    history: Vec<Kept>,
    /// Events of this chunk: the position of the next.
    count: u32,
    /// The event of the history that this chunk repeats now, if it does.
    following: Option<u32>,
    /// By the high 16 bits of a context: the position after it, below its low 8 bits. Not emptied: see `begin_following`.
    contexts: Box<[u32]>,
    habits: Box<[Kept]>,
    /// The last four allocations, hashed, the latest first.
    allocations: [u64; 4],
    last_allocation_stack: u32,
    last_op: u8,
    allocated: Near,
    given_back: Near,
    last_address: u64,
}

impl Predictor {
    pub(super) fn new() -> Self {
        Self {
            history: Vec::new(),
            count: 0,
            following: None,
            contexts: vec![0; CONTEXTS].into(),
            habits: vec![Kept::NOTHING; HABITS].into(),
            allocations: [0; 4],
            last_allocation_stack: 0,
            last_op: 0xff,
            allocated: Near::new(),
            given_back: Near::new(),
            last_address: 0,
        }
    }

    /// Starts the next chunk.
    pub(super) fn reset(&mut self) {
        self.count = 0;
        self.following = None;
        self.habits.fill(Kept::NOTHING);
        self.allocations = [0; 4];
        self.last_allocation_stack = 0;
        self.last_op = 0xff;
        self.allocated.count = 0;
        self.given_back.count = 0;
        self.last_address = 0;
    }

    /// Events told since the chunk's start.
    pub(super) fn count(&self) -> u32 {
        self.count
    }

    /// The next event. What no event looks like, where there is nothing to go by.
    #[inline]
    pub(super) fn expected(&self) -> Expected {
        let kept = match self.following {
            Some(at) => self.history[at as usize % EXPECTED_EVENTS],
            None => self.habits[self.habit()],
        };
        Expected { shape: kept.shape(), place: kept.place() }
    }

    /// The address that a place means for an event of this class now.
    pub(super) fn address(&self, class: u8, place: Place) -> Option<u64> {
        match place {
            Place::Back(back) => self.other_party(class).get(back),
            Place::Units(units) => Some(self.last_address.wrapping_add((units as u64) << 4)),
        }
    }

    /// The address of the event before; 0 before the first.
    pub(super) fn last_address(&self) -> u64 {
        self.last_address
    }

    /// The number in the chunk, among its like, of an address that is told now for an event of this class.
    pub(super) fn number(&self, class: u8) -> u32 {
        if class == class::ALLOCATION { self.allocated.count } else { self.given_back.count }
    }

    /// How many there are of those that [`Place::Back`] counts for an event of this class.
    pub(super) fn others(&self, class: u8) -> u32 {
        self.other_party(class).count
    }

    fn other_party(&self, class: u8) -> &Near {
        if class == class::ALLOCATION { &self.given_back } else { &self.allocated }
    }

    /// What came. `place` is how its address was told, where that may come again; `as_expected`, whether the shape is that
    /// of [`Self::expected`].
    pub(super) fn tell(&mut self, shape: Shape, address: u64, place: Option<Place>, as_expected: bool) {
        debug_assert_eq!(as_expected, self.expected().shape == shape);
        let is_allocation = shape.class() == class::ALLOCATION;
        let context = if is_allocation { self.enter(shape) } else { 0 };
        let kept = Kept::new(shape, place, context);
        let habit = self.habit();
        self.habits[habit] = kept;
        let at = self.count as usize % EXPECTED_EVENTS;
        match self.history.get_mut(at) {
            Some(slot) => *slot = kept,
            None => self.history.push(kept),
        }
        self.count += 1;
        self.following = match self.following {
            Some(at) if as_expected => self.still_there(at + 1),
            _ => None,
        };
        if is_allocation {
            self.begin_following(context);
            self.last_allocation_stack = shape.stack.0;
            self.allocated.push(address);
        } else {
            self.given_back.push(address);
        }
        self.last_op = shape.op;
        self.last_address = address;
    }

    /// Follows what came after this context before, unless something is followed; and the next time, what comes now.
    ///
    /// The slot may be of a chunk before, which a reader may not have seen. Such a slot is never used: had this
    /// chunk had the context at the position that it names, it would have written the slot since.
    fn begin_following(&mut self, context: u32) {
        let slot = &mut self.contexts[context as usize >> 8];
        let before = std::mem::replace(slot, context << POSITION_BITS | self.count);
        // The history is far away in memory: most of what is not the same context ends here.
        if self.following.is_some() || before >> POSITION_BITS != context & 0xff {
            return;
        }
        let before = before & ((1 << POSITION_BITS) - 1);
        if before > 0 && before < self.count {
            let Some(before) = self.still_there(before) else { return };
            let ended = self.history[(before - 1) as usize % EXPECTED_EVENTS];
            self.following = (ended.op_and_context >> 8 == context).then_some(before);
        }
    }

    /// The position, if it and the one before it are in the history yet.
    fn still_there(&self, at: u32) -> Option<u32> {
        ((self.count - at) as usize + 1 < EXPECTED_EVENTS).then_some(at)
    }

    /// Takes an allocation into the context; gives its hash, 24 bits and not 0.
    fn enter(&mut self, shape: Shape) -> u32 {
        let what = shape.size ^ u64::from(shape.stack.0) << 32 ^ u64::from(shape.op) << 27;
        self.allocations.rotate_right(1);
        self.allocations[0] = mix(what);
        let hash = self.allocations.iter().fold(0, |hash, what| mix(hash ^ what));
        (hash >> 40) as u32 | 1
    }

    fn habit(&self) -> usize {
        (mix(u64::from(self.last_allocation_stack) << 8 | u64::from(self.last_op)) >> 54) as usize
    }
}

const _: () = assert!(HABITS == 1 << 10 && CONTEXTS == 1 << 16 && CHUNK_EVENTS < 1 << POSITION_BITS);

/// What a [`Predictor`] expects.
#[derive(Clone, Copy)]
pub(super) struct Expected {
    pub(super) shape: Shape,
    pub(super) place: Option<Place>,
}

fn mix(value: u64) -> u64 {
    let value = (value ^ value >> 29).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    value ^ value >> 32
}

//! [`Site`]: what allocations are summed by. Knows no names; ids only.

use super::allocator::AllocatorKind;
use super::live_set::Block;
use super::record::{Allocation, StackId};

/// One stack, one allocator, one thread.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Site {
    /// The stack that asked.
    pub stack: StackId,
    /// The function that gave.
    pub allocator: AllocatorKind,
    /// The thread that asked.
    pub tid: u32,
}

impl Site {
    /// Where an allocation comes from.
    pub fn of(event: &Allocation) -> Self {
        Self { stack: event.stack, allocator: event.allocator, tid: event.tid }
    }
}

impl Block {
    /// Where it came from.
    pub fn site(&self) -> Site {
        Site { stack: self.stack, allocator: self.allocator, tid: self.tid }
    }
}

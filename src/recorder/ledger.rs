//! The ledger: turns what allocator calls came to into records, in an order that replays right.
//!
//! It knows which blocks are live, so that a free of a block from before the attach is told as such, and holds
//! back what a call under way may give back. A `realloc` frees its block somewhere inside; another thread may
//! be given that very address before the call's end is seen. So when an allocation lands on what a call under
//! way holds, that call has let go of it: its free is written first. A call that fails gives nothing back.

use super::RecordError;
use super::flows::Flows;
use super::given_back::GivenBack;
use crate::addr::RemoteAddr;
use crate::capture::{
    Allocation, AllocatorKind, CaptureWriter, Displaced, DropReason, Free, FreeUnknown, LiveSet, Snapshot,
    SnapshotHead, StackId, Unmap,
};
use crate::probe::calls::Observation;
use crate::probe::function::{Answer, Domain, Function, Member, Request};
use std::collections::HashSet;

/// Calls under way that are remembered: threads that died in one leave theirs behind.
const MAX_UNDER_WAY: usize = 4096;

/// What is known of memory that was given out, beside the call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Origin {
    /// The Python stack.
    pub stack: StackId,
    /// Mean sampling interval of the draw that took it; 0 where every event is recorded.
    pub interval: u64,
}

/// Something that a call under way may give back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Held {
    Block(RemoteAddr),
    Range(RemoteAddr, u64),
}

impl Held {
    /// Whether what is given out from `address` on lies in it. A block is given out again where it begins.
    fn overlaps(self, address: RemoteAddr, size: u64) -> bool {
        match self {
            Self::Block(old) => old == address,
            Self::Range(start, len) => {
                address.0 < start.0.saturating_add(len) && start.0 < address.0.saturating_add(size)
            }
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct UnderWay {
    tid: i32,
    held: Held,
    function: Function,
    written: bool,
}

/// What the ledger counts beside the writer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    /// Calls that gave nothing out.
    pub failed: u64,
    /// Unmaps of ranges that were not mapped while recording.
    pub unmaps_unknown: u64,
    /// Frees that were not seen: blocks given out at an address that was live, samples that the agent no longer knows.
    pub missed_frees: u64,
    /// Calls whose beginning or end was not seen.
    pub unmatched: u64,
    /// Blocks that libc freed a second time by itself, at a thread's end: no events of the program.
    pub freed_again: u64,
}

/// The ledger of one recording.
pub struct Ledger {
    writer: CaptureWriter,
    live: LiveSet,
    given_back: GivenBack,
    under_way: Vec<UnderWay>,
    tally: Tally,
    now_ns: u64,
    /// What came and went since the last snapshot, where snapshots are taken.
    flows: Option<Flows>,
}

impl Ledger {
    /// An empty ledger that writes to `writer`. `page_size` is the target's, in bytes.
    pub fn new(writer: CaptureWriter, page_size: u64) -> Self {
        Self {
            writer,
            live: LiveSet::new(page_size),
            given_back: GivenBack::default(),
            under_way: Vec::new(),
            tally: Tally::default(),
            now_ns: 0,
            flows: None,
        }
    }

    /// From now on what comes and goes is summed up by site, for [`Ledger::snapshot`].
    pub fn take_snapshots(&mut self) {
        self.flows = Some(Flows::default());
    }

    /// Writes a snapshot. `alive` are the target's threads. False if there was no room for it: what came and went stays for the next.
    pub fn snapshot(&mut self, head: SnapshotHead, alive: &HashSet<u32>) -> Result<bool, RecordError> {
        let Some(flows) = &mut self.flows else { return Ok(false) };
        let mut snapshot = Snapshot { head, rows: flows.rows(&self.live, head.time_ns, alive) };
        snapshot.settle();
        let is_written = self.writer.keep_snapshot(snapshot)?;
        if is_written {
            flows.clear();
        }
        Ok(is_written)
    }

    /// Nanoseconds since recording began, true of the events that follow.
    pub fn time(&mut self, now_ns: u64) {
        self.now_ns = now_ns;
        self.writer.time(now_ns);
    }

    /// What is live.
    pub fn live(&self) -> &LiveSet {
        &self.live
    }

    /// The writer.
    pub fn writer(&mut self) -> &mut CaptureWriter {
        &mut self.writer
    }

    /// What was counted.
    pub fn tally(&self) -> Tally {
        self.tally
    }

    /// The writer, to be finished.
    pub fn into_writer(self) -> CaptureWriter {
        self.writer
    }

    /// Takes an observation of thread `tid`; `origin` tells more of memory that was given out.
    pub fn observe(&mut self, tid: i32, observation: Observation, origin: Origin) -> Result<(), RecordError> {
        match observation {
            Observation::Nothing => Ok(()),
            Observation::Freed { function, address } => {
                self.has_failed(address);
                self.free_block(tid, function, address)
            }
            Observation::FreedInside { function, address } => self.free_inside(tid, function, address),
            Observation::Begins { function, request } => {
                self.begin(tid, function, request);
                Ok(())
            }
            Observation::Ended { function, request, answer } => {
                self.end(tid, function, request, answer, origin)
            }
            Observation::Unmatched => {
                self.tally.unmatched += 1;
                Ok(self.writer.dropped(1, DropReason::Unreadable)?)
            }
        }
    }

    /// The thread ended: what it had under way will not end.
    pub fn forget(&mut self, tid: i32) {
        self.under_way.retain(|u| u.tid != tid);
    }

    fn begin(&mut self, tid: i32, function: Function, request: Request) {
        let held = match request {
            Request::Reallocate { old, .. } => Held::Block(old),
            // old_len 0 makes a second view of a shared mapping; the first stays.
            Request::Remap { old, old_len, .. } if old_len > 0 => Held::Range(old, old_len),
            Request::Unmap { address, len } => Held::Range(address, len),
            _ => return,
        };
        self.forget(tid);
        if let Held::Block(block) = held {
            self.has_failed(block);
        }
        if self.under_way.len() >= MAX_UNDER_WAY {
            self.under_way.remove(0);
        }
        self.under_way.push(UnderWay { tid, held, function, written: false });
    }

    fn end(
        &mut self,
        tid: i32,
        function: Function,
        request: Request,
        answer: Answer,
        origin: Origin,
    ) -> Result<(), RecordError> {
        let begun = self.under_way.iter().position(|u| u.tid == tid).map(|i| self.under_way.swap_remove(i));
        if answer == Answer::Failed {
            self.tally.failed += 1;
            return Ok(());
        }
        if let Some(begun) = begun.filter(|b| !b.written) {
            self.give_back(tid, function, begun.held)?;
        }
        let Answer::Address(address) = answer else { return Ok(()) };
        let Some(size) = size(request) else { return Ok(()) };
        self.allocated(tid, function, address, size, origin)
    }

    fn allocated(
        &mut self,
        tid: i32,
        function: Function,
        address: RemoteAddr,
        size: u64,
        origin: Origin,
    ) -> Result<(), RecordError> {
        self.let_go_of_overlapped(address, size)?;
        self.given_back.allocated(address);
        let (allocator, Origin { stack, interval }) = (kind(function), origin);
        let event = Allocation { allocator, tid: tid as u32, address, size, stack, interval };
        let displaced = self.live.allocate(&event, self.now_ns);
        self.tally.missed_frees += u64::from(matches!(displaced, Displaced::Block(_)));
        if let Some(flows) = &mut self.flows {
            flows.allocated(&event);
            match &displaced {
                Displaced::Nothing => {}
                Displaced::Block(block) => flows.freed(block),
                Displaced::Mappings(parts) => flows.unmapped(parts),
            }
        }
        Ok(self.writer.allocation(event)?)
    }

    /// What calls under way hold and an allocation now covers, they have given back.
    fn let_go_of_overlapped(&mut self, address: RemoteAddr, size: u64) -> Result<(), RecordError> {
        for i in 0..self.under_way.len() {
            let u = self.under_way[i];
            if !u.written && u.held.overlaps(address, size) {
                self.give_back(u.tid, u.function, u.held)?;
                self.under_way[i].written = true;
            }
        }
        Ok(())
    }

    fn give_back(&mut self, tid: i32, function: Function, held: Held) -> Result<(), RecordError> {
        match held {
            Held::Block(address) => self.free_block(tid, function, address),
            Held::Range(address, len) => {
                let event = Unmap { tid: tid as u32, address, len };
                let parts = self.live.unmap(&event);
                self.tally.unmaps_unknown += u64::from(parts.is_empty());
                if let Some(flows) = &mut self.flows {
                    flows.unmapped(&parts);
                }
                Ok(self.writer.unmap(event)?)
            }
        }
    }

    /// A call under way that holds this block, which somebody else is about to give back, came to nothing: its end (no number
    /// orders that of a failed call) is yet to be told.
    fn has_failed(&mut self, block: RemoteAddr) {
        for under_way in self.under_way.iter_mut().filter(|u| u.held == Held::Block(block)) {
            under_way.written = true;
        }
    }

    fn free_block(&mut self, tid: i32, function: Function, address: RemoteAddr) -> Result<(), RecordError> {
        let (deallocator, tid) = (kind(function), tid as u32);
        if let Some(block) = self.live.free(address) {
            self.given_back.freed(address);
            if let Some(flows) = &mut self.flows {
                flows.freed(&block);
            }
            Ok(self.writer.free(Free { deallocator, tid, address })?)
        } else if function == Function::Free && self.given_back.holds(address) {
            self.tally.freed_again += 1;
            Ok(())
        } else {
            self.given_back.freed(address);
            Ok(self.writer.free_unknown(FreeUnknown { deallocator, tid, address })?)
        }
    }

    /// A live block was given back, though nobody told it: nobody knows who did it when.
    pub fn lost_free(&mut self, address: RemoteAddr) -> Result<(), RecordError> {
        self.tally.missed_frees += 1;
        self.has_failed(address);
        self.free_block(0, Function::Free, address)
    }

    /// A free inside another call is that call's own business, unless it gives back a block that is known to live and
    /// that the call does not hold.
    fn free_inside(&mut self, tid: i32, function: Function, address: RemoteAddr) -> Result<(), RecordError> {
        let holds = |u: &UnderWay| u.tid == tid && u.held == Held::Block(address) && !u.written;
        if self.under_way.iter().any(holds) || !self.live.is_live(address) {
            return Ok(());
        }
        self.has_failed(address);
        self.free_block(tid, function, address)
    }
}

/// Bytes that a call asked for; `None` for one that gives nothing out.
fn size(request: Request) -> Option<u64> {
    match request {
        Request::Allocate { size } => Some(size.unwrap_or(0)),
        Request::AllocateInto { size, .. } | Request::Reallocate { size, .. } => Some(size),
        Request::Map { len } | Request::Remap { len, .. } => Some(len),
        Request::Free { .. } | Request::Unmap { .. } | Request::Nothing => None,
    }
}

/// The capture's name of a function.
pub fn kind(function: Function) -> AllocatorKind {
    use AllocatorKind as K;
    match function {
        Function::Malloc => K::Malloc,
        Function::Calloc => K::Calloc,
        Function::Realloc => K::Realloc,
        Function::Free => K::Free,
        Function::PosixMemalign => K::PosixMemalign,
        Function::AlignedAlloc => K::AlignedAlloc,
        Function::Memalign => K::Memalign,
        Function::Valloc => K::Valloc,
        Function::Pvalloc => K::Pvalloc,
        Function::Mmap => K::Mmap,
        Function::Munmap => K::Munmap,
        Function::Mremap => K::Mremap,
        Function::Python(Domain::Object, member) => match member {
            Member::Malloc => K::ObjectMalloc,
            Member::Calloc => K::ObjectCalloc,
            Member::Realloc => K::ObjectRealloc,
            Member::Free => K::ObjectFree,
        },
        Function::Python(Domain::Mem, member) => match member {
            Member::Malloc => K::MemMalloc,
            Member::Calloc => K::MemCalloc,
            Member::Realloc => K::MemRealloc,
            Member::Free => K::MemFree,
        },
        Function::Python(Domain::Raw, member) => match member {
            Member::Malloc => K::RawMalloc,
            Member::Calloc => K::RawCalloc,
            Member::Realloc => K::RawRealloc,
            Member::Free => K::RawFree,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capture::Header;

    fn allocated(address: u64) -> Observation {
        Observation::Ended {
            function: Function::Malloc,
            request: Request::Allocate { size: Some(64) },
            answer: Answer::Address(RemoteAddr(address)),
        }
    }

    fn freed(function: Function, address: u64) -> Observation {
        Observation::Freed { function, address: RemoteAddr(address) }
    }

    #[test]
    fn a_block_that_libc_frees_again_is_not_from_before() {
        let folder = tempfile::tempdir().unwrap();
        let writer = CaptureWriter::create(folder.path().join("c"), false, &Header::default()).unwrap();
        let mut ledger = Ledger::new(writer, 4096);
        // A thread frees its block; at its end the thread's cache is given back.
        for call in [allocated(0x1000), freed(Function::Free, 0x1000), freed(Function::Free, 0x1000)] {
            ledger.observe(1, call, Origin::default()).unwrap();
        }
        assert_eq!((ledger.tally().freed_again, ledger.writer().counters().frees_from_before), (1, 0));
        // A block of before is told once, and its second free is libc's too.
        for call in [freed(Function::Free, 0x2000), freed(Function::Free, 0x2000)] {
            ledger.observe(1, call, Origin::default()).unwrap();
        }
        assert_eq!((ledger.tally().freed_again, ledger.writer().counters().frees_from_before), (2, 1));
        // Given out again, the address is a new block.
        for call in [allocated(0x1000), freed(Function::Free, 0x1000)] {
            ledger.observe(1, call, Origin::default()).unwrap();
        }
        assert_eq!((ledger.tally().freed_again, ledger.writer().counters().frees), (2, 2));
    }
}

//! Version 1: bytes of an events chunk to records (the bytes are drawn in `format`).
//!
//! Pure: the chunk's bytes and the tables in, one record at a time out. Nothing that the bytes say
//! is believed: every length, id and kind is checked, and nothing is reserved for what is only announced.

use super::allocator::AllocatorKind;
use super::format::{RECENT_ADDRESSES, tag};
use super::record::{
    Allocation, DropReason, FrameId, Free, FreeUnknown, GapReason, Record, StackId, StringId, Unmap,
};
use super::stack_table::{StackTable, ThreadName};
use super::varint::Cursor;
use crate::addr::RemoteAddr;

/// Why a chunk makes no sense.
pub(super) type Broken = &'static str;

pub(super) const ENDED: Broken = "a record is cut or holds an overlong number";

pub(super) struct ChunkDecoder {
    at: usize,
    last_address: u64,
    last_stack: u32,
    tid: Option<u32>,
    time: u64,
    next_string: u32,
    pub(super) next_frame: u32,
    next_node: u32,
    /// For what version 5 adds (`v5`).
    pub(super) next_module: u32,
    allocations: usize,
    recent: Box<[u64; RECENT_ADDRESSES]>,
}

impl ChunkDecoder {
    pub(super) fn new() -> Self {
        Self {
            at: 0,
            last_address: 0,
            last_stack: 0,
            tid: None,
            time: 0,
            next_string: 0,
            next_frame: 0,
            next_node: 0,
            next_module: 0,
            allocations: 0,
            recent: Box::new([0; RECENT_ADDRESSES]),
        }
    }

    /// Starts the next chunk.
    pub(super) fn reset(&mut self) {
        let recent = std::mem::replace(&mut self.recent, Box::new([0; RECENT_ADDRESSES]));
        *self = Self { recent, ..Self::new() };
    }

    /// The next record of `raw`, the same chunk as in the calls before; `None` at its end.
    pub(super) fn next(&mut self, raw: &[u8], tables: &mut StackTable) -> Result<Option<Record>, Broken> {
        loop {
            let mut cursor = Cursor::new(raw, self.at);
            let Some(first) = cursor.byte() else { return Ok(None) };
            let record = self.record(first, &mut cursor, tables)?;
            self.at = cursor.position();
            if record.is_some() {
                return Ok(record);
            }
        }
    }

    /// What `first` begins, with the bytes at `cursor`. `None` for a record that only sets state. Keeps no place in the
    /// chunk: for `next`, and for later versions that have the records of this one.
    pub(super) fn record(
        &mut self,
        first: u8,
        cursor: &mut Cursor<'_>,
        tables: &mut StackTable,
    ) -> Result<Option<Record>, Broken> {
        match first {
            0x00..=0x7f => Ok(Some(self.allocation(first, cursor, tables)?)),
            0x80..=0xdf => Ok(Some(self.free(first, cursor)?)),
            _ => self.other(first, cursor, tables),
        }
    }

    fn allocation(
        &mut self,
        first: u8,
        cursor: &mut Cursor<'_>,
        tables: &StackTable,
    ) -> Result<Record, Broken> {
        let allocator = kind(first & tag::KIND)?;
        let delta = cursor.signed().ok_or(ENDED)?;
        let address = self.moved(delta, first & tag::ALIGNED != 0);
        let size = cursor.varint().ok_or(ENDED)?;
        if first & tag::SAME_STACK == 0 {
            self.last_stack = cursor.varint_u32().ok_or(ENDED)?;
        }
        let stack = StackId(self.last_stack);
        if !tables.has_stack(stack) {
            return Err("an allocation names a stack that is not defined");
        }
        self.recent[self.allocations % RECENT_ADDRESSES] = address;
        self.allocations += 1;
        let tid = self.tid()?;
        Ok(Record::Allocation(Allocation {
            allocator,
            tid,
            address: RemoteAddr(address),
            size,
            stack,
            interval: 0,
        }))
    }

    fn free(&mut self, first: u8, cursor: &mut Cursor<'_>) -> Result<Record, Broken> {
        let deallocator = kind(first & tag::KIND)?;
        let address = match first & !tag::KIND {
            tag::FREE_RECENT => {
                let back = usize::from(cursor.byte().ok_or(ENDED)?);
                if back >= self.allocations {
                    return Err("a free names an allocation before its chunk");
                }
                self.last_address = self.recent[(self.allocations - 1 - back) % RECENT_ADDRESSES];
                self.last_address
            }
            form => {
                let delta = cursor.signed().ok_or(ENDED)?;
                self.moved(delta, form == tag::FREE_ALIGNED)
            }
        };
        Ok(Record::Free(Free { deallocator, tid: self.tid()?, address: RemoteAddr(address) }))
    }

    /// Everything else.
    pub(super) fn other(
        &mut self,
        first: u8,
        cursor: &mut Cursor<'_>,
        tables: &mut StackTable,
    ) -> Result<Option<Record>, Broken> {
        Ok(Some(match first {
            tag::STRING | tag::FRAME | tag::STACK => self.definition(first, cursor, tables)?,
            tag::THREAD => {
                let tid = cursor.varint_u32().ok_or(ENDED)?;
                let os = text(cursor)?.to_owned();
                let python = text(cursor)?.to_owned();
                tables.define_thread(tid, ThreadName { os, python });
                Record::Thread(tid)
            }
            tag::SWITCH => {
                let delta = cursor.signed().ok_or(ENDED)?;
                self.tid =
                    Some(shifted(self.tid.unwrap_or(0), delta).ok_or("a thread's id is out of range")?);
                return Ok(None);
            }
            tag::TIME => {
                let delta = cursor.varint().ok_or(ENDED)?;
                self.time = self.time.checked_add(delta).ok_or("a time is out of range")?;
                Record::Time(self.time)
            }
            tag::FREE_UNKNOWN => {
                let deallocator = kind(cursor.byte().ok_or(ENDED)?)?;
                let address = self.address(cursor)?;
                Record::FreeUnknown(FreeUnknown { deallocator, tid: self.tid()?, address })
            }
            tag::UNMAP => {
                let address = self.address(cursor)?;
                let len = cursor.varint().ok_or(ENDED)?;
                Record::Unmap(Unmap { tid: self.tid()?, address, len })
            }
            tag::DROP => {
                let count = cursor.varint().ok_or(ENDED)?;
                Record::Drop { count, reason: DropReason::from_id(cursor.byte().ok_or(ENDED)?) }
            }
            tag::GAP => {
                let duration_ns = cursor.varint().ok_or(ENDED)?;
                Record::Gap { duration_ns, reason: GapReason::from_id(cursor.byte().ok_or(ENDED)?) }
            }
            _ => return Err("a record's kind is unknown"),
        }))
    }

    fn definition(
        &mut self,
        first: u8,
        cursor: &mut Cursor<'_>,
        tables: &mut StackTable,
    ) -> Result<Record, Broken> {
        match first {
            tag::STRING => {
                let id = StringId(defined(cursor, &mut self.next_string)?);
                tables.define_string(id, text(cursor)?)?;
                Ok(Record::String(id))
            }
            tag::FRAME => {
                let id = FrameId(defined(cursor, &mut self.next_frame)?);
                let function = StringId(cursor.varint_u32().ok_or(ENDED)?);
                let file = StringId(cursor.varint_u32().ok_or(ENDED)?);
                let line = cursor.varint_u32().ok_or(ENDED)?;
                tables.define_frame(id, function, file, line)?;
                Ok(Record::Frame(id))
            }
            _ => {
                let id = StackId(defined(cursor, &mut self.next_node)?);
                let parent = StackId(cursor.varint_u32().ok_or(ENDED)?);
                let frame = FrameId(cursor.varint_u32().ok_or(ENDED)?);
                tables.define_node(id, parent, frame)?;
                Ok(Record::Stack(id))
            }
        }
    }

    /// The thread of the events now.
    pub(super) fn tid(&self) -> Result<u32, Broken> {
        self.tid.ok_or("an event has no thread")
    }

    fn address(&mut self, cursor: &mut Cursor<'_>) -> Result<RemoteAddr, Broken> {
        let delta = cursor.signed().ok_or(ENDED)?;
        Ok(RemoteAddr(self.moved(delta, false)))
    }

    fn moved(&mut self, delta: i64, in_units: bool) -> u64 {
        let delta = if in_units { (delta as u64) << 4 } else { delta as u64 };
        self.last_address = self.last_address.wrapping_add(delta);
        self.last_address
    }
}

pub(super) fn kind(id: u8) -> Result<AllocatorKind, Broken> {
    AllocatorKind::from_id(id).ok_or("an allocator's kind is unknown")
}

fn shifted(from: u32, delta: i64) -> Option<u32> {
    u32::try_from(i64::from(from).checked_add(delta)?).ok()
}

pub(super) fn defined(cursor: &mut Cursor<'_>, next: &mut u32) -> Result<u32, Broken> {
    let delta = cursor.signed().ok_or(ENDED)?;
    let id = shifted(*next, delta).ok_or("an id is out of range")?;
    *next = id.wrapping_add(1);
    Ok(id)
}

pub(super) fn text<'a>(cursor: &mut Cursor<'a>) -> Result<&'a str, Broken> {
    let len = cursor.varint().ok_or(ENDED)?;
    let bytes = cursor.take(len).ok_or(ENDED)?;
    std::str::from_utf8(bytes).map_err(|_| "a string is not UTF-8")
}

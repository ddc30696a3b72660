//! Records to bytes, for one chunk at a time (the bytes are drawn in `format`).
//!
//! Pure: no file, no tables. What is remembered between records is what the decoder (`v2`) can
//! know too, and it is forgotten at a chunk's start.

use super::format::{RECENT_ADDRESSES, tag};
use super::record::{
    Allocation, DropReason, FrameId, Free, FreeUnknown, GapReason, StackId, StringId, Unmap,
};
use super::varint::{put, zigzag};

/// Slots of the table that finds a recent address: four times the addresses, so that few collide
/// (a collision costs a longer record, never a wrong one).
const SLOTS: usize = 4 * RECENT_ADDRESSES;

pub(super) struct ChunkEncoder {
    buf: Vec<u8>,
    last_address: u64,
    last_stack: u32,
    tid: Option<u32>,
    interval: u64,
    time: u64,
    next_string: u32,
    next_frame: u32,
    next_node: u32,
    allocations: u64,
    /// (address, number of the allocation + 1) by hash of the address; 0 is an empty slot.
    recent: Box<[(u64, u64); SLOTS]>,
}

impl ChunkEncoder {
    pub(super) fn new() -> Self {
        Self {
            buf: Vec::new(),
            last_address: 0,
            last_stack: 0,
            tid: None,
            interval: 0,
            time: 0,
            next_string: 0,
            next_frame: 0,
            next_node: 0,
            allocations: 0,
            recent: Box::new([(0, 0); SLOTS]),
        }
    }

    /// Starts the next chunk.
    pub(super) fn reset(&mut self) {
        let mut buf = std::mem::take(&mut self.buf);
        buf.clear();
        *self = Self { buf, ..Self::new() };
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.buf
    }

    pub(super) fn is_empty(&self) -> bool {
        self.buf.is_empty()
    }

    pub(super) fn string(&mut self, id: StringId, text: &str) {
        self.buf.push(tag::STRING);
        self.next_string = self.id(id.0, self.next_string);
        self.text(text);
    }

    pub(super) fn frame(&mut self, id: FrameId, function: StringId, file: StringId, line: u32) {
        self.buf.push(tag::FRAME);
        self.next_frame = self.id(id.0, self.next_frame);
        put(&mut self.buf, u64::from(function.0));
        put(&mut self.buf, u64::from(file.0));
        put(&mut self.buf, u64::from(line));
    }

    pub(super) fn node(&mut self, id: StackId, parent: StackId, frame: FrameId) {
        self.buf.push(tag::STACK);
        self.next_node = self.id(id.0, self.next_node);
        put(&mut self.buf, u64::from(parent.0));
        put(&mut self.buf, u64::from(frame.0));
    }

    pub(super) fn thread(&mut self, tid: u32, os_name: &str, python_name: &str) {
        self.buf.push(tag::THREAD);
        put(&mut self.buf, u64::from(tid));
        self.text(os_name);
        self.text(python_name);
    }

    pub(super) fn time(&mut self, ns: u64) {
        self.buf.push(tag::TIME);
        put(&mut self.buf, ns.saturating_sub(self.time));
        self.time = self.time.max(ns);
    }

    pub(super) fn allocation(&mut self, event: &Allocation) {
        self.switch(event.tid);
        // Ranged ones are recorded for certain whatever the interval: nothing to say.
        if event.interval != self.interval && !event.allocator.is_ranged() {
            self.buf.push(tag::INTERVAL);
            put(&mut self.buf, event.interval);
            self.interval = event.interval;
        }
        let address = event.address.0;
        let delta = address.wrapping_sub(self.last_address) as i64;
        let aligned = delta & 15 == 0;
        let same = event.stack.0 == self.last_stack;
        let flags = if aligned { tag::ALIGNED } else { 0 } | if same { tag::SAME_STACK } else { 0 };
        self.buf.push(flags | event.allocator.id());
        put(&mut self.buf, zigzag(if aligned { delta >> 4 } else { delta }));
        put(&mut self.buf, event.size);
        if !same {
            put(&mut self.buf, u64::from(event.stack.0));
        }
        self.last_stack = event.stack.0;
        self.last_address = address;
        self.allocations += 1;
        self.recent[slot(address)] = (address, self.allocations);
    }

    pub(super) fn free(&mut self, event: &Free) {
        self.switch(event.tid);
        let address = event.address.0;
        let (seen, number) = self.recent[slot(address)];
        let back = self.allocations - number;
        if number > 0 && seen == address && back < RECENT_ADDRESSES as u64 {
            self.buf.push(tag::FREE_RECENT | event.deallocator.id());
            self.buf.push(back as u8);
        } else {
            let delta = address.wrapping_sub(self.last_address) as i64;
            let aligned = delta & 15 == 0;
            self.buf.push(if aligned { tag::FREE_ALIGNED } else { tag::FREE } | event.deallocator.id());
            put(&mut self.buf, zigzag(if aligned { delta >> 4 } else { delta }));
        }
        self.last_address = address;
    }

    pub(super) fn free_unknown(&mut self, event: &FreeUnknown) {
        self.switch(event.tid);
        self.buf.extend([tag::FREE_UNKNOWN, event.deallocator.id()]);
        self.address(event.address.0);
    }

    pub(super) fn unmap(&mut self, event: &Unmap) {
        self.switch(event.tid);
        self.buf.push(tag::UNMAP);
        self.address(event.address.0);
        put(&mut self.buf, event.len);
    }

    pub(super) fn dropped(&mut self, count: u64, reason: DropReason) {
        self.buf.push(tag::DROP);
        put(&mut self.buf, count);
        self.buf.push(reason.id());
    }

    pub(super) fn gap(&mut self, duration_ns: u64, reason: GapReason) {
        self.buf.push(tag::GAP);
        put(&mut self.buf, duration_ns);
        self.buf.push(reason.id());
    }

    fn switch(&mut self, tid: u32) {
        if self.tid != Some(tid) {
            self.buf.push(tag::SWITCH);
            put(&mut self.buf, zigzag(i64::from(tid) - i64::from(self.tid.unwrap_or(0))));
            self.tid = Some(tid);
        }
    }

    fn address(&mut self, address: u64) {
        put(&mut self.buf, zigzag(address.wrapping_sub(self.last_address) as i64));
        self.last_address = address;
    }

    /// Writes an id; gives the one expected next.
    fn id(&mut self, id: u32, expected: u32) -> u32 {
        put(&mut self.buf, zigzag(i64::from(id) - i64::from(expected)));
        id.wrapping_add(1)
    }

    fn text(&mut self, text: &str) {
        put(&mut self.buf, text.len() as u64);
        self.buf.extend_from_slice(text.as_bytes());
    }
}

fn slot(address: u64) -> usize {
    // Fibonacci hashing: the top ten bits of the product are well mixed.
    (address.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 54) as usize
}

const _: () = assert!(SLOTS == 1 << 10);

//! The bytes of a capture file, version 5, and how versions before it differ.
//!
//! All fixed-width integers are little-endian. `varint` is LEB128 of an unsigned 64-bit number,
//! `zigzag` a varint of `(n << 1) ^ (n >> 63)`.
//!
//! # File
//!
//! ```text
//!  0        8         10      12       16
//! ┌────────┬─────────┬───────┬────────┬───────┬───────┬───
//! │ magic  │ version │ flags │ crc32  │ chunk │ chunk │ …
//! │ 8 byte │ u16     │ u16   │ u32    │       │       │
//! └────────┴─────────┴───────┴────────┴───────┴───────┴───
//! ```
//! - magic: `89 48 54 41 50 0d 0a 1a` (`\x89HTAP\r\n\x1a`: a transfer that touches line ends shows).
//! - crc32: IEEE, over the twelve bytes before it. Magic, version and crc keep their place in every
//!   version, so that any binary can say which version a file has.
//! - flags: the low eight tell things that a reader may ignore (none is defined yet); a set bit of the
//!   high eight that a reader does not know means that it must refuse the file. 0x0100, from version 2:
//!   some allocations are samples, and a sum that takes each for one is wrong. 0x0200, from version 4: there is no event log, and
//!   what was live is in snapshots alone.
//!
//! # Chunk
//!
//! ```text
//!  0      1       2            6         10      14
//! ┌──────┬───────┬────────────┬─────────┬───────┬─────────────────────┐
//! │ kind │ codec │ stored_len │ raw_len │ crc32 │ stored_len bytes    │
//! │ u8   │ u8    │ u32        │ u32     │ u32   │                     │
//! └──────┴───────┴────────────┴─────────┴───────┴─────────────────────┘
//! ```
//! - kind: 1 header, 2 events, 3 trailer, 4 a part of a snapshot, 5 gauges, 6 symbols. Others are skipped. 0 is never used, so that
//!   a tail of zeroes left by a crash is not taken for chunks.
//! - codec: 0 stored as is (`stored_len == raw_len`), 1 one lz4 block.
//! - `raw_len` <= 2 MiB (1 MiB before version 3), `stored_len` <= `lz4` bound of that.
//! - crc32: over the ten header bytes before it and the stored bytes.
//!
//! The first chunk is the header; a trailer, if there is one, is the last. A file without a trailer
//! was cut short; it is good up to its last whole chunk. A chunk is written by one call once it is
//! complete. Header and trailer are JSON objects ([`Header`](super::Header), [`Trailer`](super::Trailer));
//! fields a reader does not know are ignored, and those missing have defaults.
//!
//! # Events chunk
//!
//! ```text
//! ┌─────────────┬────────────┬────────────────┬────────┬───────┬───────────┬─────────┐
//! │ stacks' len │ sizes' len │ addresses' len │ stacks │ sizes │ addresses │ control │
//! │ varint      │ varint     │ varint         │        │       │           │ to end  │
//! └─────────────┴────────────┴────────────────┴────────┴───────┴───────────┴─────────┘
//! ```
//! The control column is a sequence of records; what a record leaves to another column is the next there. At most
//! 2^20 events. Nothing is remembered from chunk to chunk: what is delta-coded starts from zero in every one, nothing
//! is expected at its start, and every definition carries its id. So a damaged chunk loses what it holds and nothing
//! more. What is used is defined before, in this chunk or an earlier one. The first byte of a record:
//!
//! ```text
//! bit  7   6   5   4   3   2   1   0
//!    ┌───┬───┬───┬───────────────────┐
//!    │ 0 │ 0 │ 0 │ n                 │  n + 1 events as expected, addresses too
//!    │ 0 │ 0 │ 1 │ tag               │  see the table
//!    │ 0 │ 1 │ 0 │ deallocator kind  │  free: address
//!    │ 0 │ 1 │ 1 │ deallocator kind  │  free of a block from before the attach: address
//!    │ 1 │ S │ Z │ allocator kind    │  allocation: [stack], [size], address
//!    └───┴───┴───┴───────────────────┘
//! ```
//! - Kinds are the numbers of [`AllocatorKind`](super::AllocatorKind).
//! - S: the stack is that of the expected event (0 if that has none); else it is a varint in the stacks column.
//! - Z: the size is that of the expected event (0 if that has none); else it is a varint in the sizes column.
//! - The thread of an event is the one named by the last *switch* in the chunk; there is one before the
//!   first event.
//!
//! | tag | record | fields in the control column |
//! |---|---|---|
//! | 0 | string | id, varint length, UTF-8 bytes |
//! | 1 | frame | id, varint function string, varint file string, varint line (0: unknown) |
//! | 2 | stack node | id, varint parent node (0: none), varint frame |
//! | 3 | thread | varint tid, varint length, OS name, varint length, Python name (empty: unknown) |
//! | 4 | switch | zigzag tid - current tid (0 at the chunk's start) |
//! | 5 | time | varint units of 100 µs since the chunk's last time (first of a chunk: since the start) |
//! | 6 | an event as expected but for its address | (address) |
//! | 7 | unmap | (length in the sizes column, address) |
//! | 8 | drop | varint count, u8 reason |
//! | 9 | gap | varint ns, u8 reason |
//! | 10 | interval | varint bytes |
//! | 11 | module | id, varint length, path as UTF-8, varint length, build id (may be empty) |
//! | 12 | native frame | id, varint module + 1 (0: code of no file), varint address, u8 flags |
//!
//! *interval* is true of the allocations that follow in the chunk, and 0 at its start. 0: they were recorded
//! for certain. Otherwise each was sampled with probability 1 - exp(-size / interval), so it stands for
//! 1 / that many of its kind. The allocators of the mapping domain (mmap, mremap) are recorded for certain
//! whatever the interval is. An interval other than 0 occurs only in a file with the flag 0x0100.
//!
//! `id` is a zigzag difference to the id after the last one of that sort defined in the chunk
//! (so 0 in the ordinary case), and absolute for the first. Strings, modules and frames count from 0, stack
//! nodes from 1. A parent's id is below its child's.
//!
//! *module* and *native frame* came with version 5, and occur only in a file whose header says `native`. A native frame is a
//! frame: it has an id among theirs, and stack nodes name it as any. Its address is that in the file, as the file's
//! symbols have it, or in memory where there is no module, and lies within the instruction that executes: of a caller, within its
//! call. Flags: 1, the file is the Python interpreter's own; 2, the place is guessed, because the code of the
//! frame before has no unwind data.
//!
//! # Addresses
//!
//! An address is a varint in the addresses column, its *place*:
//!
//! | place | address |
//! |---|---|
//! | 0 | that which the place of the expected event means now |
//! | 1 | a zigzag follows: the difference to the address of the event before |
//! | 2 + 2n | of an allocation: that of the event n before the latest that is none; of all others: that of the n-th last allocation (0: the latest); n < 65,536 |
//! | 3 + 2n | the difference to the address of the event before is 16 * unzigzag(n) |
//!
//! The event before the chunk's first has the address 0; differences wrap at 64 bits.
//!
//! # What is expected
//!
//! Programs repeat themselves: the event that followed in the same context before is expected now, its place included
//! (the block given back two frees ago, say, whichever that is now). Writer and reader do the same
//! with the events of the chunk (`src/capture/predict.rs`):
//!
//! - An event's *shape* is its class (0 allocation, 1 free, 2 free from before the attach, 3 unmap) * 32 + kind, its
//!   stack, and its size or length (0 where it has none). A shape with a size of 2^32 or more is never expected; a place
//!   of 2^32 - 1 or more is forgotten, and so is place 1.
//! - While an event at *position* p of the chunk is followed, the one at p is expected, and after an event of that
//!   shape the next position is followed. After another shape none is, until an allocation ends a context that was
//!   there before: then the event after its latest occurrence is followed. Only the last 2^18 events are remembered
//!   (a position is given up when it is 2^18 - 1 events ago).
//! - A context is four allocations in a row, as a hash of 24 bits: with `m(v) = (w ^ w >> 32) where w = (v ^ v >> 29) *
//!   0x9e3779b97f4a7c15`, each is `a = m(size ^ stack << 32 ^ (class * 32 + kind) << 27)`, 0 for those before the chunk;
//!   `h = 0`, then `h = m(h ^ a)` from the latest to the earliest; the high 24 bits of h with the lowest of them set. Of contexts
//!   with the same high 16 bits only the last is remembered.
//! - Where no position is followed, the event is expected that came last in the same slot of 1,024: `m(stack of the last
//!   allocation << 8 | class * 32 + kind of the last event) >> 54` (0 and 255 at the chunk's start).
//!
//! So the events of a loop cost next to nothing from its second time round, if it is no longer than 2^18 events.
//!
//! # Versions 1 and 2
//!
//! Records in a row, without columns, and each whole; nothing is expected. The first byte:
//!
//! ```text
//! bit  7   6   5   4   3   2   1   0
//!    ┌───┬───┬───┬───────────────────┐
//!    │ 0 │ A │ S │ allocator kind    │  allocation: address, size[, stack]
//!    ├───┼───┼───┼───────────────────┤
//!    │ 1 │ 0 │ 0 │ deallocator kind  │  free: zigzag (address - last) / 16
//!    │ 1 │ 0 │ 1 │ deallocator kind  │  free: u8 d, the address of the d-th last allocation of the chunk
//!    │ 1 │ 1 │ 0 │ deallocator kind  │  free: zigzag  address - last
//!    ├───┼───┼───┼───────────────────┤
//!    │ 1 │ 1 │ 1 │ tag               │  everything else
//!    └───┴───┴───┴───────────────────┘
//! ```
//! - allocation: zigzag of `address - last`, divided by 16 if A is set; varint size; and unless S (same
//!   stack as the chunk's last allocation, 0 before the first) is set, varint stack.
//! - *last* is the address in the record before that has one; differences wrap at 64 bits.
//! - d counts from 0 (the latest allocation of this chunk) to 255.
//! - Tags as above but for three: 5, time, is varint ns; 6 is a free from before the attach: u8 kind, zigzag address - last;
//!   7, unmap, is zigzag address - last, varint length. Tag 10 and the flag 0x0100 came with version 2.
//!
//! # Snapshots
//!
//! A snapshot is one or more chunks of kind 4 in a row, its parts: varints throughout.
//! ```text
//! index, ns since the start, unix ns, reason, part, parts, rows
//! ```
//! and then the columns, each with one number for every row: allocator kind; three times nine numbers (live, allocated
//! and freed since the snapshot before) of: certain bytes and blocks, samples, their bytes with 8 bits of fraction and blocks
//! with 16, and for bytes and blocks the variance and its largest part as 64 (log2 + 64), 0 for none; bytes and blocks of
//! each of 12 classes of age ([`AGE_LIMITS`](super::AGE_LIMITS)); zigzag stack - that of the row before; zigzag tid likewise.
//! At most 2048 rows a part. A snapshot of which a part is missing is lost.
//!
//! # Gauges
//!
//! A chunk of kind 5: varint moments, varint gauges, then ns since the last moment for each (of the first: since the start), then a
//! column for each gauge: 0 unknown, else 1 + zigzag(value - last known value), from 0. The names are
//! [`Gauges::NAMES`](super::Gauges::NAMES); what a later version appends is skipped.
//!
//! # Symbols
//!
//! A chunk of kind 6, from version 5: what native frames are called. It may come anywhere before the trailer, and repeatedly; of what is
//! told twice the last holds. A frame that no such chunk has is unnamed: who reads may look it up in the module.
//! ```text
//! varint strings, for each: varint length, UTF-8 bytes; varint frames, for each:
//!   varint module + 1, zigzag address - that of the frame before (from 0, wrapping), varint places (at most 64),
//!   for each place, innermost first: varint function + 1, varint file + 1 (0: unknown; else a string of the chunk), varint line (0: unknown)
//! ```
//! Several places are functions inlined into each other; none means that nothing is known.
//!
//! An allocation of 512 bytes by malloc at 0x7f00_0000_0010 after one at 0x7f00_0000_0000, from stack 7
//! as that one: `60 02 80 04` (A and S set, kind 0; zigzag(1); varint 512).

/// First bytes of every capture.
pub const MAGIC: [u8; 8] = *b"\x89HTAP\r\n\x1a";
/// The version this binary writes, and the newest it reads.
pub const VERSION: u16 = 5;
/// Bytes of magic, version, flags and checksum.
pub const PREFIX_LEN: usize = 16;
/// Bytes before a chunk's stored bytes.
pub const CHUNK_HEADER_LEN: usize = 14;
/// The most a chunk may hold uncompressed.
pub const MAX_RAW_LEN: usize = 2 << 20;
/// The most a chunk may hold as stored (lz4's bound for [`MAX_RAW_LEN`]).
pub const MAX_STORED_LEN: usize = MAX_RAW_LEN + MAX_RAW_LEN / 255 + 16;
/// The writer closes a chunk when it has this many bytes.
pub const CHUNK_TARGET_LEN: usize = MAX_RAW_LEN - (128 << 10);
/// The most events a chunk may have.
pub const CHUNK_EVENTS: u32 = 1 << 20;
/// An event can be expected to repeat one of so many before it.
pub const EXPECTED_EVENTS: usize = 1 << 18;
/// An event can name one of so many addresses before it, of allocations or of blocks given back.
pub const NEAR_ADDRESSES: usize = 1 << 16;
/// Times are told in units of so many nanoseconds.
pub const TIME_UNIT_NS: u64 = 100_000;
/// The longest string kept; longer ones are cut by the writer.
pub const MAX_STRING_LEN: usize = 16 << 10;
/// The longest name kept of a native function or of its source file.
pub const MAX_NAME_LEN: usize = 4 << 10;
/// The longest build id kept; linkers make them of 8 to 32 bytes.
pub const MAX_BUILD_ID_LEN: usize = 64;
/// The most places that a native frame may have.
pub const MAX_PLACES: usize = 64;
/// Flag bits that a reader must understand.
pub const REQUIRED_FLAGS: u16 = 0xff00;
/// Flag: some allocations are samples.
pub const FLAG_SAMPLED: u16 = 0x0100;
/// Flag: no events, snapshots alone.
pub const FLAG_AGGREGATED: u16 = 0x0200;
/// How many allocations back a free can name its block by one byte (versions 1 and 2).
pub const RECENT_ADDRESSES: usize = 256;

/// Chunk kinds.
pub mod kind {
    /// JSON [`Header`](crate::capture::Header).
    pub const HEADER: u8 = 1;
    /// Records.
    pub const EVENTS: u8 = 2;
    /// JSON [`Trailer`](crate::capture::Trailer).
    pub const TRAILER: u8 = 3;
    /// A part of a [`Snapshot`](crate::capture::Snapshot).
    pub const SNAPSHOT: u8 = 4;
    /// [`Gauges`](crate::capture::Gauges) of some moments.
    pub const GAUGES: u8 = 5;
    /// Names of native frames.
    pub const SYMBOLS: u8 = 6;
}

/// Chunk codecs.
pub mod codec {
    /// Stored as is.
    pub const RAW: u8 = 0;
    /// One lz4 block.
    pub const LZ4: u8 = 1;
}

/// First bytes in the control column.
pub mod control {
    /// Below: so many events less one are as expected.
    pub const LONGEST_RUN: u8 = 0x20;
    /// Below [`FREE`]: records other than events, by the numbers of versions 1 and 2.
    pub const OTHERS: u8 = 0x20;
    /// A string.
    pub const STRING: u8 = 0x20;
    /// A frame.
    pub const FRAME: u8 = 0x21;
    /// A stack node.
    pub const STACK: u8 = 0x22;
    /// A thread's names.
    pub const THREAD: u8 = 0x23;
    /// The thread of the events that follow.
    pub const SWITCH: u8 = 0x24;
    /// The time of the events that follow.
    pub const TIME: u8 = 0x25;
    /// An event as expected but for its address.
    pub const EXPECTED_ELSEWHERE: u8 = 0x26;
    /// A range unmapped.
    pub const UNMAP: u8 = 0x27;
    /// Events dropped.
    pub const DROP: u8 = 0x28;
    /// A span without records.
    pub const GAP: u8 = 0x29;
    /// The sampling interval of the allocations that follow.
    pub const INTERVAL: u8 = 0x2a;
    /// A mapped file.
    pub const MODULE: u8 = 0x2b;
    /// A frame of native code.
    pub const NATIVE_FRAME: u8 = 0x2c;
    /// A free.
    pub const FREE: u8 = 0x40;
    /// A free of a block from before the attach.
    pub const FREE_UNKNOWN: u8 = 0x60;
    /// An allocation.
    pub const ALLOCATION: u8 = 0x80;
    /// Its stack is that of the expected event.
    pub const EXPECTED_STACK: u8 = 0x40;
    /// Its size is that of the expected event.
    pub const EXPECTED_SIZE: u8 = 0x20;
    /// The kind in the low five bits.
    pub const KIND: u8 = 0x1f;
}

/// Numbers in the address column.
pub mod place {
    /// As the expected event's.
    pub const EXPECTED: u64 = 0;
    /// The next number is the difference.
    pub const BYTES: u64 = 1;
    /// From here on: see the module's docs.
    pub const FIRST: u64 = 2;
}

/// First bytes of records in versions 1 and 2.
pub mod tag {
    /// Allocation: the address difference is in units of 16.
    pub const ALIGNED: u8 = 0x40;
    /// Allocation: the stack is that of the last one.
    pub const SAME_STACK: u8 = 0x20;
    /// The kind in the low five bits.
    pub const KIND: u8 = 0x1f;
    /// Free with a difference in units of 16.
    pub const FREE_ALIGNED: u8 = 0x80;
    /// Free of a recent allocation.
    pub const FREE_RECENT: u8 = 0xa0;
    /// Free with a difference in bytes.
    pub const FREE: u8 = 0xc0;
    /// A string.
    pub const STRING: u8 = 0xe0;
    /// A frame.
    pub const FRAME: u8 = 0xe1;
    /// A stack node.
    pub const STACK: u8 = 0xe2;
    /// A thread's names.
    pub const THREAD: u8 = 0xe3;
    /// The thread of the events that follow.
    pub const SWITCH: u8 = 0xe4;
    /// The time of the events that follow.
    pub const TIME: u8 = 0xe5;
    /// Free of a block from before the attach.
    pub const FREE_UNKNOWN: u8 = 0xe6;
    /// A range unmapped.
    pub const UNMAP: u8 = 0xe7;
    /// Events dropped.
    pub const DROP: u8 = 0xe8;
    /// A span without records.
    pub const GAP: u8 = 0xe9;
    /// The sampling interval of the allocations that follow.
    pub const INTERVAL: u8 = 0xea;
}

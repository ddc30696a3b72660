//! What the controller and the in-target agent have in common: memory layouts, record formats, constants. Compiled into
//! both sides (into the agent without std), so that neither can disagree with the other.
//!
//! Three pieces of memory in the target:
//! * **regions**, read-only and executable, near the hooked functions: header, thunks, [`Descriptor`]s, trampolines;
//! * the **state** ([`State`]), private to the process and wiped in a forked child (`MADV_WIPEONFORK`): a child reads
//!   `enabled == 0` and passes every call through;
//! * the **ring memory** ([`RingControl`]s and their data), shared with the controller through a memfd, and not inherited
//!   by children (`MADV_DONTFORK`). It is touched only while `enabled`.
//!
//! A ring has one writer at a time: the thread that owns it, or whoever holds its lock (ring 0, that threads share). A record
//! exists from the moment that `head` is moved over it, so a thread that is cancelled or jumps out of the agent leaves
//! no half of one.

#[path = "agent_abi/python.rs"]
mod python;

pub use python::{ABSENT, PythonFacts, chain, own_state};

/// Version of everything in this file and below it. A controller that finds another in a target only passes its hooks through and
/// removes them.
pub const ABI_VERSION: u32 = 3;

/// First word of [`State::magic`].
pub const STATE_MAGIC: u64 = u64::from_le_bytes(*b"htstate\x01");

/// Which function a hook stands for: the numbers of [`Descriptor::function`] and of records.
pub mod function {
    #![allow(missing_docs)]
    pub const MALLOC: u8 = 0;
    pub const CALLOC: u8 = 1;
    pub const REALLOC: u8 = 2;
    pub const FREE: u8 = 3;
    pub const POSIX_MEMALIGN: u8 = 4;
    pub const ALIGNED_ALLOC: u8 = 5;
    pub const MEMALIGN: u8 = 6;
    pub const VALLOC: u8 = 7;
    pub const PVALLOC: u8 = 8;
    pub const MMAP: u8 = 9;
    pub const MUNMAP: u8 = 10;
    pub const MREMAP: u8 = 11;
    /// The functions of CPython's allocator tables: this + 4 × domain (raw, mem, object) + member (malloc, calloc, realloc,
    /// free). They take their context before their other arguments.
    pub const PYTHON: u8 = 16;
    /// `PyCode_Type.tp_dealloc`.
    pub const CODE_DEALLOC: u8 = 32;
}

/// A hook's facts, beside its thunk. The thunk passes its address in r11.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Descriptor {
    /// Runs the function as if it were not hooked.
    pub original: u64,
    /// Address of the [`State`].
    pub state: u64,
    /// One of [`function`].
    pub function: u32,
    /// Not used.
    pub reserved: u32,
}

/// Threads that can be told apart. More of them at once are passed through and counted.
pub const SLOTS: usize = 2048;
/// [`Slot::key`] of a slot whose thread ended, as the controller found it with the world stopped: no thread pointer. Whoever takes the
/// slot goes on with its ring and its random numbers.
pub const TOMBSTONE: u64 = 1;
/// log2 of [`SLOTS`].
pub const SLOTS_LOG2: u32 = 11;
/// Multiplier of the hash of the lower half of a thread pointer (Fibonacci hashing), fits an imm32. The upper bits of a product of
/// 64 bits would be nearly the same for threads whose stacks are small, and lie close to each other.
pub const SLOT_HASH: u32 = 0x61c8_8647;
/// Slots looked at from a thread's home on.
pub const SLOT_PROBES: usize = 64;
/// Buckets of the table of sampled blocks, of 8 addresses each: a block is in one of two.
pub const TRACKED_BUCKETS: usize = 1 << 13;
/// log2 of [`FILTER_LEN`].
pub const FILTER_LOG2: u32 = 16;
/// Counters of the filter in front of it.
pub const FILTER_LEN: usize = 1 << FILTER_LOG2;
/// Multiplier of the filter's hash of an address (of its bits from 4 on).
pub const FILTER_HASH: u64 = 0x9e37_79b1;
/// Stacks remembered as told.
pub const STACKS_SEEN: usize = 1 << 16;
/// Code objects remembered as told.
pub const CODES_SEEN: usize = 1 << 13;
/// Generations of code objects, by a hash of the address.
pub const CODE_GENERATIONS: usize = 1 << 12;
/// Ranges of return addresses of calls to mmap, munmap and mremap that are an allocator's own.
pub const INTERNAL_CALLERS: usize = 64;

/// The private state. Zero is the state of a forked child.
#[repr(C)]
pub struct State {
    /// 1: record. 0: pass everything through. First, so that a hook's first load is from offset 0.
    pub enabled: u32,
    /// 0: sampled; 1: every event.
    pub exact: u32,
    /// [`STATE_MAGIC`].
    pub magic: u64,
    /// [`ABI_VERSION`].
    pub abi_version: u32,
    /// What the agent may do, see the flags of [`may`].
    pub flags: u32,
    /// Address of the ring memory.
    pub rings: u64,
    /// Rings in it; ring 0 is shared.
    pub ring_count: u32,
    /// Threads met so far: each has a ring of its own while there are any.
    pub rings_used: u32,
    /// Bytes of data of each ring, a power of two.
    pub ring_len: u64,
    /// Sampling interval in bytes (sampled mode). The controller may raise it; a thread takes it at its next draw.
    pub interval: u64,
    /// Seed of the threads' random numbers.
    pub seed: u64,
    /// Ticks of the time stamp counter after which a controller without a heartbeat is no longer waited for.
    pub patience: u64,
    /// Ticks after which it is taken for dead, and the agent switches itself off.
    pub dead_after: u64,
    /// Ticks that one event may wait for room.
    pub max_wait: u64,
    /// Offset of the kernel's thread id from the thread pointer (`struct pthread`).
    pub tid_offset: u64,
    /// How Python stacks are walked.
    pub python: PythonFacts,
    /// Address of the [`Directory`] of the code that native stacks are walked by; 0: they are not.
    pub native: u64,
    /// Where the main thread's stack ends.
    pub stack_end: u64,
    /// Address of the [`LastStack`]s, one for each ring but the shared one; 0: there are none.
    pub last_stacks: u64,
    /// Return addresses that mark a call to the mmap family as an allocator's own: [first, last] pairs, zero ends.
    pub internal_callers: [[u64; 2]; INTERNAL_CALLERS],
    /// Threads for which there was no slot or that could not be told: calls passed through.
    pub without_slot: u64,
    /// Calls of signal handlers that came while the agent itself ran on their thread: passed through.
    pub in_agent: u64,
    /// Keeps what follows on a line of its own.
    pub padding: [u64; 8],
    /// Number of the slot whose thread recorded last.
    pub last: u32,
    /// Keeps what follows on a line of its own.
    pub more_padding: [u32; 15],
    /// Where the events' numbers come from.
    pub stripes: [Stripe; STRIPES],
    /// One for each thread.
    pub slots: [Slot; SLOTS],
    /// How many sampled blocks hash here, 255 for ever once reached.
    pub filter: [u8; FILTER_LEN],
    /// Addresses of sampled blocks.
    pub tracked: [[u64; 8]; TRACKED_BUCKETS],
    /// Hashes of stacks that were told.
    pub stacks_seen: [u64; STACKS_SEEN],
    /// Mixed addresses and generations of code objects that were told.
    pub codes_seen: [u64; CODES_SEEN],
    /// How many code objects that hash here were deallocated.
    pub code_generations: [u32; CODE_GENERATIONS],
    /// Of each slot's thread: the part of its stack that is known to be readable.
    pub stack_bounds: [StackBounds; SLOTS],
}

/// Where native stacks' code and its unwind rows lie behind the state, in memory that is mapped with it.
pub const NATIVE_AT: usize = size_of::<State>().next_multiple_of(4096);

/// Frames of a thread's last native stack that are remembered, and those found since while a stack is walked.
pub const LAST_FRAMES: usize = 1000;

/// The native stack that the thread of a ring told last: most of it is still there at its next event. Zero is none.
#[repr(C)]
pub struct LastStack {
    /// Number of the [`Directory`] by which it was walked.
    pub directory: u64,
    /// Frames of it.
    pub count: u64,
    /// They, outermost first.
    pub frames: [LastFrame; LAST_FRAMES],
}

/// A frame of it: its registers, and how those of its caller were found.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct LastFrame {
    /// Its rsp.
    pub sp: u64,
    /// Where it executes.
    pub pc: u64,
    /// Its rbp, if that is known.
    pub bp: u64,
    /// Hash of it and all outside of it.
    pub hash: u64,
    /// The caller's rbp was read so many bytes below its rsp; 0: it was not read.
    pub bp_below: u32,
    /// Of the agent's.
    pub flags: u32,
}

/// What is known of the memory that a thread's stack lies in.
#[repr(C)]
pub struct StackBounds {
    /// First byte of the part of its own stack that is readable as long as it lives.
    pub low: u64,
    /// One past the last; 0: no such part is known.
    pub high: u64,
    /// A stack pointer from here on…
    pub apart_from: u64,
    /// … to here is on no such part: between it and the end of the thread's own stack lies what can't be read.
    pub apart_to: u64,
}

/// The code of a process by ascending address: this, and [`CodeRange`]s behind it. The controller writes a new one for whatever changes,
/// and never over one that a thread may be reading.
#[repr(C)]
pub struct Directory {
    /// Ranges.
    pub count: u64,
    /// Which of all there ever were, from 1 on.
    pub number: u64,
}

/// A range of code, all of one file.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CodeRange {
    /// First byte.
    pub start: u64,
    /// One past the last.
    pub end: u64,
    /// What is taken off an address to get the file's.
    pub bias: u64,
    /// Address of the file's rows: pairs of u32, the file's address from which on a rule holds, and the
    /// [`Rule`](crate::unwind_abi::Rule).
    pub rows: u64,
    /// Address of a u32 for each block of [`BLOCK`] bytes, and one more: the row that holds where the block begins.
    pub index: u64,
    /// Where the first block begins: the first row's address.
    pub first: u32,
    /// Blocks; 0 for a file without rows.
    pub blocks: u32,
    /// The rule for all of a file without rows.
    pub rule: u32,
    /// Not used.
    pub reserved: u32,
}

/// Bytes of code that one entry of an index stands for.
pub const BLOCK: u32 = 256;

/// Flags of [`State::flags`].
pub mod may {
    /// The agent may make system calls (nanosleep, sigaltstack, arch_prctl): no seccomp filter.
    pub const MAKE_CALLS: u32 = 1;
    /// `rdfsbase` works in user mode.
    pub const READ_FS_BASE: u32 = 2;
    /// CPython's small blocks come from pymalloc or mimalloc at once: a small malloc of its tables calls no other hooked function.
    pub const PASS_ON_TABLES: u32 = 4;
    /// calloc gets its blocks without calling a hooked function (glibc; musl's calls malloc).
    pub const PASS_ON_CALLOC: u32 = 8;
}

/// A thread as the agent knows it.
#[repr(C, align(128))]
pub struct Slot {
    /// Its thread pointer; 0 for a slot that was never used, [`TOMBSTONE`]. At offset 0 for the fast path.
    pub key: u64,
    /// Bytes until its next sample; sampled when it goes below 0. At offset 8 for the fast path.
    pub until: i64,
    /// Interval with which that was drawn.
    pub interval: u64,
    /// State of its random numbers.
    pub random: u64,
    /// Calls under way that will return through the agent.
    pub depth: u32,
    /// 1 while the agent's own code runs.
    pub in_agent: u32,
    /// Stack pointer at the outermost call under way.
    pub depth_rsp: u64,
    /// Stack pointer at which the agent was entered last.
    pub agent_rsp: u64,
    /// Its kernel id when last looked at.
    pub tid: u32,
    /// Its ring.
    pub ring: u32,
    /// Where its ring ends for now: `tail` as last read.
    pub tail: u64,
    /// Events until a silent controller is looked for again.
    pub until_look: u32,
    /// Set when a wait ran out; no more waiting before the controller has moved on.
    pub gave_up: u32,
    /// Ticks that the agent spent on this thread (sampled mode: samples only).
    pub spent: u64,
    /// Events dropped for want of room.
    pub dropped: u64,
    /// Address of its ring's control words.
    pub control: u64,
    /// Address of its ring's data.
    pub data: u64,
    /// The heartbeat that was last told as the time.
    pub epoch: u64,
    /// Turns told since then.
    pub turns: u32,
    /// Its index + 1.
    pub number: u32,
}

/// Control words of a ring. All positions count bytes from the start and never wrap; a record lies at
/// `position % ring_len`.
#[repr(C, align(128))]
pub struct RingControl {
    /// End of what is published.
    pub head: u64,
    /// Which thread writes: for ring 0 the id of the last writer, whose change a THREAD record told.
    pub tid: u32,
    /// Ring 0: slot index + 1 of who holds it.
    pub lock: u32,
    /// Events dropped because this ring was full or locked.
    pub dropped: u64,
    /// Keeps the controller's word on its own line.
    pub padding: [u64; 5],
    /// End of what the controller has taken.
    pub tail: u64,
}

/// The first page of the ring memory; [`RingControl`]s follow it, then the data, from the next page on.
#[repr(C)]
pub struct SharedControl {
    /// Time stamp counter, written by the controller at least every 50 ms, while it drains about every 20 µs.
    pub heartbeat: u64,
}

/// Offset of the ring controls in the ring memory.
pub const RING_CONTROLS_AT: usize = 4096;

/// Bytes behind each ring's data in which its writer gathers the frames of a stack.
pub const SCRATCH_LEN: usize = MAX_DEPTH * 16;

/// Offset of the data of ring `index`.
pub const fn ring_data_at(ring_count: usize, ring_len: usize, index: usize) -> usize {
    (RING_CONTROLS_AT + ring_count * size_of::<RingControl>()).next_multiple_of(4096)
        + index * (ring_len + SCRATCH_LEN)
}

/// Bytes of ring memory.
pub const fn ring_memory_len(ring_count: usize, ring_len: usize) -> usize {
    ring_data_at(ring_count, ring_len, ring_count)
}

/// Counters that order events: one for the addresses of some 64 KiB ranges each. Events of different threads about one address have
/// numbers of one stripe, taken in causal order: before the call that gives a block back, after the one that gives it out.
pub const STRIPES: usize = 1 << 10;

/// The stripe of an address. The mmap family has [`MAPPING_STRIPE`] for all of its calls: ranges overlap.
#[inline(always)]
pub const fn stripe(address: u64) -> usize {
    ((address >> 16).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 54) as usize
}

/// See [`stripe`].
pub const MAPPING_STRIPE: usize = 0;

/// A stripe's counter, on a cache line of its own.
#[repr(C, align(64))]
pub struct Stripe {
    /// The next number.
    pub next: u32,
}

/// The first word of every record: kind in bits 0..8, [`function`] in 8..16, in 32..64 the event's number in its [`stripe`] (exact
/// mode; FREE, FREE_INSIDE, ALLOC, BEGIN by its first argument, END by its result; none for a call that failed). Records are
/// whole numbers of 8-byte words and never wrap around the end of the data.
pub mod record {
    /// Nothing up to the end of the data.
    pub const PAD: u8 = 1;
    /// `[_, address]`: a block given back, for certain.
    pub const FREE: u8 = 2;
    /// `[_, address]`: a block given back inside another call.
    pub const FREE_INSIDE: u8 = 3;
    /// `[_, address, size, stack]`: memory given out; address 0 (or -1 for the mmap family): the call failed.
    pub const ALLOC: u8 = 4;
    /// `[_, address, size, stack, interval]`: the same, a sample.
    pub const SAMPLE: u8 = 5;
    /// `[_, a, b, c]`: realloc (block, size), munmap (address, length), mremap (address, length, new length) begins.
    pub const BEGIN: u8 = 6;
    /// `[_, result, stack, interval]`: it ended. Interval 0: every event is recorded; [`NOT_SAMPLED`]: only what it gave
    /// back counts.
    pub const END: u8 = 7;
    /// `[_, hash, count, (code, packed) × count]`: the frames behind a stack's hash, innermost first. packed: byte offset
    /// of the instruction (i32, see the controller's `RawFrame`) in the low half, generation in the upper. The code's bit 0: a call of
    /// the interpreter's loop began with this frame. The count's bit 63: deeper frames were left out.
    pub const STACK: u8 = 8;
    /// `[_, code, generation | part << 32, total, offset | len << 32, bytes…]`: a piece of a code object's text, see
    /// [`super::part`]. `total` is the whole part's length in bytes.
    pub const CODE: u8 = 9;
    /// `[_, hash, count, directory, address × count]`: the native frames that belong to a stack, told before its STACK, innermost first:
    /// addresses within the instructions that they execute, in the code of the [`super::Directory`] with that number. The count's bit 63: the last one's code does not tell who called it; bit 62:
    /// more frames were left out.
    pub const NATIVE: u8 = 12;
    /// `[_, tid]`: the records that follow in this ring are this thread's.
    pub const THREAD: u8 = 10;
    /// `[_, stamp]`: the time (time stamp counter) of the records that follow in this ring. Coarse: it moves with the
    /// controller's heartbeat, and precisely where threads take turns.
    pub const TIME: u8 = 11;
}

/// [`record::END`]: see there.
pub const NOT_SAMPLED: u64 = u64::MAX;

/// Parts of a code object, for [`record::CODE`].
pub mod part {
    /// Two i32: first line, first traceable instruction.
    pub const NUMBERS: u32 = 0;
    /// Qualified name (name before 3.11), 1 byte per character. Longer than 4096 characters: one more, then cut.
    pub const NAME_1: u32 = 1;
    /// The same, 2 bytes.
    pub const NAME_2: u32 = 2;
    /// The same, 4 bytes.
    pub const NAME_4: u32 = 3;
    /// File name, 1 byte per character.
    pub const FILE_1: u32 = 4;
    /// The same, 2 bytes.
    pub const FILE_2: u32 = 5;
    /// The same, 4 bytes.
    pub const FILE_4: u32 = 6;
    /// The line table. Always the last part of a code object, also when it is empty.
    pub const LINES: u32 = 7;
}

/// Frames of a stack that are kept; see the trap kind.
pub const MAX_DEPTH: usize = 1024;
/// Native frames of a stack that are kept.
pub const MAX_NATIVE_DEPTH: usize = 2 * MAX_DEPTH;
/// Flag of [`record::NATIVE`]: cut short.
pub const NATIVE_CUT: u64 = 1 << 63;
/// Flag of [`record::NATIVE`]: frames were left out.
pub const NATIVE_DEEPER: u64 = 1 << 62;

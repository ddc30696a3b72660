//! The records of a capture, decoded. Knows their meaning, not their bytes (see `encode`, `v1`).

use super::allocator::AllocatorKind;
use crate::addr::RemoteAddr;

/// A string of the capture (a function or file name).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct StringId(pub u32);

/// A code location: function, file and line.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct FrameId(pub u32);

/// A node of the stack tree. A stack is named by its innermost node.
pub type NodeId = StackId;

/// A stack: the id of its innermost node, whose parent is the caller. 0 is the empty stack.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct StackId(pub u32);

impl StackId {
    /// The stack without frames (a thread without a Python state).
    pub const EMPTY: Self = Self(0);
}

/// Memory handed out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Allocation {
    /// By which function.
    pub allocator: AllocatorKind,
    /// On which thread (the kernel's id).
    pub tid: u32,
    /// First byte.
    pub address: RemoteAddr,
    /// Bytes asked for.
    pub size: u64,
    /// The Python stack that asked.
    pub stack: StackId,
    /// 0: recorded for certain, as mappings always are. Else the mean distance in bytes of the draw that
    /// sampled it: it stands for others of its kind, see [`Weight`](super::Weight).
    pub interval: u64,
}

/// A block of this capture given back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Free {
    /// By which function (`realloc` frees too).
    pub deallocator: AllocatorKind,
    /// On which thread.
    pub tid: u32,
    /// The block.
    pub address: RemoteAddr,
}

/// A block given back that was allocated before recording began.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FreeUnknown {
    /// By which function.
    pub deallocator: AllocatorKind,
    /// On which thread.
    pub tid: u32,
    /// The block.
    pub address: RemoteAddr,
}

/// A range of address space given back; parts of several mappings, or of none of ours.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Unmap {
    /// On which thread.
    pub tid: u32,
    /// First byte.
    pub address: RemoteAddr,
    /// Bytes, as passed to the kernel (which rounds up to pages).
    pub len: u64,
}

/// Why events are missing that are counted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DropReason {
    /// The buffer between target and recorder was full.
    BufferFull,
    /// The recorder could not make sense of the event.
    Unreadable,
    /// The agent can't record a call made while it runs itself (by a signal handler), nor more threads than it can tell apart.
    PassedThrough,
    /// The file, or its disk, had no room for an event log any more; snapshots went on.
    FileFull,
    /// A reason this version does not know.
    Other(u8),
}

/// Why a span of time has no records.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GapReason {
    /// Recording was paused.
    Paused,
    /// The breakpoints were lifted for a while.
    BreakpointsLifted,
    /// The application replaced CPython's allocator tables: what they give out and take back is missing, the rest is not.
    TablesReplaced,
    /// A reason this version does not know.
    Other(u8),
}

macro_rules! reason_ids {
    ($reason:ident, $($variant:ident = $id:literal $text:literal),+) => {
        impl $reason {
            /// The id in capture files.
            pub fn id(self) -> u8 {
                match self { $(Self::$variant => $id,)+ Self::Other(id) => id }
            }

            /// The reason with this id.
            pub fn from_id(id: u8) -> Self {
                match id { $($id => Self::$variant,)+ other => Self::Other(other) }
            }

            /// How reports put it.
            pub fn text(self) -> String {
                match self { $(Self::$variant => $text.to_owned(),)+ Self::Other(id) => format!("reason {id}") }
            }
        }
    };
}
reason_ids!(
    DropReason,
    BufferFull = 0 "the buffer was full",
    Unreadable = 1 "the event could not be read",
    PassedThrough = 2 "the call was made inside the agent, or by a thread too many",
    FileFull = 3 "the file was full"
);
reason_ids!(
    GapReason,
    Paused = 0 "recording was paused",
    BreakpointsLifted = 1 "the breakpoints were lifted",
    TablesReplaced = 2 "CPython's allocator tables were replaced"
);

/// One record. Definitions carry only their id; what they define is in the reader's stack table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Record {
    /// A string was defined.
    String(StringId),
    /// A code location was defined.
    Frame(FrameId),
    /// A stack was defined.
    Stack(StackId),
    /// A thread was named (or named anew).
    Thread(u32),
    /// Nanoseconds since the start of recording, true of the records that follow.
    Time(u64),
    /// Memory was handed out.
    Allocation(Allocation),
    /// A block was given back.
    Free(Free),
    /// A block from before the attach was given back.
    FreeUnknown(FreeUnknown),
    /// A range was unmapped.
    Unmap(Unmap),
    /// This many events are missing here.
    Drop {
        /// How many.
        count: u64,
        /// Why.
        reason: DropReason,
    },
    /// Nothing was recorded for a while.
    Gap {
        /// For how long, in nanoseconds.
        duration_ns: u64,
        /// Why.
        reason: GapReason,
    },
    /// A snapshot: [`CaptureReader::snapshot`](super::CaptureReader::snapshot).
    Snapshot,
    /// Gauges: [`CaptureReader::gauges`](super::CaptureReader::gauges).
    Gauges,
}

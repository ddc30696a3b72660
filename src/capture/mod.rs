//! The capture file: what was recorded, in a form that outlives the process and the machine.
//!
//! Live code writes it ([`CaptureWriter`]), offline code reads it ([`CaptureReader`]); they meet
//! nowhere else. The bytes are described in [`format`](mod@self::format). [`LiveSet`] is here because
//! the recorder (is this `free` of a block of ours?) and the analysis (what is live?) must agree on
//! what a record does to the set of live blocks.
//!
//! This module knows nothing of processes, of Python, or of how a report looks.

mod allocator;
mod chunk;
mod compact;
mod create;
mod encode;
mod error;
mod finder;
pub mod format;
mod gauges;
mod header;
mod index;
mod intern;
mod keeper;
mod live_set;
mod mappings;
mod native;
mod output;
mod predict;
mod reader;
mod reader_chunks;
mod record;
mod shown;
mod site;
mod snapshot;
mod snapshot_columns;
mod snapshot_parts;
mod stack_table;
mod stack_union;
mod symbols;
mod thin;
mod totals;
mod trailer;
mod v1;
mod v2;
mod v3;
mod v5;
mod varint;
mod weight;
mod writer;
mod writer_keeping;
mod writer_native;

pub use allocator::{AllocatorKind, Domain};
pub use error::CaptureError;
pub use gauges::Gauges;
pub use header::{BreakpointKind, EntryPoint, Header, LibcFacts, Module, PythonFacts};
pub use index::{
    INDEX_FILE, Index, IndexEntry, NotRecorded, NotRecordedKind, prepare_folder, short_command_line,
};
pub use keeper::Keep;
pub use live_set::{Block, Displaced, LiveSet};
pub use mappings::Part;
pub use native::{ModuleId, NativeFrame, NativePlace};
pub use reader::{CaptureReader, CutShort, Damage, Input};
pub use record::{
    Allocation, DropReason, FrameId, Free, FreeUnknown, GapReason, NodeId, Record, StackId, StringId, Unmap,
};
pub use shown::{FrameView, ReadOptions, Symbolizer};
pub use site::Site;
pub use snapshot::{
    AGE_LIMITS, AGES, Age, MOST_ROWS, SiteState, Snapshot, SnapshotHead, SnapshotReason, age_class,
};
pub use snapshot_columns::{SnapshotPart, Wanted};
pub use stack_table::{FrameKind, FrameText, StackTable, ThreadName};
pub use stack_union::{StackMap, StackUnion};
pub use totals::Totals;
pub(crate) use totals::{Certain, Sampled};
pub use trailer::{Counters, EndReason, Trailer};
pub use weight::{BYTES_FRACTION, COUNT_FRACTION, Weight, each};
pub use writer::CaptureWriter;

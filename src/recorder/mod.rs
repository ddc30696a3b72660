//! Recording: [`examine`] a process, attach, drain a [`source`] of events into the [`ledger`], write the
//! capture, let go.
//!
//! Knows live processes and the capture's writer; knows nothing of reports or of the command line.

pub mod aged;
pub mod agent;
pub mod clock;
pub mod control;
pub mod examine;
pub mod flows;
pub mod gauges;
pub mod given_back;
mod graves;
pub mod guard;
pub mod header;
pub mod ledger;
pub mod locations;
pub mod look;
pub mod look_native;
pub mod merge;
pub mod nap;
pub mod native_code;
pub mod plant;
pub mod reconcile;
pub mod record;
pub mod room;
pub mod schedule;
mod session;
pub mod snapshots;
pub mod source;
mod stripes;
mod tables;
pub mod target_state;
pub mod thread_names;
pub mod tids;
pub mod told;
pub mod translate;
pub mod trap;

use crate::capture::CaptureError;
use crate::cpython::allocators::AllocatorsError;
use crate::cpython::{LayoutError, LocateError};
use crate::image::ImageError;
use crate::inferior::cgroup::Room;
use crate::inferior::error::{AttachError, TraceError};
use crate::inferior::maps::FactError;
use crate::memory::ReadError;
use crate::probe::error::ProbeError;

/// Why a recording could not be made, or ended early.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The process can't be attached to.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// Its files can't be read.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// No supported CPython is in it.
    #[error(transparent)]
    Locate(#[from] LocateError),
    /// CPython's allocator tables can't be found.
    #[error(transparent)]
    Allocators(#[from] AllocatorsError),
    /// The function that frees code objects can't be found.
    #[error(transparent)]
    CodeDealloc(#[from] crate::cpython::CodeDeallocError),
    /// The layout does not fit it.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// It is understood, but not supported.
    #[error("process {pid} can't be recorded: {why}")]
    NotRecordable {
        /// The process.
        pid: i32,
        /// Why not.
        why: String,
    },
    /// Its system calls are filtered, and the agent needs one for native stacks.
    #[error(
        "native stacks of process {pid} can't be walked in it: its system calls are filtered (seccomp), and one is needed to tell which memory can \
         be read"
    )]
    NativeFiltered {
        /// The process.
        pid: i32,
    },
    /// Its control group has not enough memory left for what recording adds.
    #[error(
        "recording would add up to {} to process {pid}{}, and its control group {} has {} left (of {}, {} in use): the \
         kernel would kill a process for it",
        kib(*needed),
        if *with_heaptap { " and heaptap itself, which is in the same group" } else { "" },
        room.group.display(),
        kib(room.left()),
        kib(room.limit),
        kib(room.used)
    )]
    NoRoom {
        /// The process.
        pid: i32,
        /// Bytes that recording adds at most.
        needed: u64,
        /// heaptap's own memory is in that: the group is its own, too.
        with_heaptap: bool,
        /// Every event was to be recorded, which takes the most.
        exact: bool,
        /// The group.
        room: Room,
    },
    /// The probes could not be planted or lifted.
    #[error(transparent)]
    Probe(#[from] ProbeError),
    /// A request to it failed.
    #[error(transparent)]
    Trace(#[from] TraceError),
    /// Something about it can't be learnt.
    #[error(transparent)]
    Fact(#[from] FactError),
    /// Its memory can't be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The agent's rings can't be mapped.
    #[error(transparent)]
    Ring(#[from] crate::probe::ring::RingError),
    /// The agent found nobody there.
    #[error(
        "heaptap was stopped for so long that its agent in process {pid} took it for dead and switched itself off: what \
         happened since then is not recorded"
    )]
    SwitchedOff {
        /// The target.
        pid: i32,
    },
    /// A thread of our own can't be started.
    #[error("heaptap can't start a thread of its own")]
    Thread {
        /// Why.
        source: std::io::Error,
    },
    /// heaptap is at fault.
    #[error("an error in heaptap itself: {what}")]
    Panicked {
        /// What the panic said.
        what: String,
    },
    /// The capture can't be written.
    #[error(transparent)]
    Capture(#[from] CaptureError),
}

fn kib(bytes: u64) -> String {
    format!("{} KiB", bytes.div_ceil(1024))
}

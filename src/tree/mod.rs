//! Recording several processes at once: a process with its children, or all that match a name or a cgroup.
//!
//! The [`supervisor`] finds [`processes`] and starts a heaptap of its own for each ([`one`]), which tells it on a pipe how
//! it goes ([`told`]): one that fails costs one capture. Knows which processes there are and what becomes of their recordings;
//! how a process is recorded is the [`recorder`](crate::recorder)'s business alone.

mod book;
mod ending;
mod inherited;
pub mod one;
pub mod processes;
pub mod select;
pub mod supervisor;
pub mod told;
mod worker;

pub use book::TreeSummary;

use crate::capture::CaptureError;
use crate::inferior::error::TraceError;

/// Why a tree could not be recorded.
#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    /// Nobody to record.
    #[error("no process matches {what}")]
    NoMatch {
        /// The pattern or cgroup.
        what: String,
    },
    /// Somebody, but no Python.
    #[error("{count} match {what}, but no Python runs in any of them")]
    NoPython {
        /// How many, as `1 process`.
        count: String,
        /// The pattern or cgroup.
        what: String,
    },
    /// The process that was asked for is not there.
    #[error("no such process: {pid}")]
    NoProcess {
        /// Its id.
        pid: i32,
    },
    /// Not one recording was made.
    #[error("none of the {found} was recorded; the first: {why}")]
    NoneRecorded {
        /// How many there were, as `3 processes`.
        found: String,
        /// Why the first was not.
        why: String,
    },
    /// The folder or its index.
    #[error(transparent)]
    Folder(#[from] CaptureError),
    /// Signals can't be listened to.
    #[error(transparent)]
    Signals(#[from] TraceError),
}

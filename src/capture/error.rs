//! What can go wrong with a capture file, with the path it went wrong on.

use std::io;
use std::path::PathBuf;

/// A capture could not be written or read.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // fields: the file, the offset in bytes, what the system said
pub enum CaptureError {
    /// The output is there already.
    #[error("{} exists already", path.display())]
    Exists { path: PathBuf },
    /// `force` was given, but this is not a file to write over.
    #[error("{} is {what}, not a regular file; it was left as it is", path.display())]
    NotRegular { path: PathBuf, what: &'static str },
    /// The output could not be made.
    #[error("cannot create {}: {source}", path.display())]
    Create { path: PathBuf, source: io::Error },
    /// The output could not be written (disk full, I/O error).
    #[error("cannot write to {} at byte {offset}: {source}", path.display())]
    Write { path: PathBuf, offset: u64, source: io::Error },
    /// A write failed before; nothing more can be recorded here.
    #[error("{} can take no more records: an earlier write failed", path.display())]
    Closed { path: PathBuf },
    /// More distinct strings, frames or stacks than 32-bit ids.
    #[error("{} cannot take another distinct {what}: the format numbers them with 32 bits", path.display())]
    TooMany { path: PathBuf, what: &'static str },
    /// A sample, though the header says that every allocation is recorded.
    #[error("{} can take no sampled allocation: its header says that all are recorded", path.display())]
    NotSampled { path: PathBuf },
    /// A native frame, though the header says that there are none.
    #[error("{} can take no native frame: its header says that there are none", path.display())]
    NotNative { path: PathBuf },
    /// What was asked for takes an event log.
    #[error(
        "{} has snapshots and no event log: what {what} is not known", path.display()
    )]
    NoEventLog { path: PathBuf, what: &'static str },
    /// Header or trailer do not fit a chunk, or cannot be put as JSON.
    #[error("cannot encode the {what} of {}: {why}", path.display())]
    Document { path: PathBuf, what: &'static str, why: String },
    /// Only native frames are wanted, and none were recorded.
    #[error("{} has no native frames", path.display())]
    NoNative { path: PathBuf },
    /// The input could not be opened.
    #[error("cannot open {}: {source}", path.display())]
    Open { path: PathBuf, source: io::Error },
    /// The input could not be read.
    #[error("cannot read {} at byte {offset}: {source}", path.display())]
    Read { path: PathBuf, offset: u64, source: io::Error },
    /// Not a capture.
    #[error("{} is not a heaptap capture: {why}", path.display())]
    NotACapture { path: PathBuf, why: &'static str },
    /// Written by a later heaptap.
    #[error(
        "{} is a capture of format version {found}; this heaptap ({}) reads versions 1 to {}",
        path.display(), env!("CARGO_PKG_VERSION"), super::format::VERSION
    )]
    NewerVersion { path: PathBuf, found: u16 },
    /// The file demands something this binary does not know.
    #[error("{} uses features of a newer heaptap (flags {flags:#06x})", path.display())]
    NewerFeatures { path: PathBuf, flags: u16 },
    /// The header chunk is gone or damaged: nothing can be said about the file.
    #[error("the header of {} cannot be read: {why}", path.display())]
    BadHeader { path: PathBuf, why: String },
    /// A folder that is not one of captures.
    #[error("{} has no {}", folder.display(), super::INDEX_FILE)]
    NoIndex { folder: PathBuf },
    /// The index of a folder is damaged, or of another version.
    #[error("{} is not the index of a folder of captures: {why}", path.display())]
    BadIndex { path: PathBuf, why: String },
}

impl CaptureError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Exists { .. } => Some("give another name with -o, or --force to write over it"),
            Self::NotRegular { .. } => Some("give the name of a file with -o"),
            Self::Create { .. } => Some("give a path you may write to with -o"),
            Self::Write { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
                Some("free some space or record elsewhere with -o; what was written can be read")
            }
            Self::Write { .. } => Some("what was written before can be read"),
            Self::Closed { .. } => Some("see the error before this one"),
            Self::TooMany { .. } => Some("record for a shorter time"),
            Self::NoEventLog { .. } => Some("record with `attach --events` to have one"),
            Self::NoNative { .. } => Some("record with `attach --native` to have them"),
            Self::NotSampled { .. } | Self::NotNative { .. } | Self::Document { .. } => None,
            Self::Open { .. } => Some("captures are the files that `heaptap attach` writes, named *.heaptap"),
            Self::Read { source, .. } if source.kind() == io::ErrorKind::IsADirectory => {
                Some("give the capture itself, a file")
            }
            Self::Read { .. } => Some("copy the file to a sound disk and try again"),
            Self::NotACapture { .. } => {
                Some("captures are the files that `heaptap attach` writes, named *.heaptap")
            }
            Self::NewerVersion { .. } | Self::NewerFeatures { .. } => {
                Some("read it with the heaptap that wrote it, or a later one")
            }
            Self::NoIndex { .. } => {
                Some("give a capture, or a folder that `heaptap attach --children` or `--follow-forks` wrote")
            }
            Self::BadIndex { .. } => Some("each capture in the folder can be read by itself"),
            Self::BadHeader { .. } => {
                Some("the file was cut or damaged at its very start; nothing in it can be trusted")
            }
        }
    }
}

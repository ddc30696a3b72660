//! One line of a process's memory map, as plain data.
//!
//! Who reads it (`inferior`) and who interprets it (`image`) do not know each other; this is what they
//! share. Knows nothing of files or ELF.

use crate::addr::RemoteAddr;
use std::path::PathBuf;

/// Access rights of a mapping.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Perms {
    /// May be read.
    pub read: bool,
    /// May be written.
    pub write: bool,
    /// May be executed.
    pub execute: bool,
    /// `MAP_SHARED`.
    pub shared: bool,
}

/// A contiguous range of a process's address space.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Mapping {
    /// First byte.
    pub start: RemoteAddr,
    /// One past the last byte.
    pub end: RemoteAddr,
    /// Access rights.
    pub perms: Perms,
    /// Offset of `start` in the file, in bytes.
    pub offset: u64,
    /// Device of the file (major, minor).
    pub device: (i32, i32),
    /// Inode of the file; 0 when nothing backs the range.
    pub inode: u64,
    /// What backs the range.
    pub backing: Backing,
}

/// What backs a mapping.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Backing {
    /// A file: its path as the kernel shows it (without the mark of deletion), and whether it is deleted.
    File {
        /// Relative to the root of the reading process, or of the target's mount namespace.
        path: PathBuf,
        /// No directory entry leads to the file any more.
        deleted: bool,
    },
    /// A name the kernel made up: `[heap]`, `[stack]`, `[vdso]`, `[anon:…]`.
    Named(String),
    /// Nothing.
    Anonymous,
}

impl Mapping {
    /// True if `addr` lies in the range.
    pub fn contains(&self, addr: RemoteAddr) -> bool {
        self.start <= addr && addr < self.end
    }

    /// Bytes in the range.
    pub fn len(&self) -> u64 {
        self.end.since(self.start)
    }

    /// True for a range of no bytes (the kernel shows none).
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// True if a file on disk backs the range.
    pub fn is_file(&self) -> bool {
        matches!(self.backing, Backing::File { .. })
    }
}

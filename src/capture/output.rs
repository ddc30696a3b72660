//! [`Output`]: the file behind a writer. Whole chunks go in, each by one call.
//!
//! Where a disk that is full must not end the recording, chunks wait in memory until there is room again. Knows bytes; what
//! may wait, and how much of it, is the writer's business.

use super::error::CaptureError;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// The most that may wait: when there is more, the writer makes nothing that would have to.
const MOST_WAITING: usize = 16 << 20;

pub(super) struct Output {
    path: PathBuf,
    file: File,
    /// Bytes of the file that are whole chunks.
    offset: u64,
    failed: bool,
    /// Whether chunks may wait for room. Otherwise a disk that is full is an error like any other.
    waits: bool,
    waiting: Vec<u8>,
}

impl Output {
    pub(super) fn new(path: PathBuf, file: File) -> Self {
        Self { path, file, offset: 0, failed: false, waits: false, waiting: Vec::new() }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Bytes of the file so far.
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    /// From now on chunks wait where the disk is full.
    pub(super) fn wait_for_room(&mut self) {
        self.waits = true;
    }

    /// Whether anything waits.
    pub(super) fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Bytes that wait.
    pub(super) fn waiting_bytes(&self) -> u64 {
        self.waiting.len() as u64
    }

    /// Whether no more may wait.
    pub(super) fn is_clogged(&self) -> bool {
        self.waiting.len() >= MOST_WAITING
    }

    /// An error that was met before is met again.
    pub(super) fn check(&self) -> Result<(), CaptureError> {
        if self.failed { Err(CaptureError::Closed { path: self.path.clone() }) } else { Ok(()) }
    }

    /// Writes chunks, behind those that wait, and empties `chunks`.
    pub(super) fn write(&mut self, chunks: &mut Vec<u8>) -> Result<(), CaptureError> {
        if self.waits {
            self.waiting.append(chunks);
            return self.write_waiting();
        }
        let written = self.append(chunks);
        chunks.clear();
        written.map_err(|source| self.fail(source))
    }

    /// Lets chunks wait, and empties `chunks`.
    pub(super) fn hold(&mut self, chunks: &mut Vec<u8>) {
        self.waiting.append(chunks);
    }

    /// Writes what waits, if there is room.
    pub(super) fn write_waiting(&mut self) -> Result<(), CaptureError> {
        let waiting = std::mem::take(&mut self.waiting);
        match self.append(&waiting) {
            Ok(()) => Ok(()),
            Err(source) if self.waits && is_full(&source) => {
                self.waiting = waiting;
                Ok(())
            }
            Err(source) => Err(self.fail(source)),
        }
    }

    /// Writes chunks that need not be kept if there is no room, or if others wait before them. Whether they are in the file.
    pub(super) fn offer(&mut self, chunks: &[u8]) -> Result<bool, CaptureError> {
        if self.is_waiting() {
            return Ok(false);
        }
        match self.append(chunks) {
            Ok(()) => Ok(true),
            Err(source) if self.waits && is_full(&source) => Ok(false),
            Err(source) => Err(self.fail(source)),
        }
    }

    /// An error if anything waits still.
    pub(super) fn require_written(&mut self) -> Result<(), CaptureError> {
        if self.is_waiting() { Err(self.fail(io::ErrorKind::StorageFull.into())) } else { Ok(()) }
    }

    /// Goes on at the end of another file, which has taken this one's name.
    pub(super) fn replace(&mut self, file: File, offset: u64) {
        (self.file, self.offset) = (file, offset);
    }

    fn append(&mut self, chunks: &[u8]) -> io::Result<()> {
        let written = self.file.write_all_at(chunks, self.offset);
        match written {
            Ok(()) => self.offset += chunks.len() as u64,
            // Best effort: the reader copes with a torn chunk too.
            Err(_) => drop(self.file.set_len(self.offset)),
        }
        written
    }

    fn fail(&mut self, source: io::Error) -> CaptureError {
        self.failed = true;
        CaptureError::Write { path: self.path.clone(), offset: self.offset, source }
    }
}

/// Whether there may be room later.
pub(super) fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

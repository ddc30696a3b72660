//! How a [`CaptureReader`] gets at chunks: one after the other, and those with names of native frames before all.
//!
//! Knows chunks' borders, and nothing of records.

use super::chunk::ChunkHeader;
use super::error::CaptureError;
use super::format::{CHUNK_HEADER_LEN, kind};
use super::reader::CaptureReader;
use super::symbols::Symbols;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::Path;

/// What was found where a chunk should be.
pub(super) enum Found {
    Good(ChunkHeader),
    /// Its lengths are possible, its checksum is wrong.
    Bad(ChunkHeader),
    /// The end of the file, on a chunk's border.
    End,
    /// No chunk, or a part of one.
    Torn(&'static str),
}

impl CaptureReader {
    /// Reads one chunk's stored bytes. Nothing is reserved beyond the format's bounds.
    pub(super) fn read_chunk(&mut self) -> Result<Found, CaptureError> {
        self.chunk_offset = self.offset;
        let failed =
            |path: &Path, offset, source| CaptureError::Read { path: path.to_owned(), offset, source };
        let mut bytes = [0; CHUNK_HEADER_LEN];
        let got = fill(&mut self.input, &mut bytes).map_err(|e| failed(&self.path, self.offset, e))?;
        self.offset += got as u64;
        if got == 0 {
            return Ok(Found::End);
        }
        if got < bytes.len() {
            return Ok(Found::Torn("the file ends within a chunk's header"));
        }
        let chunk = ChunkHeader::parse(&bytes);
        if !chunk.is_plausible() {
            return Ok(Found::Torn("there is no chunk where one should begin"));
        }
        self.stored.clear();
        let got = (&mut self.input)
            .take(chunk.stored_len as u64)
            .read_to_end(&mut self.stored)
            .map_err(|e| failed(&self.path, self.offset, e))?;
        self.offset += got as u64;
        if got < chunk.stored_len {
            return Ok(Found::Torn("the file ends within a chunk"));
        }
        Ok(if chunk.matches(&self.stored) { Found::Good(chunk) } else { Found::Bad(chunk) })
    }

    /// Reads the symbols chunks of all of the file, and comes back. They follow the frames that they name.
    pub(super) fn read_symbols(&mut self) -> Result<Symbols, CaptureError> {
        let failed =
            |path: &Path, offset, source| CaptureError::Read { path: path.to_owned(), offset, source };
        let (begin, mut symbols, mut at) = (self.offset, Symbols::default(), self.offset);
        if self.input.seek(SeekFrom::Start(begin)).is_err_and(|e| e.kind() == io::ErrorKind::NotSeekable) {
            self.spool().map_err(|e| failed(&self.path, begin, e))?;
        }
        let mut bytes = [0; CHUNK_HEADER_LEN];
        loop {
            self.input.seek(SeekFrom::Start(at)).map_err(|e| failed(&self.path, at, e))?;
            if fill(&mut self.input, &mut bytes).map_err(|e| failed(&self.path, at, e))? < bytes.len() {
                break;
            }
            let chunk = ChunkHeader::parse(&bytes);
            if !chunk.is_plausible() {
                break;
            }
            if chunk.kind == kind::SYMBOLS {
                self.stored.clear();
                let mut stored = (&mut self.input).take(chunk.stored_len as u64);
                stored.read_to_end(&mut self.stored).map_err(|e| failed(&self.path, at, e))?;
                // One that is damaged is told of where the records are read.
                if chunk.matches(&self.stored) {
                    let taken =
                        chunk.unpack(&self.stored, &mut self.raw).and_then(|()| symbols.take(&self.raw));
                    taken.unwrap_or_else(|why| self.note_damage(at, 1, why));
                }
            }
            at += (CHUNK_HEADER_LEN + chunk.stored_len) as u64;
        }
        self.input.seek(SeekFrom::Start(begin)).map_err(|e| failed(&self.path, begin, e))?;
        Ok(symbols)
    }

    /// Puts what comes through a pipe into a file that has no name, for it is read twice.
    fn spool(&mut self) -> io::Result<()> {
        let mut file = tempfile::tempfile()?;
        // What was read already is a hole in it, so that offsets are what they were.
        file.seek(SeekFrom::Start(self.offset))?;
        io::copy(&mut self.input, &mut file)?;
        self.input = Box::new(BufReader::new(file));
        Ok(())
    }
}

/// What a chunk that can't be read may have held: no more than lz4 can put into its bytes.
pub(super) fn possible_bytes(chunk: &ChunkHeader) -> u64 {
    (chunk.raw_len as u64).min(chunk.stored_len as u64 * 255)
}

/// Reads until `buf` is full or the input ends; gives the bytes read.
pub(super) fn fill(input: &mut dyn Read, buf: &mut [u8]) -> io::Result<usize> {
    let mut got = 0;
    while got < buf.len() {
        match input.read(&mut buf[got..]) {
            Ok(0) => break,
            Ok(n) => got += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(got)
}

//! How bytes of the target come to us: the trait [`RemoteMemory`] and a source for tests.
//!
//! Everything that interprets memory (`cpython`, `image`) is written over this trait and does not
//! know whether a live process, a clone or a test stands behind it.

use crate::addr::RemoteAddr;
use std::collections::BTreeMap;

/// A read of the target's memory that failed. A short read is a failure, never zeroes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// Some of the range is not mapped readable.
    #[error("cannot read {len} bytes at {addr}: not mapped")]
    Unmapped {
        /// First byte asked for.
        addr: RemoteAddr,
        /// Bytes asked for.
        len: usize,
    },
    /// The process has exited.
    #[error("cannot read {len} bytes at {addr}: the process is gone")]
    Gone {
        /// First byte asked for.
        addr: RemoteAddr,
        /// Bytes asked for.
        len: usize,
    },
    /// The kernel refused for another reason.
    #[error("cannot read {len} bytes at {addr}: {errno}")]
    Refused {
        /// First byte asked for.
        addr: RemoteAddr,
        /// Bytes asked for.
        len: usize,
        /// What the kernel said.
        errno: nix::errno::Errno,
    },
}

/// Memory of a process, read by address.
pub trait RemoteMemory {
    /// Fills `buf` from `addr`, wholly or not at all.
    fn read(&self, addr: RemoteAddr, buf: &mut [u8]) -> Result<(), ReadError>;

    /// Fills each buffer; element `i` of the answer tells whether buffer `i` was filled. Sources that
    /// can do it in one system call override this.
    fn read_many(&self, wanted: &mut [(RemoteAddr, &mut [u8])]) -> Vec<bool> {
        wanted.iter_mut().map(|(addr, buf)| self.read(*addr, buf).is_ok()).collect()
    }

    /// One byte at `addr`.
    fn read_u8(&self, addr: RemoteAddr) -> Result<u8, ReadError> {
        let mut b = [0; 1];
        self.read(addr, &mut b).map(|()| b[0])
    }

    /// A little-endian `u32` at `addr`.
    fn read_u32(&self, addr: RemoteAddr) -> Result<u32, ReadError> {
        let mut b = [0; 4];
        self.read(addr, &mut b).map(|()| u32::from_le_bytes(b))
    }

    /// A little-endian `u64` at `addr`.
    fn read_u64(&self, addr: RemoteAddr) -> Result<u64, ReadError> {
        let mut b = [0; 8];
        self.read(addr, &mut b).map(|()| u64::from_le_bytes(b))
    }

    /// A pointer at `addr`.
    fn read_ptr(&self, addr: RemoteAddr) -> Result<RemoteAddr, ReadError> {
        self.read_u64(addr).map(RemoteAddr)
    }

    /// `len` bytes from `addr`. The caller bounds `len`.
    fn read_vec(&self, addr: RemoteAddr, len: usize) -> Result<Vec<u8>, ReadError> {
        let mut v = vec![0; len];
        self.read(addr, &mut v).map(|()| v)
    }

    /// A NUL-terminated string of at most `max` bytes (cut there), lossily decoded.
    fn read_c_string(&self, addr: RemoteAddr, max: usize) -> Result<String, ReadError> {
        let mut out = Vec::new();
        while out.len() < max {
            // Never across a page boundary: the next page may be unmapped.
            let at = addr.offset(out.len() as u64);
            let len = (4096 - (at.0 % 4096) as usize).min(256).min(max - out.len());
            let piece = self.read_vec(at, len)?;
            if let Some(end) = piece.iter().position(|b| *b == 0) {
                out.extend_from_slice(&piece[..end]);
                break;
            }
            out.extend_from_slice(&piece);
        }
        Ok(String::from_utf8_lossy(&out).into_owned())
    }
}

/// Memory made of byte ranges, for tests.
#[derive(Debug, Default, Clone)]
pub struct BytesMemory {
    ranges: BTreeMap<u64, Vec<u8>>,
}

impl BytesMemory {
    /// Empty memory: every read fails.
    pub fn new() -> Self {
        Self::default()
    }

    /// Maps `bytes` at `addr`.
    pub fn map(&mut self, addr: RemoteAddr, bytes: Vec<u8>) {
        self.ranges.insert(addr.0, bytes);
    }
}

impl RemoteMemory for BytesMemory {
    fn read(&self, addr: RemoteAddr, buf: &mut [u8]) -> Result<(), ReadError> {
        let unmapped = ReadError::Unmapped { addr, len: buf.len() };
        let (start, bytes) = self.ranges.range(..=addr.0).next_back().ok_or(unmapped.clone())?;
        let from = (addr.0 - start) as usize;
        let to = from.checked_add(buf.len()).ok_or(unmapped.clone())?;
        buf.copy_from_slice(bytes.get(from..to).ok_or(unmapped)?);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_read_is_an_error_and_names_the_address() {
        let mut memory = BytesMemory::new();
        memory.map(RemoteAddr(0x1000), vec![1, 2, 3, 4]);
        assert_eq!(memory.read_u32(RemoteAddr(0x1000)), Ok(0x0403_0201));
        assert_eq!(
            memory.read_u64(RemoteAddr(0x1000)),
            Err(ReadError::Unmapped { addr: RemoteAddr(0x1000), len: 8 })
        );
    }

    #[test]
    fn a_c_string_ends_at_its_nul_or_at_the_bound() {
        let mut memory = BytesMemory::new();
        let mut page = vec![b'a'; 4096];
        page[5] = 0;
        memory.map(RemoteAddr(0x1000), page);
        assert_eq!(memory.read_c_string(RemoteAddr(0x1000), 100).unwrap(), "aaaaa");
        assert_eq!(memory.read_c_string(RemoteAddr(0x1002), 2).unwrap(), "aa");
    }
}

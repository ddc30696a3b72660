//! What this layer asks of the ELF files mapped in the process. Implemented elsewhere, over real files.

use crate::addr::RemoteAddr;

/// A stretch of a mapped file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// First byte in the process.
    pub start: RemoteAddr,
    /// Bytes.
    pub len: u64,
}

impl Span {
    /// True if `addr` lies inside.
    pub fn contains(&self, addr: RemoteAddr) -> bool {
        addr.since(self.start) < self.len
    }
}

/// A mapped ELF file.
pub trait Binary {
    /// Its path, for messages.
    fn path(&self) -> String;
    /// The address of a symbol that it defines (exported ones first), thread-local ones excepted.
    fn symbol(&self, name: &str) -> Option<RemoteAddr>;
    /// Where a loaded section lies.
    fn section(&self, name: &str) -> Option<Span>;
    /// Writable data, zero-initialised included.
    fn writable(&self) -> Vec<Span>;
    /// Code.
    fn executable(&self) -> Vec<Span>;
    /// What is only read.
    fn read_only(&self) -> Vec<Span>;
}

/// The first binary that defines `name`, in lookup order, and where.
pub fn find_symbol<'a>(binaries: &[&'a dyn Binary], name: &str) -> Option<(&'a dyn Binary, RemoteAddr)> {
    binaries.iter().find_map(|b| Some((*b, b.symbol(name)?)))
}

//! The allocator tables of CPython's three domains: `PyMemAllocatorEx` {ctx, malloc, calloc, realloc, free}.
//!
//! Every allocation of a domain goes through its table (`Objects/obmalloc.c`). Since 3.12 the tables are in `_PyRuntime`;
//! before they are static variables whose symbols a stripped build has lost, and are found by what the exported functions
//! load. An answer that is no table is an error, never a guess.

use super::Python;
use super::binary::{Binary, Span, find_symbol};
use super::disasm::instructions;
use super::text::word;
use crate::addr::RemoteAddr;
use crate::memory::{ReadError, RemoteMemory};
use iced_x86::OpKind;
use std::fmt;

const DECODED: &str = "decoded exported functions";

/// An allocator domain of CPython.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Domain {
    /// `PyMem_RawMalloc`: without the GIL.
    Raw,
    /// `PyMem_Malloc`.
    Mem,
    /// `PyObject_Malloc`.
    Object,
}

impl Domain {
    /// All, in the order of CPython's enumeration.
    pub const ALL: [Self; 3] = [Self::Raw, Self::Mem, Self::Object];

    /// Static variable, exported malloc, exported free (to 3.11).
    fn names(self) -> (&'static str, &'static str, &'static str) {
        match self {
            Self::Raw => ("_PyMem_Raw", "PyMem_RawMalloc", "PyMem_RawFree"),
            Self::Mem => ("_PyMem", "PyMem_Malloc", "PyMem_Free"),
            Self::Object => ("_PyObject", "PyObject_Malloc", "PyObject_Free"),
        }
    }
}

impl fmt::Display for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Raw => "raw",
            Self::Mem => "mem",
            Self::Object => "object",
        })
    }
}

/// A domain's table: where it is and what it holds now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AllocatorTable {
    /// The domain.
    pub domain: Domain,
    /// Address of the first of the five words.
    pub address: RemoteAddr,
    /// First argument of each function. 0 in an unwrapped table.
    pub ctx: RemoteAddr,
    /// `malloc(ctx, size)`.
    pub malloc: RemoteAddr,
    /// `calloc(ctx, count, size)`.
    pub calloc: RemoteAddr,
    /// `realloc(ctx, block, size)`.
    pub realloc: RemoteAddr,
    /// `free(ctx, block)`.
    pub free: RemoteAddr,
    /// How the table was found.
    pub source: &'static str,
}

/// The table of a domain that could not be found.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AllocatorsError {
    /// Nothing led to it.
    #[error(
        "the table of CPython's {domain} allocator was not found in {binary} (no symbol, and {function} loads none)"
    )]
    NotFound {
        /// The domain.
        domain: Domain,
        /// The binary of the runtime.
        binary: String,
        /// The exported function that was decoded.
        function: &'static str,
    },
    /// What was found is no table.
    #[error("the words at {address} are not the table of CPython's {domain} allocator: {what}")]
    NotATable {
        /// The domain.
        domain: Domain,
        /// First word.
        address: RemoteAddr,
        /// Why.
        what: String,
    },
    /// Memory could not be read.
    #[error(transparent)]
    Read(#[from] ReadError),
}

/// See [`Python::allocators`].
pub fn find(
    memory: &dyn RemoteMemory,
    binaries: &[&dyn Binary],
    python: &Python,
) -> Result<[AllocatorTable; 3], AllocatorsError> {
    let code: Vec<Span> = binaries.iter().flat_map(|b| b.executable()).collect();
    let one = |domain| find_one(memory, binaries, python, &code, domain);
    Ok([one(Domain::Raw)?, one(Domain::Mem)?, one(Domain::Object)?])
}

fn find_one(
    memory: &dyn RemoteMemory,
    binaries: &[&dyn Binary],
    python: &Python,
    code: &[Span],
    domain: Domain,
) -> Result<AllocatorTable, AllocatorsError> {
    let runtime = &python.layout.runtime_state;
    let published = match domain {
        Domain::Raw => runtime.allocators_raw,
        Domain::Mem => runtime.allocators_mem,
        Domain::Object => runtime.allocators_obj,
    };
    if let Some(at) = published {
        return read(memory, code, domain, python.runtime.offset(at), "_PyRuntime.allocators");
    }
    let (variable, malloc, free) = domain.names();
    let home = binaries.iter().find(|b| b.path() == python.binary);
    if let Some(at) = home.and_then(|b| b.symbol(variable)) {
        return read(memory, code, domain, at, "symbol");
    }
    let loads =
        |name| find_symbol(binaries, name).map(|(_, at)| loaded_words(memory, at)).unwrap_or_default();
    let writable: Vec<Span> = home.map(|b| b.writable()).unwrap_or_default();
    let (mallocs, frees) = (loads(malloc), loads(free));
    // `free` stands 24 bytes behind `malloc`; that and the five words together leave no doubt.
    for slot in mallocs.iter().filter(|slot| frees.contains(&slot.offset(24)) && inside(&writable, **slot)) {
        if let Ok(table) = read(memory, code, domain, slot.back(8), DECODED) {
            return Ok(table);
        }
    }
    Err(AllocatorsError::NotFound { domain, binary: python.binary.clone(), function: malloc })
}

fn inside(spans: &[Span], addr: RemoteAddr) -> bool {
    spans.iter().any(|s| s.contains(addr))
}

/// Addresses of the words that the first instructions of a function read relative to themselves.
fn loaded_words(memory: &dyn RemoteMemory, function: RemoteAddr) -> Vec<RemoteAddr> {
    instructions(memory, function, 160)
        .iter()
        .filter(|i| i.is_ip_rel_memory_operand() && i.op_kinds().any(|kind| kind == OpKind::Memory))
        .map(|i| RemoteAddr(i.ip_rel_memory_address()))
        .collect()
}

fn read(
    memory: &dyn RemoteMemory,
    code: &[Span],
    domain: Domain,
    address: RemoteAddr,
    source: &'static str,
) -> Result<AllocatorTable, AllocatorsError> {
    let bytes = memory.read_vec(address, 40)?;
    let field = |i: u64| RemoteAddr(word(&bytes, 8 * i, 8).unwrap_or(0));
    for (i, name) in [(1, "malloc"), (2, "calloc"), (3, "realloc"), (4, "free")] {
        // Another profiler may have put generated code there, so only where the place itself is in doubt must it be known code.
        let function = field(i);
        if function.is_null() || (source == DECODED && !inside(code, function)) {
            return Err(AllocatorsError::NotATable {
                domain,
                address,
                what: format!("{name} is {function}"),
            });
        }
    }
    Ok(AllocatorTable {
        domain,
        address,
        ctx: field(0),
        malloc: field(1),
        calloc: field(2),
        realloc: field(3),
        free: field(4),
        source,
    })
}

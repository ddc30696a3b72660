//! The allocator functions and how their calls are read: System V AMD64 ABI (arguments in rdi, rsi, rdx,
//! rcx, r8, r9; result in rax) and the prototypes of malloc(3), posix_memalign(3), mmap(2), mremap(2) and
//! `PyMemAllocatorEx` (CPython's Include/cpython/pymem.h).

use crate::addr::RemoteAddr;
use crate::inferior::sys::Registers;

/// A domain of CPython's allocators.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Domain {
    /// `PyMem_Raw*`.
    Raw,
    /// `PyMem_*`.
    Mem,
    /// `PyObject_*`.
    Object,
}

/// A function of one of CPython's allocator tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Member {
    /// `void *malloc(void *ctx, size_t size)`
    Malloc,
    /// `void *calloc(void *ctx, size_t nelem, size_t elsize)`
    Calloc,
    /// `void *realloc(void *ctx, void *ptr, size_t new_size)`
    Realloc,
    /// `void free(void *ctx, void *ptr)`
    Free,
}

/// An allocator entry point.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[expect(missing_docs, reason = "each is the C function of that name")]
pub enum Function {
    Malloc,
    Calloc,
    Realloc,
    Free,
    PosixMemalign,
    AlignedAlloc,
    Memalign,
    Valloc,
    Pvalloc,
    Mmap,
    Munmap,
    Mremap,
    Python(Domain, Member),
}

/// Symbols that name each function; several may name one body.
pub const SYMBOLS: &[(&str, Function)] = &[
    ("malloc", Function::Malloc),
    ("calloc", Function::Calloc),
    ("realloc", Function::Realloc),
    ("free", Function::Free),
    ("cfree", Function::Free),
    ("free_sized", Function::Free),
    ("free_aligned_sized", Function::Free),
    ("posix_memalign", Function::PosixMemalign),
    ("aligned_alloc", Function::AlignedAlloc),
    ("memalign", Function::Memalign),
    ("valloc", Function::Valloc),
    ("pvalloc", Function::Pvalloc),
    ("mmap", Function::Mmap),
    ("mmap64", Function::Mmap),
    ("munmap", Function::Munmap),
    ("mremap", Function::Mremap),
];

/// A call, as its registers told at the entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Asks for a block of this size.
    Allocate {
        /// Bytes asked for; `None` where nelem × elsize overflows (the call will fail).
        size: Option<u64>,
    },
    /// posix_memalign: the result goes to `*out`.
    AllocateInto {
        /// Bytes asked for.
        size: u64,
        /// Where the pointer is stored.
        out: RemoteAddr,
    },
    /// Asks for a mapping of this length.
    Map {
        /// Bytes asked for.
        len: u64,
    },
    /// Moves or resizes a block.
    Reallocate {
        /// The block; not null.
        old: RemoteAddr,
        /// Bytes asked for.
        size: u64,
    },
    /// Moves or resizes a mapping.
    Remap {
        /// First byte of it.
        old: RemoteAddr,
        /// Bytes of it (0: a second view of a shared mapping).
        old_len: u64,
        /// Bytes asked for.
        len: u64,
    },
    /// Gives a block back.
    Free {
        /// The block; not null.
        address: RemoteAddr,
    },
    /// Gives a mapping back.
    Unmap {
        /// First byte.
        address: RemoteAddr,
        /// Bytes.
        len: u64,
    },
    /// `free(NULL)`.
    Nothing,
}

/// What a call came to, as its registers told at the return.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// The call gave this address.
    Address(RemoteAddr),
    /// posix_memalign succeeded: the address is to be read from `*out`.
    Stored,
    /// It succeeded and gave nothing (munmap; realloc to size 0 as glibc does it).
    Done,
    /// It failed.
    Failed,
}

impl Function {
    /// Name for messages and captures.
    pub fn name(self) -> &'static str {
        match self {
            Self::Malloc => "malloc",
            Self::Calloc => "calloc",
            Self::Realloc => "realloc",
            Self::Free => "free",
            Self::PosixMemalign => "posix_memalign",
            Self::AlignedAlloc => "aligned_alloc",
            Self::Memalign => "memalign",
            Self::Valloc => "valloc",
            Self::Pvalloc => "pvalloc",
            Self::Mmap => "mmap",
            Self::Munmap => "munmap",
            Self::Mremap => "mremap",
            Self::Python(domain, member) => python_name(domain, member),
        }
    }

    /// Whether it acts on mappings: the mmap family, that libc calls on its own account too.
    pub fn is_mapping(self) -> bool {
        matches!(self, Self::Mmap | Self::Munmap | Self::Mremap)
    }

    /// Whether the return has to be seen, too. A free takes effect whatever it returns.
    pub fn has_answer(self) -> bool {
        !matches!(self, Self::Free | Self::Python(_, Member::Free))
    }

    /// Reads the call's arguments at its first instruction.
    pub fn request(self, regs: &Registers) -> Request {
        // A table's functions take their context first.
        let (a, b, c) = match self {
            Self::Python(..) => (regs.rsi, regs.rdx, regs.rcx),
            _ => (regs.rdi, regs.rsi, regs.rdx),
        };
        match self {
            Self::Malloc | Self::Valloc | Self::Pvalloc | Self::Python(_, Member::Malloc) => {
                Request::Allocate { size: Some(a) }
            }
            Self::Calloc | Self::Python(_, Member::Calloc) => Request::Allocate { size: a.checked_mul(b) },
            Self::AlignedAlloc | Self::Memalign => Request::Allocate { size: Some(b) },
            Self::PosixMemalign => Request::AllocateInto { size: c, out: RemoteAddr(a) },
            Self::Realloc | Self::Python(_, Member::Realloc) if a == 0 => Request::Allocate { size: Some(b) },
            Self::Realloc | Self::Python(_, Member::Realloc) => {
                Request::Reallocate { old: RemoteAddr(a), size: b }
            }
            Self::Free | Self::Python(_, Member::Free) if a == 0 => Request::Nothing,
            Self::Free | Self::Python(_, Member::Free) => Request::Free { address: RemoteAddr(a) },
            Self::Mmap => Request::Map { len: b },
            Self::Munmap => Request::Unmap { address: RemoteAddr(a), len: b },
            Self::Mremap => Request::Remap { old: RemoteAddr(a), old_len: b, len: c },
        }
    }
}

impl Request {
    /// Reads what the call came to from the result register.
    pub fn answer(self, rax: u64) -> Answer {
        match self {
            // MAP_FAILED
            Self::Map { .. } | Self::Remap { .. } if rax == u64::MAX => Answer::Failed,
            Self::Map { .. } | Self::Remap { .. } => Answer::Address(RemoteAddr(rax)),
            Self::AllocateInto { .. } | Self::Unmap { .. } if rax as u32 != 0 => Answer::Failed,
            Self::AllocateInto { .. } => Answer::Stored,
            Self::Unmap { .. } | Self::Free { .. } | Self::Nothing => Answer::Done,
            Self::Reallocate { size: 0, .. } if rax == 0 => Answer::Done,
            Self::Allocate { .. } | Self::Reallocate { .. } if rax == 0 => Answer::Failed,
            Self::Allocate { .. } | Self::Reallocate { .. } => Answer::Address(RemoteAddr(rax)),
        }
    }
}

fn python_name(domain: Domain, member: Member) -> &'static str {
    match (domain, member) {
        (Domain::Raw, Member::Malloc) => "raw_malloc",
        (Domain::Raw, Member::Calloc) => "raw_calloc",
        (Domain::Raw, Member::Realloc) => "raw_realloc",
        (Domain::Raw, Member::Free) => "raw_free",
        (Domain::Mem, Member::Malloc) => "mem_malloc",
        (Domain::Mem, Member::Calloc) => "mem_calloc",
        (Domain::Mem, Member::Realloc) => "mem_realloc",
        (Domain::Mem, Member::Free) => "mem_free",
        (Domain::Object, Member::Malloc) => "object_malloc",
        (Domain::Object, Member::Calloc) => "object_calloc",
        (Domain::Object, Member::Realloc) => "object_realloc",
        (Domain::Object, Member::Free) => "object_free",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn regs(args: [u64; 4]) -> Registers {
        // Registers are plain integers: a value is made through the bytes of a default one.
        Registers { rdi: args[0], rsi: args[1], rdx: args[2], rcx: args[3], ..zeroed() }
    }

    fn zeroed() -> Registers {
        crate::inferior::sys::no_registers()
    }

    #[test]
    fn a_calloc_that_overflows_has_no_size() {
        let call = Function::Calloc.request(&regs([1 << 40, 1 << 40, 0, 0]));
        assert_eq!(call, Request::Allocate { size: None });
        assert_eq!(Function::Calloc.request(&regs([3, 5, 0, 0])), Request::Allocate { size: Some(15) });
    }

    #[test]
    fn realloc_of_null_is_an_allocation_and_free_of_null_is_nothing() {
        assert_eq!(Function::Realloc.request(&regs([0, 9, 0, 0])), Request::Allocate { size: Some(9) });
        assert_eq!(Function::Free.request(&regs([0; 4])), Request::Nothing);
    }

    #[test]
    fn realloc_to_nothing_is_a_free_but_a_failed_one_is_a_failure() {
        let to_nothing = Request::Reallocate { old: RemoteAddr(16), size: 0 };
        assert_eq!(to_nothing.answer(0), Answer::Done);
        let grow = Request::Reallocate { old: RemoteAddr(16), size: 99 };
        assert_eq!(grow.answer(0), Answer::Failed);
        assert_eq!(grow.answer(32), Answer::Address(RemoteAddr(32)));
    }

    #[test]
    fn a_tables_function_takes_its_context_first() {
        let call = Function::Python(Domain::Object, Member::Realloc).request(&regs([7, 0x1000, 64, 0]));
        assert_eq!(call, Request::Reallocate { old: RemoteAddr(0x1000), size: 64 });
    }

    #[test]
    fn map_failed_and_errno_results_are_failures() {
        assert_eq!(Request::Map { len: 1 }.answer(u64::MAX), Answer::Failed);
        let into = Request::AllocateInto { size: 1, out: RemoteAddr(8) };
        assert_eq!(into.answer(12), Answer::Failed);
        // Only eax is defined for an int.
        assert_eq!(into.answer(0xdead_0000_0000), Answer::Stored);
    }
}

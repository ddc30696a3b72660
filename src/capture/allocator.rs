//! [`AllocatorKind`]: which function allocated or freed, with ids that never change meaning.
//!
//! Knows names and roles only, not where a function lies in any process.

/// An allocator or deallocator entry point. The numbers are the ones in capture files: new kinds
/// are appended, none is renumbered (at most 32 fit the record's first byte).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
#[repr(u8)]
#[allow(missing_docs)] // each is the function of that name
pub enum AllocatorKind {
    #[default]
    Malloc = 0,
    Calloc = 1,
    Realloc = 2,
    PosixMemalign = 3,
    AlignedAlloc = 4,
    Memalign = 5,
    Valloc = 6,
    Pvalloc = 7,
    Mmap = 8,
    Mremap = 9,
    ObjectMalloc = 10,
    ObjectCalloc = 11,
    ObjectRealloc = 12,
    MemMalloc = 13,
    MemCalloc = 14,
    MemRealloc = 15,
    RawMalloc = 16,
    RawCalloc = 17,
    RawRealloc = 18,
    Free = 19,
    Munmap = 20,
    ObjectFree = 21,
    MemFree = 22,
    RawFree = 23,
}

/// Whose memory an entry point hands out.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Domain {
    /// The C library's heap, or that of a replacement (jemalloc, tcmalloc).
    Libc,
    /// Pages from the kernel.
    Mapping,
    /// CPython's object domain (`PyObject_Malloc`).
    Object,
    /// CPython's mem domain (`PyMem_Malloc`).
    Mem,
    /// CPython's raw domain (`PyMem_RawMalloc`).
    Raw,
}

use AllocatorKind as K;

impl AllocatorKind {
    /// Every kind, in the order of its id.
    pub const ALL: [Self; 24] = [
        K::Malloc,
        K::Calloc,
        K::Realloc,
        K::PosixMemalign,
        K::AlignedAlloc,
        K::Memalign,
        K::Valloc,
        K::Pvalloc,
        K::Mmap,
        K::Mremap,
        K::ObjectMalloc,
        K::ObjectCalloc,
        K::ObjectRealloc,
        K::MemMalloc,
        K::MemCalloc,
        K::MemRealloc,
        K::RawMalloc,
        K::RawCalloc,
        K::RawRealloc,
        K::Free,
        K::Munmap,
        K::ObjectFree,
        K::MemFree,
        K::RawFree,
    ];

    /// The id in capture files.
    pub fn id(self) -> u8 {
        self as u8
    }

    /// The kind with this id, if there is one.
    pub fn from_id(id: u8) -> Option<Self> {
        Self::ALL.get(usize::from(id)).copied()
    }

    /// The function's name, as reports print it.
    pub fn name(self) -> &'static str {
        match self {
            K::Malloc => "malloc",
            K::Calloc => "calloc",
            K::Realloc => "realloc",
            K::PosixMemalign => "posix_memalign",
            K::AlignedAlloc => "aligned_alloc",
            K::Memalign => "memalign",
            K::Valloc => "valloc",
            K::Pvalloc => "pvalloc",
            K::Mmap => "mmap",
            K::Mremap => "mremap",
            K::ObjectMalloc => "object_malloc",
            K::ObjectCalloc => "object_calloc",
            K::ObjectRealloc => "object_realloc",
            K::MemMalloc => "mem_malloc",
            K::MemCalloc => "mem_calloc",
            K::MemRealloc => "mem_realloc",
            K::RawMalloc => "raw_malloc",
            K::RawCalloc => "raw_calloc",
            K::RawRealloc => "raw_realloc",
            K::Free => "free",
            K::Munmap => "munmap",
            K::ObjectFree => "object_free",
            K::MemFree => "mem_free",
            K::RawFree => "raw_free",
        }
    }

    /// Whose memory it is.
    pub fn domain(self) -> Domain {
        match self {
            K::Mmap | K::Mremap | K::Munmap => Domain::Mapping,
            K::ObjectMalloc | K::ObjectCalloc | K::ObjectRealloc | K::ObjectFree => Domain::Object,
            K::MemMalloc | K::MemCalloc | K::MemRealloc | K::MemFree => Domain::Mem,
            K::RawMalloc | K::RawCalloc | K::RawRealloc | K::RawFree => Domain::Raw,
            _ => Domain::Libc,
        }
    }

    /// True where a part of what was allocated can be given back: the size of the free matters.
    pub fn is_ranged(self) -> bool {
        self.domain() == Domain::Mapping
    }

    /// True for the functions that only free.
    pub fn is_deallocator(self) -> bool {
        matches!(self, K::Free | K::Munmap | K::ObjectFree | K::MemFree | K::RawFree)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_go_there_and_back_and_fit_five_bits() {
        for (index, kind) in AllocatorKind::ALL.into_iter().enumerate() {
            assert_eq!(usize::from(kind.id()), index);
            assert_eq!(AllocatorKind::from_id(kind.id()), Some(kind));
            assert!(kind.id() < 32);
        }
        assert_eq!(AllocatorKind::from_id(24), None);
    }
}

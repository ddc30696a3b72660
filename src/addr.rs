//! Addresses: in the process ([`RemoteAddr`]) and in an ELF file ([`ImageAddr`]).
//!
//! The two are different types so that no code adds one to the other except through the
//! [`Bias`] of a mapped image. This module depends on nothing and knows nothing of memory.

use std::fmt;

/// An address in the target process's virtual memory.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct RemoteAddr(pub u64);

/// A virtual address as an ELF file states it (`st_value`, `p_vaddr`).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ImageAddr(pub u64);

/// What the loader added to every [`ImageAddr`] of one mapped image (0 for ET_EXEC).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Bias(pub u64);

impl RemoteAddr {
    /// The null pointer.
    pub const NULL: Self = Self(0);

    /// True for the null pointer.
    pub fn is_null(self) -> bool {
        self.0 == 0
    }

    /// `self + bytes`, wrapping: a wild pointer plus an offset is a wild pointer, and the read
    /// at it fails; it must not be a panic.
    #[must_use]
    pub fn offset(self, bytes: u64) -> Self {
        Self(self.0.wrapping_add(bytes))
    }

    /// `self - bytes`, wrapping (see [`RemoteAddr::offset`]).
    #[must_use]
    pub fn back(self, bytes: u64) -> Self {
        Self(self.0.wrapping_sub(bytes))
    }

    /// Bytes from `earlier` to `self`, wrapping.
    pub fn since(self, earlier: Self) -> u64 {
        self.0.wrapping_sub(earlier.0)
    }
}

impl Bias {
    /// The bias that places `image` at `remote`.
    pub fn placing(image: ImageAddr, remote: RemoteAddr) -> Self {
        Self(remote.0.wrapping_sub(image.0))
    }

    /// Where `image` lies in the process.
    pub fn to_remote(self, image: ImageAddr) -> RemoteAddr {
        RemoteAddr(image.0.wrapping_add(self.0))
    }

    /// Where `remote` lies in the file.
    pub fn to_image(self, remote: RemoteAddr) -> ImageAddr {
        ImageAddr(remote.0.wrapping_sub(self.0))
    }
}

impl fmt::Display for RemoteAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Debug for RemoteAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RemoteAddr({:#x})", self.0)
    }
}

impl fmt::Display for ImageAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Debug for ImageAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ImageAddr({:#x})", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bias_goes_there_and_back() {
        let bias = Bias::placing(ImageAddr(0x1000), RemoteAddr(0x7f00_0000_1000));
        assert_eq!(bias.to_remote(ImageAddr(0x1234)), RemoteAddr(0x7f00_0000_1234));
        assert_eq!(bias.to_image(RemoteAddr(0x7f00_0000_1234)), ImageAddr(0x1234));
    }

    #[test]
    fn arithmetic_on_wild_pointers_wraps() {
        assert_eq!(RemoteAddr(u64::MAX).offset(2), RemoteAddr(1));
        assert_eq!(RemoteAddr(1).back(2), RemoteAddr(u64::MAX));
    }
}

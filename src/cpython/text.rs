//! `str` objects: from the object's bytes to text, for every storage kind.
//!
//! Reference: `Include/cpython/unicodeobject.h`. Bounded; whatever the bytes hold, the answer is text or an error.

use super::layout::Layout;
use crate::addr::RemoteAddr;
use crate::memory::{ReadError, RemoteMemory};

/// Something that is not the object it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ObjectError {
    /// Memory could not be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The object contradicts itself, or is of another kind.
    #[error("the object at {addr} is not {expected}: {what}")]
    Wrong {
        /// The object.
        addr: RemoteAddr,
        /// What it should be.
        expected: &'static str,
        /// Why it is not.
        what: String,
    },
}

/// Where the characters of a `str` are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StrShape {
    /// First byte of the characters.
    pub data: RemoteAddr,
    /// Characters.
    pub length: u64,
    /// Bytes per character: 1, 2 or 4.
    pub width: u64,
    /// The characters follow the object's header.
    pub compact: bool,
}

/// Reads the header of the `str` at `addr`.
pub fn shape(memory: &dyn RemoteMemory, layout: &Layout, addr: RemoteAddr) -> Result<StrShape, ObjectError> {
    let unicode = &layout.unicode_object;
    let header_len = unicode.compactunicodeobject_size.max(unicode.data + 8).max(unicode.asciiobject_size);
    // An ASCII string at the end of a page may be shorter than the biggest header.
    let mut header = vec![0; header_len as usize];
    let whole = memory.read(addr, &mut header);
    if whole.is_err() {
        memory.read(addr, &mut header[..unicode.asciiobject_size as usize])?;
    }
    let wrong = |what: &str| ObjectError::Wrong { addr, expected: "a str", what: what.to_owned() };
    let state = word(&header, unicode.state, 4).ok_or_else(|| wrong("header too short"))?;
    let length = word(&header, unicode.length, 8).ok_or_else(|| wrong("header too short"))?;
    let bit = |n: u64| state >> n & 1 != 0;
    let width = state >> unicode.state_kind_bit & 7;
    if ![1, 2, 4].contains(&width) {
        return Err(wrong(&format!("storage kind {width}")));
    }
    let compact = bit(unicode.state_compact_bit);
    let data = match (compact, bit(unicode.state_ascii_bit)) {
        (true, true) if width == 1 => addr.offset(unicode.asciiobject_size),
        (true, false) => addr.offset(unicode.compactunicodeobject_size),
        (false, _) => {
            whole?;
            RemoteAddr(word(&header, unicode.data, 8).ok_or_else(|| wrong("header too short"))?)
        }
        _ => return Err(wrong("ASCII, but not one byte per character")),
    };
    if length > i64::MAX as u64 / 4 {
        return Err(wrong(&format!("length {length}")));
    }
    Ok(StrShape { data, length, width, compact })
}

/// The text of the `str` at `addr`, cut (with `…`) after `max` characters.
pub fn read_str(
    memory: &dyn RemoteMemory,
    layout: &Layout,
    addr: RemoteAddr,
    max: usize,
) -> Result<String, ObjectError> {
    let shape = shape(memory, layout, addr)?;
    let kept = shape.length.min(max as u64);
    let bytes = memory.read_vec(shape.data, (kept * shape.width) as usize)?;
    let mut text = decode(&bytes, shape.width);
    if kept < shape.length {
        text.push('…');
    }
    Ok(text)
}

/// Characters of `width` bytes each. A code point that is no character (a surrogate, as in undecodable file names) becomes
/// its escape, so that two different names stay different.
pub fn decode(bytes: &[u8], width: u64) -> String {
    let mut text = String::with_capacity(bytes.len());
    for unit in bytes.chunks_exact(width.max(1) as usize) {
        let point = unit.iter().rev().fold(0_u32, |n, b| n << 8 | u32::from(*b));
        match char::from_u32(point) {
            Some(c) => text.push(c),
            None => text.push_str(&format!("\\u{point:04x}")),
        }
    }
    text
}

/// A little-endian number of `width` bytes at `at`.
pub fn word(bytes: &[u8], at: u64, width: usize) -> Option<u64> {
    let at = usize::try_from(at).ok()?;
    let part = bytes.get(at..at.checked_add(width)?)?;
    Some(part.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpython::layout::catalog;
    use crate::cpython::version::{Flavour, PythonVersion};
    use crate::memory::BytesMemory;

    fn layout() -> Layout {
        let version = PythonVersion::parse("3.11.7").unwrap();
        catalog::find(version, Flavour::Default).unwrap().build(version, None).unwrap()
    }

    fn object(layout: &Layout, width: u64, ascii: bool, length: u64, data: &[u8]) -> BytesMemory {
        let unicode = &layout.unicode_object;
        let header = if ascii { unicode.asciiobject_size } else { unicode.compactunicodeobject_size };
        let mut bytes = vec![0; header as usize];
        let state = (width << 2 | 1 << 5 | u64::from(ascii) << 6) as u32;
        bytes[unicode.state as usize..][..4].copy_from_slice(&state.to_le_bytes());
        bytes[unicode.length as usize..][..8].copy_from_slice(&length.to_le_bytes());
        bytes.extend_from_slice(data);
        let mut memory = BytesMemory::new();
        memory.map(RemoteAddr(0x1000), bytes);
        memory
    }

    #[test]
    fn every_width_is_read_and_long_text_is_cut() {
        let layout = layout();
        let read = |memory: &BytesMemory, max| read_str(memory, &layout, RemoteAddr(0x1000), max).unwrap();
        assert_eq!(read(&object(&layout, 1, true, 5, b"hello"), 10), "hello");
        assert_eq!(read(&object(&layout, 1, true, 5, b"hello"), 2), "he…");
        assert_eq!(read(&object(&layout, 1, false, 1, &[0xe9]), 10), "é");
        assert_eq!(read(&object(&layout, 2, false, 2, &[0x2d, 0x4e, 0x80, 0xdc]), 10), "中\\udc80");
        assert_eq!(read(&object(&layout, 4, false, 1, &[0x0d, 0xf4, 0x01, 0]), 10), "🐍");
    }

    #[test]
    fn what_is_no_string_is_an_error() {
        let layout = layout();
        for (width, length) in [(3, 1), (0, 1), (1, u64::MAX)] {
            let memory = object(&layout, width, true, length, b"x");
            assert!(read_str(&memory, &layout, RemoteAddr(0x1000), 10).is_err());
        }
        // A length beyond what is mapped.
        assert!(read_str(&object(&layout, 1, true, 50, b"x"), &layout, RemoteAddr(0x1000), 100).is_err());
    }
}

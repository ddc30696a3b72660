//! Chunks: bytes with a kind, a length and a checksum. Knows nothing of records or JSON.

use super::format::{CHUNK_HEADER_LEN, MAX_RAW_LEN, MAX_STORED_LEN, codec};
use lz4::block;

/// Appends one chunk holding `raw` to `out`. lz4 is used where it saves anything.
///
/// `raw` is at most [`MAX_RAW_LEN`] bytes; callers see to that.
pub(super) fn seal(kind: u8, raw: &[u8], out: &mut Vec<u8>) {
    debug_assert!(raw.len() <= MAX_RAW_LEN);
    let start = out.len();
    out.resize(start + CHUNK_HEADER_LEN + raw.len() + raw.len() / 255 + 16, 0);
    let body = start + CHUNK_HEADER_LEN;
    let packed = block::compress_to_buffer(raw, None, false, &mut out[body..]).ok();
    let (codec, stored) = match packed {
        Some(len) if len < raw.len() => (codec::LZ4, len),
        _ => {
            out[body..body + raw.len()].copy_from_slice(raw);
            (codec::RAW, raw.len())
        }
    };
    out.truncate(body + stored);
    out[start] = kind;
    out[start + 1] = codec;
    out[start + 2..start + 6].copy_from_slice(&(stored as u32).to_le_bytes());
    out[start + 6..start + 10].copy_from_slice(&(raw.len() as u32).to_le_bytes());
    let crc = checksum(&out[start..start + 10], &out[body..]);
    out[start + 10..start + 14].copy_from_slice(&crc.to_le_bytes());
}

/// The fourteen bytes before a chunk's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ChunkHeader {
    pub(super) kind: u8,
    pub(super) codec: u8,
    pub(super) stored_len: usize,
    pub(super) raw_len: usize,
    crc: u32,
    checked: [u8; 10],
}

impl ChunkHeader {
    pub(super) fn parse(bytes: &[u8; CHUNK_HEADER_LEN]) -> Self {
        let u32_at = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let mut checked = [0; 10];
        checked.copy_from_slice(&bytes[..10]);
        Self {
            kind: bytes[0],
            codec: bytes[1],
            stored_len: u32_at(2) as usize,
            raw_len: u32_at(6) as usize,
            crc: u32_at(10),
            checked,
        }
    }

    /// Whether these can be a chunk's lengths at all: nothing is read or reserved before this holds.
    pub(super) fn is_plausible(&self) -> bool {
        self.kind != 0 && self.stored_len <= MAX_STORED_LEN && self.raw_len <= MAX_RAW_LEN
    }

    pub(super) fn matches(&self, stored: &[u8]) -> bool {
        stored.len() == self.stored_len && checksum(&self.checked, stored) == self.crc
    }

    /// The content of a chunk whose checksum is right, into `raw`. An error says why not.
    pub(super) fn unpack(&self, stored: &[u8], raw: &mut Vec<u8>) -> Result<(), &'static str> {
        raw.clear();
        match self.codec {
            codec::RAW if self.stored_len == self.raw_len => raw.extend_from_slice(stored),
            codec::RAW => return Err("its two lengths differ though it is not compressed"),
            codec::LZ4 => {
                raw.resize(self.raw_len, 0);
                match block::decompress_to_buffer(stored, Some(self.raw_len as i32), raw) {
                    Ok(len) if len == self.raw_len => {}
                    _ => return Err("its lz4 block cannot be decompressed"),
                }
            }
            _ => return Err("its codec is unknown"),
        }
        Ok(())
    }

    /// At most the first `most` bytes of that content; fewer where it can't be unpacked.
    pub(super) fn unpack_start(&self, stored: &[u8], most: usize, raw: &mut Vec<u8>) {
        raw.clear();
        match self.codec {
            codec::LZ4 => unpack_start(stored, most.min(self.raw_len), raw),
            _ => raw.extend_from_slice(&stored[..stored.len().min(most)]),
        }
    }
}

/// At most the first `most` bytes of an lz4 block's content, into `raw`; where the block is damaged, what comes before that. By our own
/// hands because the lz4 crate unpacks blocks as a whole only (block format: lz4's doc/lz4_Block_format.md).
fn unpack_start(stored: &[u8], most: usize, raw: &mut Vec<u8>) {
    let mut bytes = stored.iter().copied();
    let length = |bytes: &mut dyn Iterator<Item = u8>, nibble: u8| {
        let mut length = usize::from(nibble);
        let mut more = nibble == 15;
        while more {
            let next = bytes.next()?;
            length += usize::from(next);
            more = next == u8::MAX;
        }
        Some(length)
    };
    while raw.len() < most
        && let Some(token) = bytes.next()
    {
        let Some(literals) = length(&mut bytes, token >> 4) else { return };
        raw.extend(bytes.by_ref().take(literals.min(most - raw.len())));
        if raw.len() == most {
            return;
        }
        let Some(back) =
            bytes.next().zip(bytes.next()).map(|(low, high)| usize::from(u16::from_le_bytes([low, high])))
        else {
            return;
        };
        let Some(matched) = length(&mut bytes, token & 15) else { return };
        for _ in 0..(matched + 4).min(most - raw.len()) {
            let Some(byte) = raw.len().checked_sub(back).and_then(|at| raw.get(at).copied()) else { return };
            raw.push(byte);
        }
    }
}

fn checksum(header: &[u8], stored: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(header);
    hasher.update(stored);
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn open(sealed: &[u8]) -> Option<(u8, Vec<u8>)> {
        let header = ChunkHeader::parse(sealed.first_chunk()?);
        let stored = &sealed[CHUNK_HEADER_LEN..];
        let mut raw = Vec::new();
        (header.is_plausible() && header.matches(stored)).then_some(())?;
        header.unpack(stored, &mut raw).ok()?;
        Some((header.kind, raw))
    }

    proptest! {
        #[test]
        fn a_chunk_goes_there_and_back(raw in prop::collection::vec(0u8..4, 0..5000), kind in 1u8..) {
            let mut sealed = Vec::new();
            seal(kind, &raw, &mut sealed);
            prop_assert_eq!(open(&sealed), Some((kind, raw)));
        }

        #[test]
        fn a_start_is_the_start(raw in prop::collection::vec(prop_oneof![4 => 0u8..2, 1 => any::<u8>()], 0..3000), most in 0usize..3500) {
            let mut sealed = Vec::new();
            seal(2, &raw, &mut sealed);
            let header = ChunkHeader::parse(sealed.first_chunk().unwrap());
            let mut start = Vec::new();
            header.unpack_start(&sealed[CHUNK_HEADER_LEN..], most, &mut start);
            prop_assert_eq!(&start, &raw[..raw.len().min(most)]);
        }

        #[test]
        fn the_start_of_any_bytes_is_survived(stored in prop::collection::vec(any::<u8>(), 0..300), most in 0usize..3000) {
            let mut start = Vec::new();
            unpack_start(&stored, most, &mut start);
            prop_assert!(start.len() <= most);
        }

        #[test]
        fn any_flipped_bit_is_noticed(raw in prop::collection::vec(any::<u8>(), 1..300), bit: prop::sample::Index) {
            let mut sealed = Vec::new();
            seal(2, &raw, &mut sealed);
            let bit = bit.index(sealed.len() * 8);
            sealed[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(open(&sealed), None);
        }
    }
}

//! LEB128 and zig-zag: small numbers in few bytes. Knows nothing of records.

/// Appends `value`, seven bits per byte, low bits first.
pub(super) fn put(buf: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        buf.push((value as u8 & 0x7f) | 0x80);
        value >>= 7;
    }
    buf.push(value as u8);
}

/// Maps small negative numbers to small unsigned ones.
pub(super) fn zigzag(value: i64) -> u64 {
    ((value << 1) ^ (value >> 63)) as u64
}

/// The inverse of [`zigzag`].
pub(super) fn unzigzag(value: u64) -> i64 {
    ((value >> 1) as i64) ^ -((value & 1) as i64)
}

/// A place in a byte slice. Every read is checked; `None` means the bytes ended or a varint is
/// longer than 64 bits.
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(bytes: &'a [u8], at: usize) -> Self {
        Self { bytes, at }
    }

    pub(super) fn position(&self) -> usize {
        self.at
    }

    pub(super) fn byte(&mut self) -> Option<u8> {
        let byte = *self.bytes.get(self.at)?;
        self.at += 1;
        Some(byte)
    }

    pub(super) fn take(&mut self, len: u64) -> Option<&'a [u8]> {
        let end = self.at.checked_add(usize::try_from(len).ok()?)?;
        let taken = self.bytes.get(self.at..end)?;
        self.at = end;
        Some(taken)
    }

    pub(super) fn varint(&mut self) -> Option<u64> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            let bits = u64::from(byte & 0x7f);
            if shift == 63 && bits > 1 {
                return None;
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    /// Passes over so many numbers, without a look at their size: each ends with a byte below 0x80.
    pub(super) fn skip(&mut self, mut numbers: usize) -> Option<()> {
        while numbers >= 8 {
            let eight = self.bytes.get(self.at..self.at + 8)?;
            numbers -= eight.iter().filter(|byte| **byte < 0x80).count();
            self.at += 8;
        }
        while numbers > 0 {
            numbers -= usize::from(self.byte()? < 0x80);
        }
        Some(())
    }

    pub(super) fn varint_u32(&mut self) -> Option<u32> {
        u32::try_from(self.varint()?).ok()
    }

    pub(super) fn signed(&mut self) -> Option<i64> {
        self.varint().map(unzigzag)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn numbers_go_there_and_back(value: u64, signed: i64) {
            let mut buf = Vec::new();
            put(&mut buf, value);
            put(&mut buf, zigzag(signed));
            let mut cursor = Cursor::new(&buf, 0);
            prop_assert_eq!(cursor.varint(), Some(value));
            prop_assert_eq!(cursor.signed(), Some(signed));
            prop_assert_eq!(cursor.byte(), None);
        }
    }

    proptest! {
        #[test]
        fn numbers_are_passed_over(
            passed in prop::collection::vec(prop_oneof![Just(0u64), any::<u64>()], 0..100), next: u64,
        ) {
            let mut buf = Vec::new();
            passed.iter().chain([&next]).for_each(|value| put(&mut buf, *value));
            let mut cursor = Cursor::new(&buf, 0);
            prop_assert_eq!(cursor.skip(passed.len()), Some(()));
            prop_assert_eq!(cursor.varint(), Some(next));
            prop_assert_eq!(cursor.skip(1), None);
        }
    }

    #[test]
    fn a_varint_of_more_than_64_bits_is_refused() {
        assert_eq!(Cursor::new(&[0xff; 11], 0).varint(), None);
        assert_eq!(
            Cursor::new(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x02], 0).varint(),
            None
        );
        assert_eq!(Cursor::new(&[0x80], 0).varint(), None);
    }
}

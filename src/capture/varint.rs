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

/// In each byte of eight, the bit that says another one follows.
const MORE_BITS: u64 = 0x8080_8080_8080_8080;

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

    #[inline(always)]
    pub(super) fn varint(&mut self) -> Option<u64> {
        let Some(eight) = self.bytes.get(self.at..).and_then(|rest| rest.first_chunk()) else {
            return self.varint_by_bytes();
        };
        let word = u64::from_le_bytes(*eight);
        let ends = !word & MORE_BITS;
        if ends == 0 {
            return self.varint_by_bytes();
        }
        self.at += (ends.trailing_zeros() as usize + 1) / 8;
        // The bits up to its last byte's end, without those that say whether another byte follows, moved together by pairs.
        let bits = word & (ends ^ (ends - 1)) & !MORE_BITS;
        let bits = (bits & 0x007f_007f_007f_007f) | ((bits & 0x7f00_7f00_7f00_7f00) >> 1);
        let bits = (bits & 0x0000_3fff_0000_3fff) | ((bits & 0x3fff_0000_3fff_0000) >> 2);
        Some((bits & 0x0fff_ffff) | ((bits & 0x0fff_ffff_0000_0000) >> 4))
    }

    #[cold]
    fn varint_by_bytes(&mut self) -> Option<u64> {
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

    /// Reads as many numbers as `numbers` has; whether any of them is not 0. Most columns are numbers of one byte.
    pub(super) fn column(&mut self, numbers: &mut [u64]) -> Option<bool> {
        let (mut at, mut all) = (0, 0);
        while at < numbers.len() {
            let bytes = self.bytes.get(self.at..).and_then(|rest| rest.first_chunk::<8>());
            if let (Some(bytes), Some(eight)) = (bytes, numbers[at..].first_chunk_mut::<8>())
                && u64::from_le_bytes(*bytes) & MORE_BITS == 0
            {
                *eight = bytes.map(u64::from);
                all |= u64::from_le_bytes(*bytes);
                (self.at, at) = (self.at + 8, at + 8);
                continue;
            }
            // What is long comes in runs, too.
            for number in numbers[at..].iter_mut().take(8) {
                *number = self.varint()?;
                all |= *number;
                at += 1;
            }
        }
        Some(all != 0)
    }

    /// Passes over so many numbers, without a look at their size: each ends with a byte below 0x80.
    pub(super) fn skip(&mut self, mut numbers: usize) -> Option<()> {
        while numbers >= 64 {
            let some = self.bytes.get(self.at..)?.first_chunk::<64>()?;
            numbers -= some.iter().map(|byte| (byte >> 7) ^ 1).sum::<u8>() as usize;
            self.at += 64;
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

    proptest! {
        #[test]
        fn a_column_is_its_numbers(
            wanted in prop::collection::vec(prop_oneof![9 => 0u64..128, 1 => any::<u64>()], 0..100), next: u64, cut: prop::sample::Index,
        ) {
            let mut buf = Vec::new();
            wanted.iter().for_each(|value| put(&mut buf, *value));
            let whole = buf.len();
            put(&mut buf, next);
            let mut cursor = Cursor::new(&buf, 0);
            let mut numbers = vec![7; wanted.len()];
            prop_assert_eq!(cursor.column(&mut numbers), Some(wanted.iter().any(|value| *value != 0)));
            prop_assert_eq!(&numbers, &wanted);
            prop_assert_eq!(cursor.varint(), Some(next));
            if whole > 0 {
                prop_assert_eq!(Cursor::new(&buf[..cut.index(whole)], 0).column(&mut numbers), None);
            }
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

//! [`Weight`]: what a recorded allocation stands for.
//!
//! Where samples are drawn with a mean distance of `interval` bytes, an allocation of `size` bytes is recorded with
//! probability p = 1 - exp(-size / interval), independently of all others. So it stands for 1 / p of its kind: sums
//! weighted so are right on average, and the sum of (1 - p) / p² estimates their variance (Horvitz and Thompson, "A
//! Generalization of Sampling Without Replacement From a Finite Universe", JASA 47, 1952).
//!
//! Weights are fixed-point numbers: what was added to a sum is taken away again to the last bit, in any order.
//! Knows one allocation at a time; what sums mean is `analysis`' business.

/// Fraction bits of a weighted number of bytes. A sample stands for `interval` bytes at least, so rounding is no matter.
pub const BYTES_FRACTION: u32 = 8;
/// Fraction bits of a weighted number of blocks.
pub const COUNT_FRACTION: u32 = 16;

/// What one allocation stands for.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Weight {
    /// Bytes, with [`BYTES_FRACTION`] bits of fraction.
    pub bytes: u64,
    /// Allocations, with [`COUNT_FRACTION`] bits of fraction.
    pub count: u64,
    /// Its part of the variance of a sum of bytes.
    pub bytes_variance: f64,
    /// Its part of the variance of a sum of allocations.
    pub count_variance: f64,
}

impl Weight {
    /// Of an allocation of `size` bytes that was recorded with this sampling interval (0: for certain). An allocation
    /// of no bytes is never sampled; should a file have one, it is taken for one of a byte.
    pub fn of(size: u64, interval: u64) -> Self {
        if interval == 0 {
            return Self {
                bytes: size.saturating_mul(1 << BYTES_FRACTION),
                count: 1 << COUNT_FRACTION,
                bytes_variance: 0.0,
                count_variance: 0.0,
            };
        }
        let (size, each) = (size.max(1) as f64, each(size, interval));
        let count_variance = (-size / interval as f64).exp() * each * each;
        // Casts of floating-point numbers stop at the largest integer.
        Self {
            bytes: (size * each * f64::from(1 << BYTES_FRACTION)).round() as u64,
            count: (each * f64::from(1 << COUNT_FRACTION)).round() as u64,
            bytes_variance: size * size * count_variance,
            count_variance,
        }
    }
}

/// How many of its kind an allocation stands for: 1 / p.
pub fn each(size: u64, interval: u64) -> f64 {
    if interval == 0 {
        return 1.0;
    }
    // exp_m1 keeps its digits where size is a tiny part of interval, and 1 - exp(-x) would be 0.
    -1.0 / (-(size.max(1) as f64) / interval as f64).exp_m1()
}

/// A sum of weighted bytes and blocks.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub(super) struct WeightedSum {
    bytes: u128,
    count: u128,
}

impl WeightedSum {
    pub(super) fn add(&mut self, size: u64, interval: u64) {
        let (bytes, count) = wide(size, interval);
        self.bytes = self.bytes.saturating_add(bytes);
        self.count = self.count.saturating_add(count);
    }

    pub(super) fn remove(&mut self, size: u64, interval: u64) {
        let (bytes, count) = wide(size, interval);
        self.bytes = self.bytes.saturating_sub(bytes);
        self.count = self.count.saturating_sub(count);
    }

    /// Bytes, to the nearest.
    pub(super) fn bytes(&self) -> u64 {
        rounded(self.bytes, BYTES_FRACTION)
    }

    /// Blocks, to the nearest.
    pub(super) fn count(&self) -> u64 {
        rounded(self.count, COUNT_FRACTION)
    }
}

/// Sizes that are certain may use all 64 bits.
fn wide(size: u64, interval: u64) -> (u128, u128) {
    if interval == 0 {
        return (u128::from(size) << BYTES_FRACTION, 1 << COUNT_FRACTION);
    }
    let weight = Weight::of(size, interval);
    (u128::from(weight.bytes), u128::from(weight.count))
}

fn rounded(sum: u128, fraction: u32) -> u64 {
    u64::try_from(sum.saturating_add(1 << (fraction - 1)) >> fraction).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn close(value: f64, expected: f64) -> bool {
        (value - expected).abs() <= 1e-9 * expected.abs()
    }

    #[test]
    fn a_weight_is_one_over_the_probability() {
        // 1 - exp(-1/2), and the two ends: 1/x + 1/2 + x/12 for tiny x, 1 for large.
        assert!(close(each(256 << 10, 512 << 10), 2.541_494_082_536_798));
        assert!(close(each(8, 512 << 10), 65536.5 + 1.0 / (12.0 * 65536.0)));
        assert_eq!((each(100 << 20, 512 << 10), each(5, 0), each(0, 1000)), (1.0, 1.0, each(1, 1000)));
        let weight = Weight::of(256 << 10, 512 << 10);
        assert!(close(weight.count as f64 / 65536.0, 2.541_488_647_460_937_5));
        assert!(close(weight.bytes as f64, (2.541_494_082_536_798 * f64::from(1 << 26)).round()));
        // p = 0.393469…, (1 - p) / p²
        assert!(close(weight.count_variance, 3.917_698_089_032_762));
        assert!(close(
            weight.bytes_variance,
            3.917_698_089_032_762 * f64::from(1 << 18) * f64::from(1 << 18)
        ));
    }

    #[test]
    fn what_is_certain_has_no_variance() {
        let weight = Weight::of(1000, 0);
        assert_eq!((weight.bytes, weight.count), (256_000, 65536));
        assert_eq!((weight.bytes_variance, weight.count_variance), (0.0, 0.0));
    }

    proptest! {
        #[test]
        fn any_numbers_have_a_weight(size: u64, interval: u64) {
            let weight = Weight::of(size, interval);
            prop_assert!(weight.count >= 1 << COUNT_FRACTION);
            prop_assert!(weight.bytes >= size.min(u64::MAX >> BYTES_FRACTION));
            prop_assert!(weight.bytes_variance >= 0.0 && weight.count_variance >= 0.0);
            prop_assert!(weight.bytes_variance.is_finite() && weight.count_variance.is_finite());
            // No allocation is more uncertain than one of very few bytes: interval².
            prop_assert!(weight.bytes_variance.sqrt() <= interval as f64 * 1.000_001);
        }

        #[test]
        fn what_is_added_is_taken_away(blocks in prop::collection::vec((1u64..10_000_000, 0u64..1_000_000), 0..50)) {
            let mut sum = WeightedSum::default();
            blocks.iter().for_each(|(size, interval)| sum.add(*size, *interval));
            blocks.iter().rev().for_each(|(size, interval)| sum.remove(*size, *interval));
            prop_assert_eq!(sum, WeightedSum::default());
        }
    }
}

//! [`Totals`]: bytes in blocks, and how sure that is.
//!
//! What was recorded for certain is counted in whole numbers. Samples add what they stand for (see
//! [`Weight`]), in fixed point, so that a sum is the same in any order and what was added
//! is taken away without rest; only variances are floating-point numbers, and begin anew when no sample is left.

use super::weight::{BYTES_FRACTION, COUNT_FRACTION, Weight};
use std::cmp::Ordering;
use std::sync::LazyLock;

/// Standard deviations on either side that hold 95 % of a normal distribution.
const Z: f64 = 1.959_963_984_540_054;

/// How many more samples the error is reckoned with than there were, all as uncertain as the most uncertain one: z²/2.
///
/// A variance estimated from few samples is too low just when the sum is: of a Poisson count n, n ± z √n covers the truth
/// in 85 to 93 % only where n is 3 to 10, and n ± z √(n + 2) in 95 to 97 %. It is what Agresti and Coull do for
/// proportions ("Approximate Is Better than 'Exact'", The American Statistician 52, 1998).
const MORE_SAMPLES: f64 = 2.0;

/// Bytes in blocks: estimates, where samples are among them.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Totals {
    pub(crate) certain: Certain,
    pub(crate) sampled: Sampled,
}

/// The part that was recorded for certain.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub(crate) struct Certain {
    bytes: u64,
    count: u64,
}

/// The part that comes from samples.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub(crate) struct Sampled {
    samples: u64,
    /// With [`BYTES_FRACTION`] bits of fraction.
    bytes: u64,
    /// With [`COUNT_FRACTION`] bits of fraction.
    count: u64,
    bytes_variance: Variance,
    count_variance: Variance,
}

/// Sums of variances.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
struct Variance {
    sum: f64,
    /// Of their cubes. Its cube root stands for the largest of them, which could not be taken away again: it is no less,
    /// not much more, and grows with every sample, so that the error of a sum is never below that of a part.
    cubes: Compensated,
}

/// A sum that keeps what rounding takes from it (Neumaier, ZAMM 54, 1974): cubes differ by so much that those of large
/// variances, added and taken away again, would leave nothing of the others.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
struct Compensated {
    sum: f64,
    lost: f64,
}

impl Totals {
    /// Recorded for certain.
    pub fn certain(bytes: u64, count: u64) -> Self {
        Self { certain: Certain { bytes, count }, sampled: Sampled::default() }
    }

    /// One allocation with its sampling interval, 0 for certain.
    pub fn one(size: u64, interval: u64) -> Self {
        if interval == 0 {
            return Self::certain(size, 1);
        }
        let weight = Weight::of(size, interval);
        let sampled = Sampled {
            samples: 1,
            bytes: weight.bytes,
            count: weight.count,
            bytes_variance: Variance::of(weight.bytes_variance),
            count_variance: Variance::of(weight.count_variance),
        };
        Self { certain: Certain::default(), sampled }
    }

    /// Adds, stopping at the largest number: sizes come from a file and may be anything.
    #[inline]
    pub fn add(&mut self, other: Self) {
        self.certain.add(other.certain);
        if other.sampled.samples > 0 {
            self.sampled.add(&other.sampled);
        }
    }

    /// Takes away what was added before.
    pub fn remove(&mut self, other: Self) {
        self.certain.remove(other.certain);
        if other.sampled.samples > 0 {
            self.sampled.remove(&other.sampled);
        }
    }

    /// Bytes, to the nearest.
    pub fn bytes(&self) -> u64 {
        self.certain.bytes.saturating_add(rounded(self.sampled.bytes, BYTES_FRACTION))
    }

    /// Blocks, to the nearest.
    pub fn count(&self) -> u64 {
        self.certain.count.saturating_add(rounded(self.sampled.count, COUNT_FRACTION))
    }

    /// Samples among them.
    pub fn samples(&self) -> u64 {
        self.sampled.samples
    }

    /// The truth is within so many bytes of [`bytes`](Self::bytes) at 95 %. 0 where everything was recorded.
    pub fn bytes_error(&self) -> f64 {
        self.sampled.bytes_variance.error()
    }

    /// The truth is within so many blocks of [`count`](Self::count) at 95 %. 0 where everything was recorded.
    pub fn count_error(&self) -> f64 {
        self.sampled.count_variance.error()
    }

    /// The variance of [`bytes`](Self::bytes), without the allowance for few samples that errors have.
    pub fn bytes_variance(&self) -> f64 {
        self.sampled.bytes_variance.sum
    }

    /// The cube of about the part of it that the most uncertain sample has: there are many of these, and of many the largest is all
    /// that matters.
    pub fn cubed_bytes_variance(&self) -> f64 {
        self.sampled.bytes_variance.cubed()
    }

    /// True if neither bytes nor blocks are left.
    pub fn is_empty(&self) -> bool {
        self.certain == Certain::default() && self.sampled.samples == 0
    }

    /// Which of [`to_numbers`](Self::to_numbers) tell of blocks alone.
    pub(super) const NUMBERS_OF_COUNTS: [bool; 9] =
        [false, true, false, false, true, false, false, true, true];

    /// As numbers of a file: certain bytes and blocks; samples, what they stand for in bytes and blocks (fixed point); and for
    /// each of the two, the variance and the largest part of it, to a hundredth.
    pub(super) fn to_numbers(self) -> [u64; 9] {
        let Self { certain, sampled } = self;
        let (of_bytes, of_count) = (sampled.bytes_variance, sampled.count_variance);
        [
            certain.bytes,
            certain.count,
            sampled.samples,
            sampled.bytes,
            sampled.count,
            to_logarithm(of_bytes.sum),
            to_logarithm(of_bytes.largest()),
            to_logarithm(of_count.sum),
            to_logarithm(of_count.largest()),
        ]
    }

    /// The inverse of [`to_numbers`](Self::to_numbers), for any numbers.
    pub(super) fn from_numbers(numbers: [u64; 9]) -> Self {
        let [certain_bytes, certain_count, samples, bytes, count, variances @ ..] = numbers;
        let certain = Certain { bytes: certain_bytes, count: certain_count };
        if samples == 0 {
            return Self { certain, sampled: Sampled::default() };
        }
        let parts = &*PARTS;
        let [bytes_sum, bytes_largest, count_sum, count_largest] =
            variances.map(|number| from_logarithm(number, parts));
        let bytes_variance = Variance::from_parts(bytes_sum, bytes_largest);
        let count_variance = Variance::from_parts(count_sum, count_largest);
        Self { certain, sampled: Sampled { samples, bytes, count, bytes_variance, count_variance } }
    }

    /// Orders by bytes, then by blocks.
    pub fn compare(&self, other: &Self) -> Ordering {
        (self.bytes(), self.count()).cmp(&(other.bytes(), other.count()))
    }
}

impl Certain {
    pub(crate) fn add(&mut self, other: Self) {
        self.bytes = self.bytes.saturating_add(other.bytes);
        self.count = self.count.saturating_add(other.count);
    }

    pub(crate) fn remove(&mut self, other: Self) {
        self.bytes = self.bytes.saturating_sub(other.bytes);
        self.count = self.count.saturating_sub(other.count);
    }
}

impl Sampled {
    pub(crate) fn add(&mut self, other: &Self) {
        self.samples = self.samples.saturating_add(other.samples);
        self.bytes = self.bytes.saturating_add(other.bytes);
        self.count = self.count.saturating_add(other.count);
        self.bytes_variance.add(other.bytes_variance, 1.0);
        self.count_variance.add(other.count_variance, 1.0);
    }

    pub(crate) fn remove(&mut self, other: &Self) {
        self.samples = self.samples.saturating_sub(other.samples);
        if self.samples == 0 {
            // Nor is anything left of the rounding of the variances.
            *self = Self::default();
            return;
        }
        self.bytes = self.bytes.saturating_sub(other.bytes);
        self.count = self.count.saturating_sub(other.count);
        self.bytes_variance.add(other.bytes_variance, -1.0);
        self.count_variance.add(other.count_variance, -1.0);
    }
}

impl Variance {
    fn of(variance: f64) -> Self {
        Self { sum: variance, cubes: Compensated::cube_of(variance) }
    }

    fn add(&mut self, other: Self, sign: f64) {
        self.sum = (self.sum + sign * other.sum).max(0.0);
        self.cubes.add(sign * other.cubes.sum);
        self.cubes.add(sign * other.cubes.lost);
    }

    /// About the largest of those added. It is no more than the sum, whatever rounding may have left.
    fn largest(&self) -> f64 {
        self.cubed().cbrt().clamp(0.0, self.sum)
    }

    fn cubed(&self) -> f64 {
        (self.cubes.sum + self.cubes.lost).max(0.0)
    }

    fn from_parts(sum: f64, largest: f64) -> Self {
        Self { sum, cubes: Compensated::cube_of(largest.min(sum)) }
    }

    fn error(&self) -> f64 {
        Z * (self.sum + MORE_SAMPLES * self.largest()).sqrt()
    }
}

impl Compensated {
    fn cube_of(variance: f64) -> Self {
        Self { sum: variance * variance * variance, lost: 0.0 }
    }

    fn add(&mut self, term: f64) {
        let sum = self.sum + term;
        // Of two numbers the smaller one loses its last digits.
        let (large, small) = if self.sum.abs() >= term.abs() { (self.sum, term) } else { (term, self.sum) };
        self.lost += large - sum + small;
        self.sum = sum;
    }
}

/// Steps of a logarithm between a number and its double.
const LOGARITHM_STEPS: f64 = 64.0;
/// Added so that numbers down to 2^-64 have a positive logarithm; smaller ones are none.
const LOGARITHM_ZERO: f64 = 64.0;

/// A variance in few bytes: 0 for none, else its logarithm; what comes back is within 0.6 %.
fn to_logarithm(value: f64) -> u64 {
    if value > 0.0 { ((value.log2() + LOGARITHM_ZERO) * LOGARITHM_STEPS).round().max(1.0) as u64 } else { 0 }
}

fn from_logarithm(number: u64, parts: &[f64; 64]) -> f64 {
    if number == 0 {
        return 0.0;
    }
    // No sum of variances comes near the bound; its cube is a number still.
    let doublings = (number / 64).min(LARGEST_DOUBLINGS);
    let part = if doublings < LARGEST_DOUBLINGS { parts[(number % 64) as usize] } else { 1.0 };
    // 2 to the power of the doublings, less those of the zero: a snapshot has millions of these.
    part * f64::from_bits((1023 - LOGARITHM_ZERO as u64 + doublings) << 52)
}

/// 2^320 and the doublings below 1.
const LARGEST_DOUBLINGS: u64 = 384;
/// 2^(n / 64).
static PARTS: LazyLock<[f64; 64]> =
    LazyLock::new(|| std::array::from_fn(|n| (n as f64 / LOGARITHM_STEPS).exp2()));

fn rounded(sum: u64, fraction: u32) -> u64 {
    (sum >> fraction) + (sum >> (fraction - 1) & 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const R: u64 = 512 << 10;

    fn sum(parts: &[(u64, u64)]) -> Totals {
        let mut totals = Totals::default();
        parts.iter().for_each(|(size, interval)| totals.add(Totals::one(*size, *interval)));
        totals
    }

    #[test]
    fn what_is_certain_is_exact_and_has_no_error() {
        let mut totals = sum(&[(10, 0), (20, 0)]);
        totals.add(Totals::certain(u64::MAX - 40, 7));
        assert_eq!((totals.bytes(), totals.count(), totals.samples()), (u64::MAX - 10, 9, 0));
        assert_eq!((totals.bytes_error(), totals.count_error()), (0.0, 0.0));
        totals.add(Totals::certain(11, 0));
        assert_eq!(totals.bytes(), u64::MAX);
    }

    #[test]
    fn many_equal_samples_have_the_error_of_a_poisson_count() {
        for n in [1, 4, 100] {
            let totals = sum(&vec![(64, R); n]);
            let expected = Z * (n as f64 + 2.0 * (n as f64).cbrt()).sqrt() * R as f64;
            assert!((totals.bytes_error() / expected - 1.0).abs() < 1e-3, "{n}");
            assert!((totals.count_error() * 64.0 / expected - 1.0).abs() < 1e-3, "{n}");
        }
    }

    #[test]
    fn samples_that_were_nearly_certain_do_not_make_a_rare_one_surer() {
        let rare = sum(&[(64, R)]);
        let both = sum(&[&[(64, R)][..], &[(30 * R, R); 500]].concat());
        assert!((both.bytes_error() / rare.bytes_error() - 1.0).abs() < 1e-3);
        assert!((both.count_error() / rare.count_error() - 1.0).abs() < 1e-3);
    }

    #[test]
    fn an_allocation_far_larger_than_the_interval_is_all_but_exact() {
        let totals = sum(&[(20 * R, R); 10]);
        assert_eq!((totals.bytes(), totals.count()), (200 * R, 10));
        assert!(totals.bytes_error() < 0.01 * R as f64);
    }

    proptest! {
        #[test]
        fn the_order_of_adding_and_taking_away_does_not_matter(
            kept in prop::collection::vec((1u64..10_000_000, prop::sample::select(vec![0, 100, R, 3 * R])), 0..40),
            gone in prop::collection::vec((1u64..10_000_000, prop::sample::select(vec![0, 100, R, 3 * R])), 0..40),
        ) {
            let mut totals = sum(&gone);
            kept.iter().for_each(|(size, interval)| totals.add(Totals::one(*size, *interval)));
            gone.iter().for_each(|(size, interval)| totals.remove(Totals::one(*size, *interval)));
            let expected = sum(&kept);
            prop_assert_eq!(totals.certain, expected.certain);
            prop_assert_eq!(totals.sampled.bytes, expected.sampled.bytes);
            prop_assert_eq!(totals.sampled.count, expected.sampled.count);
            // Rounding leaves of variances what is nothing beside those that were there.
            let slack = 1e-6 * (sum(&gone).bytes_error() + expected.bytes_error());
            prop_assert!((totals.bytes_error() - expected.bytes_error()).abs() <= slack);
            if kept.is_empty() {
                prop_assert_eq!(totals, Totals::default());
            }
        }

        #[test]
        fn a_sum_is_no_surer_than_its_parts(
            parts in prop::collection::vec((1u64..10_000_000, prop::sample::select(vec![0, 100, R, 3 * R])), 1..40),
        ) {
            let (part, whole) = (sum(&parts[1..]), sum(&parts));
            prop_assert!(whole.bytes_error() >= part.bytes_error() * 0.999_999);
            prop_assert!(whole.count_error() >= part.count_error() * 0.999_999);
        }

        #[test]
        fn a_file_keeps_sums_to_the_last_bit_and_errors_to_a_hundredth(
            parts in prop::collection::vec((1u64..10_000_000, prop::sample::select(vec![0, 100, R, 3 * R])), 0..40),
        ) {
            let totals = sum(&parts);
            let read = Totals::from_numbers(totals.to_numbers());
            prop_assert_eq!(read.certain, totals.certain);
            prop_assert_eq!((read.samples(), read.bytes(), read.count()), (totals.samples(), totals.bytes(), totals.count()));
            prop_assert!((read.bytes_error() - totals.bytes_error()).abs() <= 0.01 * totals.bytes_error());
            prop_assert!((read.count_error() - totals.count_error()).abs() <= 0.01 * totals.count_error());
        }

        #[test]
        fn any_numbers_are_some_sum(numbers: [u64; 9], more: [u64; 9]) {
            let mut totals = Totals::from_numbers(numbers);
            totals.add(Totals::from_numbers(more));
            prop_assert!(!totals.bytes_error().is_nan() && !totals.count_error().is_nan());
            totals.remove(Totals::from_numbers(more));
            prop_assert!(!totals.bytes_error().is_nan() && !totals.count_error().is_nan());
        }

        #[test]
        fn any_sums_are_survived(parts in prop::collection::vec((any::<u64>(), any::<u64>()), 0..40)) {
            let mut totals = sum(&parts);
            prop_assert!(!totals.bytes_error().is_nan() && !totals.count_error().is_nan());
            parts.iter().for_each(|(size, interval)| totals.remove(Totals::one(*size, *interval)));
            prop_assert!(!totals.bytes_error().is_nan() && totals.samples() == 0);
        }
    }
}

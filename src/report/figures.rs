//! Sums as reports show them: plain where everything was recorded, with their error where they are estimates.
//!
//! Knows how a figure looks, not what it is of.

use super::text::{number, plural, size, size_and_error};
use crate::analysis::{Findings, Totals};
use serde::Serialize;

/// Characters of an error.
const ERROR: usize = 7;

/// How the sums of one report are shown.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Figures {
    /// Whether the capture is of samples.
    pub(super) estimated: bool,
}

impl Figures {
    pub(super) fn of(findings: &Findings) -> Self {
        Self { estimated: findings.header.sampling_mean_bytes.is_some() }
    }

    /// `12.3 MiB`, `12.3 MiB ±0.8`. Where there is no sample there is nothing to estimate an error from.
    pub(super) fn bytes(self, totals: &Totals) -> String {
        if self.estimated && !totals.is_empty() {
            size_and_error(totals.bytes(), totals.bytes_error())
        } else {
            size(totals.bytes())
        }
    }

    /// `1,234`, `1,234 ±56`.
    pub(super) fn count(self, totals: &Totals) -> String {
        if self.estimated && !totals.is_empty() {
            format!("{} ±{}", number(totals.count()), count_error(totals.count_error()))
        } else {
            number(totals.count())
        }
    }

    /// A figure of bytes and its error.
    pub(super) fn bytes_with(self, bytes: u64, error: f64) -> String {
        if self.estimated && (bytes > 0 || error > 0.0) { size_and_error(bytes, error) } else { size(bytes) }
    }

    /// A number of blocks and its error.
    pub(super) fn count_with(self, count: u64, error: f64) -> String {
        if self.estimated && (count > 0 || error > 0.0) {
            format!("{} ±{}", number(count), count_error(error))
        } else {
            number(count)
        }
    }

    /// `1,234 blocks`, `1,234 ±56 blocks`.
    pub(super) fn counted(self, totals: &Totals, what: &str) -> String {
        format!("{} {}", self.count(totals), plural(totals.count(), what))
    }

    /// `12.3 MiB in 1,234 blocks`, with errors if there are any.
    pub(super) fn amount(self, totals: &Totals, what: &str) -> String {
        format!("{} in {}", self.bytes(totals), self.counted(totals, what))
    }

    /// `figure` to the right of a column of so many characters, and of some more that its error begins in.
    pub(super) fn right(self, figure: &str, width: usize) -> String {
        if !self.estimated {
            return format!("{figure:>width$}");
        }
        let (value, error) = figure.split_once(" ±").unwrap_or((figure, ""));
        let sign = if error.is_empty() { ' ' } else { '±' };
        format!("{value:>width$} {sign}{error:ERROR$}")
    }

    /// Characters that [`right`](Self::right) makes of a width.
    pub(super) fn width(self, width: usize) -> usize {
        if self.estimated { width + 2 + ERROR } else { width }
    }

    /// For JSON: bytes, rounded up; `None` where everything was recorded.
    pub(super) fn bytes_error(self, totals: &Totals) -> Option<u64> {
        self.estimated.then(|| totals.bytes_error().ceil() as u64)
    }

    /// For JSON: blocks, to one decimal; `None` where everything was recorded.
    pub(super) fn count_error(self, totals: &Totals) -> Option<f64> {
        self.estimated.then(|| (totals.count_error() * 10.0).round() / 10.0)
    }

    /// The fields beside `bytes` and `count`.
    pub(super) fn errors(self, totals: &Totals) -> Option<Errors> {
        Some(Errors {
            bytes_error_95: self.bytes_error(totals)?,
            count_error_95: self.count_error(totals)?,
            samples: totals.samples(),
        })
    }

    /// The fields beside `total_bytes`, `total_count`, `own_bytes` and `own_count`.
    pub(super) fn nested_errors(self, total: &Totals, own: &Totals) -> Option<NestedErrors> {
        Some(NestedErrors {
            total_bytes_error_95: self.bytes_error(total)?,
            total_count_error_95: self.count_error(total)?,
            own_bytes_error_95: self.bytes_error(own)?,
            own_count_error_95: self.count_error(own)?,
            samples: total.samples(),
        })
    }
}

/// Half the width of the interval that holds the truth at 95 %.
#[derive(Serialize)]
pub(super) struct Errors {
    bytes_error_95: u64,
    count_error_95: f64,
    samples: u64,
}

/// The same for sums with and without callees.
#[derive(Serialize)]
pub(super) struct NestedErrors {
    total_bytes_error_95: u64,
    total_count_error_95: f64,
    own_bytes_error_95: u64,
    own_count_error_95: f64,
    samples: u64,
}

/// `0`, `0.3`, `9.9`, `123`.
fn count_error(error: f64) -> String {
    if error == 0.0 {
        "0".to_owned()
    } else if error < 9.95 {
        format!("{error:.1}")
    } else {
        number(error.round() as u64)
    }
}

/// For `skip_serializing_if`: reports of exact captures don't have the field.
#[allow(clippy::trivially_copy_pass_by_ref)] // serde calls it with a reference
pub(super) fn is_false(value: &bool) -> bool {
    !value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exact_figures_have_no_error_and_estimates_always_one() {
        let mut totals = Totals::certain(1 << 20, 3);
        let (exact, sampled) = (Figures { estimated: false }, Figures { estimated: true });
        assert_eq!(exact.amount(&totals, "block"), "1.0 MiB in 3 blocks");
        assert_eq!(sampled.amount(&totals, "block"), "1.0 MiB ±0 in 3 ±0 blocks");
        assert!(exact.errors(&totals).is_none() && exact.nested_errors(&totals, &totals).is_none());
        totals.add(Totals::one(3 << 20, 512 << 10));
        assert_eq!(sampled.amount(&totals, "block"), "4.0 MiB ±0.5 in 4 ±0.2 blocks");
        totals.add(Totals::one(1000, 512 << 10));
        let errors = sampled.errors(&totals).unwrap();
        assert_eq!((errors.samples, errors.count_error_95), (2, 1779.8));
        assert_eq!(sampled.counted(&totals, "block"), "529 ±1,780 blocks");
        assert_eq!(sampled.amount(&Totals::default(), "block"), "0 B in 0 blocks");
        assert_eq!(sampled.right("529 ±1,780", 5), "  529 ±1,780  ");
        assert_eq!((sampled.right("0", 5), exact.right("0", 5)), ("    0         ".into(), "    0".into()));
        assert_eq!((sampled.width(5), exact.width(5)), (14, 5));
    }
}

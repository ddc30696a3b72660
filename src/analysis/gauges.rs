//! Gauges over time: thinned to a bounded number of rows, and what the growth of the resident set is made of.

use crate::capture::{CaptureError, CaptureReader, Gauges, Record};

/// Rows kept at most: more than are shown, few enough for a recording of months.
const MOST_ROWS: usize = 4096;
const _: () = assert!(MOST_ROWS.is_multiple_of(2));

/// The gauges of a capture.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct GaugeSeries {
    rows: Vec<Gauges>,
    /// Moments in a row.
    per_row: u64,
    /// Moments in the last row.
    in_last: u64,
    moments: u64,
    first: Gauges,
    last: Gauges,
}

/// Reads all gauges of a capture; `each` sees every moment.
pub fn gauge_series<E: From<CaptureError>>(
    reader: &mut CaptureReader,
    mut each: impl FnMut(&Gauges) -> Result<(), E>,
) -> Result<GaugeSeries, E> {
    let mut series = GaugeSeries::default();
    while let Some(record) = reader.next() {
        if record? == Record::Gauges {
            for moment in reader.gauges() {
                each(moment)?;
                series.push(moment);
            }
        }
    }
    Ok(series)
}

impl GaugeSeries {
    /// Adds the next moment.
    pub fn push(&mut self, moment: &Gauges) {
        if self.moments == 0 {
            self.per_row = 1;
        }
        self.moments += 1;
        // The first moment stays a row of its own.
        if self.rows.len() > 1 && self.in_last < self.per_row {
            self.in_last += 1;
            if let Some(row) = self.rows.last_mut() {
                *row = later(row, moment);
            }
        } else {
            self.in_last = 1;
            self.rows.push(*moment);
        }
        self.first = later(moment, &self.first);
        self.first.time_ns = self.rows[0].time_ns;
        self.last = later(&self.last, moment);
        if self.rows.len() > MOST_ROWS {
            let rows =
                self.rows[1..].chunks(2).map(|pair| pair.iter().skip(1).fold(pair[0], |a, b| later(&a, b)));
            self.rows = [self.rows[0]].into_iter().chain(rows).collect();
            // The last row, begun just now, was paired with a full one.
            self.in_last += self.per_row;
            self.per_row *= 2;
        }
    }

    /// Moments there were.
    pub fn moments(&self) -> u64 {
        self.moments
    }

    /// At most `most` rows (2 at least; 0: no limit) evenly over the time, the first and the last moment among them. Each row has
    /// the last known value of every gauge since the row before.
    pub fn rows(&self, most: usize) -> Vec<Gauges> {
        if most == 0 || self.rows.len() <= most {
            return self.rows.clone();
        }
        let (first, rest) = (self.rows[0], &self.rows[1..]);
        let count = most.max(2) - 1;
        let bound = |i: usize| i * rest.len() / count;
        let merged = (0..count).map(|i| {
            let rows = &rest[bound(i)..bound(i + 1)];
            rows.iter().skip(1).fold(rows[0], |a, b| later(&a, b))
        });
        std::iter::once(first).chain(merged).collect()
    }

    /// Each gauge when it was last known.
    pub fn last(&self) -> &Gauges {
        &self.last
    }

    /// What became more; `None` where the resident set is not known.
    pub fn growth(&self) -> Option<Growth> {
        let (first, last) = (&self.first, &self.last);
        let grown = |of: fn(&Gauges) -> Option<u64>| Some(of(last)?.wrapping_sub(of(first)?) as i64);
        let resident = grown(|g| g.resident)?;
        let (heap_in_use, heap_free) = (grown(|g| g.heap_in_use), grown(|g| g.heap_free));
        let arenas = grown(|g| g.arenas);
        let parts = [heap_in_use, heap_free, arenas];
        let told = parts.iter().flatten().fold(0_i64, |sum, part| sum.wrapping_add(*part));
        Some(Growth {
            from_ns: first.time_ns,
            to_ns: last.time_ns,
            resident,
            live: grown(|g| g.live),
            heap_in_use,
            heap_free,
            arenas,
            other: resident.wrapping_sub(told),
        })
    }
}

/// `a`, with every gauge that `b` knows.
fn later(a: &Gauges, b: &Gauges) -> Gauges {
    let values: Vec<_> = a.values().into_iter().zip(b.values()).map(|(a, b)| b.or(a)).collect();
    Gauges::from_values(b.time_ns, &values)
}

/// By how much gauges grew between their first and their last known value, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Growth {
    /// The first moment, since the start of recording.
    pub from_ns: u64,
    /// The last one.
    pub to_ns: u64,
    /// The resident set.
    pub resident: i64,
    /// Recorded and live: some of each of the parts below.
    pub live: Option<i64>,
    /// Handed out by the C library's heap.
    pub heap_in_use: Option<i64>,
    /// Held by it beside that.
    pub heap_free: Option<i64>,
    /// pymalloc's arenas.
    pub arenas: Option<i64>,
    /// The rest of the resident set: other mappings, files, stacks, and less what of the parts above is not resident.
    pub other: i64,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moment(second: u64, resident: u64, heap_in_use: Option<u64>) -> Gauges {
        Gauges { time_ns: second, resident: Some(resident), heap_in_use, ..Gauges::default() }
    }

    fn series(moments: u64) -> GaugeSeries {
        let mut series = GaugeSeries::default();
        for second in 0..moments {
            // The heap is known now and then.
            series.push(&moment(second, second * 10, (second % 7 == 3).then_some(second)));
        }
        series
    }

    #[test]
    fn a_long_series_is_thinned_and_keeps_its_ends() {
        for moments in [1, 2, 3, 4095, 4096, 4097, 4098, 8192, 8193, 100_003] {
            let series = series(moments);
            assert_eq!(series.moments(), moments);
            for most in [0, 2, 3, 24, 4095] {
                let rows = series.rows(most);
                assert!(rows.len() <= if most == 0 { MOST_ROWS } else { most }, "{moments} {most}");
                assert_eq!((rows[0].time_ns, rows[rows.len() - 1].time_ns), (0, moments - 1), "{most}");
                assert!(rows.windows(2).all(|pair| pair[0].time_ns < pair[1].time_ns));
                assert!(rows.iter().all(|row| row.resident == Some(row.time_ns * 10)));
            }
        }
        // A row has what was last known in its time.
        let rows = series(100).rows(11);
        assert_eq!(rows.len(), 11);
        assert!(rows[1..].iter().all(|row| row.heap_in_use.is_some_and(|at| row.time_ns - at < 7)));
        // All rows but the first and the last are of the same length.
        let rows = series(100_003).rows(0);
        let steps: Vec<_> = rows[1..rows.len() - 1].windows(2).map(|w| w[1].time_ns - w[0].time_ns).collect();
        assert!(steps.iter().all(|step| *step == steps[0]), "{steps:?}");
    }

    #[test]
    fn growth_is_from_the_first_known_value_to_the_last() {
        let mut series = GaugeSeries::default();
        assert_eq!(series.growth(), None);
        series.push(&moment(0, 1000, None));
        series.push(&Gauges { heap_free: Some(50), ..moment(1, 1100, Some(400)) });
        series.push(&Gauges { heap_free: Some(20), ..moment(2, 1500, Some(700)) });
        series.push(&moment(3, 1600, None));
        let growth = series.growth().unwrap();
        assert_eq!((growth.from_ns, growth.to_ns, growth.resident), (0, 3, 600));
        assert_eq!((growth.heap_in_use, growth.heap_free, growth.arenas), (Some(300), Some(-30), None));
        assert_eq!(growth.other, 600 - 300 + 30);
    }
}

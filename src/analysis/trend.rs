//! [`Trend`]: whether one series of "bytes live at a site" keeps growing, and how sure that is. Pure arithmetic.
//!
//! # The model
//!
//! What is live at a site at successive snapshots is a sum: each snapshot has the blocks of the one before, without those that went
//! and with those that came. So the errors of successive snapshots are not independent (a sample that leaked is in all later
//! ones), and a regression line through the points, with an interval from its residuals, would be far too sure of
//! itself. What is (nearly) independent are the steps between snapshots. The series is taken for a random walk with a drift: a step
//! over a time d has mean `rate · d` and variance `σ² · d`.
//!
//! σ² is the larger of two estimates:
//!
//! - what the steps themselves show, Σ (step − rate · d)² / d / (steps − 1). It holds everything that makes them unequal: chance in
//!   what was sampled, bursts of traffic, batches that fill and are freed. Growth in one jump is as large as its own σ, in n equal jumps
//!   √n times as large: a leak is growth in *many* steps. Noise that goes back and forth (requests under way, a sawtooth) gives steps that
//!   cancel in the growth but not in σ², so that it is hard to take for growth;
//! - what sampling alone must cause: the variance of the growth (as in [`diff`](super::diff), with the same allowance for few samples),
//!   divided by the time. The steps can look more regular than that by chance where samples are few.
//!
//! # The tests
//!
//! The first tenth of a site's history is left out (imports, first requests). The growth over the rest must be [`SURE`] standard
//! deviations (with Student's correction for few steps): one in a thousand sites of pure chance, as a site is one of thousands. It must have
//! been there in the first two thirds and still in the last third. And it must not flatten: over none of the
//! final windows of [`FINAL_WINDOWS`] may the rate be significantly below half of what it was before.

/// Standard deviations that a growth must have.
const SURE: f64 = 3.0;
/// The same for a part of the time, given that the whole is sure: 95 % and 90 % on one side.
const LIKELY: f64 = 1.645;
const STILL: f64 = 1.282;
/// 95 % on both sides.
const Z: f64 = 1.959_963_984_540_054;
/// Fewer steps say nothing about their own scatter.
const LEAST_STEPS: usize = 8;
/// The part of a site's history that is left out, at its start.
const WARM_UP: f64 = 0.1;
/// The final parts over which growth may have ended.
const FINAL_WINDOWS: [f64; 5] = [1.0 / 2.0, 1.0 / 3.0, 1.0 / 4.0, 1.0 / 6.0, 1.0 / 8.0];
/// A rate has flattened if it is below so much of what it was.
const FLAT: f64 = 0.5;
/// What the second half of the time may change of a stable size; a steady leak changes half of it.
const STEADY: f64 = 0.25;
/// A fall that makes a tooth, as a part of the largest size.
const TOOTH: f64 = 1.0 / 3.0;
/// How many samples more the variance is reckoned with, as uncertain as the most uncertain one.
const MORE_SAMPLES: f64 = 2.0;
/// The variance of a slope fitted to a random walk, beside that of the walk's mean step.
const OF_A_SLOPE: f64 = 1.2;

/// A site at one moment.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Point {
    /// Bytes live.
    pub live: f32,
    /// Variance of that estimate.
    pub stock_variance: f32,
    /// Variance of what came and went since the moment before.
    pub flow_variance: f32,
}

/// A series at the moments `times` (seconds, ascending), from the first of them at which the site had anything, and the one before.
pub struct Trend<'a> {
    times: &'a [f64],
    points: &'a [Point],
    /// The most uncertain sample's variance.
    largest_variance: f64,
}

/// What a series does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Shape {
    /// It grows steadily to the end.
    Grows,
    /// It grew, and that has slowed down to less than half.
    Flattens,
    /// It falls and rises again and again.
    Sawtooth,
    /// It is what it was.
    Stable,
    /// It has too few moments.
    TooShort,
    /// It may grow, or not.
    Unsure,
    /// It grew for sure, but whether it still does can't be told.
    GrewOnce,
}

/// Bytes per second and the interval that holds the truth at 95 %.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Rate {
    /// Bytes per second.
    pub value: f64,
    /// The lower end of the interval.
    pub low: f64,
    /// Its upper end.
    pub high: f64,
}

/// A part of a series with its figures.
#[derive(Clone, Copy)]
struct Stretch {
    from: usize,
    to: usize,
    growth: f64,
    seconds: f64,
}

impl<'a> Trend<'a> {
    /// Of points at as many times.
    pub fn new(times: &'a [f64], points: &'a [Point], largest_variance: f64) -> Self {
        debug_assert_eq!(times.len(), points.len());
        Self { times, points, largest_variance }
    }

    /// What it does.
    pub fn shape(&self) -> Shape {
        let last = self.points.len().saturating_sub(1);
        let start = self.place(0, WARM_UP);
        if last < start + LEAST_STEPS {
            return Shape::TooShort;
        }
        let (all, late) = (self.stretch(0, last), self.stretch(start, last));
        let (grew, grows) = (self.is_growth(all), self.is_growth(late));
        if grows && !self.flattens(late) {
            let third = self.place(start, 2.0 / 3.0);
            let sigma = self.sigma(late);
            let there = |from, to, z: f64| {
                let part = self.stretch(from, to);
                part.growth > z * (sigma * part.seconds).sqrt()
            };
            if there(start, third, LIKELY) && there(third, last, STILL) {
                return Shape::Grows;
            }
        }
        if self.teeth() >= 2 {
            Shape::Sawtooth
        } else if (grew && self.flattens(all)) || (grows && self.flattens(late)) {
            Shape::Flattens
        } else if self.is_stable(last) {
            Shape::Stable
        } else if grew || grows {
            Shape::GrewOnce
        } else {
            Shape::Unsure
        }
    }

    /// How fast it grows after its warm-up: the median of the slopes between all moments (Theil, 1950; Sen, JASA 63, 1968), which
    /// neither a jump nor the last tooth moves far.
    pub fn rate(&self) -> Rate {
        let last = self.points.len().saturating_sub(1);
        let start = self.place(0, WARM_UP);
        if last < start + 2 {
            return Rate::default();
        }
        let mut slopes = Vec::with_capacity((last - start) * (last - start + 1) / 2);
        for to in start + 1..=last {
            for from in start..to {
                let part = self.stretch(from, to);
                slopes.push(part.growth / part.seconds);
            }
        }
        let middle = slopes.len() / 2;
        let (_, value, _) = slopes.select_nth_unstable_by(middle, f64::total_cmp);
        self.around(*value, self.stretch(start, last), OF_A_SLOPE)
    }

    /// The same at once, by what it grew by in all.
    pub fn mean_rate(&self) -> Rate {
        let last = self.points.len().saturating_sub(1);
        let all = self.stretch(0, last);
        if last < 2 { Rate::default() } else { self.around(all.growth / all.seconds, all, 1.0) }
    }

    fn around(&self, value: f64, part: Stretch, factor: f64) -> Rate {
        let half = student(Z, part.to - part.from) * (factor * self.sigma(part) / part.seconds).sqrt();
        Rate { value, low: value - half, high: value + half }
    }

    /// Bytes that it grew by, from beginning to end, and the error of that at 95 %.
    pub fn growth(&self) -> (f64, f64) {
        let all = self.stretch(0, self.points.len().saturating_sub(1));
        (all.growth, Z * self.sampling_variance(all).sqrt())
    }

    fn stretch(&self, from: usize, to: usize) -> Stretch {
        let live = |at: usize| f64::from(self.points.get(at).map_or(0.0, |point| point.live));
        let time = |at: usize| self.times.get(at).copied().unwrap_or(0.0);
        // Moments are in order; two at one time would divide by zero.
        let seconds = (time(to) - time(from)).max(1e-9);
        Stretch { from, to, growth: live(to) - live(from), seconds }
    }

    /// The moment nearest to so much of the time from `start` to the end.
    fn place(&self, start: usize, part: f64) -> usize {
        let (Some(first), Some(last)) = (self.times.get(start), self.times.last()) else { return 0 };
        let time = first + part * (last - first);
        let after = self.times.partition_point(|at| *at < time);
        let nearer = after > start
            && after < self.times.len()
            && time - self.times[after - 1] < self.times[after] - time;
        if nearer { after - 1 } else { after.min(self.times.len() - 1) }
    }

    /// What sampling makes the growth uncertain by: no more than the stocks at both ends, nor than what flowed in between.
    fn sampling_variance(&self, part: Stretch) -> f64 {
        if self.largest_variance == 0.0 {
            return 0.0;
        }
        let stock = |at: usize| f64::from(self.points[at].stock_variance);
        let flows = &self.points[part.from + 1..=part.to];
        let flows: f64 = flows.iter().map(|point| f64::from(point.flow_variance)).sum();
        flows.min(stock(part.from) + stock(part.to)) + MORE_SAMPLES * self.largest_variance
    }

    /// Variance per second.
    fn sigma(&self, part: Stretch) -> f64 {
        let rate = part.growth / part.seconds;
        let scatter = |at: usize| {
            let step = self.stretch(at, at + 1);
            (step.growth - rate * step.seconds).powi(2) / step.seconds
        };
        let steps = part.to - part.from;
        let shown = (part.from..part.to).map(scatter).sum::<f64>() / steps.saturating_sub(1).max(1) as f64;
        shown.max(self.sampling_variance(part) / part.seconds)
    }

    fn is_growth(&self, part: Stretch) -> bool {
        let sure = student(SURE, part.to - part.from) * (self.sigma(part) * part.seconds).sqrt();
        part.growth > 0.0 && part.growth > sure
    }

    fn flattens(&self, whole: Stretch) -> bool {
        let sigma = self.sigma(whole);
        FINAL_WINDOWS.iter().any(|window| {
            let border = self.place(whole.from, 1.0 - window);
            if border <= whole.from || border + 2 > whole.to {
                return false;
            }
            let (before, after) = (self.stretch(whole.from, border), self.stretch(border, whole.to));
            let (was, is) = (before.growth / before.seconds, after.growth / after.seconds);
            let variance = sigma / after.seconds + FLAT * FLAT * sigma / before.seconds;
            is - FLAT * was < -LIKELY * variance.sqrt()
        })
    }

    /// Falls by a good part of the largest size, each after a rise by as much, that sampling does not explain.
    fn teeth(&self) -> usize {
        let largest = self.points.iter().fold(0.0_f64, |most, point| most.max(f64::from(point.live)));
        let (mut teeth, mut high, mut low, mut rising) = (0, 0.0_f64, 0.0_f64, true);
        for point in self.points {
            let (live, variance) = (f64::from(point.live), f64::from(point.stock_variance));
            let chance = SURE * (2.0 * variance + MORE_SAMPLES * self.largest_variance).sqrt();
            let tooth = (TOOTH * largest).max(chance);
            if rising {
                high = high.max(live);
                if high > 0.0 && high - live >= tooth {
                    (teeth, rising, low) = (teeth + 1, false, live);
                }
            } else {
                low = low.min(live);
                if live - low >= tooth {
                    (rising, high) = (true, live);
                }
            }
        }
        teeth
    }

    /// The size is known, and the second half of the time has hardly changed it.
    fn is_stable(&self, last: usize) -> bool {
        let point = self.points[last];
        let (live, half) = (f64::from(point.live), self.stretch(self.place(0, 0.5), last));
        let known = live > 0.0 && live >= Z * f64::from(point.stock_variance).sqrt();
        let change = half.growth.abs() + LIKELY * self.sampling_variance_of_change(half).sqrt();
        known && change <= STEADY * live
    }

    /// As [`sampling_variance`](Self::sampling_variance), but none where nothing flowed: what stays is certain to stay.
    fn sampling_variance_of_change(&self, part: Stretch) -> f64 {
        let flowed = self.points[part.from + 1..=part.to].iter().any(|point| point.flow_variance > 0.0);
        if flowed { self.sampling_variance(part) } else { 0.0 }
    }
}

/// The quantile of Student's distribution that belongs to a normal one, to first order.
fn student(z: f64, steps: usize) -> f64 {
    z * (1.0 + (z * z + 1.0) / (4.0 * steps.saturating_sub(1).max(1) as f64))
}

#[cfg(test)]
#[path = "trend_tests.rs"]
mod tests;

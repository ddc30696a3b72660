//! A verdict per allocation site: which ones leak, which only look like it. `docs/leaks.md` tells users what is below.
//!
//! A site is a line of a function, the innermost frame. Its series of live bytes over the snapshots goes to [`Trend`], whose module
//! docs have the statistics; here is what a shape means, and what is said about it. Event logs are replayed at
//! [`MOMENTS`] evenly spaced moments; of more snapshots than [`MOST_MOMENTS`] evenly spaced ones are kept.
//!
//! Only bytes that were allocated while recording are seen. So what replaces blocks from before the attach looks like growth until
//! all of them are replaced: it flattens then, as a cache does.

use super::grouping::{Filter, GroupId, GroupName, Grouping, Groups, Remembered};
use super::moments::Outline;
use super::states::{each_snapshot, replay_at};
use super::trend::{Point, Rate, Shape, Trend};
use crate::capture::{AGE_LIMITS, AGES, Age, CaptureError, Gauges, SnapshotPart, StackTable, Totals, Wanted};
use std::cmp::Ordering;

/// Moments at which events are replayed, after the start.
const MOMENTS: u64 = 64;
/// The most snapshots that a series has.
const MOST_MOMENTS: usize = 128;
/// Growth below this part of all that is live is too little to matter.
const MATTERS: f64 = 0.005;
/// And growth below so many bytes.
const MATTERS_BYTES: f64 = 4096.0;
/// What malloc holds without use makes fragmentation from this part of its heap, and from so many bytes.
const FRAGMENTED: f64 = 0.5;
const FRAGMENTED_BYTES: u64 = 16 << 20;

/// What a site is judged to be; the worst first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Verdict {
    /// Steady growth to the end.
    Leak,
    /// Growth that flattens: a cache, or a warm-up.
    Warming,
    /// Rises and falls: batches.
    Sawtooth,
    /// Stable.
    Footprint,
    /// Of the process: the allocator holds what the program has freed.
    Fragmentation,
    /// It can't be told yet.
    NotEnoughData,
}

impl Verdict {
    /// `leak`, `warming`, …
    pub fn name(self) -> &'static str {
        match self {
            Self::Leak => "leak",
            Self::Warming => "warming",
            Self::Sawtooth => "sawtooth",
            Self::Footprint => "footprint",
            Self::Fragmentation => "fragmentation",
            Self::NotEnoughData => "not_enough_data",
        }
    }
}

/// Why it can't be told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TooLittle {
    /// Too few moments since the site was first seen.
    Moments,
    /// The growth is no more than chance explains.
    Growth,
    /// The growth is sure, but not that it goes on.
    Lately,
    /// The growth is sure and too small to matter.
    Bytes,
}

/// A site and what is said about it.
#[derive(Clone, Debug)]
pub struct SiteVerdict {
    /// Function, file and line.
    pub name: GroupName,
    /// What it is.
    pub verdict: Verdict,
    /// Why it can't be told, if it can't.
    pub too_little: Option<TooLittle>,
    /// Live at the last moment.
    pub live: Totals,
    /// The most bytes at any of the moments.
    pub most_bytes: u64,
    /// What it grew by since the first moment, in bytes, and the error of that at 95 % by sampling.
    pub growth: (f64, f64),
    /// How fast it grows; of leaks alone it is more than a description.
    pub rate: Rate,
    /// The part of its bytes that is older than [`Leaks::old_s`].
    pub old_share: Option<f64>,
    /// The first moment at which it had anything, in nanoseconds since the start.
    pub first_seen_ns: u64,
}

/// What the gauges say of the whole process between the first and the last moment; `None` for what they don't tell.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct ProcessGrowth {
    /// Growth of what is resident: anonymous memory where that is known, else all.
    pub resident_growth: Option<i64>,
    /// What the leaks grew by in that time.
    pub leaks_growth: f64,
    /// What the C library's heap holds without use at the end.
    pub heap_free: Option<u64>,
    /// And what of it is in use.
    pub heap_in_use: Option<u64>,
    /// Whether that is fragmentation; `None` if it is not known.
    pub fragmented: Option<bool>,
}

/// The verdicts.
pub struct Leaks {
    /// All sites that had anything at any of the moments; the most condemned first.
    pub sites: Vec<SiteVerdict>,
    /// The process.
    pub process: ProcessGrowth,
    /// How many moments each series has.
    pub moments: usize,
    /// The age that [`SiteVerdict::old_share`] is about, in seconds.
    pub old_s: u64,
}

/// Judges every site.
pub fn leaks(outline: &Outline, filter: Filter) -> Result<Leaks, CaptureError> {
    let mut series = Series::new(filter);
    let mut seen = Remembered::default();
    if outline.snapshots.is_empty() {
        let mut times: Vec<u64> = (1..=MOMENTS).map(|n| at_part(outline.end_ns, n, MOMENTS)).collect();
        times.dedup();
        let last = times.len() - 1;
        replay_at((&outline.path, &outline.options), &times, |place, part, stacks| {
            series.add(part, stacks, &mut seen, true, place == last);
            series.end_moment(times[place]);
        })?;
    } else {
        let last = outline.snapshots.len() - 1;
        let kept = kept(outline.snapshots.len());
        let wanted =
            |place| Wanted { live: kept(place), flows: true, ages: place == last, counts: place == last };
        each_snapshot(
            (&outline.path, &outline.options),
            &outline.snapshots,
            wanted,
            |place, part, stacks| {
                series.add(part, stacks, &mut seen, kept(place), place == last);
                if part.is_last && kept(place) {
                    series.end_moment(part.head.time_ns);
                }
            },
        )?;
    }
    Ok(series.judge(&outline.gauges))
}

/// `whole * part / parts`, without overflow.
fn at_part(whole: u64, part: u64, parts: u64) -> u64 {
    (u128::from(whole) * u128::from(part) / u128::from(parts)) as u64
}

/// Which of so many snapshots are kept: evenly spaced ones, the last among them.
fn kept(count: usize) -> impl Fn(usize) -> bool {
    let most = count.min(MOST_MOMENTS);
    move |place| (place + 1) * most / count != place * most / count
}

/// Sums of a site while a snapshot is read.
#[derive(Clone, Copy, Default)]
struct Sum {
    live: Totals,
    /// Of what came and went: the variance, and the cubes of the variances.
    flow_variance: f64,
    flow_cubes: f64,
    /// The largest sum of cubes at any of the moments.
    most_cubes: f64,
}

/// A site at the last moment.
#[derive(Clone, Copy, Default)]
struct AtLast {
    live: Totals,
    ages: [Age; AGES],
}

/// Every site's series. A moment of a site takes 12 bytes.
struct Series {
    groups: Groups,
    /// In seconds since the start; at the first nothing is live.
    times: Vec<f64>,
    /// By moment, for that is how they come, those sites that were known then.
    points: Vec<Vec<Point>>,
    sums: Vec<Sum>,
    /// Empty before the last moment.
    at_last: Vec<AtLast>,
}

impl Series {
    fn new(filter: Filter) -> Self {
        let groups = Groups::new(Grouping::Site, false, filter);
        Self { groups, times: vec![0.0], points: vec![Vec::new()], sums: Vec::new(), at_last: Vec::new() }
    }

    /// Adds a snapshot, or a part of one.
    fn add(
        &mut self,
        part: &SnapshotPart,
        stacks: &StackTable,
        seen: &mut Remembered,
        is_moment: bool,
        is_last: bool,
    ) {
        for (row, site) in part.sites().iter().enumerate() {
            for group in self.groups.of(site, stacks, seen) {
                let at = *group as usize;
                if at >= self.sums.len() {
                    self.sums.resize(at + 1, Sum::default());
                }
                let sum = &mut self.sums[at];
                for flow in part.allocated(row).into_iter().chain(part.freed(row)) {
                    sum.flow_variance += flow.bytes_variance();
                    sum.flow_cubes += flow.cubed_bytes_variance();
                }
                if is_moment && let Some(live) = part.live(row) {
                    sum.live.add(*live);
                }
                if is_last {
                    self.at_last.resize(self.sums.len(), AtLast::default());
                    self.at_last[at].add(part.live(row), part.ages(row));
                }
            }
        }
    }

    /// All of a moment was added.
    fn end_moment(&mut self, time_ns: u64) {
        let time = time_ns as f64 / 1e9;
        // Snapshots come in order; a clock that did not move would make a rate of nothing.
        let last = self.times.last().copied().unwrap_or(0.0);
        self.times.push(if time > last { time } else { last + 1e-6 });
        let points = self.sums.iter_mut().map(|sum| {
            let Sum { live, flow_variance, flow_cubes, most_cubes } = *sum;
            let most_cubes = most_cubes.max(live.cubed_bytes_variance()).max(flow_cubes);
            *sum = Sum { most_cubes, ..Sum::default() };
            Point {
                live: live.bytes() as f32,
                stock_variance: live.bytes_variance() as f32,
                flow_variance: flow_variance as f32,
            }
        });
        self.points.push(points.collect());
    }

    fn judge(self, gauges: &[Gauges]) -> Leaks {
        let seconds = self.times.last().copied().unwrap_or(0.0);
        // The oldest class of age that the first half of the time could fill.
        let class = AGE_LIMITS.partition_point(|limit| *limit as f64 <= seconds / 2.0);
        let old_s = class.checked_sub(1).map_or(0, |at| AGE_LIMITS[at]);
        let whole: f64 = self.at_last.iter().map(|site| site.live.bytes() as f64).sum();
        let matters = (MATTERS * whole).max(MATTERS_BYTES);
        let mut points = Vec::new();
        let judged = self.sums.iter().enumerate().filter_map(|(at, sum)| {
            points.clear();
            points.extend(self.points.iter().map(|moment| moment.get(at).copied().unwrap_or_default()));
            let seen = points.iter().position(|point| point.live > 0.0)?;
            let name = self.groups.name(at as GroupId);
            let trend = (&self.times[..], &points[..], sum.most_cubes.cbrt());
            let at_last = self.at_last.get(at).copied().unwrap_or_default();
            Some(at_last.judge(trend, seen, name, (matters, class)))
        });
        let mut sites: Vec<SiteVerdict> = judged.collect();
        sites.sort_by(most_condemned_first);
        let process = process(gauges, seconds, &sites);
        Leaks { sites, process, moments: self.times.len(), old_s }
    }
}

impl AtLast {
    fn add(&mut self, live: Option<&Totals>, ages: Option<&[Age; AGES]>) {
        live.into_iter().for_each(|live| self.live.add(*live));
        for (sum, age) in self.ages.iter_mut().zip(ages.into_iter().flatten()) {
            sum.bytes = sum.bytes.saturating_add(age.bytes);
            sum.blocks = sum.blocks.saturating_add(age.blocks);
        }
    }

    /// `seen`: the first moment at which it had anything.
    fn judge(
        &self,
        (times, points, largest_variance): (&[f64], &[Point], f64),
        seen: usize,
        name: GroupName,
        (matters, class): (f64, usize),
    ) -> SiteVerdict {
        // From the last moment at which it had nothing yet.
        let start = seen.saturating_sub(1);
        let trend = Trend::new(&times[start..], &points[start..], largest_variance);
        let growth = trend.growth();
        let (verdict, too_little) = match trend.shape() {
            Shape::Grows if growth.0 < matters => (Verdict::NotEnoughData, Some(TooLittle::Bytes)),
            Shape::Grows => (Verdict::Leak, None),
            Shape::Flattens => (Verdict::Warming, None),
            Shape::Sawtooth => (Verdict::Sawtooth, None),
            Shape::Stable => (Verdict::Footprint, None),
            Shape::TooShort => (Verdict::NotEnoughData, Some(TooLittle::Moments)),
            Shape::Unsure => (Verdict::NotEnoughData, Some(TooLittle::Growth)),
            Shape::GrewOnce => (Verdict::NotEnoughData, Some(TooLittle::Lately)),
        };
        let sum = |ages: &[Age]| ages.iter().map(|age| age.bytes as f64).sum::<f64>();
        let all = sum(&self.ages);
        SiteVerdict {
            name,
            verdict,
            too_little,
            live: self.live,
            most_bytes: points.iter().fold(0.0_f32, |most, point| most.max(point.live)) as u64,
            growth,
            rate: if verdict == Verdict::Leak { trend.rate() } else { trend.mean_rate() },
            old_share: (class > 0 && all > 0.0).then(|| sum(&self.ages[class..]) / all),
            first_seen_ns: (times[seen] * 1e9) as u64,
        }
    }
}

/// By verdict; leaks by what they grow by at least, the others by size, what can't be told by its growth.
fn most_condemned_first(a: &SiteVerdict, b: &SiteVerdict) -> Ordering {
    let weight = |site: &SiteVerdict| match site.verdict {
        Verdict::Leak => site.rate.low,
        Verdict::NotEnoughData => site.growth.0,
        _ => site.live.bytes() as f64,
    };
    let order = a.verdict.cmp(&b.verdict).then(weight(b).total_cmp(&weight(a)));
    order.then_with(|| a.name.cmp(&b.name))
}

fn process(gauges: &[Gauges], seconds: f64, sites: &[SiteVerdict]) -> ProcessGrowth {
    let leaks_growth =
        sites.iter().filter(|site| site.verdict == Verdict::Leak).map(|site| site.growth.0).sum();
    let within = || gauges.iter().filter(|gauge| gauge.time_ns as f64 / 1e9 <= seconds + 1.0);
    let grown = |of: fn(&Gauges) -> Option<u64>| {
        let (first, last) = (within().find_map(of)?, within().rev().find_map(of)?);
        i64::try_from(i128::from(last) - i128::from(first)).ok()
    };
    let last = |of: fn(&Gauges) -> Option<u64>| within().rev().find_map(of);
    let (heap_free, heap_in_use) = (last(|gauge| gauge.heap_free), last(|gauge| gauge.heap_in_use));
    let fragmented = heap_free.zip(heap_in_use).map(|(free, used)| {
        free >= FRAGMENTED_BYTES && free as f64 >= FRAGMENTED * (free as f64 + used as f64)
    });
    let resident_growth = grown(|gauge| gauge.anonymous).or_else(|| grown(|gauge| gauge.resident));
    ProcessGrowth { resident_growth, leaks_growth, heap_free, heap_in_use, fragmented }
}

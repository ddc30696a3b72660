//! Moments of a recording: which there are, and which one is meant by `10:00`, `+30m`, `last` or `17`.

use super::replay::{Findings, View, analyse_seeing};
use crate::capture::{CaptureError, CaptureReader, Gauges, ReadOptions, Record, SnapshotHead, Wanted};
use std::path::{Path, PathBuf};

const SECOND: u64 = 1_000_000_000;
const DAY: u64 = 86_400 * SECOND;
/// How far outside a recording a time of day may be: it is said to the minute, and recordings begin within one.
const NEAR: u64 = 60 * SECOND;

/// A moment as somebody names it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum When {
    /// The start of recording, when nothing was live by its account.
    Start,
    /// The first snapshot; the start where there are none.
    First,
    /// The last snapshot; the end where there are none.
    Last,
    /// The snapshot with this number.
    Index(u32),
    /// So many nanoseconds after the start.
    AfterStart(u64),
    /// So many before the end.
    BeforeEnd(u64),
    /// A time of day in UTC, in nanoseconds.
    OfDay(u64),
    /// Nanoseconds since 1970 UTC.
    Unix(u64),
}

/// A moment that is meant.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Moment {
    /// Since the start of recording, in nanoseconds.
    pub time_ns: u64,
    /// Its place among [`Outline::snapshots`], if it is the moment of one.
    pub place: Option<usize>,
}

impl Moment {
    /// The start of recording: nothing is live.
    pub const START: Self = Self { time_ns: 0, place: None };
}

/// A moment that a capture does not have.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NoSuchMoment {
    /// There are no snapshots to count.
    #[error("{} has no snapshots, so there is no snapshot {index}: give a time, such as +30m", capture.display())]
    NoSnapshots {
        /// The capture.
        capture: PathBuf,
        /// The number asked for.
        index: u32,
    },
    /// The numbers go on elsewhere.
    #[error("{} has no snapshot {index} (any more): it has {known} from {first} to {last}", capture.display())]
    NoSuchSnapshot {
        /// The capture.
        capture: PathBuf,
        /// The number asked for.
        index: u32,
        /// How many there are.
        known: usize,
        /// The first one's number.
        first: u32,
        /// The last one's.
        last: u32,
    },
    /// The time is not within the recording.
    #[error("{} was not being recorded then: its recording lasts from {} to {} (UTC)", capture.display(),
            clock(*start_unix_ns), clock(*end_unix_ns))]
    Outside {
        /// The capture.
        capture: PathBuf,
        /// Its start.
        start_unix_ns: u64,
        /// Its end.
        end_unix_ns: u64,
    },
}

fn clock(unix_ns: u64) -> String {
    let time = std::time::UNIX_EPOCH + std::time::Duration::from_nanos(unix_ns);
    humantime::format_rfc3339_seconds(time).to_string()
}

/// What a first pass over a capture tells: all facts of the run, its snapshots' heads, its gauges.
pub struct Outline {
    /// The file.
    pub path: PathBuf,
    /// How it is read.
    pub options: ReadOptions,
    /// The run. Its sites are what the records of events say was not freed by the end.
    pub findings: Findings,
    /// Heads of the snapshots, in the order of the file.
    pub snapshots: Vec<SnapshotHead>,
    /// All gauges, oldest first.
    pub gauges: Vec<Gauges>,
    /// When recording ended, in nanoseconds since its start.
    pub end_ns: u64,
}

impl Outline {
    /// Reads a capture once. It must be a file, for it is going to be read again.
    pub fn read(path: &Path, options: &ReadOptions) -> Result<Self, CaptureError> {
        let (mut snapshots, mut gauges) = (Vec::new(), Vec::new());
        let mut reader = CaptureReader::open_with(path, options)?;
        reader.want(Wanted::NOTHING);
        let mut findings = analyse_seeing(reader, View::Leaks, |record, reader| match record {
            Record::Snapshot => snapshots.extend(reader.snapshot_head()),
            Record::Gauges => gauges.extend_from_slice(reader.gauges()),
            _ => {}
        })?;
        // Rows were not read: how many samples there were is known from the end.
        let samples = findings.trailer.as_ref().map_or(0, |trailer| trailer.counters.samples);
        findings.samples.count = findings.samples.count.max(samples);
        let last = snapshots.last().map_or(0, |head: &SnapshotHead| head.time_ns);
        let last = last.max(findings.last_time_ns);
        let end_ns = findings.trailer.as_ref().map_or(last, |trailer| trailer.duration_ns.max(last));
        Ok(Self { path: path.to_owned(), options: options.clone(), findings, snapshots, gauges, end_ns })
    }

    /// When recording ended: nanoseconds since 1970 UTC.
    pub fn end_unix_ns(&self) -> u64 {
        self.findings.header.start_unix_ns.saturating_add(self.end_ns)
    }

    /// The moment that is meant: of a snapshot, the nearest, where there are any.
    pub fn find(&self, when: When) -> Result<Moment, NoSuchMoment> {
        let time_ns = match when {
            When::Start => return Ok(Moment::START),
            When::First => 0,
            When::Last => u64::MAX,
            When::Index(index) => return self.numbered(index),
            When::AfterStart(ns) => ns,
            When::BeforeEnd(ns) => self.end_ns.saturating_sub(ns),
            When::Unix(unix_ns) => return self.at_clock(unix_ns),
            When::OfDay(ns) => {
                let (first, last) = self.clock();
                let days = first / DAY..=last / DAY;
                let nearest =
                    days.map(|day| (day * DAY).saturating_add(ns)).min_by_key(|at| self.distance(*at));
                return self.at_clock(nearest.unwrap_or(first));
            }
        };
        let near = |(_, head): &(usize, &SnapshotHead)| head.time_ns.abs_diff(time_ns);
        Ok(match self.snapshots.iter().enumerate().min_by_key(near) {
            // Of several at one time, the last or the first.
            Some(_) if when == When::Last => self.at(self.snapshots.len() - 1),
            Some((place, _)) => self.at(place),
            None => Moment { time_ns: time_ns.min(self.end_ns), place: None },
        })
    }

    fn at(&self, place: usize) -> Moment {
        Moment { time_ns: self.snapshots[place].time_ns, place: Some(place) }
    }

    fn numbered(&self, index: u32) -> Result<Moment, NoSuchMoment> {
        let capture = self.path.clone();
        let (Some(first), Some(last)) = (self.snapshots.first(), self.snapshots.last()) else {
            return Err(NoSuchMoment::NoSnapshots { capture, index });
        };
        match self.snapshots.iter().position(|head| head.index == index) {
            Some(place) => Ok(self.at(place)),
            None => Err(NoSuchMoment::NoSuchSnapshot {
                capture,
                index,
                known: self.snapshots.len(),
                first: first.index,
                last: last.index,
            }),
        }
    }

    /// The moment at which the wall clock stood so: of a snapshot by what it read, for the clock may have been set meanwhile.
    fn at_clock(&self, unix_ns: u64) -> Result<Moment, NoSuchMoment> {
        if self.distance(unix_ns) > NEAR {
            let (capture, (start_unix_ns, end_unix_ns)) = (self.path.clone(), self.clock());
            return Err(NoSuchMoment::Outside { capture, start_unix_ns, end_unix_ns });
        }
        let near = |place: &usize| self.clock_of(&self.snapshots[*place]).abs_diff(unix_ns);
        Ok(match (0..self.snapshots.len()).min_by_key(near) {
            Some(place) => self.at(place),
            None => {
                let since = unix_ns.saturating_sub(self.findings.header.start_unix_ns);
                Moment { time_ns: since.min(self.end_ns), place: None }
            }
        })
    }

    /// What the wall clock was at a snapshot: read then, else (an older heaptap's) reckoned from the start.
    pub fn clock_of(&self, head: &SnapshotHead) -> u64 {
        match head.unix_ns {
            0 => self.findings.header.start_unix_ns.saturating_add(head.time_ns),
            read => read,
        }
    }

    /// From when to when the wall clock went.
    fn clock(&self) -> (u64, u64) {
        let start = self.findings.header.start_unix_ns;
        let read = || self.snapshots.iter().map(|head| self.clock_of(head));
        (read().fold(start, u64::min), read().fold(self.end_unix_ns(), u64::max))
    }

    /// How far a time is outside the recording.
    fn distance(&self, unix_ns: u64) -> u64 {
        let (first, last) = self.clock();
        first.saturating_sub(unix_ns).max(unix_ns.saturating_sub(last))
    }
}

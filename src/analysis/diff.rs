//! [`Diff`]: what grew between two moments, of one recording or of two.
//!
//! # How sure a growth is
//!
//! Of samples, every figure is an estimate with a variance. The growth between moments A and B
//!
//! - of two recordings is a difference of independent estimates: its variance is var(A) + var(B);
//! - of one recording is better known, for a block that is live at both moments is in both estimates and cancels out. Only what
//!   came or went in between is uncertain: its variance is at most that of the flows, var(given out) + var(given back), summed over
//!   the snapshots in between. A block that came and went between A and B counts twice in it though it changed nothing, so
//!   that busy places have large flows; but the blocks live at A only and at B only are among those live at A or B, so
//!   var(A) + var(B) is a bound too. The smaller of the two is taken.

use super::grouping::{Filter, GroupId, GroupName, Grouping, Groups, Remembered};
use super::moments::{Moment, Outline};
use super::moved::Moved;
use super::states::{each_snapshot, replay_at};
use crate::capture::{CaptureError, SnapshotPart, StackTable, Totals, Wanted};
use std::cmp::Reverse;
use std::collections::BTreeSet;

/// What a diff is of.
#[derive(Clone, Debug, Default)]
pub struct DiffOptions {
    /// What the rows are.
    pub grouping: Grouping,
    /// Whether a stack counts for each of its frames.
    pub cumulative: bool,
    /// What is looked at.
    pub filter: Filter,
}

/// Something at two moments.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Change {
    /// Live at the first.
    pub old: Totals,
    /// Live at the second.
    pub new: Totals,
    /// What came and went in between, where both are of one recording.
    flows: Option<Totals>,
}

impl Change {
    /// What `old` grew by, in bytes.
    pub fn growth(&self) -> i64 {
        difference(self.old.bytes(), self.new.bytes())
    }

    /// What `old` grew by, in blocks.
    pub fn count_growth(&self) -> i64 {
        difference(self.old.count(), self.new.count())
    }

    /// The growth in bytes is within so many of the truth at 95 %.
    pub fn growth_error(&self) -> f64 {
        self.error(Totals::bytes_error)
    }

    /// The growth in blocks is within so many of the truth at 95 %.
    pub fn count_growth_error(&self) -> f64 {
        self.error(Totals::count_error)
    }

    /// Samples behind the growth.
    pub fn samples(&self) -> u64 {
        let ends = self.old.samples().saturating_add(self.new.samples());
        self.flows.map_or(ends, |flows| ends.min(flows.samples()))
    }

    /// Bytes of a block at the second moment, on average.
    pub fn average(&self) -> Option<u64> {
        self.new.bytes().checked_div(self.new.count())
    }

    fn error(&self, of: fn(&Totals) -> f64) -> f64 {
        let mut ends = self.old;
        ends.add(self.new);
        self.flows.map_or(of(&ends), |flows| of(&ends).min(of(&flows)))
    }

    fn flow(&mut self, part: Totals) {
        self.flows.get_or_insert_default().add(part);
    }
}

fn difference(old: u64, new: u64) -> i64 {
    let difference = i128::from(new) - i128::from(old);
    difference.clamp(i64::MIN.into(), i64::MAX.into()) as i64
}

/// A group at two moments.
#[derive(Clone, Debug)]
pub struct DiffRow {
    /// What it is.
    pub name: GroupName,
    /// Its figures.
    pub change: Change,
}

/// What grew.
pub struct Diff {
    /// Every group that had anything at either moment; the largest change first, as `tracemalloc` orders them: by how much the size
    /// changed either way, the size, how much the number of blocks changed, that number, the name.
    pub rows: Vec<DiffRow>,
    /// All that was looked at; each block once, whatever it is grouped by.
    pub total: Change,
    /// Folders of the old recording and those of the new one that are taken for the same.
    pub moved: BTreeSet<(String, String)>,
}

/// What grew from a moment of `old` to a moment of `new`. `old` is `None` where both are of one recording.
pub fn diff(
    old: Option<(&Outline, Moment)>,
    from: Moment,
    new: (&Outline, Moment),
    options: &DiffOptions,
) -> Result<Diff, CaptureError> {
    let mut sums = Sums::new(options, old.is_none());
    match old {
        Some((old, from)) => {
            sums.compare(&old.findings.stacks, &new.0.findings.stacks);
            sums.add_old(old, Some(from))?;
            sums.add(new.0, None, Some(new.1))?;
        }
        None => sums.add(new.0, Some(from), Some(new.1))?,
    }
    Ok(sums.finish())
}

/// Whether what is live at this time is what is live at the moment: at the start nothing is.
fn is_at(moment: Option<Moment>, time_ns: u64) -> bool {
    moment.is_some_and(|moment| moment != Moment::START && moment.time_ns == time_ns)
}

/// What a snapshot is for the growth.
#[derive(Clone, Copy)]
struct Role {
    /// It is the first moment.
    is_old: bool,
    /// It is the second.
    is_new: bool,
    /// It is in between, or the second.
    is_flow: bool,
    /// What it has is gone at the second moment.
    went: bool,
}

/// Changes of groups while recordings are read.
pub(super) struct Sums {
    groups: Groups,
    /// Both moments are of the same.
    one_recording: bool,
    changes: Vec<Change>,
    total: Change,
    moved: Moved,
}

impl Sums {
    pub(super) fn new(options: &DiffOptions, one_recording: bool) -> Self {
        let groups = Groups::new(options.grouping, options.cumulative, options.filter.clone());
        Self { groups, one_recording, changes: Vec::new(), total: Change::default(), moved: Moved::default() }
    }

    /// The files of the old recording are to be called as the new one calls them.
    pub(super) fn compare(&mut self, old: &StackTable, new: &StackTable) {
        self.moved = Moved::between(old, new);
    }

    /// Adds the state at the first moment, of another recording than the second.
    pub(super) fn add_old(&mut self, outline: &Outline, from: Option<Moment>) -> Result<(), CaptureError> {
        let seen = Remembered::renaming(&self.moved);
        self.add_seen(outline, from, None, seen)
    }

    /// Adds the state at either moment, and if there are both, the flows in between. Where there is no second moment of the same
    /// recording, everything went.
    pub(super) fn add(
        &mut self,
        outline: &Outline,
        from: Option<Moment>,
        to: Option<Moment>,
    ) -> Result<(), CaptureError> {
        self.add_seen(outline, from, to, Remembered::default())
    }

    fn add_seen(
        &mut self,
        outline: &Outline,
        from: Option<Moment>,
        to: Option<Moment>,
        mut seen: Remembered,
    ) -> Result<(), CaptureError> {
        let both = from.is_some() && to.is_some();
        let went = self.one_recording && to.is_none();
        if outline.snapshots.is_empty() {
            let mut times: Vec<u64> = [from, to].iter().flatten().map(|moment| moment.time_ns).collect();
            times.sort_unstable();
            times.dedup();
            return replay_at((&outline.path, &outline.options), &times, |place, part, stacks| {
                let time = times[place];
                let (is_old, is_new) = (is_at(from, time), is_at(to, time));
                let flow = both && from.is_some_and(|from| time > from.time_ns || from == Moment::START);
                self.see(part, stacks, &mut seen, Role { is_old, is_new, is_flow: flow && is_new, went });
            });
        }
        let place_of = |moment: Option<Moment>| moment.and_then(|moment| moment.place);
        let (a, b) = (place_of(from), place_of(to));
        let roles = |place: usize| {
            let flow = both && a.is_none_or(|a| place > a) && b.is_some_and(|b| place <= b);
            Role { is_old: a == Some(place), is_new: b == Some(place), is_flow: flow, went }
        };
        let wanted = |place: usize| {
            let Role { is_old, is_new, is_flow: flows, .. } = roles(place);
            Wanted { live: is_old || is_new, flows, ages: false, counts: true }
        };
        each_snapshot((&outline.path, &outline.options), &outline.snapshots, wanted, |place, part, stacks| {
            self.see(part, stacks, &mut seen, roles(place));
        })
    }

    fn see(
        &mut self,
        part: &SnapshotPart,
        stacks: &StackTable,
        seen: &mut Remembered,
        Role { is_old, is_new, is_flow, went }: Role,
    ) {
        if !(is_old || is_new || is_flow) {
            return;
        }
        let one_recording = self.one_recording;
        for (row, site) in part.sites().iter().enumerate() {
            let (live, allocated, freed) = (part.live(row), part.allocated(row), part.freed(row));
            if live.or(allocated).or(freed).is_none() {
                continue;
            }
            let groups = self.groups.of(site, stacks, seen);
            let add = |change: &mut Change| {
                if one_recording {
                    change.flows.get_or_insert_default();
                }
                if is_old && let Some(live) = live {
                    change.old.add(*live);
                    if went {
                        change.flow(*live);
                    }
                }
                if is_new && let Some(live) = live {
                    change.new.add(*live);
                }
                if is_flow {
                    allocated.into_iter().chain(freed).for_each(|flow| change.flow(*flow));
                }
            };
            if !groups.is_empty() {
                add(&mut self.total);
            }
            for group in groups {
                let at = *group as usize;
                if at >= self.changes.len() {
                    self.changes.resize(at + 1, Change::default());
                }
                add(&mut self.changes[at]);
            }
        }
    }

    pub(super) fn finish(self) -> Diff {
        let Self { groups, changes, total, moved, .. } = self;
        let had = |(_, change): &(usize, Change)| !(change.old.is_empty() && change.new.is_empty());
        let mut rows: Vec<DiffRow> = changes
            .into_iter()
            .enumerate()
            .filter(had)
            .map(|(at, change)| DiffRow { name: groups.name(at as GroupId), change })
            .collect();
        let key = |change: &Change| {
            let (growth, count_growth) =
                (change.growth().unsigned_abs(), change.count_growth().unsigned_abs());
            Reverse((growth, change.new.bytes(), count_growth, change.new.count()))
        };
        rows.sort_by(|a, b| key(&a.change).cmp(&key(&b.change)).then_with(|| a.name.cmp(&b.name)));
        Diff { rows, total, moved: moved.folders }
    }
}

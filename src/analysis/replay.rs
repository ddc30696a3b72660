//! [`Replay`]: the records of a capture once through the live set and everything that counts.

use super::high_water_mark::HighWaterMark;
use super::merge::Merged;
use super::site::{SiteTotals, sum};
use super::snapshots::{FromSnapshots, OfSnapshot};
use super::statistics::Statistics;
use super::temporary::Temporary;
use crate::capture::{
    Allocation, Block, CaptureError, CaptureReader, CutShort, Damage, Displaced, DropReason, Free, GapReason,
    Header, LiveSet, Part, Record, Site, StackTable, Totals, Trailer, Unmap,
};

/// Which allocations a report is about.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum View {
    /// Those live when the most was live.
    #[default]
    HighWaterMark,
    /// Those not freed by the end.
    Leaks,
    /// Those freed before more than so many others were made on their thread.
    Temporary(u32),
}

/// What is known not to be in the records.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Missing {
    /// Events dropped while recording.
    pub dropped: u64,
    /// Events that the log had no room for any more; snapshots have them.
    pub unlogged: u64,
    /// Spans without records, and how long they are together in nanoseconds.
    pub gaps: u64,
    /// Nanoseconds in gaps.
    pub gap_ns: u64,
    /// Nanoseconds at the end in which CPython's own allocators were not recorded, for their tables had been replaced.
    pub tables_replaced_ns: u64,
    /// Allocations at an address that was live: the free between them is missing.
    pub missed_frees: u64,
    /// Frees of blocks that the records don't have, though they should.
    pub missed_allocations: u64,
}

/// What is known of how a capture was sampled.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Samples {
    /// Allocations that stand for others.
    pub count: u64,
    /// The smallest interval that one was drawn with, in bytes; 0 without samples.
    pub least_interval: u64,
    /// The largest.
    pub largest_interval: u64,
}

/// The sums, while records pass.
pub struct Replay {
    live: LiveSet,
    peak: HighWaterMark,
    temporary: Option<Temporary>,
    view: View,
    statistics: Statistics,
    missing: Missing,
    samples: Samples,
    frees: u64,
    freed: Totals,
    frees_from_before: u64,
    unmaps: u64,
    events: u64,
    time_ns: u64,
    /// The file was full before the recording ended.
    log_ended: bool,
}

/// Everything that a report is made from.
pub struct Findings {
    /// The facts of the run.
    pub header: Header,
    /// How it ended, unless the file was cut.
    pub trailer: Option<Trailer>,
    /// Where the file was cut.
    pub cut: Option<CutShort>,
    /// What was lost in the file's middle.
    pub damage: Damage,
    /// Stacks and names.
    pub stacks: StackTable,
    /// What `sites` are.
    pub view: View,
    /// Sites of the view, biggest first.
    pub sites: Vec<SiteTotals>,
    /// Sums over all allocations.
    pub statistics: Statistics,
    /// What is not in the records.
    pub missing: Missing,
    /// How the records were drawn.
    pub samples: Samples,
    /// Allocations, frees and unmaps read.
    pub events: u64,
    /// Frees of recorded blocks.
    pub frees: u64,
    /// The blocks that were freed, for what they stand for; those that the records don't have without their bytes.
    pub freed: Totals,
    /// Frees of blocks from before the attach.
    pub frees_from_before: u64,
    /// Unmaps.
    pub unmaps: u64,
    /// What was live when the most bytes were.
    pub peak: Totals,
    /// When, in nanoseconds since the start.
    pub peak_time_ns: u64,
    /// What was live at the end.
    pub live: Totals,
    /// The last time in the records, in nanoseconds since the start.
    pub last_time_ns: u64,
    /// The snapshot that all of this is from, where there is no event log, or one that ended early.
    pub of_snapshot: Option<OfSnapshot>,
    /// Of which captures this is the sum, if it is one.
    pub merged: Option<Merged>,
}

impl Replay {
    /// Begins with nothing live. `page_size` is the target's.
    pub fn new(view: View, page_size: u64) -> Self {
        let temporary = match view {
            View::Temporary(threshold) => Some(Temporary::new(threshold)),
            View::HighWaterMark | View::Leaks => None,
        };
        Self {
            live: LiveSet::new(page_size),
            peak: HighWaterMark::default(),
            temporary,
            view,
            statistics: Statistics::default(),
            missing: Missing::default(),
            samples: Samples::default(),
            frees: 0,
            freed: Totals::default(),
            frees_from_before: 0,
            unmaps: 0,
            events: 0,
            time_ns: 0,
            log_ended: false,
        }
    }

    /// Takes the next record.
    pub fn observe(&mut self, record: &Record) {
        match record {
            Record::Allocation(event) => self.allocation(event),
            Record::Free(event) => self.free(event),
            Record::Unmap(event) => self.unmap(event),
            Record::FreeUnknown(_) => {
                self.events += 1;
                self.frees_from_before += 1;
            }
            Record::Time(ns) => self.time_ns = self.time_ns.max(*ns),
            Record::Drop { count, reason: DropReason::FileFull } => {
                self.log_ended = true;
                self.missing.unlogged = self.missing.unlogged.saturating_add(*count);
            }
            Record::Drop { count, .. } => {
                self.missing.dropped = self.missing.dropped.saturating_add(*count);
            }
            Record::Gap { duration_ns, reason: GapReason::TablesReplaced } => {
                self.missing.tables_replaced_ns =
                    self.missing.tables_replaced_ns.saturating_add(*duration_ns);
            }
            Record::Gap { duration_ns, .. } => {
                self.missing.gaps += 1;
                self.missing.gap_ns = self.missing.gap_ns.saturating_add(*duration_ns);
            }
            Record::String(_) | Record::Frame(_) | Record::Stack(_) | Record::Thread(_) => {}
            Record::Snapshot | Record::Gauges => {}
        }
    }

    /// The sites of the view, biggest first.
    pub fn sites(&self) -> Vec<SiteTotals> {
        match &self.temporary {
            Some(temporary) => temporary.sites(),
            None if self.view == View::Leaks => {
                sum(self.live.iter().map(|(block, bytes)| (block.site(), left(&block, bytes))))
            }
            None => self.peak.sites(),
        }
    }

    /// What is live now.
    fn live(&self) -> Totals {
        let mut live = Totals::default();
        self.live.iter().for_each(|(block, bytes)| live.add(left(&block, bytes)));
        live
    }

    fn allocation(&mut self, event: &Allocation) {
        self.events += 1;
        self.statistics.allocated(event);
        self.samples.take(event.interval);
        match self.live.allocate(event, self.time_ns) {
            Displaced::Nothing => {}
            Displaced::Block(old) => {
                self.missing.missed_frees += 1;
                self.peak.remove(old.site(), Totals::one(old.size, old.interval));
            }
            Displaced::Mappings(parts) => self.unmapped(&parts),
        }
        if !event.allocator.is_ranged() {
            self.peak.add(Site::of(event), Totals::one(event.size, event.interval), self.time_ns);
        } else if let bytes @ 1.. = event.size.min(u64::MAX - event.address.0) {
            self.peak.add(Site::of(event), Totals::certain(bytes, 1), self.time_ns);
        }
        if let Some(temporary) = &mut self.temporary {
            temporary.allocated(event);
        }
    }

    fn free(&mut self, event: &Free) {
        self.events += 1;
        self.frees += 1;
        match self.live.free(event.address) {
            Some(block) => {
                let went = Totals::one(block.size, block.interval);
                self.freed.add(went);
                self.peak.remove(block.site(), went);
            }
            None => {
                self.freed.add(Totals::certain(0, 1));
                self.missing.missed_allocations += 1;
            }
        }
        if let Some(temporary) = &mut self.temporary {
            temporary.freed(event.address);
        }
    }

    fn unmap(&mut self, event: &Unmap) {
        self.events += 1;
        self.unmaps += 1;
        let parts = self.live.unmap(event);
        self.unmapped(&parts);
        if let Some(temporary) = &mut self.temporary
            && parts.iter().any(|part| part.ended)
        {
            temporary.freed(event.address);
        }
    }

    fn unmapped(&mut self, parts: &[Part]) {
        for part in parts {
            self.peak.remove(part.mapping.site(), Totals::certain(part.bytes, u64::from(part.ended)));
        }
    }
}

/// Reads a capture to its end. Where there is no event log, or one that ended early, the view is of a snapshot: that with most live
/// for the high-water mark, the last one for leaks.
pub fn analyse(reader: CaptureReader, view: View) -> Result<Findings, CaptureError> {
    analyse_seeing(reader, view, |_, _| {})
}

/// The same; `see` is given every record, and the reader that has what it tells of.
pub fn analyse_seeing(
    mut reader: CaptureReader,
    view: View,
    mut see: impl FnMut(&Record, &mut CaptureReader),
) -> Result<Findings, CaptureError> {
    let header = reader.header().clone();
    if header.aggregated && matches!(view, View::Temporary(_)) {
        let what = "was freed at once";
        return Err(CaptureError::NoEventLog { path: reader.path().to_owned(), what });
    }
    let mut replay = Replay::new(view, header.page_size);
    let mut snapshots = FromSnapshots::default();
    let mut last_snapshot_ns = 0;
    while let Some(record) = reader.next() {
        let record = record?;
        see(&record, &mut reader);
        replay.observe(&record);
        if record == Record::Snapshot
            && let Some(snapshot) = reader.snapshot()
        {
            last_snapshot_ns = snapshot.head.time_ns;
            snapshots.take(&snapshot);
        }
    }
    let has_log = !(header.aggregated || replay.log_ended && replay.temporary.is_none());
    let findings = Findings {
        header,
        trailer: reader.trailer().cloned(),
        cut: reader.cut().cloned(),
        damage: reader.damage().clone(),
        stacks: reader.into_stacks(),
        view,
        sites: if has_log { replay.sites() } else { Vec::new() },
        missing: replay.missing,
        samples: replay.samples,
        events: replay.events,
        frees: replay.frees,
        freed: replay.freed,
        frees_from_before: replay.frees_from_before,
        unmaps: replay.unmaps,
        peak: replay.peak.peak(),
        peak_time_ns: replay.peak.peak_time_ns(),
        live: replay.live(),
        last_time_ns: replay.time_ns.max(last_snapshot_ns),
        statistics: replay.statistics,
        of_snapshot: None,
        merged: None,
    };
    Ok(if has_log { findings } else { by_snapshots(findings, snapshots) })
}

/// The findings with what snapshots say in place of what a replay would.
fn by_snapshots(findings: Findings, mut snapshots: FromSnapshots) -> Findings {
    let (peak, last) = snapshots.peak_and_last().unzip();
    let (sites, of_snapshot) = snapshots.shown(findings.view == View::Leaks);
    // What no snapshot has, the trailer may tell.
    let counters = findings.trailer.as_ref().map(|trailer| trailer.counters).unwrap_or_default();
    Findings {
        sites,
        of_snapshot,
        samples: snapshots.samples(),
        events: counters.events,
        frees: counters.frees,
        freed: snapshots.freed,
        frees_from_before: counters.frees_from_before,
        unmaps: counters.unmaps,
        peak: peak.map(|moment| moment.live).unwrap_or_default(),
        peak_time_ns: peak.map_or(0, |moment| moment.head.time_ns),
        live: last.map(|moment| moment.live).unwrap_or_default(),
        statistics: snapshots.statistics,
        // A replay of what there was of a log is not what is shown.
        missing: Missing { missed_frees: 0, missed_allocations: 0, ..findings.missing },
        ..findings
    }
}

impl Findings {
    /// Whether what is shown is of snapshots: single allocations are not known.
    pub fn is_of_snapshots(&self) -> bool {
        self.of_snapshot.is_some() || self.merged.as_ref().is_some_and(|merged| merged.of_snapshots)
    }
}

impl Missing {
    pub(super) fn add(&mut self, other: &Self) {
        self.dropped = self.dropped.saturating_add(other.dropped);
        self.gaps = self.gaps.saturating_add(other.gaps);
        self.gap_ns = self.gap_ns.saturating_add(other.gap_ns);
        self.tables_replaced_ns = self.tables_replaced_ns.saturating_add(other.tables_replaced_ns);
        self.missed_frees = self.missed_frees.saturating_add(other.missed_frees);
        self.missed_allocations = self.missed_allocations.saturating_add(other.missed_allocations);
    }
}

impl Samples {
    pub(super) fn add(&mut self, other: &Self) {
        if other.count == 0 {
            return;
        }
        self.least_interval = if self.count == 0 {
            other.least_interval
        } else {
            self.least_interval.min(other.least_interval)
        };
        self.largest_interval = self.largest_interval.max(other.largest_interval);
        self.count = self.count.saturating_add(other.count);
    }

    fn take(&mut self, interval: u64) {
        if interval == 0 {
            return;
        }
        self.least_interval = if self.count == 0 { interval } else { self.least_interval.min(interval) };
        self.largest_interval = self.largest_interval.max(interval);
        self.count += 1;
    }
}

/// What is left of a block: all, but of a mapping perhaps a part.
fn left(block: &Block, bytes: u64) -> Totals {
    if block.allocator.is_ranged() { Totals::certain(bytes, 1) } else { Totals::one(bytes, block.interval) }
}

#[cfg(test)]
#[path = "replay_tests.rs"]
mod tests;

//! Findings from snapshots, where there is no event log.
//!
//! Streams: of all snapshots nothing is held but sums, and of two (the highest and the last) their sites.

use super::replay::Samples;
use super::site::{SiteTotals, sorted};
use super::statistics::Statistics;
use crate::capture::{Snapshot, SnapshotHead, Totals};

/// A snapshot without its rows.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct LiveAt {
    /// When and why.
    pub head: SnapshotHead,
    /// What was live.
    pub live: Totals,
}

/// Which snapshot findings are of, and of how many.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct OfSnapshot {
    /// The one whose sites are shown.
    pub shown: LiveAt,
    /// Snapshots in the capture.
    pub count: usize,
}

/// The sums, while snapshots pass.
#[derive(Default)]
pub(super) struct FromSnapshots {
    count: usize,
    highest: Option<(LiveAt, Vec<SiteTotals>)>,
    last: Option<(LiveAt, Vec<SiteTotals>)>,
    pub(super) statistics: Statistics,
    pub(super) freed: Totals,
}

impl FromSnapshots {
    pub(super) fn take(&mut self, snapshot: &Snapshot) {
        for row in &snapshot.rows {
            self.statistics.came(row);
            self.freed.add(row.freed);
        }
        let moment = LiveAt { head: snapshot.head, live: snapshot.live() };
        let sites = sorted(snapshot.rows.iter().map(|row| (row.site(), row.live)));
        // Of equals the first.
        if self.highest.as_ref().is_none_or(|(highest, _)| moment.live.bytes() > highest.live.bytes()) {
            self.highest = Some((moment, sites.clone()));
        }
        self.last = Some((moment, sites));
        self.count += 1;
    }

    /// The highest snapshot and the last.
    pub(super) fn peak_and_last(&self) -> Option<(LiveAt, LiveAt)> {
        self.highest.as_ref().zip(self.last.as_ref()).map(|((highest, _), (last, _))| (*highest, *last))
    }

    /// The sites of the highest snapshot, or those of the last, and which that is.
    pub(super) fn shown(&mut self, last: bool) -> (Vec<SiteTotals>, Option<OfSnapshot>) {
        let kept = if last { self.last.take() } else { self.highest.take() };
        let count = self.count;
        kept.map_or((Vec::new(), None), |(shown, sites)| (sites, Some(OfSnapshot { shown, count })))
    }

    /// Samples that came; the intervals they were drawn with are not known each.
    pub(super) fn samples(&self) -> Samples {
        Samples { count: self.statistics.allocated.samples(), ..Samples::default() }
    }
}

//! [`HighWaterMark`]: what was live when the most was live, in one pass and O(1) per event.
//!
//! At a new peak nothing is copied. Each site remembers which peak its `at_peak` belongs to; before a
//! site changes, and only then, what it has is kept if a newer peak has come since. At the end a site
//! that has not changed since the last peak still has what it had then.
//!
//! Where records are samples it is the peak of the estimate of what is live. The largest of many estimates is too large
//! on average: docs/reports.md says by how much.

use super::site::{SiteTable, SiteTotals, sum};
use crate::capture::{Certain, Sampled, Site, Totals};

/// What a site has.
#[derive(Clone, Copy, Default)]
struct State<T> {
    now: T,
    at_peak: T,
    /// The peak that `at_peak` tells of.
    peak: u64,
}

/// All sites that have something of one kind. What is certain and what comes from samples are in books of their own: the
/// one is small and there may be much of it, the other is large and there are few.
#[derive(Default)]
struct Book<T> {
    sites: SiteTable,
    states: Vec<State<T>>,
}

/// Totals per site at the high-water mark. Of equal peaks the first counts.
#[derive(Default)]
pub struct HighWaterMark {
    certain: Book<Certain>,
    sampled: Book<Sampled>,
    live: Totals,
    peak: Totals,
    peak_time_ns: u64,
    /// How many peaks there were.
    peaks: u64,
}

impl HighWaterMark {
    /// A block came to live.
    pub fn add(&mut self, site: Site, block: Totals, time_ns: u64) {
        if block.samples() > 0 {
            self.sampled.touch(site, self.peaks).add(&block.sampled);
        } else {
            self.certain.touch(site, self.peaks).add(block.certain);
        }
        self.live.add(block);
        if self.live.bytes() > self.peak.bytes() {
            self.peak = self.live;
            self.peak_time_ns = time_ns;
            self.peaks += 1;
        }
    }

    /// A block went, or a part of a mapping (then without its count).
    pub fn remove(&mut self, site: Site, part: Totals) {
        if part.samples() > 0 {
            self.sampled.touch(site, self.peaks).remove(&part.sampled);
        } else {
            self.certain.touch(site, self.peaks).remove(part.certain);
        }
        self.live.remove(part);
    }

    /// What was live when the most bytes were.
    pub fn peak(&self) -> Totals {
        self.peak
    }

    /// When that was, in nanoseconds since the start.
    pub fn peak_time_ns(&self) -> u64 {
        self.peak_time_ns
    }

    /// What each site had then, biggest first.
    pub fn sites(&self) -> Vec<SiteTotals> {
        let certain = self.certain.at_peak(self.peaks);
        let sampled = self.sampled.at_peak(self.peaks);
        let certain = certain.map(|(site, certain)| (site, Totals { certain, ..Totals::default() }));
        sum(certain.chain(sampled.map(|(site, sampled)| (site, Totals { sampled, ..Totals::default() }))))
    }
}

impl<T: Copy + Default> Book<T> {
    /// What `site` has, to be changed: if it is what it had at the latest peak, that is kept.
    fn touch(&mut self, site: Site, peaks: u64) -> &mut T {
        let id = self.sites.id(site);
        if id == self.states.len() {
            // What is new now was not there at the last peak.
            self.states.push(State { peak: peaks, ..State::default() });
        }
        let state = &mut self.states[id];
        if state.peak != peaks {
            state.at_peak = state.now;
            state.peak = peaks;
        }
        &mut state.now
    }

    fn at_peak(&self, peaks: u64) -> impl Iterator<Item = (Site, T)> + '_ {
        let at_peak = move |state: &State<T>| match state.peak == peaks {
            _ if peaks == 0 => T::default(),
            true => state.at_peak,
            false => state.now,
        };
        self.sites.sites().iter().copied().zip(self.states.iter().map(at_peak))
    }
}

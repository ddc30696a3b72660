//! [`HighWaterMark`]: what was live when the most was live, in one pass and O(1) per event.
//!
//! At a new peak nothing is copied. Each site remembers which peak its `at_peak` belongs to; before a
//! site changes, and only then, what it has is kept if a newer peak has come since. At the end a site
//! that has not changed since the last peak still has what it had then.
//!
//! Where records are samples it is the peak of the estimate of what is live. The largest of many estimates is too large
//! on average: docs/reports.md says by how much.

use super::site::{Site, SiteTable, SiteTotals, sorted};
use super::totals::Totals;

#[derive(Clone, Copy, Default)]
struct SiteState {
    now: Totals,
    at_peak: Totals,
    /// The peak that `at_peak` tells of.
    peak: u64,
}

/// Totals per site at the high-water mark. Of equal peaks the first counts.
#[derive(Default)]
pub struct HighWaterMark {
    sites: SiteTable,
    states: Vec<SiteState>,
    live: Totals,
    peak: Totals,
    peak_time_ns: u64,
    /// How many peaks there were.
    peaks: u64,
}

impl HighWaterMark {
    /// A block came to live.
    pub fn add(&mut self, site: Site, block: Totals, time_ns: u64) {
        self.touch(site).now.add(block);
        self.live.add(block);
        if self.live.bytes() > self.peak.bytes() {
            self.peak = self.live;
            self.peak_time_ns = time_ns;
            self.peaks += 1;
        }
    }

    /// A block went, or a part of a mapping (then without its count).
    pub fn remove(&mut self, site: Site, part: Totals) {
        self.touch(site).now.remove(part);
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
        let at_peak =
            self.states.iter().map(|state| if state.peak == self.peaks { state.at_peak } else { state.now });
        let at_peak = at_peak.map(|totals| if self.peaks == 0 { Totals::default() } else { totals });
        sorted(self.sites.sites().iter().copied().zip(at_peak))
    }

    fn touch(&mut self, site: Site) -> &mut SiteState {
        let id = self.sites.id(site);
        if id == self.states.len() {
            // What is new now was not there at the last peak.
            self.states.push(SiteState { peak: self.peaks, ..SiteState::default() });
        }
        let state = &mut self.states[id];
        if state.peak != self.peaks {
            state.at_peak = state.now;
            state.peak = self.peaks;
        }
        state
    }
}

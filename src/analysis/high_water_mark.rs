//! [`HighWaterMark`]: what was live when the most was live, in one pass and O(1) per event.
//!
//! At a new peak nothing is copied. Each site remembers which peak its `at_peak` belongs to; before a
//! site changes, and only then, what it has is kept if a newer peak has come since. At the end a site
//! that has not changed since the last peak still has what it had then.

use super::site::{Site, SiteTable, SiteTotals, Totals, sorted};

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
    live_bytes: u64,
    peak_bytes: u64,
    peak_time_ns: u64,
    /// How many peaks there were.
    peaks: u64,
}

impl HighWaterMark {
    /// A block came to live.
    pub fn add(&mut self, site: Site, bytes: u64, time_ns: u64) {
        let state = self.touch(site);
        state.now.add(Totals { bytes, count: 1 });
        self.live_bytes = self.live_bytes.saturating_add(bytes);
        if self.live_bytes > self.peak_bytes {
            self.peak_bytes = self.live_bytes;
            self.peak_time_ns = time_ns;
            self.peaks += 1;
        }
    }

    /// `bytes` of a block went; `ended` if nothing is left of it.
    pub fn remove(&mut self, site: Site, bytes: u64, ended: bool) {
        let state = self.touch(site);
        state.now.bytes = state.now.bytes.saturating_sub(bytes);
        state.now.count = state.now.count.saturating_sub(u64::from(ended));
        self.live_bytes = self.live_bytes.saturating_sub(bytes);
    }

    /// The most bytes live at once.
    pub fn peak_bytes(&self) -> u64 {
        self.peak_bytes
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

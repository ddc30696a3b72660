//! [`Schedule`]: when a snapshot is due. Pure: it is told the time and what is to be watched.

use crate::capture::SnapshotReason;
use std::time::Duration;

/// How much more has to be live than at the last peak that was written: one in so many.
const PEAK_PART: u64 = 20;
/// How long after one peak the next is written at the earliest.
const PEAK_PAUSE: Duration = Duration::from_secs(10);
/// How far below its limit the resident set has to fall before it can pass it anew: one in so many.
const RESIDENT_PART: u64 = 20;

/// See the module.
#[derive(Debug)]
pub struct Schedule {
    every: Option<Duration>,
    next_tick: Duration,
    /// With `at_peak`: the most bytes live at any snapshot, and when a peak was written.
    peak: Option<(u64, Option<Duration>)>,
    /// With `at_rss`: the limit, and whether the resident set is above it.
    resident: Option<(u64, bool)>,
}

impl Schedule {
    /// A snapshot at each of these occasions.
    pub fn new(every: Option<Duration>, at_peak: bool, at_rss: Option<u64>) -> Self {
        Self {
            every,
            next_tick: every.unwrap_or_default(),
            peak: at_peak.then_some((0, None)),
            resident: at_rss.map(|limit| (limit, false)),
        }
    }

    /// Whether the resident set is of interest.
    pub fn watches_resident(&self) -> bool {
        self.resident.is_some()
    }

    /// Why a snapshot is due `now` (since the start), if one is. `resident` is given where it was looked at.
    pub fn due(&mut self, now: Duration, live_bytes: u64, resident: Option<u64>) -> Option<SnapshotReason> {
        if let (Some((limit, is_above)), Some(resident)) = (&mut self.resident, resident) {
            if !*is_above && resident > *limit {
                *is_above = true;
                return Some(SnapshotReason::Resident);
            }
            *is_above &= resident > *limit - *limit / RESIDENT_PART;
        }
        if let Some((highest, written)) = &mut self.peak
            && live_bytes > *highest + *highest / PEAK_PART
            && written.is_none_or(|written| now - written >= PEAK_PAUSE)
        {
            *written = Some(now);
            return Some(SnapshotReason::Peak);
        }
        let every = self.every?;
        if now < self.next_tick {
            return None;
        }
        // In step with the start, however late this one is.
        let step = every.as_nanos().max(1);
        let ticks = now.as_nanos() / step + 1;
        self.next_tick = Duration::from_nanos(u64::try_from(ticks * step).unwrap_or(u64::MAX));
        Some(SnapshotReason::Tick)
    }

    /// A snapshot was written, for whatever reason.
    pub fn written(&mut self, live_bytes: u64) {
        if let Some((highest, _)) = &mut self.peak {
            *highest = (*highest).max(live_bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn ticks_keep_in_step_however_late_one_is() {
        let mut schedule = Schedule::new(Some(s(10)), false, None);
        let due: Vec<u64> = [0, 9, 10, 11, 19, 25, 29, 30, 95, 99, 100]
            .into_iter()
            .filter(|at| schedule.due(s(*at), 0, None) == Some(SnapshotReason::Tick))
            .collect();
        assert_eq!(due, [10, 25, 30, 95, 100]);
        assert_eq!(Schedule::new(None, false, None).due(s(1_000_000), 1 << 40, Some(1 << 40)), None);
    }

    #[test]
    fn a_peak_is_a_twentieth_higher_and_some_time_later() {
        let mut schedule = Schedule::new(None, true, None);
        let mut peaks = Vec::new();
        for (at, live) in
            [(0, 0), (1, 100), (2, 1000), (12, 1000), (30, 1049), (31, 1051), (50, 900), (60, 1104)]
        {
            if schedule.due(s(at), live, None) == Some(SnapshotReason::Peak) {
                schedule.written(live);
                peaks.push(at);
            }
        }
        assert_eq!(peaks, [1, 12, 31, 60]);
        // What a tick has seen is no new peak.
        schedule.written(5000);
        assert_eq!(schedule.due(s(100), 5100, None), None);
    }

    #[test]
    fn the_resident_set_passes_its_limit_once_and_again_when_it_was_well_below() {
        let mut schedule = Schedule::new(None, false, Some(1000));
        let due: Vec<u64> =
            [(1, 900), (2, 1001), (3, 1200), (4, 990), (5, 1100), (6, 950), (7, 1000), (8, 1001)]
                .into_iter()
                .filter(|(at, resident)| {
                    schedule.due(s(*at), 0, Some(*resident)) == Some(SnapshotReason::Resident)
                })
                .map(|(at, _)| at)
                .collect();
        assert_eq!(due, [2, 8]);
        assert!(schedule.watches_resident());
    }
}

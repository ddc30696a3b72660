//! From the time stamp counter to nanoseconds since recording began.

use crate::probe::ring::ticks;
use std::time::Instant;

/// Both clocks at one moment, and their ratio.
#[derive(Debug)]
pub struct Clock {
    start: Instant,
    start_ticks: u64,
    /// Nanoseconds per tick in units of 2^-32.
    rate: u64,
    last: u64,
}

impl Clock {
    /// Starts now. `ticks_per_second` is a first estimate; [`Clock::refine`] betters it.
    pub fn start(ticks_per_second: u64) -> Self {
        let rate = (1_000_000_000_u128 << 32) / u128::from(ticks_per_second.max(1));
        Self { start: Instant::now(), start_ticks: ticks(), rate: rate as u64, last: 0 }
    }

    /// Compares the clocks again: the longer they ran, the better is the ratio known.
    pub fn refine(&mut self) {
        let (elapsed, ticked) = (self.start.elapsed().as_nanos(), ticks().wrapping_sub(self.start_ticks));
        if ticked > 0 {
            self.rate = u64::try_from((elapsed << 32) / u128::from(ticked)).unwrap_or(self.rate);
        }
    }

    /// Nanoseconds since the start of what the counter showed as `stamp`. Does not go back.
    pub fn ns(&mut self, stamp: u64) -> u64 {
        let ticked = stamp.saturating_sub(self.start_ticks);
        let ns = ((u128::from(ticked) * u128::from(self.rate)) >> 32) as u64;
        self.last = self.last.max(ns);
        self.last
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_of_now_is_about_now_and_time_does_not_go_back() {
        let mut clock = Clock::start(2_000_000_000);
        std::thread::sleep(std::time::Duration::from_millis(20));
        clock.refine();
        let (ns, real) = (clock.ns(ticks()), clock.start.elapsed().as_nanos() as u64);
        assert!(ns.abs_diff(real) < 2_000_000, "{ns} for {real}");
        assert_eq!(clock.ns(0), ns);
    }
}

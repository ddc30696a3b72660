//! From the time stamp counter to nanoseconds since recording began, on the monotonic clock: setting the wall clock changes
//! nothing here. Time in which the machine is suspended is not counted.

use crate::probe::ring::ticks;
use std::time::Instant;

/// What the two clocks may differ by before one of them is taken to have jumped: a suspended machine's counter runs on or begins
/// anew, a virtual machine's is another after it has moved.
const JUMP: u64 = 2_000_000_000;

/// Both clocks at one moment, and their ratio.
#[derive(Debug)]
pub struct Clock {
    start: Instant,
    /// A moment by both: nanoseconds since the start, and the counter.
    base_ns: u64,
    base_ticks: u64,
    /// Nanoseconds per tick in units of 2^-32.
    rate: u64,
    last: u64,
}

impl Clock {
    /// Starts now. `ticks_per_second` is a first estimate; [`Clock::refine`] betters it.
    pub fn start(ticks_per_second: u64) -> Self {
        let rate = (1_000_000_000_u128 << 32) / u128::from(ticks_per_second.max(1));
        Self { start: Instant::now(), base_ns: 0, base_ticks: ticks(), rate: rate as u64, last: 0 }
    }

    /// Compares the clocks again, about once a second: the longer they ran, the better is the ratio known.
    pub fn refine(&mut self) {
        self.compare(self.start.elapsed().as_nanos() as u64, ticks());
    }

    /// `elapsed` nanoseconds after the start the counter shows `now`.
    fn compare(&mut self, elapsed: u64, now: u64) {
        let ticked = now.checked_sub(self.base_ticks);
        let told = ticked.map(|ticked| self.base_ns.saturating_add(self.in_ns(ticked)));
        match ticked.zip(told) {
            Some((0, _)) => {}
            Some((ticked, told)) if told.abs_diff(elapsed) <= JUMP + (elapsed - self.base_ns) / 16 => {
                let rate = (u128::from(elapsed - self.base_ns) << 32) / u128::from(ticked);
                self.rate = u64::try_from(rate).unwrap_or(self.rate);
            }
            _ => (self.base_ns, self.base_ticks) = (elapsed, now),
        }
    }

    fn in_ns(&self, ticks: u64) -> u64 {
        u64::try_from((u128::from(ticks) * u128::from(self.rate)) >> 32).unwrap_or(u64::MAX)
    }

    /// Nanoseconds since the start of what the counter showed as `stamp`. Does not go back.
    pub fn ns(&mut self, stamp: u64) -> u64 {
        let ns = self.base_ns.saturating_add(self.in_ns(stamp.saturating_sub(self.base_ticks)));
        self.last = self.last.max(ns);
        self.last
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn a_stamp_of_now_is_about_now_and_time_does_not_go_back() {
        let mut clock = Clock::start(2_000_000_000);
        std::thread::sleep(std::time::Duration::from_millis(20));
        clock.refine();
        let (ns, real) = (clock.ns(ticks()), clock.start.elapsed().as_nanos() as u64);
        assert!(ns.abs_diff(real) < 2_000_000, "{ns} for {real}");
        assert_eq!(clock.ns(0), ns);
    }

    /// Two ticks a nanosecond from `from` on.
    fn clock(from: u64) -> Clock {
        Clock { start: Instant::now(), base_ns: 0, base_ticks: from, rate: 1 << 31, last: 0 }
    }

    #[test]
    fn a_counter_that_jumped_is_followed_from_where_it_is() {
        let from = 1_000_000_000_000;
        // Forth by an hour (it ran while the machine was suspended), back to nearly nothing (it began anew).
        for after in [from + 7200 * SECOND, 5_000] {
            let mut clock = clock(from);
            clock.compare(10 * SECOND, from + 20 * SECOND);
            assert_eq!(clock.ns(from + 20 * SECOND), 10 * SECOND);
            clock.compare(11 * SECOND, after);
            assert_eq!(clock.ns(after), 11 * SECOND);
            // And the ratio is what it was.
            clock.compare(12 * SECOND, after + 2 * SECOND);
            assert_eq!(clock.ns(after + 4 * SECOND), 13 * SECOND);
        }
    }

    #[test]
    fn a_first_estimate_that_was_far_off_is_no_jump() {
        let mut clock = Clock { rate: 1 << 32, ..clock(0) };
        clock.compare(SECOND, 2 * SECOND);
        assert_eq!(clock.ns(4 * SECOND), 2 * SECOND);
    }
}

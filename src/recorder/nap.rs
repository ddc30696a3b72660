//! [`Nap`]: when the recorder looks at the rings next. Pure.
//!
//! Too long, and a ring fills: the target waits, or events are dropped. Too short, and the recorder takes the processor's time
//! that the target could use. While events come, it sleeps so long that a ring fills to [`FILL`] at the rate seen last; a burst
//! may be sixteen times as fast before anybody has to wait. While none come, ever longer.

use crate::probe::ring::Found;
use std::time::Duration;

/// How full the fullest ring may be when it is looked at, as a divisor of its length.
const FILL: u64 = 16;
/// The sleep is no longer than this while events come: bounds how coarse the agent's clock is, too, which is our heartbeat.
const LONGEST_BUSY: Duration = Duration::from_millis(1);
/// The least that is worth a sleep: the kernel's own slack is as long.
const SHORTEST: Duration = Duration::from_micros(50);
/// The sleep when there is nothing for the first time, and how far it doubles.
const FIRST_IDLE: Duration = Duration::from_micros(200);
const LONGEST_IDLE: Duration = Duration::from_millis(5);
/// The same where the agent samples: nothing can wait for us, and a ring is full after thousands of samples.
const LONGEST_SAMPLED: Duration = Duration::from_millis(10);
/// From this interval on samples are so seldom (10 GB/s give 150,000 in a second, and a tenth of a ring in [`SELDOM`]) that every look
/// may be as late: each of them costs what a hundred samples do.
const SELDOM_FROM: u64 = 64 << 10;
const SELDOM: Duration = Duration::from_millis(40);
/// Looks in vain after which the sleep doubles.
const IDLE_LOOKS: u32 = 5;

/// See the module.
#[derive(Debug)]
pub struct Nap {
    ring_len: u64,
    /// The first sleep where there is nothing, and the longest.
    idle_sleeps: (Duration, Duration),
    longest_busy: Duration,
    idle: u32,
}

impl Nap {
    /// For rings of this many bytes; samples come once in `interval` bytes, where it is not `None`.
    pub fn new(ring_len: u64, interval: Option<u64>) -> Self {
        let (idle_sleeps, longest_busy) = match interval {
            None => ((FIRST_IDLE, LONGEST_IDLE), LONGEST_BUSY),
            Some(..SELDOM_FROM) => ((FIRST_IDLE, LONGEST_SAMPLED), LONGEST_BUSY),
            Some(_) => ((SELDOM, SELDOM), SELDOM),
        };
        Self { ring_len, idle_sleeps, longest_busy, idle: 0 }
    }

    /// How long after a look that found this, `since` the look before, the next one is due. Zero: at once.
    pub fn after(&mut self, found: Found, since: Duration) -> Duration {
        if found.fresh == 0 {
            let doublings = (self.idle / IDLE_LOOKS).min(16);
            self.idle = self.idle.saturating_add(1);
            let (first, longest) = self.idle_sleeps;
            return (first * (1 << doublings)).min(longest);
        }
        self.idle = 0;
        let (full, wanted) = (found.fullest.max(1), self.ring_len / FILL);
        let nap = since.saturating_mul(u32::try_from(wanted).unwrap_or(u32::MAX)) / clamp(full);
        if nap < SHORTEST { Duration::ZERO } else { nap.min(self.longest_busy) }
    }
}

fn clamp(bytes: u64) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const RING: u64 = 1 << 20;

    fn found(fresh: u64) -> Found {
        Found { fresh, fullest: fresh }
    }

    #[test]
    fn a_busy_target_finds_its_rings_looked_at_before_they_are_full() {
        let mut nap = Nap::new(RING, None);
        for bytes_per_ms in [100, 10_000, 100_000, 1_000_000, 10_000_000] {
            let mut since = Duration::from_micros(100);
            for _ in 0..50 {
                let fresh = (bytes_per_ms as f64 * since.as_secs_f64() * 1000.0) as u64;
                let next = nap.after(found(fresh.max(1)), since);
                assert!(next <= LONGEST_BUSY && (next.is_zero() || next >= SHORTEST));
                // A look takes a while, too.
                since = next + Duration::from_micros(20);
            }
            let filled = bytes_per_ms as f64 * since.as_secs_f64() * 1000.0;
            assert!(filled < RING as f64 / 4.0, "{bytes_per_ms}: {filled}");
        }
    }

    #[test]
    fn who_has_nothing_to_do_sleeps_ever_longer_but_wakes_at_once() {
        let mut nap = Nap::new(RING, None);
        let naps: Vec<Duration> =
            (0..100).map(|_| nap.after(Found::default(), Duration::from_millis(1))).collect();
        assert_eq!((naps[0], naps[99]), (FIRST_IDLE, LONGEST_IDLE));
        assert!(naps.is_sorted());
        assert!(nap.after(found(24), Duration::from_millis(5)) <= LONGEST_BUSY);
        assert_eq!(nap.after(Found::default(), LONGEST_IDLE), FIRST_IDLE);
        assert!(nap.after(found(RING), Duration::from_micros(300)).is_zero());
    }

    #[test]
    fn where_samples_are_seldom_every_look_is_late_unless_a_ring_fills() {
        let mut nap = Nap::new(RING, Some(512 << 10));
        for fresh in [0, 100, 0, 5000] {
            assert_eq!(nap.after(found(fresh), SELDOM), SELDOM);
        }
        assert!(nap.after(found(RING / 2), SELDOM) < SELDOM / 4);
    }
}

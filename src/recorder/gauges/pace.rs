//! [`Pace`]: how often something may be done whose cost depends on the target. Pure.

use std::time::{Duration, Instant};

/// Of so many parts of the time, it takes one at most: four such things and what is read every second stay below a
/// thousandth of a processor.
const PARTS: u32 = 5000;

/// What took no longer than this may be done once more at the end, whenever that is: letting go waits for it.
const CHEAP: Duration = Duration::from_millis(10);

/// When it may be done next.
#[derive(Debug, Default)]
pub struct Pace {
    due: Option<Instant>,
    cost: Duration,
    is_last: bool,
}

impl Pace {
    /// Whether it is time.
    pub fn is_due(&self, now: Instant) -> bool {
        self.due.is_none_or(|due| now >= due) || self.is_last && self.cost <= CHEAP
    }

    /// There is no other time after this one.
    pub fn at_last(&mut self) {
        self.is_last = true;
    }

    /// It took so long, and ended `now`.
    pub fn took(&mut self, cost: Duration, now: Instant) {
        (self.cost, self.due) = (cost, Some(now + cost.saturating_mul(PARTS)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_dear_is_done_seldom() {
        let (mut pace, start) = (Pace::default(), Instant::now());
        assert!(pace.is_due(start));
        pace.took(Duration::from_millis(3), start);
        assert!(!pace.is_due(start + Duration::from_millis(14_999)));
        assert!(pace.is_due(start + Duration::from_secs(15)));
        // What is cheap is done once more in the end.
        pace.at_last();
        assert!(pace.is_due(start + Duration::from_secs(1)));
        // Never again, rather than a panic.
        pace.took(Duration::from_secs(3600), start);
        assert!(!pace.is_due(start + Duration::from_secs(1 << 20)));
    }
}

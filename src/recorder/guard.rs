//! [`Guard`]: samples less when recording costs the target too much. Pure.
//!
//! Every sample carries the interval with which it was drawn, so estimates stay right whatever the guard does.

/// The interval is lowered again when the share of time falls below the limit by this factor: lowering it by half doubles the
/// samples, so anything above a half would go up and down for ever.
const EASE: f64 = 0.25;
/// The largest interval: 1 TiB. One sample of all that a target ever allocates can be no burden.
const LARGEST: u64 = 1 << 40;

/// The rule for one recording.
#[derive(Debug)]
pub struct Guard {
    /// The interval that was asked for.
    asked: u64,
    /// That in force.
    interval: u64,
    /// Share of one processor's time that recording may take; `None`: any.
    limit: Option<f64>,
    /// Time and time spent at the last look, in ticks.
    last: Option<(u64, u64)>,
}

impl Guard {
    /// `max_cpu` in percent of one processor.
    pub fn new(asked: u64, max_cpu: Option<f64>) -> Self {
        Self { asked, interval: asked, limit: max_cpu.map(|percent| percent / 100.0), last: None }
    }

    /// The interval in force.
    pub fn interval(&self) -> u64 {
        self.interval
    }

    /// Looks at the time that all threads spent recording since the start. Answers the interval that shall be in force from
    /// now on, if it is another.
    pub fn look(&mut self, now: u64, spent: u64) -> Option<u64> {
        let (before, spent_before) = self.last.replace((now, spent))?;
        let limit = self.limit?;
        let elapsed = now.checked_sub(before).filter(|ticks| *ticks > 0)?;
        let share = spent.saturating_sub(spent_before) as f64 / elapsed as f64;
        let wanted = if share > limit {
            self.interval.saturating_mul(2).min(LARGEST).max(self.interval)
        } else if share < limit * EASE {
            (self.interval / 2).max(self.asked)
        } else {
            self.interval
        };
        (wanted != self.interval).then(|| {
            tracing::debug!("recording took {:.2} % of a processor: interval {wanted}", share * 100.0);
            self.interval = wanted;
            wanted
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A target that spends `per_sample` ticks on each sample and allocates `rate` bytes per second of 1e9 ticks.
    fn run(guard: &mut Guard, seconds: u64, rate: f64, per_sample: f64) -> f64 {
        let (mut now, mut spent) = guard.last.unwrap_or((0, 0));
        let mut share = 0.0;
        for _ in 0..seconds {
            share = rate / guard.interval() as f64 * per_sample / 1e9;
            now += 1_000_000_000;
            spent += (share * 1e9) as u64;
            guard.look(now, spent);
        }
        share
    }

    #[test]
    fn the_interval_grows_until_recording_is_cheap_and_comes_back() {
        let mut guard = Guard::new(512 << 10, Some(2.0));
        // 100 GB/s: 190,000 samples of 2,000 ticks each would be 38 %.
        let share = run(&mut guard, 20, 1e11, 2000.0);
        assert!(share <= 0.02, "{share}");
        assert_eq!(guard.interval(), (512 << 10) * 32);
        // It settles: a share between a quarter of the limit and the limit changes nothing.
        let interval = guard.interval();
        run(&mut guard, 20, 1e11, 2000.0);
        assert_eq!(guard.interval(), interval);
        run(&mut guard, 20, 1e6, 2000.0);
        assert_eq!(guard.interval(), 512 << 10);
    }

    #[test]
    fn without_a_limit_or_at_odd_times_nothing_changes() {
        let mut guard = Guard::new(4096, None);
        assert_eq!((guard.look(1, 0), guard.look(2, 1 << 60)), (None, None));
        let mut guard = Guard::new(4096, Some(2.0));
        // The first look knows no span; a clock that stands still or goes back tells nothing.
        assert_eq!(
            (guard.look(100, 1 << 40), guard.look(100, 1 << 50), guard.look(50, 1 << 60)),
            (None, None, None)
        );
        // However much is spent, there is an end.
        for n in 1..100 {
            guard.look(100 + n, u64::MAX / 200 * n);
        }
        assert_eq!(guard.interval(), LARGEST);
    }
}

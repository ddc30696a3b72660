//! Which snapshots go when there are too many. Pure.

use super::snapshot::SnapshotReason;

/// What is known of a snapshot that is kept.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Moment {
    /// Since the start, in nanoseconds.
    pub(super) time_ns: u64,
    pub(super) reason: SnapshotReason,
    pub(super) live_bytes: u64,
}

/// The first, the last and the highest are always kept.
pub(super) const LEAST_KEPT: usize = 3;
/// How much more a snapshot weighs that somebody asked for.
const ASKED: f64 = 8.0;

/// The indices of those that go so that `keep` ([`LEAST_KEPT`] at least) of `moments`, which are in order of time, are left.
///
/// One at a time that goes which matters least: where it would leave a gap that is small for its age. So gaps grow with age, and
/// each older hour keeps fewer. The first, the last and the highest (the earliest of equals) stay.
pub(super) fn dropped(moments: &[Moment], keep: usize) -> Vec<usize> {
    let keep = keep.max(LEAST_KEPT);
    let highest =
        moments.iter().enumerate().rev().max_by_key(|(_, moment)| moment.live_bytes).map(|(i, _)| i);
    let Some(now) = moments.last().map(|moment| moment.time_ns) else { return Vec::new() };
    let mut left: Vec<usize> = (0..moments.len()).collect();
    let mut dropped = Vec::new();
    while left.len() > keep {
        let matters = |at: usize| {
            let moment = &moments[left[at]];
            let gap = moments[left[at + 1]].time_ns.saturating_sub(moments[left[at - 1]].time_ns);
            let age = now.saturating_sub(moment.time_ns).max(1);
            let asked = matches!(moment.reason, SnapshotReason::Asked | SnapshotReason::Signal);
            gap as f64 / age as f64 * if asked { ASKED } else { 1.0 }
        };
        let interior = (1..left.len() - 1).filter(|at| Some(left[*at]) != highest);
        // Of equals the oldest goes.
        let Some(least) = interior.min_by(|a, b| matters(*a).total_cmp(&matters(*b))) else { break };
        dropped.push(left.remove(least));
    }
    dropped.sort_unstable();
    dropped
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const S: u64 = 1_000_000_000;

    fn tick(seconds: u64, live_bytes: u64) -> Moment {
        Moment { time_ns: seconds * S, reason: SnapshotReason::Tick, live_bytes }
    }

    fn kept(moments: &[Moment], keep: usize) -> Vec<Moment> {
        let dropped = dropped(moments, keep);
        moments.iter().enumerate().filter(|(i, _)| !dropped.contains(i)).map(|(_, moment)| *moment).collect()
    }

    proptest! {
        #[test]
        fn first_last_and_highest_stay_and_no_more_than_asked_for(
            steps in prop::collection::vec((0u64..100, 0u64..50, any::<bool>()), 1..60),
            keep in 0usize..70,
        ) {
            let mut time = 0;
            let moments: Vec<Moment> = steps.iter().map(|(step, live, asked)| {
                time += step;
                let reason = if *asked { SnapshotReason::Signal } else { SnapshotReason::Tick };
                Moment { reason, ..tick(time, *live) }
            }).collect();
            let kept = kept(&moments, keep);
            prop_assert_eq!(kept.len(), moments.len().min(keep.max(LEAST_KEPT)));
            prop_assert_eq!((kept.first(), kept.last()), (moments.first(), moments.last()));
            let highest = |of: &[Moment]| of.iter().map(|moment| moment.live_bytes).max();
            prop_assert_eq!(highest(&kept), highest(&moments));
        }
    }

    #[test]
    fn a_day_of_minutes_keeps_fewer_of_each_older_hour() {
        // As it goes: one a minute, thinned whenever there are a quarter too many.
        let mut moments = Vec::new();
        for minute in 0..=1440 {
            moments.push(tick(minute * 60, minute % 600));
            if moments.len() > 125 {
                moments = kept(&moments, 100);
            }
        }
        let between = |from: u64, to: u64| {
            moments.iter().filter(|m| (from * 60 * S..to * 60 * S).contains(&m.time_ns)).count()
        };
        let hours = [
            between(1380, 1440),
            between(1260, 1320),
            between(1080, 1140),
            between(720, 780),
            between(60, 120),
        ];
        assert!(hours.is_sorted_by(|newer, older| newer >= older), "{hours:?}");
        assert!(hours[0] >= 3 * hours[4].max(1) && hours[0] >= 15, "{hours:?}");
        // No gap is out of proportion to its age.
        for pair in moments.windows(2).skip(1) {
            let (gap, age) = (pair[1].time_ns - pair[0].time_ns, 1440 * 60 * S - pair[0].time_ns);
            assert!(gap <= (age / 4).max(120 * S), "{} s at {} s", gap / S, age / S);
        }
    }

    #[test]
    fn what_was_asked_for_outlives_ticks() {
        let mut moments: Vec<Moment> = (0..100).map(|second| tick(second, second)).collect();
        moments[40].reason = SnapshotReason::Asked;
        assert!(kept(&moments, 20).contains(&moments[40]));
    }
}

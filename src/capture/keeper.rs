//! [`Keeper`]: the snapshots of a file that is being written, and which of them it can still hold.
//!
//! A file of at most N bytes has 5/10 of them for definitions and events (of that, events no more than 4/10), and 1/10 for any
//! one snapshot, so that the first, the last, the highest and the next always fit; what is left is for header, gauges and
//! trailer. Names of native frames come when there is no next snapshot, and may have its share. Pure: knows sizes and moments, not bytes.

use super::snapshot::{MOST_ROWS, SnapshotHead};
use super::thin::{self, LEAST_KEPT, Moment};
use std::collections::HashSet;

/// What a capture with snapshots may keep.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Keep {
    /// Snapshots (3 at least). For a while there may be a quarter more.
    pub snapshots: usize,
    /// Bytes of the file.
    pub max_bytes: u64,
}

/// Shares of the file, in tenths.
pub(super) const EVENTS_SHARE: u64 = 4;
pub(super) const LOG_SHARE: u64 = 5;
pub(super) const SNAPSHOT_SHARE: u64 = 1;
pub(super) const SYMBOLS_SHARE: u64 = 1;
/// A snapshot has so many rows at least.
pub(super) const LEAST_ROWS: usize = 64;

/// A snapshot in the file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Kept {
    pub(super) head: SnapshotHead,
    pub(super) live_bytes: u64,
    /// Bytes of its chunks.
    pub(super) stored: u64,
}

/// What a file is to be rewritten with.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Plan {
    /// Indices (see [`SnapshotHead`]) of the snapshots that go.
    pub(super) dropped: HashSet<u32>,
    /// The most rows of those that stay.
    pub(super) rows: usize,
}

pub(super) struct Keeper {
    keep: Keep,
    pub(super) kept: Vec<Kept>,
    /// Bytes of events chunks.
    pub(super) log_bytes: u64,
    /// Bytes of symbols chunks.
    pub(super) symbols_bytes: u64,
    /// The most rows of a snapshot.
    pub(super) rows: usize,
}

impl Keeper {
    pub(super) fn new(keep: Keep) -> Self {
        let keep = Keep { snapshots: keep.snapshots.max(LEAST_KEPT), ..keep };
        Self { keep, kept: Vec::new(), log_bytes: 0, symbols_bytes: 0, rows: MOST_ROWS }
    }

    pub(super) fn max_bytes(&self) -> u64 {
        self.keep.max_bytes
    }

    /// So many tenths of the file, in bytes.
    pub(super) fn share(&self, tenths: u64) -> u64 {
        self.keep.max_bytes / 10 * tenths
    }

    /// Whether a file of `size` bytes can take `extra` more and, where these are a snapshot, one more of those.
    pub(super) fn fits(&self, size: u64, extra: u64, snapshots: usize) -> bool {
        let most = self.keep.snapshots + (self.keep.snapshots / 4).max(1);
        size.saturating_add(extra) <= self.keep.max_bytes && self.kept.len() + snapshots <= most
    }

    /// How to make a file of `size` bytes smaller before `extra` come; `None` where it would hardly become so.
    pub(super) fn plan(&self, size: u64, extra: u64) -> Option<Plan> {
        let moment = |kept: &Kept| Moment {
            time_ns: kept.head.time_ns,
            reason: kept.head.reason,
            live_bytes: kept.live_bytes,
        };
        let moments: Vec<Moment> = self.kept.iter().map(moment).collect();
        let of_snapshots: u64 = self.kept.iter().map(|kept| kept.stored).sum();
        let others = size.saturating_sub(of_snapshots).saturating_add(extra);
        // Some room is left, lest it be done again at once.
        let room = (self.keep.max_bytes - self.keep.max_bytes / 8).saturating_sub(others);
        let mut keep = self.keep.snapshots.saturating_sub(1).max(LEAST_KEPT);
        let (mut dropped, mut left);
        loop {
            dropped = thin::dropped(&moments, keep);
            left = of_snapshots - dropped.iter().map(|at| self.kept[*at].stored).sum::<u64>();
            if left <= room || keep == LEAST_KEPT {
                break;
            }
            keep = (keep / 2).max(LEAST_KEPT);
        }
        let mut rows = self.rows;
        while left > room && rows > LEAST_ROWS {
            // As if all had as many as they may: there are rarely more.
            (left, rows) = (left / 2, (rows / 2).max(LEAST_ROWS));
        }
        let too_many = !self.fits(0, 0, 1) && !dropped.is_empty();
        let is_worth_it = too_many || of_snapshots - left >= self.keep.max_bytes / 16;
        let dropped = dropped.into_iter().map(|at| self.kept[at].head.index).collect();
        is_worth_it.then_some(Plan { dropped, rows })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keeper(keep: usize, max_bytes: u64, stored: &[u64]) -> Keeper {
        let mut keeper = Keeper::new(Keep { snapshots: keep, max_bytes });
        let kept = |(at, stored): (usize, &u64)| Kept {
            head: SnapshotHead {
                index: at as u32,
                time_ns: at as u64 * 1_000_000_000,
                ..SnapshotHead::default()
            },
            live_bytes: at as u64 % 7,
            stored: *stored,
        };
        keeper.kept = stored.iter().enumerate().map(kept).collect();
        keeper
    }

    #[test]
    fn a_quarter_too_many_are_thinned_to_what_was_asked_for() {
        let full = keeper(100, 1 << 30, &[1000; 125]);
        assert!(full.fits(125_000, 1000, 0) && !full.fits(125_000, 1000, 1));
        let plan = full.plan(125_000, 1000).unwrap();
        assert_eq!((plan.dropped.len(), plan.rows), (26, MOST_ROWS));
    }

    #[test]
    fn a_file_too_large_keeps_fewer_and_then_smaller_ones() {
        let full = keeper(100, 1_000_000, &[10_000; 90]);
        assert!(!full.fits(1_000_000, 10_000, 1));
        // 110,000 are of others: room for 76 of the 90, so half of the asked for 99 stay.
        let plan = full.plan(1_000_000, 10_000).unwrap();
        assert_eq!((90 - plan.dropped.len(), plan.rows), (49, MOST_ROWS));
        let huge = keeper(100, 1_000_000, &[300_000; 4]);
        let plan = huge.plan(1_200_000, 100_000).unwrap();
        assert_eq!((plan.dropped.len(), plan.rows), (1, MOST_ROWS / 2));
        // Nothing can be done about what are no snapshots.
        assert_eq!(keeper(100, 1_000_000, &[10; 2]).plan(1_000_000, 10), None);
    }
}

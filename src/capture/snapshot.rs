//! [`Snapshot`]: what was live at one moment, by site, and what came and went since the one before.
//!
//! A snapshot is kept in chunks of its own kind, each a part with some of its rows (see [`format`](mod@super::format)); how these
//! are bytes is `snapshot_columns`' business. Sums are exact; variances are rounded to a hundredth, which no error that is
//! shown has digits for. Who takes snapshots, and when, is the recorder's business.

use super::allocator::AllocatorKind;
use super::record::StackId;
use super::site::Site;
use super::snapshot_columns::put_rows;
use super::totals::Totals;
use super::varint::{Cursor, put};

/// Upper ends of the ages that live blocks are counted by, in seconds; the last class has no end.
pub const AGE_LIMITS: [u64; 11] = [1, 5, 15, 60, 300, 900, 3_600, 14_400, 43_200, 86_400, 345_600];
/// Classes of age.
pub const AGES: usize = AGE_LIMITS.len() + 1;
/// Rows of one part: at their longest (11 bytes a number) they fit a chunk.
pub const ROWS_PER_PART: usize = 1 << 11;
/// Rows of one snapshot: a reader holds no more, and a writer sums up what is beyond.
pub const MOST_ROWS: usize = 1 << 19;

/// Why a snapshot was taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum SnapshotReason {
    /// Recording began.
    Start,
    /// The time was due.
    #[default]
    Tick,
    /// SIGUSR1.
    Signal,
    /// `heaptap snapshot`.
    Asked,
    /// More was live than ever.
    Peak,
    /// The resident set passed a limit.
    Resident,
    /// Recording ended.
    End,
    /// A reason this version does not know.
    Other(u8),
}

impl SnapshotReason {
    const KNOWN: [(Self, u8, &str); 7] = [
        (Self::Start, 0, "start"),
        (Self::Tick, 1, "tick"),
        (Self::Signal, 2, "signal"),
        (Self::Asked, 3, "asked"),
        (Self::Peak, 4, "peak"),
        (Self::Resident, 5, "resident"),
        (Self::End, 6, "end"),
    ];

    /// The id in capture files.
    pub fn id(self) -> u8 {
        match self {
            Self::Other(id) => id,
            known => Self::KNOWN.iter().find(|(reason, ..)| *reason == known).map_or(1, |(_, id, _)| *id),
        }
    }

    /// The reason with this id.
    pub fn from_id(id: u8) -> Self {
        Self::KNOWN.iter().find(|(_, known, _)| *known == id).map_or(Self::Other(id), |(reason, ..)| *reason)
    }

    /// `start`, `tick`, …
    pub fn name(self) -> &'static str {
        Self::KNOWN.iter().find(|(reason, ..)| *reason == self).map_or("other", |(.., name)| name)
    }
}

/// When and why a snapshot was taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SnapshotHead {
    /// Counts the snapshots that were taken, from 0. Those that were thinned out leave holes.
    pub index: u32,
    /// Since the start of recording, in nanoseconds.
    pub time_ns: u64,
    /// Wall clock, nanoseconds since 1970 UTC.
    pub unix_ns: u64,
    /// Why.
    pub reason: SnapshotReason,
}

/// What a class of age holds of a site's live blocks. Of samples, what they stand for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Age {
    /// Bytes.
    pub bytes: u64,
    /// Blocks.
    pub blocks: u64,
}

/// One site at one moment.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct SiteState {
    /// The stack that asked.
    pub stack: StackId,
    /// The function that gave.
    pub allocator: AllocatorKind,
    /// The thread that asked.
    pub tid: u32,
    /// Live.
    pub live: Totals,
    /// Given out since the snapshot before (that is kept), or since the start.
    pub allocated: Totals,
    /// Given back since then.
    pub freed: Totals,
    /// The live blocks by their age: class `i` ends at [`AGE_LIMITS`]`[i]` seconds.
    pub ages: [Age; AGES],
}

impl SiteState {
    /// Whose it is.
    pub fn site(&self) -> Site {
        Site { stack: self.stack, allocator: self.allocator, tid: self.tid }
    }

    fn add(&mut self, other: &Self) {
        self.live.add(other.live);
        self.allocated.add(other.allocated);
        self.freed.add(other.freed);
        for (age, more) in self.ages.iter_mut().zip(&other.ages) {
            age.bytes = age.bytes.saturating_add(more.bytes);
            age.blocks = age.blocks.saturating_add(more.blocks);
        }
    }
}

/// What was live at one moment.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Snapshot {
    /// When and why.
    pub head: SnapshotHead,
    /// Sites with anything live, or anything that came or went, by (stack, allocator, thread).
    pub rows: Vec<SiteState>,
}

/// The class of a block that is so old, in milliseconds.
pub fn age_class(age_ms: u64) -> usize {
    AGE_LIMITS.partition_point(|limit| limit * 1000 <= age_ms)
}

impl Snapshot {
    /// Everything that was live.
    pub fn live(&self) -> Totals {
        let mut sum = Totals::default();
        self.rows.iter().for_each(|row| sum.add(row.live));
        sum
    }

    /// Puts the rows in order, and those of one site together.
    pub fn settle(&mut self) {
        self.rows.sort_by_key(SiteState::site);
        self.rows.dedup_by(|row, before| {
            let same = row.site() == before.site();
            if same {
                before.add(row);
            }
            same
        });
    }

    /// Leaves `most` rows at most (more than there are allocators): the sites with the least are summed up by allocator, as of
    /// the stack `rest`.
    pub(super) fn limit_rows(&mut self, most: usize, rest: StackId) {
        if self.rows.len() <= most {
            return;
        }
        self.rows.sort_by_key(|row| {
            let came = row.allocated.bytes().max(row.freed.bytes());
            (row.stack == rest, std::cmp::Reverse((row.live.bytes(), came)))
        });
        for row in &mut self.rows[most.saturating_sub(AllocatorKind::ALL.len())..] {
            (row.stack, row.tid) = (rest, 0);
        }
        self.settle();
    }

    /// The parts as chunk contents, each handed to `write`.
    pub(super) fn encode<E>(&self, mut write: impl FnMut(&[u8]) -> Result<(), E>) -> Result<(), E> {
        let parts = self.rows.len().div_ceil(ROWS_PER_PART).max(1);
        let mut buf = Vec::new();
        for part in 0..parts {
            let from = part * ROWS_PER_PART;
            let rows = &self.rows[from..self.rows.len().min(from + ROWS_PER_PART)];
            buf.clear();
            let SnapshotHead { index, time_ns, unix_ns, reason } = self.head;
            for number in [u64::from(index), time_ns, unix_ns, u64::from(reason.id())] {
                put(&mut buf, number);
            }
            for number in [part, parts, rows.len()] {
                put(&mut buf, number as u64);
            }
            put_rows(&mut buf, rows);
            write(&buf)?;
        }
        Ok(())
    }
}

/// Index and number of parts of the snapshot that a chunk's content is a part of.
pub(super) fn part_of(raw: &[u8]) -> Option<(u32, u64)> {
    let mut cursor = Cursor::new(raw, 0);
    let mut numbers = [0; 6];
    for number in &mut numbers {
        *number = cursor.varint()?;
    }
    Some((u32::try_from(numbers[0]).ok()?, numbers[5]))
}

#[cfg(test)]
#[path = "snapshot_tests.rs"]
mod tests;

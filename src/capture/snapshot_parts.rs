//! [`Assembler`]: the parts of snapshots, one by one or put together.

use super::snapshot::{MOST_ROWS, ROWS_PER_PART, Snapshot, SnapshotHead, SnapshotReason};
use super::snapshot_columns::{Broken, Buffer, ENDED, SnapshotPart, Wanted};
use super::varint::Cursor;

/// The most bytes that a part's head takes: seven numbers.
pub(super) const HEAD_LEN: usize = 70;

/// What the next part came to.
#[derive(PartialEq, Debug)]
pub(super) enum Taken {
    /// A part of a snapshot that is not whole yet.
    More,
    /// A part, where parts are what is asked for.
    Part,
    /// All of a snapshot.
    Whole(Snapshot),
}

/// See the module.
pub(super) struct Assembler {
    open: Option<Open>,
    wanted: Wanted,
    in_parts: bool,
    part: SnapshotPart,
    buffer: Buffer,
}

/// A snapshot of which parts are to come.
struct Open {
    snapshot: Snapshot,
    next: u64,
    parts: u64,
}

impl Default for Assembler {
    fn default() -> Self {
        let (part, buffer) = (SnapshotPart::default(), Buffer::default());
        Self { open: None, wanted: Wanted::ALL, in_parts: false, part, buffer }
    }
}

impl Assembler {
    /// What rows have from now on.
    pub(super) fn want(&mut self, wanted: Wanted) {
        self.wanted = wanted;
    }

    /// Whether more than the heads of parts is.
    pub(super) fn wants_rows(&self) -> bool {
        self.wanted.any()
    }

    /// From now on [`take`](Self::take) tells of each part by itself.
    pub(super) fn give_parts(&mut self) {
        self.in_parts = true;
    }

    /// The part that was taken last.
    pub(super) fn part(&self) -> &SnapshotPart {
        &self.part
    }

    /// The same, to be changed.
    pub(super) fn part_mut(&mut self) -> &mut SnapshotPart {
        &mut self.part
    }

    /// Takes the next part, which may use stacks up to `stacks`. A part that does not go on where the last one ended begins a new
    /// snapshot or is an error; what was open then is lost.
    pub(super) fn take(&mut self, raw: &[u8], stacks: usize) -> Result<Taken, Broken> {
        let mut cursor = Cursor::new(raw, 0);
        let mut number = || cursor.varint().ok_or(ENDED);
        let index = u32::try_from(number()?).map_err(|_| ENDED)?;
        let (time_ns, unix_ns) = (number()?, number()?);
        let reason = SnapshotReason::from_id(u8::try_from(number()?).map_err(|_| ENDED)?);
        let (part, parts, count) = (number()?, number()?, number()?);
        let head = SnapshotHead { index, time_ns, unix_ns, reason };
        let most = (MOST_ROWS / ROWS_PER_PART) as u64;
        let open = self.open.take();
        if part >= parts || parts > most || count > ROWS_PER_PART as u64 {
            return Err("a part of a snapshot has impossible numbers");
        }
        self.part.read(&mut cursor, (count as usize, stacks), self.wanted, &mut self.buffer)?;
        let is_next = |open: &Open| open.snapshot.head == head && (open.next, open.parts) == (part, parts);
        let mut snapshot = match open.filter(is_next) {
            Some(open) => open.snapshot,
            None if part == 0 => Snapshot { head, rows: Vec::new() },
            None => return Err("a part of a snapshot comes without those before it"),
        };
        let next = part + 1;
        (self.part.head, self.part.is_last) = (head, next == parts);
        if !self.in_parts {
            snapshot.rows.extend(self.part.rows());
            if self.part.is_last {
                return Ok(Taken::Whole(snapshot));
            }
        }
        if !self.part.is_last {
            self.open = Some(Open { snapshot, next, parts });
        }
        Ok(if self.in_parts { Taken::Part } else { Taken::More })
    }
}

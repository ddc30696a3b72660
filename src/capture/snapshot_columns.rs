//! The rows of one part of a snapshot as columns of bytes, there and back.
//!
//! A file has millions of rows of fifty numbers each, nearly all of them zero, and most questions need a few of the columns: so
//! they are read as the columns they are written in, into buffers that are used again, and what is not wanted is passed over.

use super::allocator::AllocatorKind;
use super::record::StackId;
use super::site::Site;
use super::snapshot::{AGES, Age, SiteState, Snapshot, SnapshotHead};
use super::totals::Totals;
use super::varint::{Cursor, put, unzigzag, zigzag};

/// Numbers of a [`Totals`] in a file.
const NUMBERS: usize = 9;

pub(super) type Broken = &'static str;
pub(super) const ENDED: Broken = "a part of a snapshot ends too early, or a number in it is too large";

/// What of the rows is wanted. What is not, is 0 in them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Wanted {
    /// What is live.
    pub live: bool,
    /// What came and went.
    pub flows: bool,
    /// Ages.
    pub ages: bool,
    /// Of what is live, and of what came and went: numbers of blocks beside bytes.
    pub counts: bool,
}

impl Wanted {
    /// Everything.
    pub const ALL: Self = Self { live: true, flows: true, ages: true, counts: true };
    /// Not even rows.
    pub const NOTHING: Self = Self { live: false, flows: false, ages: false, counts: false };

    /// Whether rows are wanted at all.
    pub(super) fn any(self) -> bool {
        self.live || self.flows || self.ages
    }
}

/// Some rows of a snapshot.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct SnapshotPart {
    /// Of which snapshot.
    pub head: SnapshotHead,
    /// Whether it is the last part of it.
    pub is_last: bool,
    sites: Vec<Site>,
    live: Column<Totals>,
    allocated: Column<Totals>,
    freed: Column<Totals>,
    ages: Column<[Age; AGES]>,
}

/// Values of as many rows as there are; none where all of them are the default, or none is wanted.
#[derive(Clone, PartialEq, Debug)]
struct Column<T>(Vec<T>);

impl<T> Default for Column<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T: Copy + Default> Column<T> {
    fn at(&self, row: usize) -> Option<&T> {
        self.0.get(row)
    }

    fn value(&self, row: usize) -> T {
        self.at(row).copied().unwrap_or_default()
    }
}

impl SnapshotPart {
    /// A whole snapshot as one part.
    pub fn of(snapshot: &Snapshot) -> Self {
        let column = |of: fn(&SiteState) -> Totals| Column(snapshot.rows.iter().map(of).collect());
        Self {
            head: snapshot.head,
            is_last: true,
            sites: snapshot.rows.iter().map(SiteState::site).collect(),
            live: column(|row| row.live),
            allocated: column(|row| row.allocated),
            freed: column(|row| row.freed),
            ages: Column(snapshot.rows.iter().map(|row| row.ages).collect()),
        }
    }

    /// Whose the rows are, in their order.
    pub fn sites(&self) -> &[Site] {
        &self.sites
    }

    /// Puts others in place of the stacks. Rows may come to be of the same site.
    pub(super) fn map_stacks(&mut self, mut map: impl FnMut(StackId) -> StackId) {
        self.sites.iter_mut().for_each(|site| site.stack = map(site.stack));
    }

    /// What is live of a row; `None` for nothing, and where it was not wanted.
    pub fn live(&self, row: usize) -> Option<&Totals> {
        self.live.at(row).filter(|totals| !totals.is_empty())
    }

    /// What it was given since the snapshot before.
    pub fn allocated(&self, row: usize) -> Option<&Totals> {
        self.allocated.at(row).filter(|totals| !totals.is_empty())
    }

    /// What it gave back since then.
    pub fn freed(&self, row: usize) -> Option<&Totals> {
        self.freed.at(row).filter(|totals| !totals.is_empty())
    }

    /// What is live of it by its age.
    pub fn ages(&self, row: usize) -> Option<&[Age; AGES]> {
        self.ages.at(row)
    }

    /// All rows with everything that was read.
    pub(super) fn rows(&self) -> impl Iterator<Item = SiteState> {
        self.sites.iter().enumerate().map(|(row, site)| SiteState {
            stack: site.stack,
            allocator: site.allocator,
            tid: site.tid,
            live: self.live.value(row),
            allocated: self.allocated.value(row),
            freed: self.freed.value(row),
            ages: self.ages.value(row),
        })
    }

    /// Reads `count` rows, which may use stacks up to `stacks`, over those there were.
    pub(super) fn read(
        &mut self,
        cursor: &mut Cursor,
        (count, stacks): (usize, usize),
        wanted: Wanted,
        buffer: &mut Buffer,
    ) -> Result<(), Broken> {
        self.clear();
        if !wanted.any() {
            return Ok(());
        }
        self.sites.resize(count, Site::default());
        for (site, id) in self.sites.iter_mut().zip(buffer.column(cursor, count)?) {
            let kind = u8::try_from(*id).ok().and_then(AllocatorKind::from_id);
            site.allocator = kind.ok_or("a row of a snapshot has an unknown allocator")?;
        }
        let columns = [&mut self.live, &mut self.allocated, &mut self.freed];
        for (column, is_wanted) in columns.into_iter().zip([wanted.live, wanted.flows, wanted.flows]) {
            if is_wanted {
                buffer.totals(cursor, (count, wanted.counts), &mut column.0)?;
            } else {
                cursor.skip(NUMBERS * count).ok_or(ENDED)?;
            }
        }
        if wanted.ages {
            self.read_ages(cursor, count)?;
        } else {
            cursor.skip(2 * AGES * count).ok_or(ENDED)?;
        }
        self.read_differences(cursor, stacks, buffer)
    }

    /// Leaves no rows.
    pub(super) fn clear(&mut self) {
        self.sites.clear();
        self.live.0.clear();
        self.allocated.0.clear();
        self.freed.0.clear();
        self.ages.0.clear();
    }

    fn read_ages(&mut self, cursor: &mut Cursor, count: usize) -> Result<(), Broken> {
        let rows = &mut self.ages.0;
        rows.resize(count, [Age::default(); AGES]);
        for class in 0..AGES {
            for ages in &mut *rows {
                ages[class].bytes = cursor.varint().ok_or(ENDED)?;
            }
            for ages in &mut *rows {
                ages[class].blocks = cursor.varint().ok_or(ENDED)?;
            }
        }
        Ok(())
    }

    /// What is told by its difference to the row before.
    fn read_differences(
        &mut self,
        cursor: &mut Cursor,
        stacks: usize,
        buffer: &mut Buffer,
    ) -> Result<(), Broken> {
        let (count, mut last) = (self.sites.len(), 0_i64);
        for (site, number) in self.sites.iter_mut().zip(buffer.column(cursor, count)?) {
            last = last.wrapping_add(unzigzag(*number));
            let known = u32::try_from(last).ok().filter(|stack| *stack as usize <= stacks);
            site.stack = StackId(known.ok_or("a row of a snapshot has a stack that was not defined")?);
        }
        last = 0;
        for (site, number) in self.sites.iter_mut().zip(buffer.column(cursor, count)?) {
            last = last.wrapping_add(unzigzag(*number));
            site.tid = u32::try_from(last).map_err(|_| ENDED)?;
        }
        Ok(())
    }
}

/// Columns of numbers, before they are rows.
#[derive(Default)]
pub(super) struct Buffer {
    numbers: [Vec<u64>; NUMBERS],
}

impl Buffer {
    /// Reads one column.
    fn column(&mut self, cursor: &mut Cursor, count: usize) -> Result<&[u64], Broken> {
        let numbers = &mut self.numbers[0];
        numbers.resize(count, 0);
        cursor.column(numbers).ok_or(ENDED)?;
        Ok(numbers)
    }

    /// Reads the columns of so many [`Totals`]; into none if all of them are zero.
    fn totals(
        &mut self,
        cursor: &mut Cursor,
        (count, with_counts): (usize, bool),
        totals: &mut Vec<Totals>,
    ) -> Result<(), Broken> {
        let mut any = false;
        for (numbers, is_of_counts) in self.numbers.iter_mut().zip(Totals::NUMBERS_OF_COUNTS) {
            if with_counts || !is_of_counts {
                numbers.resize(count, 0);
                any |= cursor.column(numbers).ok_or(ENDED)?;
            } else {
                numbers.clear();
                numbers.resize(count, 0);
                cursor.skip(count).ok_or(ENDED)?;
            }
        }
        if any {
            // Slices of one length, by name: their bounds are not checked for every number.
            let [a, b, c, d, e, f, g, h, i] = self.numbers.each_ref().map(|column| &column[..count]);
            let numbers =
                |row: usize| [a[row], b[row], c[row], d[row], e[row], f[row], g[row], h[row], i[row]];
            totals.extend((0..count).map(|row| Totals::from_numbers(numbers(row))));
        }
        Ok(())
    }
}

pub(super) fn put_rows(buf: &mut Vec<u8>, rows: &[SiteState]) {
    rows.iter().for_each(|row| put(buf, u64::from(row.allocator.id())));
    let figures: [fn(&SiteState) -> Totals; 3] = [|row| row.live, |row| row.allocated, |row| row.freed];
    for of in figures {
        let numbers: Vec<[u64; NUMBERS]> = rows.iter().map(|row| of(row).to_numbers()).collect();
        for at in 0..NUMBERS {
            numbers.iter().for_each(|numbers| put(buf, numbers[at]));
        }
    }
    for class in 0..AGES {
        rows.iter().for_each(|row| put(buf, row.ages[class].bytes));
        rows.iter().for_each(|row| put(buf, row.ages[class].blocks));
    }
    // What is told by its difference to the row before.
    let numbers: [fn(&SiteState) -> i64; 2] = [|row| i64::from(row.stack.0), |row| i64::from(row.tid)];
    for of in numbers {
        let mut last = 0;
        for row in rows {
            put(buf, zigzag(of(row) - last));
            last = of(row);
        }
    }
}

//! Versions 3 to 5: columns, and events that are told by what was expected (`predict`).
//!
//! Pure and as mistrustful as `v1`, which decodes what is no event; `v5` has what version 5 adds to that.

use super::format::{CHUNK_EVENTS, TIME_UNIT_NS, control, place, tag};
use super::predict::{Expected, Place, Predictor, Shape, class};
use super::record::{Allocation, Free, FreeUnknown, Record, StackId, Unmap};
use super::stack_table::StackTable;
use super::v1::{self, Broken, ENDED, kind};
use super::varint::{Cursor, unzigzag};
use crate::addr::RemoteAddr;
use std::ops::Range;

pub(super) struct ChunkDecoder {
    columns: Columns,
    /// Whether the columns of this chunk are known.
    entered: bool,
    /// Events as expected that come before the next byte of the control column.
    run: u8,
    predictor: Predictor,
    interval: u64,
    /// In units of the format.
    time: u64,
    /// Whether the file says that it has samples.
    sampled: bool,
    /// Whether it says that it has native frames.
    native: bool,
    /// Decodes what is no event, and knows the thread.
    records: v1::ChunkDecoder,
}

/// What is left of each column, as bytes of the chunk.
#[derive(Default)]
struct Columns {
    stacks: Range<usize>,
    sizes: Range<usize>,
    addresses: Range<usize>,
    control: Range<usize>,
}

impl Columns {
    fn find(raw: &[u8]) -> Option<Self> {
        let mut cursor = Cursor::new(raw, 0);
        let (stacks, sizes, addresses) = (cursor.varint()?, cursor.varint()?, cursor.varint()?);
        let mut next = |len| {
            let begin = cursor.position();
            cursor.take(len)?;
            Some(begin..cursor.position())
        };
        let (stacks, sizes, addresses) = (next(stacks)?, next(sizes)?, next(addresses)?);
        Some(Self { control: addresses.end..raw.len(), stacks, sizes, addresses })
    }
}

/// The next number of a column.
fn number(raw: &[u8], column: &mut Range<usize>) -> Result<u64, Broken> {
    let mut cursor = Cursor::new(&raw[..column.end], column.start);
    let number = cursor.varint().ok_or(ENDED)?;
    column.start = cursor.position();
    Ok(number)
}

impl ChunkDecoder {
    pub(super) fn new(sampled: bool) -> Self {
        Self {
            columns: Columns::default(),
            entered: false,
            run: 0,
            predictor: Predictor::new(),
            interval: 0,
            time: 0,
            sampled,
            native: false,
            records: v1::ChunkDecoder::new(),
        }
    }

    /// From now on there may be native frames.
    pub(super) fn allow_native(&mut self) {
        self.native = true;
    }

    /// Starts the next chunk.
    pub(super) fn reset(&mut self) {
        self.entered = false;
        self.run = 0;
        self.predictor.reset();
        (self.interval, self.time) = (0, 0);
        self.records.reset();
    }

    /// The next record of `raw`, the same chunk as in the calls before; `None` at its end.
    pub(super) fn next(&mut self, raw: &[u8], tables: &mut StackTable) -> Result<Option<Record>, Broken> {
        if self.run > 0 {
            self.run -= 1;
            return self.as_expected(tables).map(Some);
        }
        if !self.entered {
            self.columns = Columns::find(raw).ok_or("its columns do not fit into it")?;
            self.entered = true;
        }
        while !self.columns.control.is_empty() {
            if let Some(record) = self.record(raw, tables)? {
                return Ok(Some(record));
            }
        }
        Ok(None)
    }

    /// What the next byte of the control column begins. `None` for a record that only sets state.
    fn record(&mut self, raw: &[u8], tables: &mut StackTable) -> Result<Option<Record>, Broken> {
        let mut cursor = Cursor::new(raw, self.columns.control.start);
        let first = cursor.byte().ok_or(ENDED)?;
        let record = match first {
            0..control::LONGEST_RUN => {
                self.run = first;
                Some(self.as_expected(tables)?)
            }
            control::INTERVAL => {
                self.interval = cursor.varint().ok_or(ENDED)?;
                if self.interval > 0 && !self.sampled {
                    return Err("it has samples, and the file's flags say that there are none");
                }
                None
            }
            control::TIME => {
                let units = cursor.varint().ok_or(ENDED)?;
                self.time = self.time.checked_add(units).ok_or("a time is out of range")?;
                Some(Record::Time(self.time.checked_mul(TIME_UNIT_NS).ok_or("a time is out of range")?))
            }
            control::EXPECTED_ELSEWHERE | control::UNMAP | control::FREE.. => {
                let expected = self.predictor.expected();
                let shape = shape(first, &expected, raw, &mut self.columns)?;
                Some(self.event(shape, &expected, raw, tables)?)
            }
            control::MODULE | control::NATIVE_FRAME if self.native => {
                self.records.native(first, &mut cursor, tables)?.map(Record::Frame)
            }
            control::OTHERS.. => {
                self.records.other(first - control::OTHERS + tag::STRING, &mut cursor, tables)?
            }
        };
        self.columns.control.start = cursor.position();
        Ok(record)
    }

    fn as_expected(&mut self, tables: &StackTable) -> Result<Record, Broken> {
        let Expected { shape, place } = self.predictor.expected();
        let address = place.and_then(|place| self.predictor.address(shape.class(), place));
        let address = address.ok_or("an event is as expected where none is expected")?;
        self.told(shape, address, place, true, tables)
    }

    /// An event of this shape, its address in its column.
    fn event(
        &mut self,
        shape: Shape,
        expected: &Expected,
        raw: &[u8],
        tables: &StackTable,
    ) -> Result<Record, Broken> {
        let as_expected = shape == expected.shape;
        let place = match number(raw, &mut self.columns.addresses)? {
            place::BYTES => {
                let delta = number(raw, &mut self.columns.addresses).map(unzigzag)?;
                let address = self.predictor.last_address().wrapping_add(delta as u64);
                return self.told(shape, address, None, as_expected, tables);
            }
            place::EXPECTED => expected.place,
            number => Place::of(number),
        };
        let address = place.and_then(|place| self.predictor.address(shape.class(), place));
        let address = address.ok_or("an event names an address that its chunk does not have")?;
        self.told(shape, address, place, as_expected, tables)
    }

    fn told(
        &mut self,
        shape: Shape,
        address: u64,
        place: Option<Place>,
        as_expected: bool,
        tables: &StackTable,
    ) -> Result<Record, Broken> {
        if self.predictor.count() == CHUNK_EVENTS {
            return Err("it has more events than a chunk may have");
        }
        self.predictor.tell(shape, address, place, as_expected);
        let (tid, address) = (self.records.tid()?, RemoteAddr(address));
        Ok(match shape.class() {
            class::ALLOCATION => {
                if !tables.has_stack(shape.stack) {
                    return Err("an allocation names a stack that is not defined");
                }
                let allocator = kind(shape.kind())?;
                let interval = if allocator.is_ranged() { 0 } else { self.interval };
                let Shape { stack, size, .. } = shape;
                Record::Allocation(Allocation { allocator, tid, address, size, stack, interval })
            }
            class::FREE => Record::Free(Free { deallocator: kind(shape.kind())?, tid, address }),
            class::FREE_UNKNOWN => {
                Record::FreeUnknown(FreeUnknown { deallocator: kind(shape.kind())?, tid, address })
            }
            class::UNMAP => Record::Unmap(Unmap { tid, address, len: shape.size }),
            _ => return Err("an event is as expected where none is expected"),
        })
    }
}

/// The shape that an event's first byte tells.
fn shape(first: u8, expected: &Expected, raw: &[u8], columns: &mut Columns) -> Result<Shape, Broken> {
    let of = |class| Shape::of(class, first & control::KIND);
    Ok(match first {
        control::EXPECTED_ELSEWHERE => expected.shape,
        control::UNMAP => Shape { size: number(raw, &mut columns.sizes)?, ..Shape::of(class::UNMAP, 0) },
        control::ALLOCATION.. => {
            let Shape { mut stack, mut size, .. } = expected.shape;
            if first & control::EXPECTED_STACK == 0 {
                let id = u32::try_from(number(raw, &mut columns.stacks)?);
                stack = StackId(id.map_err(|_| "an allocation names a stack that is not defined")?);
            }
            if first & control::EXPECTED_SIZE == 0 {
                size = number(raw, &mut columns.sizes)?;
            }
            Shape { stack, size, ..of(class::ALLOCATION) }
        }
        control::FREE_UNKNOWN.. => of(class::FREE_UNKNOWN),
        _ => of(class::FREE),
    })
}

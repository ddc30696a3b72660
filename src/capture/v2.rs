//! Version 2: the records of version 1, and the sampling interval of allocations.
//!
//! Pure and as mistrustful as `v1`, which decodes all but the new record.

use super::format::tag;
use super::record::Record;
use super::stack_table::StackTable;
use super::v1::{self, Broken, ENDED};
use super::varint::Cursor;

pub(super) struct ChunkDecoder {
    at: usize,
    interval: u64,
    /// Whether the file says that it has samples.
    sampled: bool,
    records: v1::ChunkDecoder,
}

impl ChunkDecoder {
    pub(super) fn new(sampled: bool) -> Self {
        Self { at: 0, interval: 0, sampled, records: v1::ChunkDecoder::new() }
    }

    /// Starts the next chunk.
    pub(super) fn reset(&mut self) {
        self.at = 0;
        self.interval = 0;
        self.records.reset();
    }

    /// The next record of `raw`, the same chunk as in the calls before; `None` at its end.
    pub(super) fn next(&mut self, raw: &[u8], tables: &mut StackTable) -> Result<Option<Record>, Broken> {
        loop {
            let mut cursor = Cursor::new(raw, self.at);
            let Some(first) = cursor.byte() else { return Ok(None) };
            let mut record = None;
            if first == tag::INTERVAL {
                self.interval = cursor.varint().ok_or(ENDED)?;
                if self.interval > 0 && !self.sampled {
                    return Err("it has samples, and the file's flags say that there are none");
                }
            } else {
                record = self.records.record(first, &mut cursor, tables)?;
            }
            self.at = cursor.position();
            if let Some(Record::Allocation(event)) = &mut record
                && !event.allocator.is_ranged()
            {
                event.interval = self.interval;
            }
            if record.is_some() {
                return Ok(record);
            }
        }
    }
}

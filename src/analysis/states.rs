//! What was live, site by site, at moments of a recording: read from its snapshots, or made from its events by replaying them.
//!
//! Either way it comes as [`SnapshotPart`]s in order of time, each with what came and went since the one before, so that nothing
//! after this has to know which it was. One is held at a time.

use crate::capture::{
    AGES, Age, BYTES_FRACTION, Block, COUNT_FRACTION, CaptureError, CaptureReader, Displaced, LiveSet,
    ReadOptions, Record, Site, SiteState, Snapshot, SnapshotHead, SnapshotPart, StackTable, Totals, Wanted,
    Weight, age_class,
};
use foldhash::fast::RandomState;
use std::collections::HashMap;
use std::path::Path;

/// Hands out the snapshots of a capture with their places, in the order of the file and in parts: what of them, `wanted` says for
/// each place. `heads` are those that are whole.
pub fn each_snapshot(
    (path, options): (&Path, &ReadOptions),
    heads: &[SnapshotHead],
    wanted: impl Fn(usize) -> Wanted,
    mut see: impl FnMut(usize, &SnapshotPart, &StackTable),
) -> Result<(), CaptureError> {
    let mut reader = CaptureReader::open_with(path, options)?;
    reader.give_parts();
    let mut place = 0;
    reader.want(wanted(place));
    while place < heads.len()
        && let Some(record) = reader.next()
    {
        if let Record::Snapshot = record?
            && reader.part().head == heads[place]
        {
            let part = reader.part();
            see(place, part, reader.stacks());
            if part.is_last {
                place += 1;
                reader.want(wanted(place));
            }
        }
    }
    Ok(())
}

/// Replays the events of a capture and hands out what was live at each of `times` (nanoseconds since the start, ascending).
pub fn replay_at(
    (path, options): (&Path, &ReadOptions),
    times: &[u64],
    mut see: impl FnMut(usize, &SnapshotPart, &StackTable),
) -> Result<(), CaptureError> {
    let mut reader = CaptureReader::open_with(path, options)?;
    reader.want(Wanted::NOTHING);
    let (mut states, start) = (States::new(reader.header().page_size), reader.header().start_unix_ns);
    let mut due = times.iter().enumerate();
    let mut next = due.next();
    let mut take = |states: &mut States, (place, time_ns): (usize, &u64), stacks: &StackTable| {
        let unix_ns = start.saturating_add(*time_ns);
        let head =
            SnapshotHead { index: place as u32, time_ns: *time_ns, unix_ns, ..SnapshotHead::default() };
        see(place, &SnapshotPart::of(&states.snapshot(head)), stacks);
    };
    while let Some(record) = reader.next() {
        let record = record?;
        if let Record::Time(now) = record {
            while let Some(moment) = next.filter(|(_, time)| **time < now) {
                take(&mut states, moment, reader.stacks());
                next = due.next();
            }
        }
        states.observe(&record);
    }
    while let Some(moment) = next {
        take(&mut states, moment, reader.stacks());
        next = due.next();
    }
    Ok(())
}

/// What came and what went.
type Flows = (Totals, Totals);

/// The live set, and what came and went at each site since the last snapshot.
struct States {
    live: LiveSet,
    flows: HashMap<Site, Flows, RandomState>,
    time_ns: u64,
}

impl States {
    fn new(page_size: u64) -> Self {
        Self { live: LiveSet::new(page_size), flows: HashMap::default(), time_ns: 0 }
    }

    fn observe(&mut self, record: &Record) {
        match record {
            Record::Time(ns) => self.time_ns = self.time_ns.max(*ns),
            Record::Allocation(event) => {
                match self.live.allocate(event, self.time_ns) {
                    Displaced::Nothing => {}
                    Displaced::Block(old) => self.went(&old, Totals::one(old.size, old.interval)),
                    Displaced::Mappings(parts) => {
                        for part in parts {
                            self.went(&part.mapping, Totals::certain(part.bytes, u64::from(part.ended)));
                        }
                    }
                }
                let one = if event.allocator.is_ranged() {
                    Totals::certain(event.size.min(u64::MAX - event.address.0), 1)
                } else {
                    Totals::one(event.size, event.interval)
                };
                self.flows.entry(Site::of(event)).or_default().0.add(one);
            }
            Record::Free(event) => {
                if let Some(block) = self.live.free(event.address) {
                    self.went(&block, Totals::one(block.size, block.interval));
                }
            }
            Record::Unmap(event) => {
                for part in self.live.unmap(event) {
                    self.went(&part.mapping, Totals::certain(part.bytes, u64::from(part.ended)));
                }
            }
            _ => {}
        }
    }

    fn went(&mut self, block: &Block, part: Totals) {
        self.flows.entry(block.site()).or_default().1.add(part);
    }

    fn snapshot(&mut self, head: SnapshotHead) -> Snapshot {
        let mut rows: HashMap<Site, SiteState, RandomState> = HashMap::default();
        let now_ms = head.time_ns / 1_000_000;
        // Of each class of age, with the fractions that weights have.
        let mut ages: HashMap<Site, [Age; AGES], RandomState> = HashMap::default();
        for (block, bytes) in self.live.iter() {
            let interval = if block.allocator.is_ranged() { 0 } else { block.interval };
            let row = rows.entry(block.site()).or_default();
            row.live.add(Totals::one(bytes, interval));
            let weight = Weight::of(bytes, interval);
            let class = age_class(now_ms.saturating_sub(u64::from(block.time_ms)));
            let age = &mut ages.entry(block.site()).or_default()[class];
            age.bytes = age.bytes.saturating_add(weight.bytes);
            age.blocks = age.blocks.saturating_add(weight.count);
        }
        for (site, (came, went)) in self.flows.drain() {
            let row = rows.entry(site).or_default();
            (row.allocated, row.freed) = (came, went);
        }
        let mut rows: Vec<SiteState> = rows
            .into_iter()
            .map(|(Site { stack, allocator, tid }, row)| {
                let ages = ages.get(&Site { stack, allocator, tid }).copied().unwrap_or_default();
                let whole = |age: Age| Age {
                    bytes: age.bytes >> BYTES_FRACTION,
                    blocks: age.blocks >> COUNT_FRACTION,
                };
                SiteState { stack, allocator, tid, ages: ages.map(whole), ..row }
            })
            .collect();
        rows.sort_unstable_by_key(|row| (row.stack, row.allocator, row.tid));
        Snapshot { head, rows }
    }
}

//! `dump`: every record, as text or as JSON lines, as it is read.
//!
//! Streams: unlike the other reports it needs no analysis and holds nothing but the reader's tables.

use super::ReportError;
use super::dump_moments::{gauges_json, gauges_text, snapshot_json, snapshot_text};
use super::facts::{file_warnings, write_header};
use super::names::{location, place};
use super::text::{escaped, size, terminal_safe_json};
use crate::capture::{
    Allocation, CaptureError, CaptureReader, FrameId, LiveSet, Record, StackId, StackTable, each,
};
use serde_json::{Value, json};
use std::collections::HashSet;
use std::io::Write;

/// A capture could not be dumped.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    /// The capture could not be read.
    #[error(transparent)]
    Capture(#[from] CaptureError),
    /// The dump could not be written.
    #[error(transparent)]
    Report(#[from] ReportError),
}

impl From<std::io::Error> for DumpError {
    fn from(error: std::io::Error) -> Self {
        Self::Report(error.into())
    }
}

impl From<serde_json::Error> for DumpError {
    fn from(error: serde_json::Error) -> Self {
        Self::Report(error.into())
    }
}

/// The allocations of a capture of which something was left at its end, by their number in the order of the
/// file, from 0. Holds what is live, no more.
pub fn not_freed(reader: CaptureReader) -> Result<HashSet<u32>, DumpError> {
    if reader.header().aggregated {
        let what = "was not freed";
        return Err(CaptureError::NoEventLog { path: reader.path().to_owned(), what }.into());
    }
    let mut live = LiveSet::new(reader.header().page_size);
    let mut number = 0;
    for record in reader {
        match record? {
            Record::Allocation(event) => {
                // The set keeps an id of the caller's with each block: here it is the allocation's number.
                live.allocate(&Allocation { stack: StackId(number), ..event }, 0);
                number += 1;
            }
            Record::Free(event) => drop(live.free(event.address)),
            Record::Unmap(event) => drop(live.unmap(&event)),
            _ => {}
        }
    }
    Ok(live.iter().map(|(block, _)| block.stack.0).collect())
}

/// Writes everything that `reader` still holds; of allocations and what became of them only the allocations in
/// `only`, where that is given. With `json`, one object per line: the header, the records, and at last how the file
/// ends.
pub fn dump(
    mut reader: CaptureReader,
    json: bool,
    only: Option<&HashSet<u32>>,
    out: &mut dyn Write,
) -> Result<(), DumpError> {
    if json {
        let header = json!({ "record": "header", "header": reader.header() });
        write_line(&header, out)?;
    } else {
        write_header(reader.header(), out)?;
        if let Some(mean) = reader.header().sampling_mean_bytes {
            let mean = size(mean);
            writeln!(
                out,
                "Sampled at {mean} mean: weight is how many allocations a recorded one stands for"
            )?;
        }
        writeln!(out)?;
    }
    let sampled = reader.header().sampling_mean_bytes.is_some();
    let mut number = 0;
    while let Some(record) = reader.next() {
        let record = record?;
        if !is_wanted(&record, only, &mut number) {
            continue;
        }
        match record {
            Record::Snapshot | Record::Gauges => write_moment(&record, &mut reader, json, out)?,
            _ if json => write_line(&as_json(&record, sampled, reader.stacks()), out)?,
            _ => writeln!(out, "{}", as_text(&record, sampled, reader.stacks()))?,
        }
    }
    let warnings = file_warnings(reader.cut(), reader.damage());
    if json {
        let end = json!({
            "record": "end",
            "complete": reader.trailer().is_some(),
            "trailer": reader.trailer(),
            "warnings": warnings,
        });
        write_line(&end, out)?;
    } else {
        writeln!(out)?;
        if let Some(trailer) = reader.trailer() {
            writeln!(out, "ended: {}", escaped(&trailer.reason.text()))?;
        }
        for warning in warnings {
            writeln!(out, "warning: {warning}")?;
        }
    }
    Ok(())
}

/// A snapshot, or gauges.
fn write_moment(
    record: &Record,
    reader: &mut CaptureReader,
    json: bool,
    out: &mut dyn Write,
) -> Result<(), DumpError> {
    if *record == Record::Gauges {
        if !json {
            writeln!(out, "{}", gauges_text(reader.gauges()))?;
            return Ok(());
        }
        return reader.gauges().iter().try_for_each(|moment| write_line(&gauges_json(moment), out));
    }
    let Some(snapshot) = reader.snapshot() else { return Ok(()) };
    if json {
        write_line(&snapshot_json(&snapshot), out)?;
    } else {
        writeln!(out, "{}", snapshot_text(&snapshot))?;
    }
    Ok(())
}

/// `number` counts the allocations met.
fn is_wanted(record: &Record, only: Option<&HashSet<u32>>, number: &mut u32) -> bool {
    match record {
        Record::Allocation(_) => {
            *number += 1;
            only.is_none_or(|only| only.contains(&(*number - 1)))
        }
        Record::Free(_) | Record::FreeUnknown(_) | Record::Unmap(_) => only.is_none(),
        _ => true,
    }
}

fn write_line(value: &Value, out: &mut dyn Write) -> Result<(), DumpError> {
    let line = serde_json::to_string(value)?;
    writeln!(out, "{}", terminal_safe_json(&line))?;
    Ok(())
}

fn as_text(record: &Record, sampled: bool, stacks: &StackTable) -> String {
    match record {
        Record::String(id) => format!("string {} {:?}", id.0, escaped(stacks.string(*id))),
        Record::Frame(id) => format!("frame {} {}", id.0, place(Some(*id), stacks)),
        Record::Stack(id) => {
            let (frame, caller) = stacks.node(*id).unwrap_or((FrameId(u32::MAX), *id));
            format!("stack {} caller {} {}", id.0, caller.0, place(Some(frame), stacks))
        }
        Record::Thread(tid) => format!("thread {}", super::names::thread(*tid, stacks)),
        Record::Time(ns) => format!("time {}.{:09}", ns / 1_000_000_000, ns % 1_000_000_000),
        Record::Allocation(event) => allocation_text(event, sampled),
        Record::Free(event) => {
            format!("free by {} tid {} address {}", event.deallocator.name(), event.tid, event.address)
        }
        Record::FreeUnknown(event) => {
            let name = event.deallocator.name();
            format!("free from before by {name} tid {} address {}", event.tid, event.address)
        }
        Record::Unmap(event) => {
            format!("unmap tid {} address {} size {}", event.tid, event.address, event.len)
        }
        Record::Drop { count, reason } => format!("dropped {count}: {}", reason.text()),
        Record::Gap { duration_ns, reason } => format!("gap of {duration_ns} ns: {}", reason.text()),
        // Told by `write_moment`.
        Record::Snapshot | Record::Gauges => String::new(),
    }
}

fn as_json(record: &Record, sampled: bool, stacks: &StackTable) -> Value {
    match record {
        Record::String(id) => json!({ "record": "string", "id": id.0, "text": stacks.string(*id) }),
        Record::Frame(id) => {
            let place = location(Some(*id), stacks);
            let mut object = json!(place);
            (object["record"], object["id"]) = ("frame".into(), id.0.into());
            object
        }
        Record::Stack(id) => {
            let node = stacks.node(*id);
            json!({
                "record": "stack", "id": id.0,
                "caller": node.map(|(_, caller)| caller.0), "frame": node.map(|(frame, _)| frame.0),
            })
        }
        Record::Thread(tid) => {
            let known = |name: &String| (!name.is_empty()).then(|| name.clone());
            let names = stacks.thread(*tid);
            json!({
                "record": "thread", "tid": tid,
                "os_name": names.and_then(|n| known(&n.os)), "python_name": names.and_then(|n| known(&n.python)),
            })
        }
        Record::Time(ns) => json!({ "record": "time", "ns": ns }),
        Record::Allocation(event) => allocation_json(event, sampled),
        Record::Free(event) => json!({
            "record": "free", "deallocator": event.deallocator.name(), "tid": event.tid,
            "address": event.address.0,
        }),
        Record::FreeUnknown(event) => json!({
            "record": "free_from_before", "deallocator": event.deallocator.name(), "tid": event.tid,
            "address": event.address.0,
        }),
        Record::Unmap(event) => json!({
            "record": "unmap", "tid": event.tid, "address": event.address.0, "bytes": event.len,
        }),
        Record::Drop { count, reason } => {
            json!({ "record": "drop", "count": count, "reason": reason.text() })
        }
        Record::Gap { duration_ns, reason } => {
            json!({ "record": "gap", "duration_ns": duration_ns, "reason": reason.text() })
        }
        Record::Snapshot | Record::Gauges => Value::Null,
    }
}

fn allocation_text(event: &Allocation, sampled: bool) -> String {
    let Allocation { allocator, tid, address, size, stack, interval } = event;
    let mut text = format!("{} tid {tid} address {address} size {size} stack {}", allocator.name(), stack.0);
    if sampled {
        text.push_str(&format!(" interval {interval} weight {}", weight(event)));
    }
    text
}

fn allocation_json(event: &Allocation, sampled: bool) -> Value {
    let mut object = json!({
        "record": "allocation", "allocator": event.allocator.name(), "tid": event.tid,
        "address": event.address.0, "bytes": event.size, "stack": event.stack.0,
    });
    if sampled {
        object["interval"] = event.interval.into();
        object["weight"] = weight(event).into();
    }
    object
}

/// How many allocations it stands for, to six decimals.
fn weight(event: &Allocation) -> f64 {
    (each(event.size, event.interval) * 1e6).round() / 1e6
}

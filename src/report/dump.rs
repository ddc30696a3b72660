//! `dump`: every record, as text or as JSON lines, as it is read.
//!
//! Streams: unlike the other reports it needs no analysis and holds nothing but the reader's tables.

use super::ReportError;
use super::facts::{file_warnings, write_header};
use super::names::{location, place, thread_name};
use super::text::{escaped, terminal_safe_json};
use crate::capture::{CaptureError, CaptureReader, FrameId, Record, StackTable};
use serde_json::{Value, json};
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

/// Writes everything that `reader` still holds. With `json`, one object per line: the header, the
/// records, and at last how the file ends.
pub fn dump(mut reader: CaptureReader, json: bool, out: &mut dyn Write) -> Result<(), DumpError> {
    if json {
        let header = json!({ "record": "header", "header": reader.header() });
        write_line(&header, out)?;
    } else {
        write_header(reader.header(), out)?;
        writeln!(out)?;
    }
    while let Some(record) = reader.next() {
        let record = record?;
        if json {
            write_line(&as_json(&record, reader.stacks()), out)?;
        } else {
            writeln!(out, "{}", as_text(&record, reader.stacks()))?;
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

fn write_line(value: &Value, out: &mut dyn Write) -> Result<(), DumpError> {
    let line = serde_json::to_string(value)?;
    writeln!(out, "{}", terminal_safe_json(&line))?;
    Ok(())
}

fn as_text(record: &Record, stacks: &StackTable) -> String {
    match record {
        Record::String(id) => format!("string {} {:?}", id.0, escaped(stacks.string(*id))),
        Record::Frame(id) => format!("frame {} {}", id.0, place(Some(*id), stacks)),
        Record::Stack(id) => {
            let (frame, caller) = stacks.node(*id).unwrap_or((FrameId(u32::MAX), *id));
            format!("stack {} caller {} {}", id.0, caller.0, place(Some(frame), stacks))
        }
        Record::Thread(tid) => format!("thread {}", super::names::thread(*tid, stacks)),
        Record::Time(ns) => format!("time {}.{:09}", ns / 1_000_000_000, ns % 1_000_000_000),
        Record::Allocation(event) => format!(
            "{} tid {} address {} size {} stack {}",
            event.allocator.name(),
            event.tid,
            event.address,
            event.size,
            event.stack.0
        ),
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
    }
}

fn as_json(record: &Record, stacks: &StackTable) -> Value {
    match record {
        Record::String(id) => json!({ "record": "string", "id": id.0, "text": stacks.string(*id) }),
        Record::Frame(id) => {
            let place = location(Some(*id), stacks);
            json!({
                "record": "frame", "id": id.0,
                "function": place.function, "file": place.file, "line": place.line,
            })
        }
        Record::Stack(id) => {
            let node = stacks.node(*id);
            json!({
                "record": "stack", "id": id.0,
                "caller": node.map(|(_, caller)| caller.0), "frame": node.map(|(frame, _)| frame.0),
            })
        }
        Record::Thread(tid) => {
            json!({ "record": "thread", "tid": tid, "name": thread_name(*tid, stacks) })
        }
        Record::Time(ns) => json!({ "record": "time", "ns": ns }),
        Record::Allocation(event) => json!({
            "record": "allocation", "allocator": event.allocator.name(), "tid": event.tid,
            "address": event.address.0, "bytes": event.size, "stack": event.stack.0,
        }),
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
    }
}

//! `gauges`: the target's memory over time, and what its growth is made of.

use super::columns::{Column, Kind, write_columns};
use super::dump::DumpError;
use super::facts::{file_warnings, write_header};
use super::text::{duration, number, percent, size};
use super::{ReportError, text};
use crate::analysis::{GaugeSeries, Growth, gauge_series};
use crate::capture::{CaptureError, CaptureReader, Gauges};
use serde_json::{Map, Value, json};
use std::io::Write;

/// How gauges are written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GaugesFormat {
    /// A table of so many rows at most (0: all that are kept), in so many columns of the terminal.
    Table(usize, Option<usize>),
    /// One JSON document with every moment.
    Json,
    /// A heading and a line per moment.
    Csv,
}

/// Writes the gauges of a capture.
pub fn write_gauges(
    mut reader: CaptureReader,
    format: GaugesFormat,
    out: &mut dyn Write,
) -> Result<(), DumpError> {
    match format {
        GaugesFormat::Table(rows, width) => table(&mut reader, rows, width, out),
        GaugesFormat::Json => json(&mut reader, out),
        GaugesFormat::Csv => csv(&mut reader, out),
    }
}

const NONE: ReportError =
    ReportError::Nothing("it holds no gauges (an older heaptap wrote it, or it ended at once)");

fn table(
    reader: &mut CaptureReader,
    most: usize,
    width: Option<usize>,
    out: &mut dyn Write,
) -> Result<(), DumpError> {
    let series = gauge_series::<CaptureError>(reader, |_| Ok(()))?;
    if series.moments() == 0 {
        return Err(NONE.into());
    }
    write_header(reader.header(), out)?;
    for warning in file_warnings(reader.cut(), reader.damage()) {
        writeln!(out, "warning: {warning}")?;
    }
    let rows = series.rows(most);
    writeln!(out, "Gauges of {} moments, in {} rows\n", number(series.moments()), number(rows.len() as u64))?;
    let shown: Vec<&Shown> =
        SHOWN.iter().filter(|shown| rows.iter().any(|row| (shown.of)(row).is_some())).collect();
    let time = Column { heading: "Time", short: "Time", kind: Kind::Figures };
    let columns: Vec<Column> =
        std::iter::once(time).chain(shown.iter().map(|shown| shown.column())).collect();
    let cells: Vec<Vec<String>> = rows
        .iter()
        .map(|row| {
            std::iter::once(clock(row.time_ns)).chain(shown.iter().map(|shown| shown.cell(row))).collect()
        })
        .collect();
    write_columns(&columns, &cells, width, out)?;
    writeln!(out)?;
    if let Some(line) = limit(series.last()) {
        writeln!(out, "{line}")?;
    }
    writeln!(out, "{}", verdict(&series))?;
    Ok(())
}

/// A column of the table.
struct Shown {
    heading: &'static str,
    short: &'static str,
    kind: Kind,
    bytes: bool,
    of: fn(&Gauges) -> Option<u64>,
}

impl Shown {
    fn column(&self) -> Column {
        Column { heading: self.heading, short: self.short, kind: self.kind }
    }

    fn cell(&self, row: &Gauges) -> String {
        let shown = if self.bytes { size } else { number };
        (self.of)(row).map_or_else(|| "-".to_owned(), shown)
    }
}

/// In the order of the table. Columns of which nothing is known are left out; shares give way on a narrow terminal.
const SHOWN: &[Shown] = &[
    Shown { heading: "RSS", short: "RSS", kind: Kind::Figures, bytes: true, of: |g| g.resident },
    Shown { heading: "PSS", short: "PSS", kind: Kind::Share, bytes: true, of: |g| g.proportional },
    Shown { heading: "Recorded live", short: "Live", kind: Kind::Figures, bytes: true, of: |g| g.live },
    Shown {
        heading: "Heap in use",
        short: "In use",
        kind: Kind::Figures,
        bytes: true,
        of: |g| g.heap_in_use,
    },
    Shown { heading: "Heap held free", short: "Free", kind: Kind::Figures, bytes: true, of: |g| g.heap_free },
    Shown { heading: "pymalloc arenas", short: "Arenas", kind: Kind::Figures, bytes: true, of: |g| g.arenas },
    Shown {
        heading: "thereof in use",
        short: "In use",
        kind: Kind::Share,
        bytes: true,
        of: |g| g.arenas_in_use,
    },
    Shown { heading: "Threads", short: "Thr", kind: Kind::Share, bytes: false, of: |g| g.threads },
    Shown { heading: "Fds", short: "Fds", kind: Kind::Share, bytes: false, of: |g| g.descriptors },
];

/// `1:02:03`.
fn clock(ns: u64) -> String {
    let seconds = ns / 1_000_000_000;
    format!("{}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

fn limit(last: &Gauges) -> Option<String> {
    let limit = last.limit?;
    let used = last.limit_used.map_or_else(String::new, |used| {
        format!(", of which {} ({:.0} %) is used", size(used), percent(used, limit))
    });
    Some(format!("Its cgroup may use {}{used}", size(limit)))
}

/// The last line: what the growth is made of.
fn verdict(series: &GaugeSeries) -> String {
    let Some(growth) = series.growth() else { return "The resident set is not known".to_owned() };
    let parts = [
        ("heap in use", growth.heap_in_use),
        ("held free by the allocator", growth.heap_free),
        ("pymalloc", growth.arenas),
        ("other", Some(growth.other)),
    ];
    let parts = parts.iter().filter_map(|(name, part)| part.map(|part| format!("{name} {}", signed(part))));
    let verb = if growth.resident < 0 { "shrank" } else { "grew" };
    let span = duration(growth.to_ns.saturating_sub(growth.from_ns));
    format!(
        "RSS {verb} by {} in {span}: {}",
        size(growth.resident.unsigned_abs()),
        parts.collect::<Vec<_>>().join(", ")
    )
}

/// `1.5 KiB`, `-1.5 KiB`.
fn signed(bytes: i64) -> String {
    let sign = if bytes < 0 { "-" } else { "" };
    format!("{sign}{}", size(bytes.unsigned_abs()))
}

/// The moments are written as they are read: there may be many.
fn json(reader: &mut CaptureReader, out: &mut dyn Write) -> Result<(), DumpError> {
    let header = reader.header();
    let run = json!({
        "pid": header.pid, "command_line": header.command_line, "start_unix_ns": header.start_unix_ns,
        "python": header.python.version, "sampling_mean_bytes": header.sampling_mean_bytes,
    });
    let line = |value: &Value| -> Result<String, ReportError> {
        Ok(text::terminal_safe_json(&serde_json::to_string(value)?).into_owned())
    };
    write!(out, "{{\n  \"report\": \"gauges\",\n  \"run\": {},\n  \"moments\": [", line(&run)?)?;
    let mut between = "\n    ";
    let series = gauge_series::<DumpError>(reader, |moment| {
        write!(out, "{between}{}", line(&moment_json(moment))?)?;
        between = ",\n    ";
        Ok(())
    })?;
    let growth = series.growth().map(|growth| growth_json(&growth));
    let rest = json!({ "complete": reader.trailer().is_some(), "damaged_chunks": reader.damage().chunks });
    let verdict = if series.moments() == 0 { Value::Null } else { verdict(&series).into() };
    writeln!(out, "\n  ],\n  \"growth\": {},", line(&growth.into())?)?;
    writeln!(out, "  \"verdict\": {},\n  \"file\": {}\n}}", line(&verdict)?, line(&rest)?)?;
    Ok(())
}

/// Unknown gauges are null.
fn moment_json(moment: &Gauges) -> Value {
    let mut object = Map::new();
    object.insert("time_ns".into(), moment.time_ns.into());
    for (name, value) in Gauges::NAMES.iter().zip(moment.values()) {
        object.insert((*name).into(), value.into());
    }
    object.into()
}

fn growth_json(growth: &Growth) -> Value {
    json!({
        "from_ns": growth.from_ns, "to_ns": growth.to_ns, "resident": growth.resident, "live": growth.live,
        "heap_in_use": growth.heap_in_use, "heap_free": growth.heap_free, "arenas": growth.arenas,
        "other": growth.other,
    })
}

/// Unknown gauges are empty. There is nothing to be quoted in it.
fn csv(reader: &mut CaptureReader, out: &mut dyn Write) -> Result<(), DumpError> {
    writeln!(out, "time_s,{}", Gauges::NAMES.join(","))?;
    let series = gauge_series::<DumpError>(reader, |moment| {
        let values =
            moment.values().into_iter().map(|value| value.map_or_else(String::new, |v| v.to_string()));
        let time = moment.time_ns as f64 / 1e9;
        writeln!(out, "{time:.3},{}", values.collect::<Vec<_>>().join(","))?;
        Ok(())
    })?;
    if series.moments() == 0 { Err(NONE.into()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series() -> GaugeSeries {
        let mut series = GaugeSeries::default();
        series.push(&Gauges {
            resident: Some(100 << 20),
            heap_in_use: Some(50 << 20),
            heap_free: Some(20 << 20),
            limit: Some(512 << 20),
            ..Gauges::default()
        });
        series.push(&Gauges {
            time_ns: 3_723_000_000_000,
            resident: Some(160 << 20),
            heap_in_use: Some(90 << 20),
            heap_free: Some(10 << 20),
            limit_used: Some(256 << 20),
            ..Gauges::default()
        });
        series
    }

    #[test]
    fn the_last_line_says_what_the_growth_is_made_of() {
        assert_eq!(
            verdict(&series()),
            "RSS grew by 60.0 MiB in 62 min 3 s: heap in use 40.0 MiB, held free by the allocator -10.0 MiB, other 30.0 MiB"
        );
        assert_eq!(
            limit(series().last()).unwrap(),
            "Its cgroup may use 512.0 MiB, of which 256.0 MiB (50 %) is used"
        );
        assert_eq!(clock(3_723_000_000_000), "1:02:03");
    }
}

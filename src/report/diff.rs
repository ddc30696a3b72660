//! `diff`: what grew between two moments, one row per group.

use super::columns::{Column, Kind, write_columns};
use super::facts::{Facts, write_run};
use super::figures::{Figures, is_false};
use super::names::{NO_STACK, NativeCode, place_text};
use super::text::{duration, escaped, size, timestamp};
use super::{ReportError, limited, write_json, write_rest};
use crate::analysis::{Change, Diff, DiffRow, FrameName, GroupName, Grouping, Moment, Outline};
use serde::Serialize;
use std::collections::BTreeSet;
use std::io::Write;
use std::sync::Arc;

/// How a diff is written.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum DiffFormat {
    /// A table for people.
    #[default]
    Text,
    /// One JSON document.
    Json,
    /// Comma-separated values, a heading first.
    Csv,
}

/// The report.
pub struct DiffReport<'a> {
    /// What grew.
    pub diff: &'a Diff,
    /// What the rows are.
    pub grouping: Grouping,
    /// Whether a stack counts for all of its frames.
    pub cumulative: bool,
    /// The capture of the first moment, if it is not that of the second.
    pub old: Option<&'a Outline>,
    /// The first moment.
    pub from: Moment,
    /// The capture of the second moment.
    pub new: &'a Outline,
    /// The second moment.
    pub to: Moment,
    /// The most rows; 0 for all.
    pub max_rows: usize,
}

#[derive(Serialize)]
struct Document<'a> {
    report: &'static str,
    run: Facts<'a>,
    old_run: Option<Facts<'a>>,
    #[serde(skip_serializing_if = "is_false")]
    estimated: bool,
    by: &'static str,
    cumulative: bool,
    from: MomentFields,
    to: MomentFields,
    #[serde(skip_serializing_if = "BTreeSet::is_empty")]
    moved: &'a BTreeSet<(String, String)>,
    total: Fields,
    rows: Vec<Row<'a>>,
}

#[derive(Serialize)]
struct MomentFields {
    time_ns: u64,
    unix_ns: u64,
    snapshot: Option<u32>,
    reason: Option<&'static str>,
}

#[derive(Serialize)]
struct Row<'a> {
    #[serde(flatten)]
    name: NameFields<'a>,
    #[serde(flatten)]
    figures: Fields,
}

/// Words of a group; those that it is not grouped by are left out.
#[derive(Serialize)]
#[serde(untagged)]
enum NameFields<'a> {
    Line {
        function: Option<&'a str>,
        file: Option<&'a str>,
        line: Option<u32>,
        #[serde(flatten)]
        code: Option<NativeCode<'a>>,
    },
    File {
        file: Option<&'a str>,
    },
    Function {
        function: Option<&'a str>,
        file: Option<&'a str>,
        #[serde(flatten)]
        code: Option<NativeCode<'a>>,
    },
    Module {
        module: Option<&'a str>,
    },
    Allocator {
        allocator: Option<&'a str>,
    },
    Thread {
        thread: Option<&'a str>,
    },
    Traceback {
        traceback: Vec<FrameFields<'a>>,
    },
}

#[derive(Serialize)]
struct FrameFields<'a> {
    function: &'a str,
    file: &'a str,
    line: Option<u32>,
    #[serde(flatten)]
    code: Option<NativeCode<'a>>,
}

/// Figures of a row, also the columns of CSV.
#[derive(Serialize)]
struct Fields {
    bytes: u64,
    growth_bytes: i64,
    count: u64,
    growth_count: i64,
    average_bytes: Option<u64>,
    old_bytes: u64,
    old_count: u64,
    #[serde(flatten)]
    errors: Option<Errors>,
}

#[derive(Serialize)]
struct Errors {
    bytes_error_95: u64,
    growth_bytes_error_95: u64,
    count_error_95: f64,
    growth_count_error_95: f64,
    samples: u64,
}

impl DiffReport<'_> {
    /// Writes all of it.
    pub fn write(
        &self,
        format: DiffFormat,
        width: Option<usize>,
        out: &mut dyn Write,
    ) -> Result<(), ReportError> {
        let rows = limited(&self.diff.rows, self.max_rows);
        match format {
            DiffFormat::Text => self.text(rows, width, out),
            DiffFormat::Json => self.json(rows, out),
            DiffFormat::Csv => self.csv(rows, out),
        }
    }

    fn figures(&self) -> Figures {
        let sampled = |outline: &Outline| Figures::of(&outline.findings).estimated;
        Figures { estimated: sampled(self.new) || self.old.is_some_and(sampled) }
    }

    fn text(&self, rows: &[DiffRow], width: Option<usize>, out: &mut dyn Write) -> Result<(), ReportError> {
        if let Some(old) = self.old {
            writeln!(out, "Old: {}", escaped(&old.path.display().to_string()))?;
            write_run(&old.findings, out)?;
            writeln!(out, "New: {}", escaped(&self.new.path.display().to_string()))?;
        }
        write_run(&self.new.findings, out)?;
        writeln!(out, "From {}", moment_text(self.old.unwrap_or(self.new), self.from))?;
        writeln!(out, "to {}", moment_text(self.new, self.to))?;
        for (old, new) in &self.diff.moved {
            writeln!(out, "Code in {} is taken for that in {}", escaped(old), escaped(new))?;
        }
        let (figures, total) = (self.figures(), &self.diff.total);
        writeln!(
            out,
            "Live: {}; growth: {} in {} blocks",
            figures.amount(&total.new, "block"),
            growth(figures, total),
            count_growth(figures, total)
        )?;
        writeln!(out)?;
        let cells: Vec<Vec<String>> = rows.iter().map(|row| cells(figures, row)).collect();
        let columns = columns(self.grouping);
        write_columns(&columns, &cells, width, out)?;
        write_rest(rows.len(), self.diff.rows.len(), out)?;
        Ok(())
    }

    fn json(&self, rows: &[DiffRow], out: &mut dyn Write) -> Result<(), ReportError> {
        let figures = self.figures();
        let document = Document {
            report: "diff",
            run: Facts::of(&self.new.findings),
            old_run: self.old.map(|old| Facts::of(&old.findings)),
            estimated: figures.estimated,
            by: name_of(self.grouping),
            cumulative: self.cumulative,
            from: MomentFields::of(self.old.unwrap_or(self.new), self.from),
            to: MomentFields::of(self.new, self.to),
            moved: &self.diff.moved,
            total: Fields::of(figures, &self.diff.total),
            rows: rows
                .iter()
                .map(|row| Row {
                    name: NameFields::of(self.grouping, &row.name),
                    figures: Fields::of(figures, &row.change),
                })
                .collect(),
        };
        write_json(&document, out)
    }

    fn csv(&self, rows: &[DiffRow], out: &mut dyn Write) -> Result<(), ReportError> {
        let figures = self.figures();
        let mut csv = csv::Writer::from_writer(out);
        let mut heading = name_columns(self.grouping).to_vec();
        heading.extend([
            "bytes",
            "growth_bytes",
            "count",
            "growth_count",
            "average_bytes",
            "old_bytes",
            "old_count",
        ]);
        if figures.estimated {
            heading.extend([
                "bytes_error_95",
                "growth_bytes_error_95",
                "count_error_95",
                "growth_count_error_95",
                "samples",
            ]);
        }
        csv.write_record(heading).map_err(csv_error)?;
        for DiffRow { name, change } in rows {
            let Fields {
                bytes,
                growth_bytes,
                count,
                growth_count,
                average_bytes,
                old_bytes,
                old_count,
                errors,
            } = Fields::of(figures, change);
            let mut record: Vec<String> =
                name_columns(self.grouping).iter().map(|c| name_cell(c, name)).collect();
            let average = average_bytes.map(|average| average.to_string()).unwrap_or_default();
            record.extend([
                bytes.to_string(),
                growth_bytes.to_string(),
                count.to_string(),
                growth_count.to_string(),
            ]);
            record.extend([average, old_bytes.to_string(), old_count.to_string()]);
            if let Some(errors) = errors {
                record.extend([errors.bytes_error_95.to_string(), errors.growth_bytes_error_95.to_string()]);
                record.extend([errors.count_error_95.to_string(), errors.growth_count_error_95.to_string()]);
                record.push(errors.samples.to_string());
            }
            csv.write_record(record).map_err(csv_error)?;
        }
        csv.flush()?;
        Ok(())
    }
}

fn csv_error(error: csv::Error) -> ReportError {
    match error.into_kind() {
        csv::ErrorKind::Io(error) => ReportError::Write(error),
        other => ReportError::Write(std::io::Error::other(format!("{other:?}"))),
    }
}

impl MomentFields {
    fn of(outline: &Outline, moment: Moment) -> Self {
        let head = moment.place.map(|place| outline.snapshots[place]);
        Self {
            time_ns: moment.time_ns,
            unix_ns: unix_ns(outline, moment),
            snapshot: head.map(|head| head.index),
            reason: head.map(|head| head.reason.name()),
        }
    }
}

/// The wall clock at a moment: a snapshot has read it, else it is reckoned from the start.
fn unix_ns(outline: &Outline, moment: Moment) -> u64 {
    let reckoned = outline.findings.header.start_unix_ns.saturating_add(moment.time_ns);
    moment.place.map_or(reckoned, |place| outline.clock_of(&outline.snapshots[place]))
}

/// `snapshot 17 (tick), 12 min 5 s after the start, 2026-11-21T07:49:43Z`.
fn moment_text(outline: &Outline, moment: Moment) -> String {
    if moment == Moment::START {
        return "the start of recording, when nothing was recorded yet".to_owned();
    }
    let time =
        format!("{} after the start, {}", duration(moment.time_ns), timestamp(unix_ns(outline, moment)));
    match moment.place.map(|place| outline.snapshots[place]) {
        Some(head) => format!("snapshot {} ({}), {time}", head.index, head.reason.name()),
        None => time,
    }
}

impl<'a> NameFields<'a> {
    fn of(grouping: Grouping, name: &'a GroupName) -> Self {
        let GroupName { function, file, line, library, module, allocator, thread, traceback } = name;
        let (function, file) = (function.as_deref(), file.as_deref());
        let code = library.as_deref().map(NativeCode::of);
        match grouping {
            Grouping::Lineno | Grouping::Site => Self::Line { function, file, line: *line, code },
            Grouping::Filename => Self::File { file },
            Grouping::Function => Self::Function { function, file, code },
            Grouping::Module => Self::Module { module: module.as_deref() },
            Grouping::Allocator => Self::Allocator { allocator: *allocator },
            Grouping::Thread => Self::Thread { thread: thread.as_deref() },
            Grouping::Traceback => {
                let frames = traceback.iter().flatten();
                let frame = |FrameName { function, file, line, library }: &'a FrameName| FrameFields {
                    function,
                    file,
                    line: Some(*line).filter(|line| *line > 0),
                    code: library.as_deref().map(NativeCode::of),
                };
                Self::Traceback { traceback: frames.map(frame).collect() }
            }
        }
    }
}

impl Fields {
    fn of(figures: Figures, change: &Change) -> Self {
        let tenth = |error: f64| (error * 10.0).round() / 10.0;
        let errors = figures.estimated.then(|| Errors {
            bytes_error_95: change.new.bytes_error().ceil() as u64,
            growth_bytes_error_95: change.growth_error().ceil() as u64,
            count_error_95: tenth(change.new.count_error()),
            growth_count_error_95: tenth(change.count_growth_error()),
            samples: change.samples(),
        });
        Self {
            bytes: change.new.bytes(),
            growth_bytes: change.growth(),
            count: change.new.count(),
            growth_count: change.count_growth(),
            average_bytes: change.average(),
            old_bytes: change.old.bytes(),
            old_count: change.old.count(),
            errors,
        }
    }
}

/// `lineno`, `filename`, …
fn name_of(grouping: Grouping) -> &'static str {
    match grouping {
        Grouping::Lineno | Grouping::Site => "lineno",
        Grouping::Filename => "filename",
        Grouping::Function => "function",
        Grouping::Traceback => "traceback",
        Grouping::Module => "module",
        Grouping::Allocator => "allocator",
        Grouping::Thread => "thread",
    }
}

fn name_columns(grouping: Grouping) -> &'static [&'static str] {
    match grouping {
        Grouping::Lineno | Grouping::Site => &["function", "file", "line"],
        Grouping::Filename => &["file"],
        Grouping::Function => &["function", "file"],
        Grouping::Traceback => &["traceback"],
        Grouping::Module => &["module"],
        Grouping::Allocator => &["allocator"],
        Grouping::Thread => &["thread"],
    }
}

/// A cell of CSV. What a terminal would obey is shown as escapes, as everywhere.
fn name_cell(column: &str, name: &GroupName) -> String {
    let text = |word: &Option<Arc<str>>| word.as_deref().map(|word| escaped(word).into_owned());
    let cell = match column {
        "function" => text(&name.function),
        "file" => text(&name.file),
        "line" => name.line.map(|line| line.to_string()),
        "module" => text(&name.module),
        "allocator" => name.allocator.map(str::to_owned),
        "thread" => text(&name.thread),
        _ => name.traceback.as_ref().map(|_| label(name)),
    };
    cell.unwrap_or_default()
}

/// A group in one line.
pub(super) fn label(name: &GroupName) -> String {
    let GroupName { function, file, line, library, module, allocator, thread, traceback } = name;
    if let Some(frames) = traceback {
        let frames = frames.iter().map(|FrameName { function, file, line, library }| match library {
            Some(library) => place_text(function, file, *line, Some(library)),
            None => {
                let line = at_line(Some(*line).filter(|line| *line > 0));
                format!("{} ({}{line})", escaped(function), escaped(file))
            }
        });
        return frames.collect::<Vec<_>>().join(" < ");
    }
    if let Some(word) = [module, thread].into_iter().flatten().next() {
        return escaped(word).into_owned();
    }
    match (function, file, allocator) {
        (Some(function), Some(file), _) if library.is_some() => {
            place_text(function, file, line.unwrap_or(0), library.as_deref())
        }
        (Some(function), Some(file), _) => {
            format!("{} ({}{})", escaped(function), escaped(file), at_line(*line))
        }
        (None, Some(file), _) => format!("{}{}", escaped(file), at_line(*line)),
        (_, None, Some(allocator)) => (*allocator).to_owned(),
        (_, None, None) => NO_STACK.to_owned(),
    }
}

fn at_line(line: Option<u32>) -> String {
    line.map(|line| format!(":{line}")).unwrap_or_default()
}

fn columns(grouping: Grouping) -> [Column; 6] {
    let heading = match grouping {
        Grouping::Lineno | Grouping::Site => "Line",
        Grouping::Filename => "File",
        Grouping::Function => "Function",
        Grouping::Traceback => "Traceback",
        Grouping::Module => "Module",
        Grouping::Allocator => "Allocator",
        Grouping::Thread => "Thread",
    };
    [
        Column { heading: "Size", short: "Size", kind: Kind::Figures },
        Column { heading: "Growth", short: "Growth", kind: Kind::Figures },
        Column { heading: "Blocks", short: "Blocks", kind: Kind::Figures },
        Column { heading: "Block growth", short: "+Blocks", kind: Kind::Figures },
        Column { heading: "Average", short: "Avg", kind: Kind::Share },
        Column { heading, short: heading, kind: Kind::Location },
    ]
}

fn cells(figures: Figures, DiffRow { name, change }: &DiffRow) -> Vec<String> {
    vec![
        figures.bytes(&change.new),
        growth(figures, change),
        figures.count(&change.new),
        count_growth(figures, change),
        change.average().map(size).unwrap_or_default(),
        label(name),
    ]
}

/// `+1.2 MiB ±0.3`, `-12 B`, `0 B`.
fn growth(figures: Figures, change: &Change) -> String {
    let growth = change.growth();
    let unsigned = figures.bytes_with(growth.unsigned_abs(), change.growth_error());
    format!("{}{unsigned}", sign(growth))
}

fn count_growth(figures: Figures, change: &Change) -> String {
    let growth = change.count_growth();
    let unsigned = figures.count_with(growth.unsigned_abs(), change.count_growth_error());
    format!("{}{unsigned}", sign(growth))
}

fn sign(growth: i64) -> &'static str {
    match growth {
        ..0 => "-",
        0 => "",
        1.. => "+",
    }
}

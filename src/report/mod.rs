//! Reports: what [`Findings`] look like as text, JSON or SVG. One output per file.
//!
//! A report knows how to write itself and nothing of how a capture is read. All text from the target
//! passes through [`text`], so that no name in it reaches a terminal as a control code.

mod columns;
mod diff;
pub mod dump;
mod dump_moments;
mod facts;
mod figures;
mod flamegraph;
mod gauges;
mod leaks;
mod leaks_folder;
mod names;
mod several;
mod stats;
mod summary;
mod table;
pub mod text;
mod tree;

pub use diff::{DiffFormat, DiffReport};
pub use facts::Facts;
pub use flamegraph::FlameGraph;
pub use gauges::{GaugesFormat, write_gauges};
pub use leaks::LeaksReport;
pub use leaks_folder::LeaksOfFolder;
pub use stats::Stats;
pub use summary::{Summary, SummaryOrder};
pub use table::Table;
pub use tree::Tree;

use crate::analysis::Findings;
use serde::Serialize;
use std::io::{self, Write};

/// A report could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// The output could not be written.
    #[error("cannot write the report: {0}")]
    Write(#[from] io::Error),
    /// The report's text could not be put as JSON.
    #[error("cannot put the report as JSON: {0}")]
    Json(#[from] serde_json::Error),
    /// There is nothing to draw.
    #[error("there is nothing to draw: {0}")]
    Nothing(&'static str),
}

/// What a report is written as.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Format {
    /// One JSON document instead of text.
    pub json: bool,
    /// Columns of the terminal, if it is one.
    pub width: Option<usize>,
}

/// One kind of output.
pub trait Report {
    /// Writes all of it.
    fn write(&self, findings: &Findings, format: Format, out: &mut dyn Write) -> Result<(), ReportError>;
}

/// Writes one JSON document, indented.
fn write_json(document: &impl Serialize, out: &mut dyn Write) -> Result<(), ReportError> {
    let json = serde_json::to_string_pretty(document)?;
    writeln!(out, "{}", text::terminal_safe_json(&json))?;
    Ok(())
}

/// Says what was left out of a text table.
fn write_rest(shown: usize, all: usize, out: &mut dyn Write) -> io::Result<()> {
    if shown < all {
        writeln!(out, "… and {} more rows (--max-rows 0 shows all)", text::number((all - shown) as u64))?;
    }
    Ok(())
}

/// `rows`, or the first of them. 0 is no limit.
fn limited<T>(rows: &[T], max_rows: usize) -> &[T] {
    if max_rows == 0 { rows } else { &rows[..rows.len().min(max_rows)] }
}

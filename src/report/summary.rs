//! `summary`: one row per function, own memory and with everything it called.

use super::columns::{Column, Kind, write_columns};
use super::facts::{Facts, Shown, total, write_view};
use super::figures::{Figures, NestedErrors};
use super::names::{NativeCode, function, location};
use super::text::{percent, share};
use super::{Format, Report, ReportError, limited, write_json, write_rest};
use crate::analysis::{CallTree, Findings, FunctionRow, functions};
use serde::Serialize;
use std::io::Write;

/// What the rows are ordered by, biggest first.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum SummaryOrder {
    /// Bytes of the function and everything it called.
    #[default]
    Total,
    /// Bytes of the function itself.
    Own,
    /// Allocations of the function itself.
    Allocations,
}

/// The report.
#[derive(Clone, Copy, Debug, Default)]
pub struct Summary {
    /// Order of the rows.
    pub order: SummaryOrder,
    /// The most rows; 0 for all.
    pub max_rows: usize,
}

#[derive(Serialize)]
struct Document<'a> {
    report: &'static str,
    run: Facts<'a>,
    #[serde(flatten)]
    shown: Shown,
    functions: Vec<Row<'a>>,
}

#[derive(Serialize)]
struct Row<'a> {
    function: Option<&'a str>,
    file: Option<&'a str>,
    #[serde(flatten)]
    code: Option<NativeCode<'a>>,
    total_bytes: u64,
    total_percent: f64,
    total_count: u64,
    own_bytes: u64,
    own_percent: f64,
    own_count: u64,
    #[serde(flatten)]
    errors: Option<NestedErrors>,
}

const COLUMNS: [Column; 6] = [
    Column { heading: "Location", short: "Location", kind: Kind::Location },
    Column { heading: "Total Memory", short: "Total", kind: Kind::Figures },
    Column { heading: "Total %", short: "%", kind: Kind::Share },
    Column { heading: "Own Memory", short: "Own", kind: Kind::Figures },
    Column { heading: "Own %", short: "%", kind: Kind::Share },
    Column { heading: "Allocations", short: "Count", kind: Kind::Figures },
];

impl Report for Summary {
    fn write(&self, findings: &Findings, format: Format, out: &mut dyn Write) -> Result<(), ReportError> {
        let mut rows = functions(&CallTree::new(&findings.sites, &findings.stacks), &findings.stacks);
        rows.sort_by(|a, b| {
            let key = |row: &FunctionRow| match self.order {
                SummaryOrder::Total => (row.total.bytes(), row.own.bytes(), row.own.count()),
                SummaryOrder::Own => (row.own.bytes(), row.total.bytes(), row.own.count()),
                SummaryOrder::Allocations => (row.own.count(), row.own.bytes(), row.total.bytes()),
            };
            key(b).cmp(&key(a)).then(a.frame.cmp(&b.frame))
        });
        let shown = limited(&rows, self.max_rows);
        if format.json {
            Self::json(findings, shown, out)
        } else {
            Self::text(findings, shown, rows.len(), format, out)
        }
    }
}

impl Summary {
    fn text(
        findings: &Findings,
        rows: &[FunctionRow],
        all: usize,
        format: Format,
        out: &mut dyn Write,
    ) -> Result<(), ReportError> {
        write_view(findings, out)?;
        let (figures, whole) = (Figures::of(findings), total(findings).bytes());
        let cells: Vec<Vec<String>> = rows
            .iter()
            .map(|row| {
                vec![
                    function(row.frame, &findings.stacks),
                    figures.bytes(&row.total),
                    share(row.total.bytes(), whole),
                    figures.bytes(&row.own),
                    share(row.own.bytes(), whole),
                    figures.count(&row.own),
                ]
            })
            .collect();
        write_columns(&COLUMNS, &cells, format.width, out)?;
        write_rest(rows.len(), all, out)?;
        Ok(())
    }

    fn json(findings: &Findings, rows: &[FunctionRow], out: &mut dyn Write) -> Result<(), ReportError> {
        let (figures, whole) = (Figures::of(findings), total(findings).bytes());
        let functions = rows.iter().map(|row| {
            let place = location(row.frame, &findings.stacks);
            Row {
                function: place.function,
                file: place.file,
                code: place.code,
                total_bytes: row.total.bytes(),
                total_percent: percent(row.total.bytes(), whole),
                total_count: row.total.count(),
                own_bytes: row.own.bytes(),
                own_percent: percent(row.own.bytes(), whole),
                own_count: row.own.count(),
                errors: figures.nested_errors(&row.total, &row.own),
            }
        });
        let document = Document {
            report: "summary",
            run: Facts::of(findings),
            shown: Shown::of(findings),
            functions: functions.collect(),
        };
        write_json(&document, out)
    }
}

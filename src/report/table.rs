//! `table`: one row per allocation site: innermost location, thread, allocator.

use super::columns::{Column, Kind, write_columns};
use super::facts::{Facts, Shown, total, write_view};
use super::figures::{Errors, Figures};
use super::names::{Location, ids, location, place, thread_found, thread_name};
use super::text::{fitted, percent, share};
use super::{Format, Report, ReportError, limited, write_json, write_rest};
use crate::analysis::{Findings, Totals};
use crate::capture::{AllocatorKind, FrameId};
use serde::Serialize;
use std::collections::BTreeMap;
use std::io::Write;

/// The report.
#[derive(Clone, Copy, Debug, Default)]
pub struct Table {
    /// The most rows; 0 for all.
    pub max_rows: usize,
}

/// What a row is about.
type Key = (Option<FrameId>, u32, AllocatorKind);

#[derive(Serialize)]
struct Document<'a> {
    report: &'static str,
    run: Facts<'a>,
    #[serde(flatten)]
    shown: Shown,
    allocations: Vec<Row<'a>>,
}

#[derive(Serialize)]
struct Row<'a> {
    #[serde(flatten)]
    location: Location<'a>,
    /// Where processes are kept apart.
    #[serde(skip_serializing_if = "Option::is_none")]
    pid: Option<u32>,
    /// `null` where threads of several processes are united by their names.
    tid: Option<u32>,
    thread_name: Option<&'a str>,
    allocator: &'static str,
    bytes: u64,
    percent: f64,
    count: u64,
    #[serde(flatten)]
    errors: Option<Errors>,
}

const COLUMNS: [Column; 6] = [
    Column { heading: "Size", short: "Size", kind: Kind::Figures },
    Column { heading: "Size %", short: "%", kind: Kind::Share },
    Column { heading: "Allocations", short: "Count", kind: Kind::Figures },
    Column { heading: "Allocator", short: "By", kind: Kind::Words },
    Column { heading: "Thread", short: "Thread", kind: Kind::Words },
    Column { heading: "Location", short: "Location", kind: Kind::Location },
];

impl Report for Table {
    fn write(&self, findings: &Findings, format: Format, out: &mut dyn Write) -> Result<(), ReportError> {
        let mut sums: BTreeMap<Key, Totals> = BTreeMap::new();
        for row in &findings.sites {
            let frame = findings.stacks.node(row.site.stack).map(|(frame, _)| frame);
            sums.entry((frame, row.site.tid, row.site.allocator)).or_default().add(row.totals);
        }
        let mut rows: Vec<(Key, Totals)> = sums.into_iter().collect();
        rows.sort_by(|(_, a), (_, b)| b.compare(a));
        let shown = limited(&rows, self.max_rows);
        if format.json {
            Self::json(findings, shown, out)
        } else {
            Self::text(findings, shown, rows.len(), format, out)
        }
    }
}

impl Table {
    fn text(
        findings: &Findings,
        rows: &[(Key, Totals)],
        all: usize,
        format: Format,
        out: &mut dyn Write,
    ) -> Result<(), ReportError> {
        write_view(findings, out)?;
        let (figures, whole) = (Figures::of(findings), total(findings).bytes());
        let cells: Vec<Vec<String>> = rows
            .iter()
            .map(|((frame, tid, allocator), totals)| {
                vec![
                    figures.bytes(totals),
                    share(totals.bytes(), whole),
                    figures.count(totals),
                    allocator.name().to_owned(),
                    fitted(&thread_found(*tid, findings), 24).into_owned(),
                    place(*frame, &findings.stacks),
                ]
            })
            .collect();
        write_columns(&COLUMNS, &cells, format.width, out)?;
        write_rest(rows.len(), all, out)?;
        Ok(())
    }

    fn json(findings: &Findings, rows: &[(Key, Totals)], out: &mut dyn Write) -> Result<(), ReportError> {
        let (figures, whole) = (Figures::of(findings), total(findings).bytes());
        let allocations = rows.iter().map(|((frame, tid, allocator), totals)| Row {
            location: location(*frame, &findings.stacks),
            pid: findings.merged.as_ref().and(ids(*tid, findings)).map(|(pid, _)| pid),
            tid: ids(*tid, findings).map(|(_, tid)| tid),
            thread_name: thread_name(*tid, &findings.stacks),
            allocator: allocator.name(),
            bytes: totals.bytes(),
            percent: percent(totals.bytes(), whole),
            count: totals.count(),
            errors: figures.errors(totals),
        });
        let document = Document {
            report: "table",
            run: Facts::of(findings),
            shown: Shown::of(findings),
            allocations: allocations.collect(),
        };
        write_json(&document, out)
    }
}
